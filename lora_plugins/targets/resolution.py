"""Choose target modules, check the choice; the public names of `targets`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from lora_plugins.models.structure import collapse
from lora_plugins.plugins.host import PluginHost, plugin_host
from lora_plugins.targets.candidates import SCOPES
from lora_plugins.targets.check import check_names
from lora_plugins.targets.heads import check_trained, find_required, task_heads
from lora_plugins.targets.initialized import set_new_tokens
from lora_plugins.targets.records import Required, TargetHit, TargetPlan
from lora_plugins.targets.resolver import Resolver
from lora_plugins.targets.tasks import task_type


def resolve_targets(
    model: nn.Module,
    target_modules: str | Sequence[str] | None = None,
    *,
    experts: str = "default",
    exclude_modules: str | Sequence[str] | None = None,
    layers_to_transform: int | Sequence[int] | None = None,
    target_parameters: Sequence[str] | None = None,
    frozen: Sequence[str] = (),
    literal: bool = False,
    strict: bool = True,
    host: PluginHost | None = None,
    **lora: Any,
) -> TargetPlan:
    """Choose the modules of a base model that get adapters, and check the choice against the model.

    Args:
        model: A raw base model: live, on the meta device, or quantized.
        target_modules: ``None`` for the registered default; a scope (``"attention"``, ``"mlp"``,
            ``"all-linear"``, ``"experts"``, ``"vision"``, or one of the architecture's own); a list of
            names; or a regular expression for whole paths, as in PEFT.
        experts: ``"none"``, ``"routed"``, ``"shared"``, or ``"default"`` for the architecture's policy.
        exclude_modules: Names, or a regular expression, to leave out.
        layers_to_transform: Indices of the blocks to adapt; all when ``None``.
        target_parameters: Names of parameters that get adapters as well, as in PEFT.
        frozen: Names of heads and other new parts that stay as they are on purpose.
        literal: Whether the names come from a stored adapter: they then mean all that PEFT finds, in encoders
            and in single blocks too, nothing is added to them, and only names without a match are errors.
        strict: Whether unmatched names and uneven coverage are errors; else they are warnings.
        host: Where to look architectures up; default is the process's plugin host.
        **lora: Other fields of ``peft.LoraConfig`` that were given; what they name is checked, and what they save
            is not saved twice.

    Raises:
        UnmatchedTargets: A name, pattern or index matches nothing.
        FrozenHead: A newly initialized parameter is in no module that PEFT could save.
        ForbiddenTargets: A requested name matches only modules where an adapter would be wrong.
        UnevenCoverage: A name is missing in some blocks of a kind.
        NoTargets: Nothing in the model can take an adapter.
        TargetError: An argument is not valid.
    """
    asked = {
        **lora,
        "target_modules": target_modules,
        "exclude_modules": exclude_modules,
        "layers_to_transform": layers_to_transform,
        "target_parameters": target_parameters,
    }
    resolver = Resolver(model, asked, experts, frozen, strict, host or plugin_host())
    return resolver.read() if literal else resolver.run()


__all__ = [
    "SCOPES",
    "Required",
    "TargetHit",
    "TargetPlan",
    "check_names",
    "check_trained",
    "collapse",
    "find_required",
    "resolve_targets",
    "set_new_tokens",
    "task_heads",
    "task_type",
]

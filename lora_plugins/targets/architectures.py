"""Find the registered record of a model, and say which default it gave."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from typing import Any

from torch import nn

from lora_plugins.plugins.host import PluginHost
from lora_plugins.plugins.types import Architecture

__all__ = ["explain_registered", "explain_structure", "find_record"]

#: How to choose other targets than the default.
_OTHERS = "target_modules='all-linear', another scope or a list of names chooses others"


def find_record(model: nn.Module, host: PluginHost) -> Architecture | None:
    """Return the registered record of a model, with the names of its inner models filled in.

    Raises:
        ArchitectureConflict: Two third-party plugins claim the model's type.
    """
    config = getattr(model, "config", None)
    record = _find_registered(config, host)
    if record is None or not record.inner:
        return record
    known = _find_inner(record, config, host)
    if not known:
        return record
    scopes: dict[str, tuple[str, ...]] = {}
    for part in known:
        for scope, names in part.scopes.items():
            scopes[scope] = _join([scopes.get(scope, ()), names])
    return dataclasses.replace(
        record,
        targets=_join(part.targets for part in known),
        scopes={**scopes, **record.scopes},
        experts=_join([record.experts, *(part.experts for part in known)]),
        expert_policy=next(
            (part.expert_policy for part in known if part.expert_policy != "none"), record.expert_policy
        ),
        never=_join([record.never, *(part.never for part in known)]),
        unreached=_join([record.unreached, *(part.unreached for part in known)]),
        input_gradients=record.input_gradients or any(part.input_gradients for part in known),
    )


def _find_registered(config: Any, host: PluginHost) -> Architecture | None:
    model_type = getattr(config, "model_type", None)
    return host.architecture(model_type) if isinstance(model_type, str) else None


def _find_inner(record: Architecture, config: Any, host: PluginHost) -> list[Architecture]:
    """Return the records of the inner models whose type is registered."""
    inner = [_find_registered(getattr(config, name, None), host) for name in record.inner]
    return [part for part in inner if part is not None]


def _join(groups: Iterable[Sequence[str]]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(name for group in groups for name in group))


def explain_registered(model: nn.Module, record: Architecture, names: Sequence[str], host: PluginHost) -> str:
    """Return the note on targets that were not named and come from a record, or from those of inner models.

    Args:
        model: The model.
        record: Its record, as `find_record` returns it.
        names: Those of its targets that the model has.
        host: Where the record was registered.
    """
    # Where an inner model has a record, all targets are from such records.
    parts = _find_inner(record, getattr(model, "config", None), host) or [record]
    owners = {name: part.model_type for part in reversed(parts) for name in part.targets}
    by_type: dict[str, list[str]] = {}
    for name in names:
        by_type.setdefault(owners.get(name, record.model_type), []).append(name)
    shown = []
    for model_type, own in by_type.items():
        inside = "" if model_type == record.model_type else f" (inside {record.model_type!r})"
        plugin = host.architecture_plugin(model_type)
        by = "" if plugin is None else f", registered by {plugin}"
        shown.append(f"{', '.join(own)}, the default for {model_type!r}{inside}{by}")
    return f"no targets were named: {', and '.join(shown)}; {_OTHERS}"


def explain_structure(why: str, chosen: str, blocks: int) -> str:
    """Return the note on targets that were not named and come from the model's structure.

    Args:
        why: Why there is no record that gives them, as a clause.
        chosen: What was chosen, with its number.
        blocks: Number of the model's blocks.
    """
    return (
        f"no targets were named, and {why}: its structure was read, and all {chosen} in {blocks} blocks were chosen; "
        f"{_OTHERS}"
    )

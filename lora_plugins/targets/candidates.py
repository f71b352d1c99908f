"""List the modules that may get adapters, and why others have none."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Iterable, Sequence
from functools import cached_property

from torch import nn

from lora_plugins.models.structure import Structure, collapse, is_under, matches
from lora_plugins.plugins.types import Architecture
from lora_plugins.targets.patterns import match_paths
from lora_plugins.targets.records import LeftOut

__all__ = ["SCOPES", "Candidates", "list_left_out"]


#: Scopes that every model has, whether or not its architecture is registered.
SCOPES = ("attention", "mlp", "all-linear", "experts", "vision")

_ATTENTION = re.compile(r"attn|attention|query_key_value|(^|[._])[qkv]_(proj|lin)|(^|\.)(mixer|linear_attn|mamba|ssm)")
_ROUTER = re.compile(r"(^|\.)(router|gate|gate_network|shared_expert_gate)(\.|$)")
_VISION = re.compile(r"vision|visual|image_encoder|audio_tower|audio_encoder|speech_encoder")
_ROUTED = re.compile(r"(^|\.)experts(\.|$)")
_SHARED = re.compile(r"(^|\.)shared_(experts?|mlp)(\.|$)")

#: Names that decoders give to their cross-attention.
_CROSS_ATTENTION = ("encoder_attn", "cross_attn", "cross_attention", "crossattention")

#: Layers of a state-space mixer whose weights fused kernels or the mixer's own code read without calling them.
_RAW = ("dt_proj", "x_proj", "out_proj")


class Candidates:
    """The modules of one model that may get adapters, by role.

    Args:
        structure: The model's parts.
        record: Its registered record, ``None`` for an unregistered model.
        heads: Names of the heads that are trained whole.
        exclude: Names, or a pattern for whole paths, to leave out.
        layers: Indices of the blocks to adapt, ``None`` for all.
        own: Further classes of modules, for which the user registered LoRA layers with PEFT.
    """

    def __init__(
        self,
        structure: Structure,
        record: Architecture | None,
        heads: Sequence[str],
        exclude: str | Sequence[str] | None,
        layers: set[int] | None,
        own: Iterable[type[nn.Module]] = (),
    ) -> None:
        self.structure = structure
        self.record = record
        self.heads = heads
        self.exclude = exclude if exclude is None or isinstance(exclude, str) else tuple(exclude)
        self.layers = layers
        self.own = tuple(own)
        self.never = tuple(record.never) if record else ()

    # -- by name -------------------------------------------------------------------------------

    @cached_property
    def adaptable(self) -> list[str]:
        """Paths of all modules that PEFT can wrap, except heads that are trained whole."""
        others = (nn.Embedding, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.MultiheadAttention, *self.own)
        return [
            path
            for path, module in self.structure.modules.items()
            if (path in self.structure.linears or isinstance(module, others)) and not is_under(path, self.heads)
        ]

    def named(self, name: str) -> list[str]:
        """Return the paths that a user's name matches: in the language model, else in the encoders beside it."""
        found = [path for path in self.adaptable if matches(path, name)]
        return [path for path in found if not self.is_encoder(path)] or found

    def registered(self, name: str) -> list[str]:
        """Return the paths that a record's name matches, except encoders, routed experts and grouped convolutions."""
        return [
            path
            for path in self.adaptable
            if matches(path, name)
            and not self.is_encoder(path)
            and not self.is_forbidden(path)
            and not _ROUTED.search(self.structure.inside_block(path))
            and getattr(self.structure.modules[path], "groups", 1) == 1
        ]

    def by_regex(self, pattern: str) -> list[str]:
        """Return the paths that a pattern matches as a whole, encoders included."""
        return match_paths(pattern, self.adaptable)

    # -- by role -------------------------------------------------------------------------------

    @cached_property
    def linear(self) -> list[str]:
        """Linear layers in blocks that a scope may take: all but routers, heads, encoders and routed experts."""
        return [
            path for path, linear in self.structure.linears.items() if linear.block is not None and self._in_scope(path)
        ]

    def outside_blocks(self) -> list[str]:
        """Return the linear layers that a scope may take in a model without repeated blocks."""
        return [path for path in self.structure.linears if self._in_scope(path)]

    def _in_scope(self, path: str) -> bool:
        inside = self.structure.inside_block(path)
        return not (
            path in self.structure.output_heads
            or is_under(path, self.heads)
            or self.is_forbidden(path)
            or _ROUTER.search(inside)
            or _ROUTED.search(inside)
            or self.is_encoder(path)
        )

    def find_role(self, path: str) -> str:
        """Return why a scope would not take a module: ``encoder``, ``expert``, ``router``, ``output``, ``other``.

        ``other`` is a module that is not linear; the role of one that a scope may take is empty.
        """
        inside = self.structure.inside_block(path)
        roles = (
            ("encoder", self.is_encoder(path)),
            ("expert", bool(_ROUTED.search(inside))),
            ("router", bool(_ROUTER.search(inside))),
            ("output", path in self.structure.output_heads),
            ("other", path not in self.structure.linears),
        )
        return next((role for role, found in roles if found), "")

    def is_attention(self, path: str) -> bool:
        """Whether the names in a path say that a layer belongs to attention or to a mixer in its place."""
        return _ATTENTION.search(self.structure.inside_block(path)) is not None

    def encoders(self) -> list[str]:
        """Return the linear layers in the blocks of vision, audio and other encoders."""
        inside = [p for p, linear in self.structure.linears.items() if linear.block is not None and self.is_encoder(p)]
        return [path for path in inside if not is_under(path, self.heads) and not self.is_forbidden(path)]

    def shared_experts(self) -> list[str]:
        """Return the linear layers of the experts that process every token."""
        return [path for path in self.linear if _SHARED.search(self.structure.inside_block(path))]

    def routed_layers(self) -> list[str]:
        """Return the linear layers of routed experts that are stored as modules."""
        return [
            path
            for path in self.structure.linears
            if _ROUTED.search(self.structure.inside_block(path))
            and not self.is_forbidden(path)
            and not self.is_encoder(path)
        ]

    def routed_parameters(self) -> list[str]:
        """Return the stacked weights of routed experts."""
        names = self.record.experts if self.record else ()
        found = [
            path
            for path in self.structure.expert_parameters
            if not path.endswith("bias") and not self.is_encoder(path) and not _SHARED.search(path)
        ]
        return [path for path in found if any(matches(path, name) for name in names)] or found

    def unreached(self) -> tuple[str, ...]:
        """Return names of parts that a batch may not reach: encoders, and cross-attention of a lone decoder."""
        named = (*self.record.vision, *self.record.unreached) if self.record else ()
        config = getattr(self.structure.model, "config", None)
        alone = not getattr(config, "is_encoder_decoder", False)
        paths = self.structure.modules if alone else ()
        attention = [name for name in _CROSS_ATTENTION if any(is_under(path, [name]) for path in paths)]
        return tuple(dict.fromkeys([*named, *attention]))

    # -- exclusions ----------------------------------------------------------------------------

    def is_encoder(self, path: str) -> bool:
        """Whether a path lies in an encoder beside the language model."""
        if self.record is not None and (self.record.vision or self.record.text):
            outside = bool(self.record.text) and not is_under(path, self.record.text)
            return outside or is_under(path, self.record.vision)
        # In a model that is itself an encoder, every block has such a name.
        return bool(_VISION.search(path)) and self._has_other_blocks

    @cached_property
    def _has_other_blocks(self) -> bool:
        return any(not _VISION.search(block.kind.stack) for block in self.structure.blocks)

    def is_forbidden(self, path: str) -> bool:
        """Whether an adapter would be wrong here: the record forbids it, or the weight is read without a call."""
        return (
            is_under(path, self.never) or self.structure.is_output_layer_of_attention(path) or self._is_read_raw(path)
        )

    def _is_read_raw(self, path: str) -> bool:
        owner, _, name = path.rpartition(".")
        return (
            name in _RAW and f"{owner}.conv1d" in self.structure.modules and f"{owner}.D" in self.structure.parameters
        )

    def left_out(self, path: str) -> bool:
        """Whether ``exclude_modules`` or ``layers_to_transform`` leaves a path out."""
        return bool(self.explain_left_out(path))

    def explain_left_out(self, path: str) -> str:
        """Return which of ``exclude_modules`` and ``layers_to_transform`` leaves a path out; empty if neither does."""
        if self.layers is not None:
            block = self.structure.block_of(path)
            if block is None or int(re.findall(r"\d+", block.path)[-1]) not in self.layers:
                return "left out by layers_to_transform"
        if isinstance(self.exclude, str):
            out = path in self._excluded
        else:
            out = any(matches(path, name) for name in self.exclude or ())
        return "left out by exclude_modules" if out else ""

    @cached_property
    def _excluded(self) -> frozenset[str]:
        paths = [*self.structure.modules, *self.structure.parameters]
        return frozenset(match_paths(str(self.exclude), paths, "exclude_modules"))


def list_left_out(
    candidates: Candidates,
    adapted: Collection[str],
    named: Collection[str],
    source: str,
    policy: str,
    saved: Sequence[str],
) -> list[LeftOut]:
    """Return the modules with weights that have no adapter, those that are alike in one row, each with the reason.

    Args:
        candidates: The modules of the model.
        adapted: Paths of the modules and parameters with adapters.
        named: Paths that the request means, before any is left out.
        source: Where the targets come from.
        policy: What is asked for of experts.
        saved: Names of the modules that are trained and saved whole, besides heads.
    """
    counts: Counter[tuple[str, str]] = Counter()
    for path, module in candidates.structure.modules.items():
        weights = [name for name, value in module._parameters.items() if value is not None]
        if path in adapted or not weights or any(f"{path}.{name}" in adapted for name in weights):
            continue
        why = _find_reason(candidates, path, named, source, policy, saved)
        counts[collapse(path), why] += 1
    return [LeftOut(name, count, why) for (name, why), count in counts.items()]


def _find_reason(
    candidates: Candidates, path: str, named: Collection[str], source: str, policy: str, saved: Sequence[str]
) -> str:
    kind = type(candidates.structure.modules[path]).__name__
    if is_under(path, candidates.heads):
        return "a head: trained and saved whole, without an adapter"
    if is_under(path, saved):
        return "named by modules_to_save: trained and saved whole"
    if path not in candidates.structure.linears and path not in candidates.adaptable:
        return f"of the class {kind}, which takes no adapter"
    if path in named and candidates.left_out(path):
        return candidates.explain_left_out(path)
    if candidates.is_forbidden(path):
        return _explain_forbidden(candidates, path)
    if source == "the names given":
        return _explain_unnamed(candidates, path)
    if source == "the pattern given":
        return "not matched by the pattern in target_modules"
    role = candidates.find_role(path)
    if role == "expert":
        return f"a routed expert, and experts={policy!r}"
    return {
        "encoder": "in an encoder beside the language model, which only the scope 'vision' or a longer name reaches",
        "router": "a router of experts, which is taken only where it is named",
        "output": "the output layer, which is taken only where it is named",
    }.get(role, "not a linear layer: taken only where it is named" if role == "other" else f"not a target of {source}")


def _explain_forbidden(candidates: Candidates, path: str) -> str:
    if is_under(path, candidates.never):
        return "an adapter here would be wrong: the architecture's record lists it under never"
    return "its weight is read without calling it, so an adapter would have no effect"


def _explain_unnamed(candidates: Candidates, path: str) -> str:
    if candidates.find_role(path) == "encoder":
        return "in an encoder beside the language model, which names in target_modules reach only if they are longer"
    return "not named in target_modules"

"""The records of a choice of target modules."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

__all__ = ["LeftOut", "Required", "TargetHit", "TargetPlan"]


@dataclass(frozen=True)
class Required:
    """The parameters that a run must train and save.

    Attributes:
        parameters: Paths of the newly initialized parameters in the base model, and of embeddings with new rows.
        vocabulary: Rows of the embeddings, by path, when this was found.
        note: How new parameters were recognised, for the report.
        frozen: Names of modules or parameters that stay as they are on purpose.
    """

    parameters: tuple[str, ...] = ()
    vocabulary: Mapping[str, int] = field(default_factory=dict)
    note: str = ""
    frozen: tuple[str, ...] = ()


@dataclass(frozen=True)
class TargetHit:
    """One requested name and the modules that it matched.

    Attributes:
        name: The name as it was asked for or registered.
        modules: Paths of the matched modules.
        shapes: ``"in -> out"`` of each, in the same order.
    """

    name: str
    modules: list[str]
    shapes: list[str]


@dataclass(frozen=True)
class LeftOut:
    """Modules without an adapter that are alike.

    Attributes:
        name: Path with ``*`` for indices.
        modules: How many there are.
        why: Why they have none, as a clause.
    """

    name: str
    modules: int
    why: str


@dataclass(frozen=True)
class TargetPlan:
    """The targets for PEFT, and how they were chosen.

    Attributes:
        target_modules: Explicit names: short where the short name matches just the wanted modules, else paths.
        target_parameters: Names of stacked expert parameters.
        rank_factors: Factors for the rank of such parameters: two projections that are stored as one get a
            decomposition each.
        modules_to_save: Names of heads, trained and saved whole.
        task_type: PEFT's task type, ``None`` if none of them fits.
        source: Where the targets come from.
        hits: The hit table.
        bare: Linear layers without an adapter: path with ``*`` for indices, and how many.
        left_out: Every kind of module without an adapter, linear or not, and the reason.
        coverage: For each kind of block, how many have an adapter and how many there are.
        never: Names that stay untouched, by quantization as well.
        unreached: Parts of paths that a batch may not reach: encoders, cross-attention without an encoder.
        input_gradients: Whether the embeddings' output must require a gradient.
        fields: Fields of ``peft.LoraConfig`` for PEFT, as the user wrote them where PEFT reads them the same way.
        required: The newly initialized parameters, which a run must train and save.
        notes: Sentences for the report.
    """

    target_modules: list[str]
    target_parameters: list[str] = field(default_factory=list)
    rank_factors: dict[str, int] = field(default_factory=dict)
    modules_to_save: list[str] = field(default_factory=list)
    task_type: str | None = None
    source: str = ""
    hits: list[TargetHit] = field(default_factory=list)
    bare: dict[str, int] = field(default_factory=dict)
    left_out: list[LeftOut] = field(default_factory=list)
    coverage: dict[str, tuple[int, int]] = field(default_factory=dict)
    never: tuple[str, ...] = ()
    unreached: tuple[str, ...] = ()
    input_gradients: bool = False
    fields: dict[str, Any] = field(default_factory=dict)
    required: Required = field(default_factory=Required)
    notes: list[str] = field(default_factory=list)

    @property
    def vision(self) -> tuple[str, ...]:
        """Former name of ``unreached``."""
        warnings.warn("TargetPlan.vision is called unreached", DeprecationWarning, stacklevel=2)
        return self.unreached

"""The figures of a plan, as plain data."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

from lora_plugins.adapters.report import TargetRow
from lora_plugins.planning.amounts import Memory

__all__ = ["PlanFigures", "Row"]


@dataclass(frozen=True)
class Row:
    """What one way of running takes.

    Attributes:
        quantization: Backend of the base, empty for float.
        checkpointing: Whether blocks are computed again in the backward pass.
        memory: Bytes on each device.
        quantized_share: Share of the float base's bytes that the backend stores in its own way, 0 to 1.
        fits: Whether it fits the memory, ``None`` without a GPU and without ``memory``.
        unavailable: Why the backend can't run on this machine, empty when it can.
    """

    quantization: str
    checkpointing: bool
    memory: Memory
    quantized_share: float = 0.0
    fits: bool | None = None
    unavailable: str = ""

    @property
    def label(self) -> str:
        """Backend and checkpointing in a few words."""
        return (self.quantization or "float") + (", checkpointing" if self.checkpointing else "")


@dataclass(frozen=True)
class PlanFigures:
    """What a run would train and what it would take.

    Attributes:
        model: Class of the base model.
        model_type: Type of its configuration, empty where it has none.
        dtype: Dtype of the base's weights.
        trainable: Weights that get gradients, exactly.
        total: All weights, exactly.
        adapter_bytes: Bytes of the adapter's file.
        targets: The hit table.
        source: Who named the targets.
        bare: Linear layers without an adapter: name pattern and number.
        coverage: Adapted blocks and all blocks, by block kind.
        heads: Heads that are trained whole.
        expert_share: Share of the weights that stacked routed experts hold, 0 to 1: no linear backend reaches them.
        batch_size: Examples on each device.
        length: Tokens in each.
        optim: Name of the optimizer.
        strategy: How several devices share the work.
        devices: How many.
        memory_limit: Bytes of one device, ``None`` when unknown.
        chosen: What was asked for.
        rows: Every backend, with and without checkpointing.
        advice: The nearest change that makes it fit; empty when it fits or no memory is known.
        notes: What else is worth knowing.
    """

    model: str
    model_type: str
    dtype: str
    trainable: int
    total: int
    adapter_bytes: int
    targets: list[TargetRow]
    source: str
    bare: dict[str, int]
    coverage: dict[str, list[int]]
    heads: list[str]
    expert_share: float
    batch_size: int
    length: int
    optim: str
    strategy: str
    devices: int
    memory_limit: int | None
    chosen: Row
    rows: list[Row]
    advice: str = ""
    notes: list[str] = field(default_factory=list)

    @property
    def percent(self) -> float:
        """Trainable weights in per cent of all."""
        return 100 * self.trainable / self.total if self.total else 0.0

    @property
    def fits(self) -> bool | None:
        """Whether what was asked for fits, ``None`` when no memory is known."""
        return self.chosen.fits

    def to_dict(self) -> dict[str, Any]:
        """The plan as plain data, with totals."""
        values = asdict(self)
        values["percent"] = self.percent
        for given, row in zip([values["chosen"], *values["rows"]], [self.chosen, *self.rows], strict=True):
            given["memory"]["total"] = row.memory.total
        return values

"""The figures of a plan, as plain data."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

from lora_plugins.adapters.report import TargetRow
from lora_plugins.planning.amounts import Memory

__all__ = ["PlanFigures", "Row"]


@dataclass(frozen=True)
class Row:
    """Memory of a run with one backend, with or without gradient checkpointing.

    Attributes:
        quantization: Backend of the base, empty for float.
        checkpointing: Whether blocks are recomputed in the backward pass.
        memory: Bytes on each device.
        quantized_share: Share of the float base's bytes that the backend quantizes, 0 to 1.
        fits: Whether it fits into the device's memory; ``None`` if that is unknown.
        unavailable: Why the backend cannot run on this machine, empty when it can.
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
    """Trainable parameters and memory of a planned run.

    Attributes:
        model: Class of the base model.
        model_type: Type of its configuration, empty where it has none.
        dtype: Dtype of the base's weights.
        trainable: Exact number of trainable parameters.
        total: Exact number of all parameters.
        adapter_bytes: Size of the adapter file.
        targets: Modules that get adapters, one row per name.
        source: Where the target names come from.
        bare: Linear layers without an adapter: name pattern -> count.
        coverage: Numbers of adapted blocks and of all blocks, by block kind.
        heads: Heads that are trained in full.
        expert_share: Share of the weights in stacked routed experts, 0 to 1.
        float_experts: Backends that leave stacked experts in float: name -> reason.
        batch_size: Examples per device.
        length: Tokens per example.
        optim: Name of the optimizer.
        strategy: How several devices share the work.
        devices: Number of devices.
        memory_limit: Bytes of one device, ``None`` when unknown.
        chosen: The requested run.
        rows: Every backend, with and without checkpointing.
        advice: The nearest change that makes the run fit; empty when it fits or the memory is unknown.
        notes: Further remarks.
        serves_on: Servers that take such an adapter by their rules, of those that were asked, each with the release
            whose rules they are.
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
    float_experts: dict[str, str] = field(default_factory=dict)
    serves_on: list[str] = field(default_factory=list)

    @property
    def percent(self) -> float:
        """Trainable parameters as a percentage of all."""
        return 100 * self.trainable / self.total if self.total else 0.0

    @property
    def fits(self) -> bool | None:
        """Whether the requested run fits, ``None`` when the memory is unknown."""
        return self.chosen.fits

    def to_dict(self) -> dict[str, Any]:
        """Return the plan as plain data, with totals."""
        values = asdict(self)
        values["percent"] = self.percent
        for given, row in zip([values["chosen"], *values["rows"]], [self.chosen, *self.rows], strict=True):
            given["memory"]["total"] = row.memory.total
        return values

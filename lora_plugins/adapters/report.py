"""The parameter report: counts, bytes, targets, notes."""

from __future__ import annotations

import html
import os
from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from typing import Any

from peft.tuners.tuners_utils import BaseTunerLayer
from rich.console import Console, ConsoleOptions, RenderResult
from rich.markup import escape
from rich.table import Table
from torch import nn

from lora_plugins.adapters.records import Preparation, preparation_of
from lora_plugins.logs import get_logger
from lora_plugins.models.sharding import is_sharded
from lora_plugins.models.wrapping import base_of
from lora_plugins.quantization.counting import count_parameters, tensor_bytes
from lora_plugins.quantization.request import Quantization, detect_quantization, unknown_layers
from lora_plugins.quantization.walk import EXPECTED_REASONS
from lora_plugins.targets.records import LeftOut, TargetHit
from lora_plugins.text import write_json

__all__ = ["ParameterReport", "TargetRow", "list_adapters", "list_hits", "make_report"]


@dataclass(frozen=True)
class TargetRow:
    """One requested target name and what it matched.

    Attributes:
        name: The name as requested or registered.
        modules: How many modules it matched.
        shapes: The distinct shapes of the matched layers, as ``"in -> out"``.
    """

    name: str
    modules: int
    shapes: list[str]


@dataclass(frozen=True)
class ParameterReport:
    """Trainable and total parameters, bytes, and targets of a model.

    Attributes:
        model: Class name of the base model.
        adapter: Name of the trained adapter, empty when there is none.
        trainable: Number of weights that get gradients.
        total: Number of all weights, by logical shape; tied weights and copied heads count once.
        percent: Trainable weights in per cent of the total.
        quantization: Backend of the base, empty for float.
        quantized_share: Share of all weights that quantized layers hold, 0 to 1.
        bytes_by_dtype: Bytes of live tensors by dtype name.
        bytes_quantization_state: Bytes of scales and tables of quantized layers.
        bytes_trainable: Bytes of the trained tensors.
        bytes_before: Bytes before the preparation, ``None`` if the model was prepared elsewhere.
        bytes_after: Bytes now; of a model that is divided among processes, those that this process holds.
        targets: The requested names and what they matched.
        bare: Linear layers without an adapter: name pattern and number.
        left_out: Every kind of module without an adapter, linear or not: name pattern, number, reason.
        coverage: Number of adapted blocks and of all blocks, by block kind.
        heads: Heads that are trained in full.
        frozen_adapters: Adapters that are not trained, such as a reference adapter.
        source: Where the targets came from.
        notes: Further remarks, in sentences.
    """

    model: str
    adapter: str
    trainable: int
    total: int
    percent: float
    quantization: str
    quantized_share: float
    bytes_by_dtype: dict[str, int]
    bytes_quantization_state: int
    bytes_trainable: int
    bytes_before: int | None
    bytes_after: int
    targets: list[TargetRow] = field(default_factory=list)
    bare: dict[str, int] = field(default_factory=dict)
    left_out: list[LeftOut] = field(default_factory=list)
    coverage: dict[str, list[int]] = field(default_factory=dict)
    heads: list[str] = field(default_factory=list)
    frozen_adapters: list[str] = field(default_factory=list)
    source: str = ""
    notes: list[str] = field(default_factory=list)

    def line(self) -> str:
        """Return the report in the format of PEFT's ``print_trainable_parameters``."""
        text = f"trainable params: {self.trainable:,} || all params: {self.total:,} || trainable%: {self.percent:.4f}"
        if self.quantization:
            text += f" || {self.quantization}: {self.quantized_share:.1%} of the weights"
        return text

    def to_dict(self) -> dict[str, Any]:
        """Return the report as plain data."""
        return asdict(self)

    def scalars(self) -> dict[str, float]:
        """Return the figures for experiment trackers."""
        values: dict[str, float] = {
            "parameters/trainable": self.trainable,
            "parameters/total": self.total,
            "parameters/trainable_percent": self.percent,
            "parameters/quantized_share": self.quantized_share,
            "memory/bytes_after_preparation": self.bytes_after,
        }
        if self.bytes_before is not None:
            values["memory/bytes_before_preparation"] = self.bytes_before
        return values

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the report as JSON, atomically.

        Raises:
            OSError: The folder cannot be written.
        """
        write_json(path, self.to_dict())

    def print(self, *, table_only: bool = False) -> None:
        """Print the table on a terminal or in a notebook; log the one-line form elsewhere.

        Args:
            table_only: Whether to print nothing where the table cannot be shown.
        """
        console = Console()
        if console.is_terminal or console.is_jupyter:
            console.print(self)
        elif not table_only:
            get_logger().info(self.line())

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        summary = Table(title=f"{escape(self.model)}: parameters", show_header=False, title_justify="left")
        summary.add_column()
        summary.add_column(justify="right", overflow="fold")
        for label, value in self._make_rows():
            summary.add_row(label, escape(value))
        yield summary
        if self.targets:
            hits = Table(title=f"Targets from {escape(self.source)}", title_justify="left")
            for title, justify in (("name", "left"), ("modules", "right"), ("in -> out", "left")):
                hits.add_column(title, justify=justify, overflow="fold")  # type: ignore[arg-type]
            for row in self.targets:
                hits.add_row(escape(row.name), str(row.modules), escape(", ".join(row.shapes)))
            for name, count in self.bare.items():
                reasons = "; ".join(row.why for row in self.left_out if row.name == name)
                why = f"no adapter: {reasons}" if reasons else "no adapter"
                hits.add_row(*(f"[dim]{escape(text)}[/dim]" for text in (name, str(count), why)))
            yield hits
        for note in self.notes:
            yield f"[dim]note:[/dim] {escape(note)}"

    def _make_rows(self) -> list[tuple[str, str]]:
        rows = [
            ("trainable", f"{self.trainable:,}"),
            ("all", f"{self.total:,}"),
            ("trainable %", f"{self.percent:.4f}"),
        ]
        if self.quantization:
            rows.append(("quantization", f"{self.quantization}, {self.quantized_share:.1%} of the weights"))
        if self.bytes_before is not None:
            rows.append(("bytes before", f"{self.bytes_before:,}"))
        rows.append(("bytes now", f"{self.bytes_after:,}"))
        rows += [(f"  in {dtype}", f"{size:,}") for dtype, size in self.bytes_by_dtype.items()]
        if self.bytes_quantization_state:
            rows.append(("  quantization state", f"{self.bytes_quantization_state:,}"))
        rows += [(f"blocks of {kind}", f"{hit} of {total}") for kind, (hit, total) in self.coverage.items()]
        if self.heads:
            rows.append(("trained heads", ", ".join(self.heads)))
        if self.frozen_adapters:
            rows.append(("frozen adapters", ", ".join(self.frozen_adapters)))
        return rows

    def _repr_html_(self) -> str:
        cells = "".join(
            f"<tr><td>{html.escape(a.strip())}</td><td style='text-align:right'>{html.escape(b)}</td></tr>"
            for a, b in self._make_rows()
        )
        hits = "".join(
            f"<tr><td>{html.escape(row.name)}</td><td style='text-align:right'>{row.modules}</td></tr>"
            for row in self.targets
        )
        return (
            f"<table><caption>{html.escape(self.model)}: parameters</caption>{cells}</table>"
            f"<table><caption>Targets from {html.escape(self.source)}</caption>{hits}</table>"
        )


def make_report(model: nn.Module) -> ParameterReport:
    """Count the parameters and bytes of a model, whether it was prepared here or elsewhere.

    Args:
        model: The model in the Trainer.
    """
    count = count_parameters(model)
    size = tensor_bytes(model)
    record = preparation_of(model)
    base = base_of(model)
    quantization = _find_quantization(model, record)
    names = list(getattr(model, "peft_config", {}))
    active = list(getattr(model, "active_adapters", [])) if names else []
    return ParameterReport(
        model=type(base).__name__,
        adapter=active[0] if active and isinstance(active[0], str) else "",
        trainable=count.trainable,
        total=count.total,
        percent=count.percent,
        quantization=quantization.name if quantization else "",
        quantized_share=count.quantized / count.total if count.total else 0.0,
        bytes_by_dtype=size.by_dtype,
        bytes_quantization_state=size.quantization_state,
        bytes_trainable=size.trainable,
        bytes_before=record.before.total if record else None,
        bytes_after=size.total,
        targets=_list_targets(model, record),
        bare=dict(record.plan.bare) if record and record.plan else {},
        left_out=list(record.plan.left_out) if record and record.plan else [],
        coverage={kind: list(pair) for kind, pair in record.plan.coverage.items()} if record and record.plan else {},
        heads=list(record.heads) if record else [],
        frozen_adapters=[name for name in names if name not in active],
        source=record.plan.source if record and record.plan else "the model's own adapters",
        notes=_collect_notes(model, record),
    )


def _find_quantization(model: nn.Module, record: Preparation | None) -> Quantization | None:
    return record.quantization if record else detect_quantization(model)


def _collect_notes(model: nn.Module, record: Preparation | None) -> list[str]:
    notes = []
    if record is not None:
        notes += record.notes
        notes += record.plan.notes if record.plan else []
        if record.compute_dtype is not None:
            notes.append(f"frozen float weights are held in {str(record.compute_dtype).removeprefix('torch.')}")
        if record.upcast:
            notes.append(f"{len(record.upcast)} modules are held in float32 (upcast)")
        if record.layers is not None:
            reasons = Counter(why for why in record.layers.skipped.values() if why not in EXPECTED_REASONS)
            notes += [f"{count} linear layers stay in float: {why}" for why, count in reasons.items()]
            stacks = Counter(record.layers.skipped_stacks.values())
            notes += [f"{count} stacked expert weights stay in float: {why}" for why, count in stacks.items()]
    notes += [
        f"{count} linear layers are stored as {kind}, which no quantization backend here knows: they are counted by "
        "their sizes, and register_quantizers is the hook for them"
        for kind, count in Counter(unknown_layers(base_of(model)).values()).items()
    ]
    if is_sharded(model):
        notes.append("the model is divided among processes: bytes are those that this process holds")
    quantization = _find_quantization(model, record)
    if quantization is not None and quantization.quantizer.loss_note:
        notes.append(quantization.quantizer.loss_note)
    return notes


def _list_targets(model: nn.Module, record: Preparation | None) -> list[TargetRow]:
    if record is not None and record.plan is not None:
        return list_hits(record.plan.hits)
    return list_adapters(model)


def list_hits(hits: Iterable[TargetHit]) -> list[TargetRow]:
    """Return one row per resolved target name."""
    return [TargetRow(hit.name, len(hit.modules), list(dict.fromkeys(hit.shapes))) for hit in hits]


def list_adapters(model: nn.Module) -> list[TargetRow]:
    """Return one row per name of the adapted modules (last part of the path), for adapters added elsewhere."""
    counts: Counter[str] = Counter()
    shapes: dict[str, dict[str, None]] = {}
    for path, module in model.named_modules():
        if isinstance(module, BaseTunerLayer):
            name = path.rpartition(".")[2]
            counts[name] += 1
            shape = f"{getattr(module, 'in_features', '?')} -> {getattr(module, 'out_features', '?')}"
            shapes.setdefault(name, {})[shape] = None
    return [TargetRow(name, number, list(shapes[name])) for name, number in counts.items()]

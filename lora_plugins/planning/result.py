"""Print a plan, save it as JSON and draw it as a chart."""

from __future__ import annotations

import io
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console, ConsoleOptions, RenderResult
from rich.markup import escape
from rich.table import Table

from lora_plugins.planning.amounts import show_bytes
from lora_plugins.planning.records import PlanFigures, Row
from lora_plugins.text import write_json

__all__ = ["Plan"]


@dataclass(frozen=True)
class Plan(PlanFigures):
    """Trainable parameters and memory of a planned run: `PlanFigures` that can be printed, saved and drawn."""

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the plan as JSON, atomically.

        Raises:
            OSError: The folder cannot be written.
        """
        write_json(path, self.to_dict())

    def chart(self, path: str | os.PathLike[str]) -> None:
        """Draw the memory of every row as stacked bars into a PNG file.

        Raises:
            OSError: The file cannot be written.
        """
        _draw(self, Path(path))

    def __str__(self) -> str:
        return _render_text(self)

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        yield from _make_tables(self)


# -- tables ---------------------------------------------------------------------------------------

#: Width of the text outside a terminal, in characters.
_WIDTH = 120

_ANSWERS = {True: "yes", False: "no", None: "?"}


def _render_text(plan: PlanFigures) -> str:
    """Return the tables as plain text."""
    stream = io.StringIO()
    Console(file=stream, width=_WIDTH, color_system=None).print(plan)
    return stream.getvalue().rstrip()


def _make_tables(plan: PlanFigures) -> Iterator[Any]:
    """Yield what `rich` prints: the summary, the hit table, the memory, advice and notes."""
    yield _make_summary(plan)
    yield _make_hit_table(plan)
    yield _make_memory_table(plan)
    for name, reason in {row.quantization: row.unavailable for row in plan.rows if row.unavailable}.items():
        yield f"[dim]* {escape(name)} cannot be used here: {escape(reason)}[/dim]"
    if plan.advice:
        yield f"[bold]{escape(plan.advice)}[/bold]"
    for note in plan.notes:
        yield f"[dim]note:[/dim] {escape(note)}"


def _make_table(title: str, columns: str, *, head: bool = True) -> Table:
    """Make a table; a column whose name begins with ``>`` is right-aligned."""
    table = Table(title=title, title_justify="left", show_header=head)
    for column in columns.split("|"):
        table.add_column(column.lstrip(">"), justify="right" if column.startswith(">") else "left")
    return table


def _make_summary(plan: PlanFigures) -> Table:
    table = _make_table(f"{escape(plan.model)} in {plan.dtype}", "|>", head=False)
    rows = [
        ("trainable", f"{plan.trainable:,}"),
        ("all", f"{plan.total:,}"),
        ("trainable %", f"{plan.percent:.4f}"),
        ("adapter file", show_bytes(plan.adapter_bytes)),
        ("batch", f"{plan.batch_size} x {plan.length} tokens on each device"),
        ("optimizer", plan.optim),
    ]
    if plan.devices > 1:
        rows.append(("devices", f"{plan.devices}, {plan.strategy}"))
    if plan.memory_limit is not None:
        rows.append(("memory of a device", show_bytes(plan.memory_limit)))
    if plan.expert_share:
        rows.append(("in stacked experts", f"{plan.expert_share:.1%} of the weights, which no backend quantizes"))
    rows += [(f"blocks of {kind}", f"{hit} of {total} adapted") for kind, (hit, total) in plan.coverage.items()]
    if plan.heads:
        rows.append(("trained heads", ", ".join(plan.heads)))
    for label, value in rows:
        table.add_row(escape(label), escape(value))
    return table


def _make_hit_table(plan: PlanFigures) -> Table:
    table = _make_table(f"Targets from {escape(plan.source)}", "name|>modules|in -> out")
    for target in plan.targets:
        table.add_row(escape(target.name), str(target.modules), escape(", ".join(target.shapes)))
    for name, count in plan.bare.items():
        table.add_row(f"[dim]{escape(name)}[/dim]", f"[dim]{count}[/dim]", "[dim]no adapter[/dim]")
    return table


def _make_memory_table(plan: PlanFigures) -> Table:
    several = "|>communication" if plan.devices > 1 else ""
    known = "|fits" if plan.memory_limit is not None else ""
    columns = f"base|>quantized|>weights|>gradients|>optimizer|>activations{several}|>total{known}"
    table = _make_table("Memory on each device", columns)
    for row in plan.rows:
        table.add_row(*_make_cells(plan, row), style=_choose_style(plan, row))
    return table


def _make_cells(plan: PlanFigures, row: Row) -> list[str]:
    memory = row.memory
    parts = [memory.weights, memory.gradients, memory.optimizer, memory.activations]
    if plan.devices > 1:
        parts.append(memory.communication)
    share = f"{row.quantized_share:.1%}" if row.quantization else ""
    label = escape(row.label) + (" *" if row.unavailable else "")
    cells = [label, share, *map(show_bytes, parts), show_bytes(memory.total)]
    return [*cells, _ANSWERS[row.fits]] if plan.memory_limit is not None else cells


def _choose_style(plan: PlanFigures, row: Row) -> str:
    if row is plan.chosen:
        return "bold"
    return "dim" if row.unavailable else ""


# -- the chart ------------------------------------------------------------------------------------

#: Part of the memory -> color; distinguishable with color blindness and in grayscale.
_COLORS = {
    "weights": "#30496b",
    "gradients": "#c8553d",
    "optimizer": "#e9a23b",
    "activations": "#7fb2b0",
    "communication": "#b9b4c7",
}


def _draw(plan: PlanFigures, path: Path) -> None:
    """Draw the chart into a PNG file.

    Args:
        plan: The plan.
        path: The file; its folder must exist.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 1.6 + 0.34 * len(plan.rows)), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    places = list(range(len(plan.rows)))
    left = [0.0] * len(plan.rows)
    for part, color in _COLORS.items():
        sizes = [getattr(row.memory, part) / 2**30 for row in plan.rows]
        if any(sizes):
            axes.barh(places, sizes, left=left, color=color, label=part, height=0.7)
        left = [start + size for start, size in zip(left, sizes, strict=True)]
    for place, end in zip(places, left, strict=True):
        axes.text(end, place, f" {end:.2f}", va="center", fontsize=8)
    if plan.memory_limit is not None:
        axes.axvline(plan.memory_limit / 2**30, color="black", linewidth=1, linestyle="--", label="memory")
    labels = [row.label + ("  ◂" if row is plan.chosen else "") for row in plan.rows]
    axes.set_yticks(places, labels, fontsize=9)
    axes.invert_yaxis()
    axes.set_xlabel("GiB on each device")
    axes.margins(x=0.12)
    axes.set_title(f"{plan.model}: batch {plan.batch_size} x {plan.length} tokens, {plan.optim}", fontsize=10)
    axes.legend(fontsize=8, loc="lower right")
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    figure.savefig(path, dpi=130)

"""Print a plan, save it as JSON and draw it as a chart."""

from __future__ import annotations

import io
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console, ConsoleOptions, RenderResult
from rich.markup import escape
from rich.measure import Measurement
from rich.table import Table

from lora_plugins.planning.amounts import show_bytes
from lora_plugins.planning.records import PlanFigures, Row
from lora_plugins.text import write_json

__all__ = ["Plan"]


@dataclass(frozen=True, repr=False)
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

    def __repr__(self) -> str:
        needed = show_bytes(self.chosen.memory.total)
        return f"<Plan of {self.model}: {self.trainable:,} of {self.total:,} trained, {self.chosen.label}, {needed}>"

    def _repr_html_(self) -> str:
        console = Console(file=io.StringIO(), width=_NOTEBOOK, color_system=None, record=True, force_jupyter=False)
        console.print(self)
        return console.export_html(code_format="<pre>{code}</pre>", inline_styles=True)

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        yield from _make_tables(self, console, options)


# -- tables ---------------------------------------------------------------------------------------

#: Width of the text outside a terminal, in characters.
_WIDTH = 120
#: The same in a notebook, whose cells are narrower.
_NOTEBOOK = 110

_ANSWERS = {True: "yes", False: "no", None: "?"}


def _render_text(plan: PlanFigures) -> str:
    """Return the tables as plain text."""
    stream = io.StringIO()
    # Where rich finds a notebook it displays there and writes nothing into the file.
    Console(file=stream, width=_WIDTH, color_system=None, force_jupyter=False).print(plan)
    return stream.getvalue().rstrip()


def _make_tables(plan: PlanFigures, console: Console, options: ConsoleOptions) -> Iterator[Any]:
    """Yield what `rich` prints: the summary, the hit table, the memory, advice and notes."""
    yield _make_summary(plan)
    yield _make_hit_table(plan)
    yield from _fit_memory_table(plan, console, options)
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
        right = column.startswith(">")
        # A long name goes on in the next line; rich would cut it.
        table.add_column(column.lstrip(">"), justify="right" if right else "left", no_wrap=right, overflow="fold")
    return table


def _make_summary(plan: PlanFigures) -> Table:
    table = _make_table(f"{escape(plan.model)} in {plan.dtype}", "|", head=False)
    table.columns[1].justify = "right"
    rows = [
        ("trainable", f"{plan.trainable:,}"),
        ("all", f"{plan.total:,}"),
        ("trainable %", f"{plan.percent:.4f}"),
        ("adapter file", show_bytes(plan.adapter_bytes)),
        ("batch", f"{plan.batch_size} x {plan.length} tokens on each device"),
        ("optimizer", plan.optim),
    ]
    rows.append(("base", plan.chosen.label + _describe_share(plan.chosen)))
    rows.append(("memory needed", f"{show_bytes(plan.chosen.memory.total)} on each device"))
    if plan.devices > 1:
        rows.append(("devices", f"{plan.devices}, {plan.strategy}"))
    if plan.memory_limit is not None:
        rows.append(("memory of a device", show_bytes(plan.memory_limit)))
    if plan.expert_share:
        rows.append(("in stacked experts", f"{plan.expert_share:.1%} of the weights"))
        rows.append(("left in float by", ", ".join(plan.float_experts) or "no backend"))
    rows += [(f"blocks of {kind}", f"{hit} of {total} adapted") for kind, (hit, total) in plan.coverage.items()]
    rows.append(("serves on", ", ".join(plan.serves_on) or "none of the servers that were asked"))
    if plan.heads:
        rows.append(("trained heads", ", ".join(plan.heads)))
    for label, value in rows:
        table.add_row(escape(label), escape(value))
    return table


def _describe_share(row: Row) -> str:
    return f", {row.quantized_share:.1%} of the weights quantized" if row.quantization else ""


def _make_hit_table(plan: PlanFigures) -> Table:
    table = _make_table(f"Targets from {escape(plan.source)}", "name|>modules|in -> out")
    for target in plan.targets:
        table.add_row(escape(target.name), str(target.modules), escape(", ".join(target.shapes)))
    for name, count in plan.bare.items():
        table.add_row(f"[dim]{escape(name)}[/dim]", f"[dim]{count}[/dim]", "[dim]no adapter[/dim]")
    return table


#: Columns of the memory table that a narrow terminal does without, the first of them first. The total stays.
_OPTIONAL = ("communication", "optimizer", "gradients", "quantized", "activations", "weights")


def _fit_memory_table(plan: PlanFigures, console: Console, options: ConsoleOptions) -> Iterator[Any]:
    """Yield the memory table with as many columns as the terminal has room for: no figure is cut."""
    optional = [name for name in _OPTIONAL if name in _make_cells(plan, plan.chosen)]
    left_out: list[str] = []
    table = _make_memory_table(plan)
    # Measured on a terminal of any width: what is wider than this one would be cut.
    while optional and Measurement.get(console, options.update(max_width=10_000), table).maximum > options.max_width:
        left_out.append(optional.pop(0))
        table = _make_memory_table(plan, left_out)
    yield table
    if left_out:
        yield f"[dim]Left out because the terminal is narrow: {', '.join(reversed(left_out))}.[/dim]"


def _make_memory_table(plan: PlanFigures, left_out: Sequence[str] = ()) -> Table:
    table = Table(title="Memory on each device", title_justify="left")
    columns = [name for name in _make_cells(plan, plan.chosen) if name not in left_out]
    for name in columns:
        table.add_column(name, justify="left" if name in ("base", "fits") else "right", no_wrap=True)
    for row in plan.rows:
        cells = _make_cells(plan, row)
        table.add_row(*(cells[name] for name in columns), style=_choose_style(plan, row))
    return table


def _make_cells(plan: PlanFigures, row: Row) -> dict[str, str]:
    """Return the cells of a row by the names of their columns."""
    memory = row.memory
    cells = {
        "base": escape(row.label) + (" *" if row.unavailable else ""),
        "quantized": f"{row.quantized_share:.1%}" if row.quantization else "",
        "weights": show_bytes(memory.weights),
        "gradients": show_bytes(memory.gradients),
        "optimizer": show_bytes(memory.optimizer),
        "activations": show_bytes(memory.activations),
    }
    if plan.devices > 1:
        cells["communication"] = show_bytes(memory.communication)
    cells["total"] = show_bytes(memory.total)
    return {**cells, "fits": _ANSWERS[row.fits]} if plan.memory_limit is not None else cells


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

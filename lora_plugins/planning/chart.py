"""A plan as a picture: one stacked bar for each backend, with and without checkpointing."""

from __future__ import annotations

from pathlib import Path

from lora_plugins.planning.records import PlanFigures

__all__ = ["draw"]


#: Part of the memory -> color; distinguishable with color blindness and in grey.
_PARTS = {
    "weights": "#30496b",
    "gradients": "#c8553d",
    "optimizer": "#e9a23b",
    "activations": "#7fb2b0",
    "communication": "#b9b4c7",
}


def draw(plan: PlanFigures, path: Path) -> None:
    """Write the picture as PNG.

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
    for part, color in _PARTS.items():
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

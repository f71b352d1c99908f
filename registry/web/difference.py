"""The page of a comparison of two releases."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from registry.catalog.comparison import Difference
from registry.catalog.metrics import find_direction
from registry.errors import InvalidReference
from registry.pages.charts import make_heat_map
from registry.pages.environment import load_template

__all__ = ["describe_difference", "render_difference"]

#: Layers in the table; all of them are in what ``--json`` prints.
_MOST_LAYERS = 2000
_MOST_ROWS = 1000


def render_difference(found: Difference) -> str:
    """Return the page of a comparison as one HTML file without scripts, which asks no server for anything."""
    layers = [(layer.name, layer.change) for layer in found.layers]
    return load_template("registry.web", "difference.html").render(
        **describe_difference(found),
        heat=make_heat_map(layers),
        layers=found.layers[:_MOST_LAYERS],
        left_out=max(0, len(found.layers) - _MOST_LAYERS),
    )


def describe_difference(found: Difference) -> dict[str, Any]:
    """Return what the templates show of a comparison: tables of name, before and after."""
    base = {key: ("one", "another") if key == "fingerprint" else pair for key, pair in found.base.items()}
    tables = {"Base model": base, "Configuration": found.config, "Trained from": found.lineage}
    metrics = list(found.metrics.items())[:_MOST_ROWS]
    return {
        "before": found.before,
        "after": found.after,
        "metrics": [(name, old, new, *_judge(name, old, new)) for name, (old, new) in metrics],
        "tables": [(title, _list_rows(pairs.items())) for title, pairs in tables.items() if pairs],
        "same": [title.lower() for title, pairs in {"Metrics": metrics, **tables}.items() if not pairs],
    }


def _list_rows(pairs: Iterable[tuple[str, tuple[Any, Any]]]) -> list[tuple[str, str, str]]:
    return [(name, _show(old), _show(new)) for name, (old, new) in list(pairs)[:_MOST_ROWS]]


def _judge(name: str, old: float | None, new: float | None) -> tuple[str, str]:
    """Return the change of a metric as text, and whether it is better, worse, or neither."""
    if old is None or new is None:
        return "", ""
    change = new - old
    try:
        lower = find_direction(name) == "lower"
    except InvalidReference:
        return f"{change:+.4g}", ""
    return f"{change:+.4g}", "" if not change else "better" if (change < 0) == lower else "worse"


def _show(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.6g}"
    if isinstance(value, list):
        return ", ".join(map(_show, value))
    return "none" if value is None else str(value)

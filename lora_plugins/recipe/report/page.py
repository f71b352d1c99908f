"""Render the report page: HTML without scripts, which needs no network."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import registry
from lora_plugins.errors import ReportError
from lora_plugins.recipe.report.collect import HELD_OUT, RunFacts
from registry import PageError, load_template, make_bar, make_heat_map, make_line_chart

__all__ = ["REPORT_PAGE", "render_page", "write_page"]

#: Name of the page in the folder of a run.
REPORT_PAGE = "report.html"
_MOST_LAYERS = 2000
_MOST_STEPS = 2000
#: The chart has five colors, one of them for the training loss.
_MOST_HELD_OUT = 4
_RECIPE = "recipe: "
#: The Trainer's names of figures in words.
_TITLES = {
    "loss": "training loss, last",
    "eval_loss": "held-out loss, last",
    "train_loss": "training loss, mean",
    "train_runtime": "seconds of training",
}


def write_page(facts: RunFacts, path: Path) -> Path:
    """Write the page, whole or not at all, and return its path.

    Raises:
        ReportError: The path is a folder, the file cannot be written, or the facts cannot be shown.
    """
    try:
        content = render_page(facts)
    except Exception as error:  # The facts are files of others; nothing that reads the page's error knows more of them.
        raise ReportError(
            f"The page {path} cannot be made of what the run holds: {type(error).__name__}: {error}"
        ) from error
    try:
        return registry.write_page(content, path, REPORT_PAGE)
    except PageError as error:
        raise ReportError(str(error)) from error


def render_page(facts: RunFacts) -> str:
    """Return the page as HTML. Every text of the run is shown as text, without control characters."""
    log, report = facts.log, facts.report
    held_out = {key: _read_points(log, key) for key in _list_held_out(log)}
    losses = {"training": _read_points(log, "loss"), **{_title(key): points for key, points in held_out.items()}}
    return load_template("lora_plugins.recipe.report", "report.html").render(
        facts=facts,
        report=report,
        loss=make_line_chart("Loss", losses),
        rate=make_line_chart("Learning rate", {"learning rate": _read_points(log, "learning_rate")}),
        tiles=_list_tiles(facts, held_out),
        evaluated=any(held_out.values()) or any(HELD_OUT.fullmatch(name) for name in facts.metrics),
        columns=["loss", *map(_title, held_out), "learning rate", "gradient norm"],
        steps=_list_steps(log, ["loss", *held_out, "learning_rate", "grad_norm"]),
        weights=make_bar("Weights", _split_weights(report), "weights"),
        size=make_bar("Bytes of the model", _read_bytes(report), "bytes"),
        heat=make_heat_map(facts.layers),
        layers=facts.layers[:_MOST_LAYERS],
        lineage=[row for row in facts.lineage if not row[0].startswith(_RECIPE)],
        recipe=[(row[0].removeprefix(_RECIPE), row[1]) for row in facts.lineage if row[0].startswith(_RECIPE)],
    )


def _list_held_out(log: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return the names of the held-out losses in a log, at most as many as the chart has colors for."""
    names = dict.fromkeys(str(key) for entry in log for key in entry if HELD_OUT.fullmatch(str(key)))
    return list(names)[:_MOST_HELD_OUT]


def _title(key: str) -> str:
    match = HELD_OUT.fullmatch(key)
    name = match["name"] if match else None
    return f"held out, {name}" if name else "held out"


def _list_tiles(facts: RunFacts, held_out: Mapping[str, Sequence[tuple[float, float]]]) -> list[tuple[str, str, float]]:
    """Return label, name and value of the results: the held-out losses before training or first, and the last ones."""
    tiles = []
    for key, points in held_out.items():
        label = _title(key).replace("held out", "held-out loss")
        if len(points) > 1 or (points and not points[0][0]):
            when = f"first, at step {points[0][0]:.0f}" if points[0][0] else "before training"
            tiles.append((f"{label}, {when}", f"{key}_first", points[0][1]))
        if points and key not in facts.metrics:
            tiles.append((f"{label}, last, at step {points[-1][0]:.0f}", f"{key}_last", points[-1][1]))
    for name, value in facts.metrics.items():
        label = _TITLES.get(name, name)
        if name in held_out:
            label = f"{_title(name).replace('held out', 'held-out loss')}, last"
        tiles.append((label, name, value))
    return tiles


def _list_steps(log: Sequence[Mapping[str, Any]], keys: Sequence[str]) -> list[tuple[str, list[str]]]:
    """Return step and figures of the log's entries that have a loss."""
    losses = keys[:-2]
    entries = [entry for entry in log if any(key in entry for key in losses)][:_MOST_STEPS]
    return [
        (str(entry.get("step", "")), [_format_figure(entry[key]) if key in entry else "" for key in keys])
        for entry in entries
    ]


def _split_weights(report: Mapping[str, Any]) -> dict[str, int]:
    trainable, total = report.get("trainable"), report.get("total")
    if not isinstance(trainable, int) or not isinstance(total, int):
        return {}
    share = report.get("quantized_share")
    quantized = round(total * share) if isinstance(share, (int, float)) else 0
    stored = f"frozen, {report.get('quantization') or 'quantized'}"
    return {"trained": trainable, stored: quantized, "frozen, float": total - trainable - quantized}


def _read_bytes(report: Mapping[str, Any]) -> dict[str, int]:
    sizes = report.get("bytes_by_dtype")
    items = sizes.items() if isinstance(sizes, Mapping) else ()
    found = {str(name): size for name, size in items if isinstance(size, int)}
    state = report.get("bytes_quantization_state")
    return {**found, "quantization state": state} if isinstance(state, int) and found else found


def _format_figure(value: Any) -> str:
    return f"{value:.6g}" if isinstance(value, float) else "" if value is None else str(value)


def _read_points(log: Sequence[Mapping[str, Any]], key: str) -> list[tuple[float, float]]:
    """Return (step, value) of the entries of a Trainer's log that have a value."""
    found = ((entry.get("step"), entry.get(key)) for entry in log if isinstance(entry, Mapping))
    return [(float(x), float(y)) for x, y in found if _is_number(x) and _is_number(y)]  # type: ignore[arg-type]


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)

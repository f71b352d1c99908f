"""Render the report page: HTML without scripts, which needs no network."""

from __future__ import annotations

import os
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined, Template

from lora_plugins.errors import ReportError
from lora_plugins.recipe.report.charts import make_bar, make_heat_map, make_line_chart, read_points
from lora_plugins.recipe.report.collect import RunFacts
from lora_plugins.text import visible_text

__all__ = ["REPORT_PAGE", "render_page", "write_page"]

#: Name of the page in the folder of a run.
REPORT_PAGE = "report.html"
_MOST_TEXT = 4000
_MOST_LAYERS = 2000
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
        ReportError: The file cannot be written.
    """
    partial = path.with_name(path.name + ".partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial.write_text(render_page(facts), encoding="utf-8")
        os.replace(partial, path)
    except OSError as error:
        raise ReportError(f"The page {path} cannot be written: {error.strerror}") from error
    return path


def render_page(facts: RunFacts) -> str:
    """Return the page as HTML. Every text of the run is shown as text, without control characters."""
    log, report = facts.log, facts.report
    losses = {"training": read_points(log, "loss"), "held out": read_points(log, "eval_loss")}
    held_out = losses["held out"]
    return _load_template().render(
        facts=facts,
        report=report,
        loss=make_line_chart("Loss (nats a token)", losses),
        rate=make_line_chart("Learning rate", {"learning rate": read_points(log, "learning_rate")}),
        first=held_out[0] if len(held_out) > 1 or (held_out and not held_out[0][0]) else None,
        last=held_out[-1] if held_out else None,
        weights=make_bar("Weights", _split_weights(report), "weights"),
        size=make_bar("Bytes while training", _read_bytes(report), "bytes"),
        heat=make_heat_map(facts.layers),
        layers=facts.layers[:_MOST_LAYERS],
        lineage=[row for row in facts.lineage if not row[0].startswith(_RECIPE)],
        recipe=[(row[0].removeprefix(_RECIPE), row[1]) for row in facts.lineage if row[0].startswith(_RECIPE)],
        titles=_TITLES,
    )


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


@lru_cache(maxsize=1)
def _load_template() -> Template:
    environment = Environment(
        loader=PackageLoader("lora_plugins.recipe.report", "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=_show,
    )
    environment.filters |= {"number": _format_number, "figure": _format_figure}
    return environment.get_template("report.html")


def _show(value: Any) -> Any:
    """Return a text without characters that hide or reverse what is read; markup of the template stays as it is."""
    return visible_text(value, _MOST_TEXT) if type(value) is str else value


def _format_number(value: Any) -> str:
    return f"{value:,}" if isinstance(value, int) else _format_figure(value)


def _format_figure(value: Any) -> str:
    return f"{value:.6g}" if isinstance(value, float) else str(value)

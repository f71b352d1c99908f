"""Geometry of the report's pictures; the template draws them as SVG."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

__all__ = ["Bar", "HeatMap", "LineChart", "make_bar", "make_heat_map", "make_line_chart", "read_points"]

_WIDTH, _HEIGHT = 480, 268
_LEFT, _RIGHT, _TOP, _BOTTOM = 62, 14, 14, 48
#: More points than pixels cannot be seen.
_MOST_POINTS = 800
#: More rows make a page that nobody reads; the figures of all layers are in the table below.
_MOST_ROWS = 200
_MOST_COLUMNS = 24
#: Shares of the largest value from which the text on a cell changes between black and white, on a light and on a dark
#: page; with these, the contrast is at least 4.5 on every cell.
_LIGHT_TEXT, _DARK_TEXT = 0.81, 0.6


@dataclass(frozen=True)
class Curve:
    """A line of a chart: title, CSS class, points as SVG wants them, and the single points where they are few."""

    title: str
    style: str
    points: str
    dots: tuple[tuple[float, float, str], ...]


@dataclass(frozen=True)
class LineChart:
    """A chart of lines over steps.

    Attributes:
        title: What it shows, with the unit.
        description: The same in a sentence with its first and last figures, for those who do not see it.
        curves: The lines.
        across: Ticks of the step: position and text.
        up: Ticks of the value: position and text.
    """

    title: str
    description: str
    curves: tuple[Curve, ...]
    across: tuple[tuple[float, str], ...]
    up: tuple[tuple[float, str], ...]
    width: int = _WIDTH
    height: int = _HEIGHT
    left: int = _LEFT
    right: int = _WIDTH - _RIGHT
    top: int = _TOP
    bottom: int = _HEIGHT - _BOTTOM


@dataclass(frozen=True)
class Bar:
    """A bar of parts: title, number, share of the whole in per cent, index of its color."""

    title: str
    total: int
    unit: str
    parts: tuple[tuple[str, int, float, int], ...]


@dataclass(frozen=True)
class HeatMap:
    """How much an adapter changes each layer: blocks down, kinds of modules across."""

    columns: tuple[str, ...]
    rows: tuple[tuple[str, tuple[tuple[str, float, str] | None, ...]], ...]
    left_out: int
    largest: float


def make_line_chart(title: str, series: Mapping[str, Sequence[tuple[float, float]]]) -> LineChart | None:
    """Return a chart of named series of (step, value); ``None`` if none has a finite point."""
    kept = {name: _keep_finite(points) for name, points in series.items()}
    kept = {name: points for name, points in kept.items() if points}
    if not kept:
        return None
    xs = [x for points in kept.values() for x, _ in points]
    ys = [y for points in kept.values() for _, y in points]
    across, up = _make_ticks(min(xs), max(xs), 5, whole=True), _make_ticks(min(ys), max(ys), 5)
    low_x, high_x = min(xs), max(max(xs), min(xs) + 1)
    low_y, high_y = up[0], up[-1]

    def place(x: float, y: float) -> tuple[float, float]:
        inner_x, inner_y = _WIDTH - _LEFT - _RIGHT, _HEIGHT - _TOP - _BOTTOM
        return (
            round(_LEFT + (x - low_x) / (high_x - low_x) * inner_x, 1),
            round(_HEIGHT - _BOTTOM - (y - low_y) / (high_y - low_y) * inner_y, 1),
        )

    curves = []
    for index, (name, points) in enumerate(kept.items()):
        placed = [(*place(x, y), f"step {_format(x)}: {_format(y)}") for x, y in points]
        line = " ".join(f"{x},{y}" for x, y, _ in placed)
        curves.append(Curve(name, f"c{index}", line, tuple(placed) if len(placed) <= 40 else ()))
    said = "; ".join(
        f"{name}: {_format(points[0][1])} at step {_format(points[0][0])}, "
        f"{_format(points[-1][1])} at step {_format(points[-1][0])}"
        for name, points in kept.items()
    )
    return LineChart(
        title,
        said,
        tuple(curves),
        tuple((place(x, low_y)[0], _format(x)) for x in across if low_x <= x <= high_x),
        tuple((place(low_x, y)[1], _format(y)) for y in up),
    )


def _keep_finite(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    finite = [(x, y) for x, y in points if math.isfinite(x) and math.isfinite(y)]
    stride = max(1, math.ceil(len(finite) / _MOST_POINTS))
    return [*finite[:-1:stride], finite[-1]] if finite else []


def _make_ticks(low: float, high: float, count: int, *, whole: bool = False) -> list[float]:
    """Return round numbers from at most ``low`` to at least ``high``."""
    if high <= low:
        high = low + (abs(low) or 1.0)
    rough = (high - low) / count
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 2.5, 5, 10) if factor * power >= rough * 0.999)
    if whole:
        step = max(1.0, float(math.ceil(step)))
    first = math.floor(low / step)
    return [index * step for index in range(first, math.ceil(high / step - 1e-9) + 1)]


def _format(value: float) -> str:
    if value == 0:
        return "0"
    if abs(value) < 1e-3 or abs(value) >= 1e6:
        number, _, power = f"{value:.3e}".partition("e")
        return f"{float(number):.3g}e{int(power)}"
    return f"{value:,.4g}" if abs(value) < 1000 else f"{value:,.0f}"


def make_bar(title: str, parts: Mapping[str, int], unit: str) -> Bar | None:
    """Return a bar of parts, without those that are empty; ``None`` if all are."""
    kept = {name: number for name, number in parts.items() if number > 0}
    total = sum(kept.values())
    if not total:
        return None
    rows = tuple((name, number, 100 * number / total, index) for index, (name, number) in enumerate(kept.items()))
    return Bar(title, total, unit, rows)


def make_heat_map(layers: Sequence[tuple[str, float]]) -> HeatMap | None:
    """Return the norms of layers as a grid: the first number in a layer's name is its row, the rest its column.

    Args:
        layers: Name of the layer in the base model, and norm of what the adapter adds to its weight.
    """
    cells: dict[str, dict[str, tuple[str, float]]] = {}
    for name, norm in layers:
        row, column = _split_name(name)
        cells.setdefault(row, {})[column] = (name, norm)
    columns = list(dict.fromkeys(column for row in cells.values() for column in row))[:_MOST_COLUMNS]
    largest = max((norm for _, norm in layers if math.isfinite(norm)), default=0.0)
    if not largest:
        return None
    rows = tuple((row, tuple(_shade(found.get(column), largest) for column in columns)) for row, found in cells.items())
    shown = sum(cell is not None for _, row in rows[:_MOST_ROWS] for cell in row)
    return HeatMap(tuple(columns), rows[:_MOST_ROWS], len(layers) - shown, largest)


def _split_name(name: str) -> tuple[str, str]:
    parts = name.split(".")
    number = next((index for index, part in enumerate(parts) if part.isdecimal()), None)
    if number is None:
        return "-", parts[-1]
    return ".".join(parts[: number + 1]), ".".join(parts[number + 1 :]) or parts[-1]


def _shade(cell: tuple[str, float] | None, largest: float) -> tuple[str, float, str] | None:
    if cell is None or not math.isfinite(cell[1]):
        return None
    share = cell[1] / largest
    classes = ("l " if share > _LIGHT_TEXT else "") + ("d" if share > _DARK_TEXT else "")
    return f"{cell[1]:.4g}", round(100 * share, 1), classes.strip()


def read_points(log: Sequence[Mapping[str, Any]], key: str) -> list[tuple[float, float]]:
    """Return (step, value) of the entries of a Trainer's log that have a value."""
    found = ((entry.get("step"), entry.get(key)) for entry in log if isinstance(entry, Mapping))
    return [(float(x), float(y)) for x, y in found if _is_number(x) and _is_number(y)]  # type: ignore[arg-type]


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)

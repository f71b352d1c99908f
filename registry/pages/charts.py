"""Geometry of the pictures on pages; the templates draw them as SVG."""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

__all__ = ["SHADES", "Bar", "HeatMap", "LineChart", "make_bar", "make_heat_map", "make_line_chart"]

_WIDTH, _HEIGHT = 480, 268
_LEFT, _RIGHT, _TOP, _BOTTOM = 62, 14, 14, 48
#: More points than pixels cannot be seen.
_MOST_POINTS = 800
#: More rows make a page that nobody reads; the figures of all layers are in the table below.
_MOST_ROWS = 200
_MOST_COLUMNS = 24
#: Shades of a heat map, from the color of the page to the full color.
SHADES = 20
#: Single points are drawn only where they can be told apart.
_MOST_DOTS = 40
#: Texts under a chart whose steps have names, and characters of each.
_MOST_NAMES, _LONGEST_NAME = 5, 12
#: Shares of the largest value from which the text on a cell changes between black and white, on a light and on a dark
#: page; with these, the contrast is at least 4.5 on every cell.
_LIGHT_TEXT, _DARK_TEXT = 0.81, 0.6
_LARGEST = sys.float_info.max
#: A range below this, or below this share of its ends, has no numbers for ticks in it: it is drawn as one value.
_NARROWEST, _NARROWEST_SHARE = 1e-300, 1e-9


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
        axis: What a step is.
    """

    title: str
    description: str
    curves: tuple[Curve, ...]
    across: tuple[tuple[float, str], ...]
    up: tuple[tuple[float, str], ...]
    axis: str = "step"
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
    rows: tuple[tuple[str, tuple[tuple[str, str] | None, ...]], ...]
    left_out: int
    largest: float


def make_line_chart(
    title: str,
    series: Mapping[str, Sequence[tuple[float, float]]],
    *,
    axis: str = "step",
    names: Sequence[str] = (),
) -> LineChart | None:
    """Return a chart of named series of (step, value); ``None`` if none has a finite point.

    Args:
        title: What it shows.
        series: The lines by name.
        axis: What a step is.
        names: Texts of the steps 0, 1, 2, …, where they are not numbers.
    """
    kept = {name: _keep_finite(points) for name, points in series.items()}
    kept = {name: points for name, points in kept.items() if points}
    if not kept:
        return None
    xs = [x for points in kept.values() for x, _ in points]
    up = _make_ticks(
        min(y for points in kept.values() for _, y in points), max(y for points in kept.values() for _, y in points), 5
    )
    scale = _Scale(*_widen(min(xs), max(max(xs), min(xs) + 1)), up[0], up[-1], axis, names)
    curves = [_draw(name, points, f"c{index}", scale) for index, (name, points) in enumerate(kept.items())]
    described = "; ".join(
        f"{name}: {_format(points[0][1])} at {scale.name(points[0][0])}, "
        f"{_format(points[-1][1])} at {scale.name(points[-1][0])}"
        for name, points in kept.items()
    )
    across = _pick_names(names) if names else [(x, _format(x)) for x in _make_ticks(min(xs), max(xs), 5, whole=True)]
    return LineChart(
        title,
        described,
        tuple(curves),
        tuple((scale.place(x, up[0])[0], text) for x, text in across if scale.left <= x <= scale.right),
        tuple((scale.place(scale.left, y)[1], _format(y)) for y in up),
        axis,
    )


@dataclass(frozen=True)
class _Scale:
    """Where steps and values are in a chart, and what a step is called."""

    left: float
    right: float
    low: float
    high: float
    axis: str
    names: Sequence[str]

    def place(self, x: float, y: float) -> tuple[float, float]:
        """Return the position of a point."""
        inner_x, inner_y = _WIDTH - _LEFT - _RIGHT, _HEIGHT - _TOP - _BOTTOM
        return (
            round(_LEFT + _find_share(x, self.left, self.right) * inner_x, 1),
            round(_HEIGHT - _BOTTOM - _find_share(y, self.low, self.high) * inner_y, 1),
        )

    def name(self, x: float) -> str:
        """Return a step in words."""
        return f"{self.axis} {self.names[int(x)] if self.names else _format(x)}"


def _draw(name: str, points: Sequence[tuple[float, float]], style: str, scale: _Scale) -> Curve:
    placed = [(*scale.place(x, y), f"{scale.name(x)}: {_format(y)}") for x, y in points]
    return Curve(
        name, style, " ".join(f"{x},{y}" for x, y, _ in placed), tuple(placed) if len(placed) <= _MOST_DOTS else ()
    )


def _pick_names(names: Sequence[str]) -> list[tuple[float, str]]:
    """Return steps and the texts under them: the first, the last, and some between, no two at one place."""
    count = min(len(names), _MOST_NAMES)
    steps = {round(index * (len(names) - 1) / max(1, count - 1)) for index in range(count)}
    return [(float(step), _shorten(names[step])) for step in sorted(steps)]


def _shorten(name: str) -> str:
    return name if len(name) <= _LONGEST_NAME else f"{name[: _LONGEST_NAME - 1]}…"


def _keep_finite(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    finite = [(x, y) for x, y in points if math.isfinite(x) and math.isfinite(y)]
    stride = max(1, math.ceil(len(finite) / _MOST_POINTS))
    return [*finite[:-1:stride], finite[-1]] if finite else []


def _find_share(value: float, low: float, high: float) -> float:
    """Return how far a value is from ``low`` to ``high``, between 0 and 1, where their difference may be infinite."""
    return min(1.0, max(0.0, (value / 4 - low / 4) / (high / 4 - low / 4)))


def _widen(low: float, high: float) -> tuple[float, float]:
    """Return a range that has numbers for ticks in it: the given one, or if it is too narrow, one that begins at it."""
    size = max(abs(low), abs(high))
    if high / 2 - low / 2 > max(_NARROWEST, _NARROWEST_SHARE * size):
        return low, high
    if size < _NARROWEST:
        return low, low + 1.0
    return (low, low + abs(low)) if low <= _LARGEST / 2 else (0.0, _LARGEST)


def _make_ticks(low: float, high: float, count: int, *, whole: bool = False) -> list[float]:
    """Return round numbers from at most ``low`` to at least ``high``, or to the largest number."""
    low, high = _widen(low, high)
    rough = high / count - low / count
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 2.5, 5, 10) if factor * power >= rough * 0.999)
    if whole:
        step = max(1.0, float(math.ceil(step)))
    first = math.floor(low / step)
    ticks = (index * step for index in range(first, math.ceil(high / step - 1e-9) + 1))
    return [min(_LARGEST, max(-_LARGEST, tick)) for tick in ticks]


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
    if largest <= 0:
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


def _shade(cell: tuple[str, float] | None, largest: float) -> tuple[str, str] | None:
    """Return the text of a cell, and the classes with its shade and the color of its text."""
    if cell is None or not math.isfinite(cell[1]):
        return None
    shade = round(SHADES * max(0.0, cell[1] / largest))
    share = shade / SHADES
    classes = f"s{shade}" + (" l" if share > _LIGHT_TEXT else "") + (" d" if share > _DARK_TEXT else "")
    return f"{cell[1]:.4g}", classes

"""Compare a recorded run with what is here, and with its repetition."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lora_plugins.adapters.lineage.environment import find_version
from registry import visible_lines

__all__ = [
    "Difference",
    "compare_data",
    "compare_libraries",
    "compare_values",
    "find_first_step",
    "show_lines",
]

#: Characters of a line that are shown.
_MOST_CHARACTERS = 2000

#: Fields of a data set that are compared where its hash differs; the first two say how.
_OF_ROWS = ("rows", "columns", "sha256")


@dataclass(frozen=True)
class Difference:
    """One thing that is different here from what was recorded.

    Attributes:
        field: Its name, dotted.
        recorded: As recorded; ``None`` if there was none.
        here: As it is here; ``None`` if there is none.
    """

    field: str
    recorded: Any
    here: Any

    def __str__(self) -> str:
        return f"{self.field} was {_show(self.recorded)} and is {_show(self.here)}"


def _show(value: Any) -> str:
    if isinstance(value, str) and len(value) == 64 and value.isalnum():
        return value[:12]
    return "nothing" if value is None else str(value)


def show_lines(lines: Iterable[str]) -> list[str]:
    """Return lines for the terminal, each on one line, without the control characters that a release may hold."""
    return [visible_lines(line, _MOST_CHARACTERS).replace("\n", " ") for line in lines]


def compare_values(
    prefix: str, recorded: Mapping[str, Any], here: Mapping[str, Any], leave_out: Sequence[str] = ()
) -> Iterator[Difference]:
    """Yield the differences of two mappings, by name."""
    for name in sorted({*recorded, *here} - {*leave_out}):
        if recorded.get(name) != here.get(name):
            yield Difference(f"{prefix}.{name}", recorded.get(name), here.get(name))


def compare_libraries(recorded: Mapping[str, Any]) -> Iterator[Difference]:
    """Yield the recorded libraries of which another version, or none, is installed here."""
    for name, version in sorted(recorded.items()):
        here = find_version(name)
        if here != version:
            yield Difference(f"libraries.{name}", version, here)


def compare_data(field: str, recorded: Mapping[str, Any], here: Mapping[str, Any]) -> Iterator[Difference]:
    """Yield how the rows differ, part by part (train, eval)."""
    for part in sorted({*recorded, *here}):
        one, two = recorded.get(part), here.get(part)
        if not isinstance(one, Mapping) or not isinstance(two, Mapping):
            yield Difference(f"{field}.{part}", "rows" if one else None, "rows" if two else None)
            continue
        if one.get("sha256") is not None and one.get("sha256") == two.get("sha256"):
            continue
        for name in _OF_ROWS:
            if one.get(name) != two.get(name):
                yield Difference(f"{field}.{part}.{name}", one.get(name), two.get(name))


def find_first_step(recorded: Mapping[str, Any], here: Mapping[str, Any]) -> Difference | None:
    """Return the first logged step whose loss, or norm of the gradient, differs."""
    for name in ("loss", "grad_norm"):
        one, two = (_index(losses, name) for losses in (recorded, here))
        for step in sorted({*one, *two}):
            if step in one and step in two and one[step] != two[step]:
                return Difference(f"{name} at step {step}", one[step], two[step])
    return None


def _index(losses: Mapping[str, Any], name: str) -> dict[int, Any]:
    steps, values = losses.get("step"), losses.get(name)
    if not isinstance(steps, list) or not isinstance(values, list) or len(steps) != len(values):
        return {}
    return dict(zip(steps, values, strict=True))

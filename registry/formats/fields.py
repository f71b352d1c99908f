"""Read typed fields of an untrusted JSON object."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeVar

from registry.formats.strict_json import JsonRefused, shown

__all__ = ["COMMIT", "SHA256", "Fields", "is_finite"]

_Value = TypeVar("_Value")

SHA256 = re.compile(r"[0-9a-f]{64}")
#: Commit ids of git hubs (40 digits) and folder registries (64).
COMMIT = re.compile(r"[0-9a-f]{40}(?:[0-9a-f]{24})?")
_MAX_TEXT = 10_000


class Fields:
    """A JSON object that is read key by key."""

    def __init__(self, value: object, where: str = "") -> None:
        if not isinstance(value, dict):
            raise JsonRefused(f"{where or 'it'} is {shown(value)}, not an object")
        self._values: dict[str, Any] = value
        self._where = where

    def refuse(self, key: str, expected: str) -> JsonRefused:
        """Return the error for an unexpected value."""
        found = shown(self._values[key]) if key in self._values else "missing"
        return JsonRefused(f"{self._join_path(key)} is {found}; expected {expected}")

    def has(self, key: str) -> bool:
        """Whether a key has a value other than null."""
        return self._values.get(key) is not None

    def text(self, key: str, pattern: re.Pattern[str] | None = None, expected: str = "a text") -> str:
        """Return a string that matches ``pattern`` completely."""
        value = self._values.get(key)
        if not isinstance(value, str) or len(value) > _MAX_TEXT or (pattern and not pattern.fullmatch(value)):
            raise self.refuse(key, expected)
        return value

    def optional(self, key: str, read: Callable[[str], _Value]) -> _Value | None:
        """Return ``read(key)``, or ``None`` if the key is missing or null."""
        return read(key) if self.has(key) else None

    def integer(self, key: str, limit: int, least: int = 0) -> int:
        """Return an integer from ``least`` to ``limit``, both included."""
        value = self._values.get(key)
        if not isinstance(value, int) or isinstance(value, bool) or not least <= value <= limit:
            raise self.refuse(key, f"a whole number from {least} to {limit}")
        return value

    def shape(self, key: str) -> tuple[int, ...]:
        """Return a list of at most 8 sizes."""
        value = self._values.get(key)
        if (
            not isinstance(value, list)
            or len(value) > 8
            or not all(isinstance(size, int) and not isinstance(size, bool) and 0 <= size < 2**40 for size in value)
        ):
            raise self.refuse(key, "a list of sizes")
        return tuple(value)

    def numbers(self, key: str, most: int) -> tuple[float, ...]:
        """Return a list of at most ``most`` numbers; empty if missing."""
        value = self._values.get(key, [])
        if not isinstance(value, list) or len(value) > most or not all(_is_number(item) for item in value):
            raise self.refuse(key, f"a list of at most {most} numbers")
        return tuple(float(item) for item in value)

    def texts(self, key: str) -> tuple[str, ...]:
        """Return a list of strings."""
        value = self._values.get(key)
        if not isinstance(value, list) or not all(isinstance(item, str) and len(item) <= _MAX_TEXT for item in value):
            raise self.refuse(key, "a list of texts")
        return tuple(value)

    def number_table(self, key: str) -> dict[str, float]:
        """Return an object whose values are numbers; empty if missing."""
        table = self.json_table(key)
        for name, value in table.items():
            if not _is_number(value):
                raise JsonRefused(f"{self._join_path(key)}.{shown(name)} is {shown(value)}; expected a number")
        return table

    def json_table(self, key: str) -> dict[str, Any]:
        """Return an object with any values; empty if missing."""
        value = self._values.get(key, {})
        if not isinstance(value, dict):
            raise self.refuse(key, "an object")
        return value

    def inner(self, key: str) -> Fields:
        """Return the object under a key as `Fields`."""
        return Fields(self._values.get(key), self._join_path(key))

    def table(self, key: str, most: int) -> Iterator[tuple[str, Fields]]:
        """Yield the entries of an object of objects."""
        entries: Mapping[str, Any] = self.json_table(key)
        if len(entries) > most:
            raise JsonRefused(f"{self._join_path(key)} has {len(entries):,} entries, and may have {most:,}")
        for name, value in entries.items():
            yield name, Fields(value, f"{self._join_path(key)}.{shown(name)}")

    def _join_path(self, key: str) -> str:
        return f"{self._where}.{key}" if self._where else key


def is_finite(value: object) -> bool:
    """Whether a value is a finite number."""
    return _is_number(value) and math.isfinite(value)  # type: ignore[arg-type]


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)

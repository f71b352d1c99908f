"""Parse untrusted JSON within limits of size and depth."""

from __future__ import annotations

import json
import math
from typing import Any, NoReturn

__all__ = ["JsonRefused", "canonical", "parse", "shown"]

_MAX_DEPTH = 32
_MAX_DIGITS = 19


class JsonRefused(ValueError):
    """A document is refused; callers convert this into their own error."""


def parse(data: bytes, limit: int, *, depth: int = _MAX_DEPTH) -> Any:
    """Parse a JSON document of at most ``limit`` bytes and ``depth`` levels.

    Raises:
        JsonRefused: It is larger, deeper or not JSON, has a duplicate key, a number that is not finite or has more than
            19 digits, or text that cannot be encoded.
    """
    if len(data) > limit:
        raise JsonRefused(f"it has {len(data):,} bytes, and may have {limit:,}")
    try:
        text = data.decode("utf-8")
        value = json.loads(
            text,
            object_pairs_hook=_refuse_duplicates,
            parse_constant=_refuse_constant,
            parse_int=_read_integer,
            parse_float=_read_number,
        )
    except JsonRefused:
        raise
    except RecursionError:
        raise JsonRefused("it is nested too deeply") from None
    except ValueError as error:
        raise JsonRefused(f"it is not JSON in UTF-8 ({type(error).__name__})") from None
    _check_depth(value, depth)
    # Valid UTF-8 contains no lone surrogates; only an escape sequence can introduce one.
    if b"\\u" in data:
        _check_text(value)
    return value


def canonical(value: Any) -> bytes:
    """Return the canonical encoding of a value: sorted keys, UTF-8, a newline at the end."""
    text = json.dumps(value, sort_keys=True, indent=1, ensure_ascii=False, allow_nan=False)
    return text.encode("utf-8") + b"\n"


def shown(text: object, length: int = 80) -> str:
    """Return an untrusted value for a message: quoted, without control characters, at most ``length`` characters."""
    quoted = ascii(text)
    return quoted if len(quoted) <= length else f"{quoted[: length - 1]}…"


def _refuse_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise JsonRefused(f"it has the key {shown(twice)} twice")
    return found


def _refuse_constant(text: str) -> NoReturn:
    raise JsonRefused(f"it has the number {text}")


def _read_integer(text: str) -> int:
    if len(text.lstrip("-")) > _MAX_DIGITS:
        raise JsonRefused(f"it has a number of {len(text)} digits")
    return int(text)


def _read_number(text: str) -> float:
    value = float(text) if len(text) <= 64 else math.inf
    if not math.isfinite(value):
        raise JsonRefused(f"it has the number {shown(text)}")
    return value


def _check_depth(value: Any, depth: int) -> None:
    level = [value]
    for _ in range(depth):
        level = [
            item
            for container in level
            if isinstance(container, (dict, list))
            for item in (container.values() if isinstance(container, dict) else container)
            if isinstance(item, (dict, list))
        ]
        if not level:
            return
    raise JsonRefused("it is nested too deeply")


def _check_text(value: Any) -> None:
    if isinstance(value, str):
        _check_encodable(value)
    elif isinstance(value, list):
        for item in value:
            _check_text(item)
    elif isinstance(value, dict):
        for key, item in value.items():
            _check_encodable(key)
            _check_text(item)


def _check_encodable(text: str) -> None:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        raise JsonRefused(f"it has text that cannot be encoded: {shown(text)}") from None

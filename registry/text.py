"""Text from strangers as it can be shown: one line, no control characters.

Names, messages and values that come from a hub, a manifest or a configuration can hold sequences that move the cursor,
change colours or reverse the direction of reading. Everything that shows such text passes it through here.
"""

from __future__ import annotations

import html
import unicodedata
from collections.abc import Iterable

__all__ = ["html_table", "visible", "visible_lines"]

#: Control, format (bidi marks among them), private use, surrogate, and the two separators that end a line.
_HIDDEN = frozenset({"Cc", "Cf", "Co", "Cs", "Zl", "Zp"})


def visible(text: object, length: int | None = None) -> str:
    """Return a text on one line, without control, bidi, private-use and surrogate characters.

    Args:
        text: Any value; its ``str()`` is used.
        length: Characters to keep; a longer text is cut and ends with ``…``.
    """
    raw = str(text)
    if length is not None:
        raw = raw[: 8 * length + 8]  # most of it is not looked at
    if not raw.isascii() or not raw.isprintable():
        raw = "".join(" " if unicodedata.category(char) in _HIDDEN else char for char in raw)
    line = " ".join(raw.split())
    return line if length is None or len(line) <= length else f"{line[:length]}…"


def visible_lines(text: object, most: int) -> str:
    """Return a text of others without control, bidi, private-use and surrogate characters; tabs and line breaks stay.

    Args:
        text: Any value; its ``str()`` is used.
        most: Characters to keep; a longer text is cut and ends with ``…``.
    """
    raw = str(text)[: most + 1]
    if not raw.isascii() or not raw.isprintable():
        raw = "".join(c if c in "\n\t" or unicodedata.category(c) not in _HIDDEN else "\ufffd" for c in raw)
    return raw if len(raw) <= most else f"{raw[:most]}…"


def html_table(title: str, rows: Iterable[tuple[str, object]]) -> str:
    """Return a table of two columns for a notebook; rows without a value are left out, and every text is escaped."""
    cells = "".join(
        f"<tr><th>{html.escape(visible(label))}</th><td>{html.escape(visible(value))}</td></tr>"
        for label, value in rows
        if value not in (None, "", ())
    )
    return f"<table><caption>{html.escape(visible(title))}</caption>{cells}</table>"

"""Text from strangers reaches a terminal without anything that could move the cursor or reverse the reading."""

from __future__ import annotations

import warnings

import pytest

from registry import errors
from registry.text import visible


@pytest.mark.parametrize(
    ("raw", "shown"),
    [
        ("\x1b[2Jred\u202e\r\nnext\u2028line\0", "[2Jred next line"),
        ("\x9b31mC1 control", "31mC1 control"),
        ("a\u2066b\u2069\u200fc", "a b c"),
        ("\ud800half\ue000private", "half private"),
        ("é 漢字 plain", "é 漢字 plain"),
        (b"\x1b", "b'\\x1b'"),
        (None, "None"),
    ],
)
def test_only_visible_characters_are_left(raw: object, shown: str) -> None:
    assert visible(raw) == shown


def test_a_long_text_is_cut() -> None:
    assert visible("x" * 10**7, 300) == "x" * 300 + "…"
    assert visible("\u202e" * 10**7 + "y", 3) == ""


HOSTILE = "evil\x1b]0;title\x07\u202e\nsecond line"


@pytest.mark.parametrize("name", [n for n in vars(errors) if isinstance(getattr(errors, n), type)])
def test_no_error_or_warning_shows_control_characters(name: str) -> None:
    kind = getattr(errors, name)
    assert str(kind(HOSTILE)) == "evil ]0;title second line"
    assert str(kind()) == ""


def test_a_warning_is_printed_on_one_line() -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        warnings.warn(HOSTILE, errors.StaleWarning, stacklevel=1)
    assert str(caught[0].message) == "evil ]0;title second line"

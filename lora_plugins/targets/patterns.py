"""Match regular expressions against paths in bounded time."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Iterable
from re import _constants, _parser  # type: ignore[attr-defined]
from typing import Any

from lora_plugins.errors import TargetError

__all__ = ["is_cheap", "match_paths"]


#: Most ways of matching over all paths (some seconds); a pattern that may need more runs in a process of its own.
_MOST_WAYS = 10**8
_LONGEST_PATTERN = 2000
#: Time limit of that process in seconds.
_SECONDS = 5.0

_MATCHER = (
    "import json, re, sys; pattern, paths = json.load(sys.stdin); match = re.compile(pattern).fullmatch; "
    "json.dump([path for path in paths if match(path)], sys.stdout)"
)
_REPEATS = tuple(
    getattr(_constants, name) for name in ("MAX_REPEAT", "MIN_REPEAT", "POSSESSIVE_REPEAT") if hasattr(_constants, name)
)
#: Operators that match one character, or none, in exactly one way.
_PLAIN = (_constants.LITERAL, _constants.NOT_LITERAL, _constants.ANY, _constants.IN, _constants.AT, _constants.RANGE)


class _TooMany(ValueError):
    """The ways of matching cannot be counted, or are very many."""


def is_cheap(pattern: str, paths: Iterable[str], where: str = "target_modules") -> bool:
    """Whether matching a pattern against some paths provably takes little time.

    This is an upper bound: every way to try a match is counted, whether or not these paths need it.

    Raises:
        TargetError: The pattern is not a valid regular expression.
    """
    names = list(paths)
    tree = _parse(pattern, where)
    longest = max(map(len, names), default=0)
    try:
        return len(pattern) <= _LONGEST_PATTERN and _count_ways(tree, longest) * max(1, len(names)) <= _MOST_WAYS
    except (_TooMany, RecursionError):
        return False


def match_paths(pattern: str, paths: Iterable[str], where: str = "target_modules") -> list[str]:
    """Return the paths that a regular expression matches as a whole, as `re.fullmatch` does.

    A pattern that is not provably cheap runs in a process of its own, with a time limit.

    Args:
        pattern: The expression.
        paths: The paths to match.
        where: The field that holds the expression, for messages.

    Raises:
        TargetError: It is not a valid expression, or matching takes too long.
    """
    names = list(paths)
    if is_cheap(pattern, names, where):
        return [path for path in names if re.fullmatch(pattern, path)]
    command = [sys.executable, "-I", "-c", _MATCHER]
    try:
        done = subprocess.run(  # noqa: S603 - our own interpreter and arguments
            command, input=json.dumps([pattern, names]), capture_output=True, text=True, timeout=_SECONDS, check=True
        )
    except (subprocess.TimeoutExpired, subprocess.CalledProcessError, OSError) as error:
        why = f"more than {_SECONDS:g} s" if isinstance(error, subprocess.TimeoutExpired) else "a process that failed"
        raise TargetError(
            f"{where}={pattern[:80]!r} cannot be matched against the {len(names)} modules of this model: it took "
            f"{why}. Nested or many repetitions, such as (.*)*, try the same text in very many ways. Write names "
            "instead, or a pattern with at most two .* in it."
        ) from None
    matched: list[str] = json.loads(done.stdout)
    return matched


def _parse(pattern: str, where: str) -> Any:
    try:
        re.compile(pattern)
        return _parser.parse(pattern)
    except (re.error, RecursionError, OverflowError) as error:
        raise TargetError(f"{where}={pattern[:80]!r} is not a valid regular expression: {error}") from None


def _count_ways(tree: Any, longest: int) -> int:
    """Return in how many ways a sequence can match a text of this length, at most."""
    ways = 1
    for operator, argument in tree:
        ways *= _count_ways_of(operator, argument, longest)
        if ways > _MOST_WAYS:
            raise _TooMany
    return ways


def _count_ways_of(operator: Any, argument: Any, longest: int) -> int:
    if operator in _PLAIN:
        return 1
    if operator is _constants.BRANCH:
        return sum(_count_ways(branch, longest) for branch in argument[1])
    if operator is _constants.SUBPATTERN:
        return _count_ways(argument[-1], longest)
    if operator in (_constants.ASSERT, _constants.ASSERT_NOT):
        return _count_ways(argument[1], longest)
    if operator in _REPEATS:
        least, most, inner = argument
        return _count_ways_of_repeat(least, most, _count_ways(inner, longest), longest)
    # References to groups and conditions depend on what was matched before.
    raise _TooMany


def _count_ways_of_repeat(least: int, most: Any, inner: int, longest: int) -> int:
    if int(most) <= 1:
        return inner + (least == 0)
    if inner == 1:
        # Only the number of repetitions is free, and the text's length limits it.
        return max(1, min(int(most), longest) - least + 1)
    if least == int(most) <= 8:
        return inner**least
    raise _TooMany

"""Regular expressions in somebody else's configuration: run by PEFT over every module name, so they must be cheap."""

from __future__ import annotations

import re
from typing import Any

try:
    from re import _constants, _parser  # type: ignore[attr-defined]
except ImportError:  # Python 3.10
    import sre_constants as _constants
    import sre_parse as _parser

__all__ = ["is_cheap"]

_MAX_LENGTH = 2000
#: Unbounded repetitions that one match may go through; each multiplies the worst time by a name's length.
_MAX_REPEATS = 4


def is_cheap(pattern: str) -> bool:
    """Whether an expression can be matched against module names in little time, whatever the names.

    It must be short, no repetition may stand within another one, and few may follow each other.
    """
    if len(pattern) > _MAX_LENGTH:
        return False
    try:
        return _repeats(_parser.parse(pattern)) <= _MAX_REPEATS
    except (re.error, RecursionError, OverflowError, _Nested):
        return False


class _Nested(ValueError):
    """A repetition stands within another one."""


def _repeats(tree: Any) -> int:
    """How many unbounded repetitions one match can go through."""
    return sum(_of(operator, argument) for operator, argument in tree)


def _of(operator: Any, argument: Any) -> int:
    if operator in (_constants.MAX_REPEAT, _constants.MIN_REPEAT, getattr(_constants, "POSSESSIVE_REPEAT", None)):
        _, most, inner = argument
        within = _repeats(inner)
        if most <= 1:
            return within
        if within or _branches(inner):
            raise _Nested
        return 1
    if operator is _constants.BRANCH:
        return max(_repeats(branch) for branch in argument[1])
    inner_trees = [part for part in _flat(argument) if isinstance(part, _parser.SubPattern)]
    return sum(_repeats(part) for part in inner_trees)


def _branches(tree: Any) -> bool:
    """Whether there are alternatives below, which a repetition can try in every combination."""
    return any(
        operator is _constants.BRANCH or any(_branches(p) for p in _flat(argument) if isinstance(p, _parser.SubPattern))
        for operator, argument in tree
    )


def _flat(argument: Any) -> list[Any]:
    if isinstance(argument, (tuple, list)):
        return [part for item in argument for part in _flat(item)]
    return [argument]

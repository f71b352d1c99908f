"""Bound the time that untrusted regular expressions take to match.

PEFT matches expressions of a configuration, some with text around them, against every module name. Python's matcher
backtracks, and an expression can have exponentially many ways to match. The bound counts the ways from the parsed
expression alone:

- names have at most 128 characters;
- a repetition that can stop at several places has that many ways, and each way tries what follows;
- after a repetition, a literal text continues only where it occurs: a word of three letters or more at most 4 times in
  a name, anything shorter at most 16 times; of alternatives that are words, each once and 8 more in all.

Expressions without a computable bound (references to groups, repetitions of a part with several ways) are refused.
The bound is a count, so it is the same on every machine. Where the modules are known and all steps together might take
a noticeable time, the expressions are tried in a process that is stopped after a time limit, before PEFT gets them.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Iterable, Iterator, Mapping
from itertools import pairwise
from re import _constants, _parser  # type: ignore[attr-defined]
from typing import Any

from registry.errors import MachineError

__all__ = ["PatternTable", "find_costly", "find_slow", "is_cheap"]

_MAX_LENGTH = 2000
_NAME = 128
#: Steps for one name.
_BUDGET = 500_000.0
#: Steps for one name by all expressions of a configuration together.
_TOTAL = 10 * _BUDGET
#: Steps for all names of a model below which nothing is tried: less than a second on any machine.
_SURE = 1_000_000.0
#: Processor seconds, and seconds, after which an expression counts as endless.
_CPU_SECONDS, _SECONDS = 2, 30.0
#: Matches each expression with each name, and says which one it is at.
_TRIAL = """
import json, re, sys
try:
    import resource
    resource.setrlimit(resource.RLIMIT_CPU, (int(sys.argv[1]), int(sys.argv[1])))
except (ImportError, ValueError, OSError):
    pass
expressions, names = json.load(sys.stdin)
for index, expression in enumerate(expressions):
    print(index, flush=True)
    compiled = re.compile(expression)
    for name in names:
        compiled.match(name)
print("done", flush=True)
"""
#: How PEFT 0.21.2 embeds the text of a field (peft.utils.get_pattern_key, peft.tuners.tuners_utils).
_FORMS = {
    "alpha_pattern": r"(.*\.)?({})$",
    "layers_pattern": r"(?:^|.*?\.){}\.(?P<idx>\d+)\.",
    "modules_to_save": r"(^|.*\.){}($|\..*)",
    "rank_pattern": r"(.*\.)?({})$",
}
_TABLES = ("rank_pattern", "alpha_pattern")
#: An expression that is a name: its dots match any character, as in PEFT.
_NAME_ONLY = re.compile(r"[\w.]+", re.ASCII)
_REPEATS = (_constants.MAX_REPEAT, _constants.MIN_REPEAT, getattr(_constants, "POSSESSIVE_REPEAT", None))
_ONE_CHARACTER = (_constants.LITERAL, _constants.NOT_LITERAL, _constants.ANY, _constants.IN)


class PatternTable:
    """Values by expression, looked up as PEFT does: the first expression that matches a module's name counts.

    PEFT compares every name with every expression, which it compiles anew each time if there are many. Here names among
    the expressions are found without a comparison, however many there are.
    """

    def __init__(self, table: Mapping[str, Any]) -> None:
        self._keys, self._values = list(table), table
        #: Names among the keys by their length and the places of their dots, with their positions in the table.
        self._names: dict[int, dict[tuple[int, ...], dict[str, int]]] = {}
        self._others: list[tuple[int, re.Pattern[str]]] = []
        for position, key in enumerate(self._keys):
            if _NAME_ONLY.fullmatch(key):
                dots = tuple(place for place, char in enumerate(key) if char == ".")
                self._names.setdefault(len(key), {}).setdefault(dots, {})[key] = position
            else:
                self._others.append((position, re.compile(_FORMS["rank_pattern"].replace("{}", key))))

    def find(self, name: str, default: Any = None) -> Any:
        """Return the value for a module."""
        starts = [0, *(place + 1 for place, char in enumerate(name) if char == ".")]
        first = min(self._find_name(name[start:]) for start in starts)
        for position, expression in self._others:
            if position > first:
                break
            if expression.match(name):
                return self._values[self._keys[position]]
        return self._values[self._keys[first]] if first < len(self._keys) else default

    def group(self, names: Iterable[str]) -> dict[str, Any]:
        """Return a table with the same values for these modules that has one expression for each value."""
        groups: dict[Any, list[str]] = {}
        for name in names:
            if (value := self.find(name)) is not None:
                groups.setdefault(value, []).append(re.escape(name))
        return {rf"\A(?:{'|'.join(group)})": value for value, group in groups.items()}

    def _find_name(self, text: str) -> int:
        """Return the position of the first key that is this text; behind the last one if none is."""
        first = len(self._keys)
        for dots, keys in self._names.get(len(text), {}).items():
            characters = list(text)
            for place in dots:
                characters[place] = "."
            first = min(first, keys.get("".join(characters), first))
        return first


class _NotVouchedFor(ValueError):
    """An expression has no computable bound, or exceeds the budget."""


def is_cheap(pattern: str) -> bool:
    """Whether matching an expression is fast for every module name.

    Args:
        pattern: The expression as passed to `re`.
    """
    return _count_steps(pattern) <= _BUDGET


def find_costly(patterns: Iterable[tuple[str, str]]) -> tuple[str, str] | None:
    """Return the first expression of a configuration that may be slow, as field and text; ``None`` if there is none.

    Args:
        patterns: Field names and expressions, without the text that PEFT adds.
    """
    total = 0.0
    for field, text in patterns:
        # Check the text alone as well: an unbalanced parenthesis could close one that PEFT adds.
        total += max(_count_steps(text), _count_steps(_FORMS.get(field, "{}").replace("{}", text)))
        if total > _TOTAL or len(text) > _MAX_LENGTH:
            return field, text
    return None


def find_slow(patterns: Iterable[tuple[str, str]], names: Iterable[str]) -> tuple[str, str] | None:
    """Return the first expression that is slow to match with these names, as field and text; ``None`` without one.

    Args:
        patterns: Field names and expressions, without the text that PEFT adds.
        names: The names of a model's modules.

    Raises:
        MachineError: No process can be started.
    """
    # A name in a table is looked up, not matched; see `PatternTable`.
    asked = [(field, text) for field, text in patterns if field not in _TABLES or not _NAME_ONLY.fullmatch(text)]
    against = list(names)
    embedded = [_FORMS.get(field, "(?:{})$").replace("{}", text) for field, text in asked]
    if sum(map(_count_steps, embedded)) * len(against) <= _SURE:
        return None
    command = [sys.executable, "-I", "-c", _TRIAL, str(_CPU_SECONDS)]
    try:
        done = subprocess.run(  # noqa: S603 - our own interpreter and arguments
            command, input=json.dumps([embedded, against]).encode(), capture_output=True, timeout=_SECONDS
        )
        output = done.stdout
    except subprocess.TimeoutExpired as stopped:
        output = stopped.stdout or b"0"
    except OSError as error:
        raise MachineError(f"No process can be started to try the expressions of a configuration: {error}") from error
    last = output.decode("ascii").split()[-1:]
    return None if last == ["done"] else asked[int(last[0]) if last else 0]


def _count_steps(pattern: str) -> float:
    """Return an upper bound of the steps; infinity if the expression is malformed or has no bound."""
    if len(pattern) > _MAX_LENGTH + 100:
        return float("inf")
    try:
        bound = _Bound()
        bound.walk(_parser.parse(pattern))
    except (re.error, RecursionError, OverflowError, _NotVouchedFor):
        return float("inf")
    return bound.steps if bound.steps <= _BUDGET else float("inf")


class _Bound:
    """The number of ways in which a matcher can reach a place in an expression, and the steps taken.

    Attributes:
        ways: Ways up to the last repetition.
        places: Places at which that repetition can stop; 1 if no repetition is open.
        steps: Steps so far.
    """

    def __init__(self, ways: float = 1.0, places: float = 1.0) -> None:
        self.ways, self.places, self.steps = ways, places, 0.0

    @property
    def total(self) -> float:
        """All ways."""
        return self.ways * self.places

    def spend(self, each: float) -> None:
        """Count steps of every way."""
        self.steps += self.total * each
        if self.steps > _BUDGET:
            raise _NotVouchedFor

    def walk(self, tree: Any) -> None:
        """Add a sequence to the bound."""
        for operator, argument in _join_literals(tree):
            if isinstance(operator, str):
                self._walk_literal(operator)
            elif operator in _ONE_CHARACTER or operator is _constants.AT:
                self.spend(1)
            elif operator in _REPEATS:
                self._walk_repeat(*argument)
            elif operator is _constants.BRANCH:
                self._walk_branch(argument[1])
            elif operator is _constants.SUBPATTERN:
                self.walk(argument[-1])
            elif operator is getattr(_constants, "ATOMIC_GROUP", None):
                self.walk(argument)
            elif operator in (_constants.ASSERT, _constants.ASSERT_NOT):
                self.spend(_bound_part(argument[1])[1])
            else:
                raise _NotVouchedFor

    def _walk_literal(self, text: str) -> None:
        self.spend(1)
        if self.places > 1:
            self.ways, self.places = self.ways * min(self.places, _count_occurrences(text)), 1.0

    def _walk_repeat(self, least: Any, most: Any, tree: Any) -> None:
        if len(tree) == 1 and tree[0][0] in _ONE_CHARACTER:
            ways, steps, width = 1.0, 1.0, 1
        else:
            ways, steps = _bound_part(tree)
            width = tree.getwidth()[0]
        # A part that can match the empty text may be tried ``most`` times without advancing.
        longest = int(most) if width == 0 else min(int(most), _NAME // width)
        shortest = min(int(least), longest)
        if ways == 1:
            self.spend(longest * steps)
            if longest > shortest:
                self.ways, self.places = self.total, float(longest - shortest + 1)
            return
        # Several ways through the repeated part multiply with each repetition; they may end at the same place.
        every = sum(ways ** min(times, 64) for times in range(shortest, min(longest, 64) + 1))
        self.spend(longest * steps * ways ** min(longest - 1, 64))
        self.ways, self.places = self.total * every, 1.0

    def _walk_branch(self, branches: list[Any]) -> None:
        words = [_read_word(branch) for branch in branches]
        if self.places > 1 and all(words):
            found = min(sum(map(_count_occurrences, words)), 8 + len(words))
            self.spend(len(words))
            self.ways, self.places = self.ways * min(self.places, found), 1.0
            return
        total = 0.0
        for branch in branches:
            inner = _Bound(self.ways, self.places)
            inner.steps = self.steps
            inner.walk(branch)
            self.steps, total = inner.steps, total + inner.total
        if self.places == 1 and all(words) and not _is_prefix(words):
            total = self.ways  # at one place, at most one of these words matches
        self.ways, self.places = total, 1.0


def _bound_part(tree: Any) -> tuple[float, float]:
    """Return the ways and the steps of a part on its own."""
    bound = _Bound()
    bound.walk(tree)
    return bound.total, max(1.0, bound.steps)


def _join_literals(tree: Any) -> Iterator[tuple[Any, Any]]:
    """Yield the parts of a sequence, with consecutive characters joined into one text."""
    text = ""
    for operator, argument in tree:
        if operator is _constants.LITERAL:
            text += chr(argument)
            continue
        if text:
            yield text, None
        text = ""
        yield operator, argument
    if text:
        yield text, None


def _read_word(tree: Any) -> str | None:
    """Return the text of a part that is purely literal, else ``None``."""
    parts = list(_join_literals(tree))
    return parts[0][0] if len(parts) == 1 and isinstance(parts[0][0], str) else None


def _is_prefix(words: list[str | None]) -> bool:
    known = sorted(word for word in words if word is not None)
    return any(after.startswith(before) for before, after in pairwise(known))


def _count_occurrences(text: str | None) -> float:
    return 4.0 if text is not None and sum(char.isalpha() for char in text) >= 3 else 16.0

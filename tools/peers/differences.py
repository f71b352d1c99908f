"""Compare two runs of a suite, and read the differences that the documentation lists.

``docs/peers.md`` is the list: in its blocks of kind ``peers``, each line is the id of a test in which ``*`` stands for
anything.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

__all__ = ["Comparison", "compare", "read_listed"]

BLOCK = re.compile(r"^```peers\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def read_listed(page: str) -> list[str]:
    """Return the patterns of all blocks of the page, in their order."""
    lines = [line.strip() for block in BLOCK.findall(page) for line in block.splitlines()]
    return [line for line in lines if line]


def _matches(pattern: str, name: str) -> bool:
    return re.fullmatch(".*".join(re.escape(part) for part in pattern.split("*")), name) is not None


@dataclass(frozen=True)
class Comparison:
    """What the second run did with the tests that passed in the first one."""

    same: int
    #: Id -> error, for the differences that the list has.
    listed: Mapping[str, str]
    #: Id -> error, for the others.
    unlisted: Mapping[str, str]
    #: Patterns for tests that were run, none of which differs.
    stale: list[str]

    @property
    def agrees(self) -> bool:
        """Whether the list is exactly what was found."""
        return not self.unlisted and not self.stale


def compare(
    baseline: Mapping[str, Mapping[str, Any]], exchanged: Mapping[str, Mapping[str, Any]], listed: Iterable[str]
) -> Comparison:
    """Compare two runs, each a mapping from a test's id to its ``outcome`` and ``error``.

    A test that passed at first and is absent from the second run, because its process died, differs.
    """
    patterns = list(listed)
    passed = [name for name, test in baseline.items() if test["outcome"] == "passed" and test.get("lora")]
    absent = {"outcome": "absent", "error": "the process ended before or during this test"}
    outcomes = {name: exchanged.get(name, absent) for name in passed}
    different = {name: str(test["error"]) for name, test in outcomes.items() if test["outcome"] != "passed"}
    known = {name: error for name, error in different.items() if any(_matches(p, name) for p in patterns)}
    stale = [
        pattern
        for pattern in patterns
        if any(_matches(pattern, name) for name in passed) and not any(_matches(pattern, name) for name in known)
    ]
    unlisted = {name: error for name, error in different.items() if name not in known}
    return Comparison(same=len(passed) - len(different), listed=known, unlisted=unlisted, stale=stale)

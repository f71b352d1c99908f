"""Compare two runs of a suite, and read the differences that the documentation lists.

``docs/peers.md`` is the list: in its blocks of kind ``peers``, each line is the id of a test in which ``*`` stands for
anything.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

__all__ = ["Comparison", "choose_suspects", "compare", "read_listed"]

BLOCK = re.compile(r"^```peers\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def read_listed(page: str) -> list[str]:
    """Return the patterns of all blocks of the page, in their order."""
    lines = [line.strip() for block in BLOCK.findall(page) for line in block.splitlines()]
    return [line for line in lines if line]


def _matches(pattern: str, name: str) -> bool:
    return re.fullmatch(".*".join(re.escape(part) for part in pattern.split("*")), name) is not None


@dataclass(frozen=True)
class Comparison:
    """What the exchanged run did with the tests that call the function and pass, or are taken to pass, without us."""

    same: int
    #: How many fail without us too.
    failing: int
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


def choose_suspects(exchanged: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Return the ids of the tests that called the function and did not pass: only these can differ."""
    return [name for name, test in exchanged.items() if test.get("lora") and test["outcome"] != "passed"]


def compare(
    exchanged: Mapping[str, Mapping[str, Any]], baseline: Mapping[str, Mapping[str, Any]], listed: Iterable[str]
) -> Comparison:
    """Compare two runs, each a mapping from a test's id to its ``outcome``, ``error`` and calls (``lora``).

    Args:
        exchanged: The run with `prepare_model`.
        baseline: The run of the suspects as they are. A suspect that passes there, or is absent because the process
            ended, differs; one that does not pass there fails for another reason.
        listed: Patterns of differences that are known.
    """
    patterns = list(listed)
    called = [name for name, test in exchanged.items() if test.get("lora")]
    suspects = choose_suspects(exchanged)
    failing = {name for name in suspects if name in baseline and baseline[name]["outcome"] != "passed"}
    different = {name: str(exchanged[name]["error"]) for name in suspects if name not in failing}
    known = {name: error for name, error in different.items() if any(_matches(p, name) for p in patterns)}
    stale = [
        pattern
        for pattern in patterns
        if any(_matches(pattern, name) for name in called) and not any(_matches(pattern, name) for name in known)
    ]
    unlisted = {name: error for name, error in different.items() if name not in known}
    return Comparison(len(called) - len(suspects), len(failing), listed=known, unlisted=unlisted, stale=stale)

"""The fast tier: tests of functions that take less than `FAST_SECONDS` by the times in ``times.json``.

``make test`` runs them, ``make test-full`` the others. A test function that is not in the file is fast until
``make test-times`` has measured it.
"""

from __future__ import annotations

import json
from collections import defaultdict
from pathlib import Path

import pytest

__all__ = ["FAST_SECONDS", "TIMES", "function_of", "mark_full", "read_times"]

TIMES = Path(__file__).with_name("times.json")

#: Seconds that all cases of a test function may take together, with what they set up.
FAST_SECONDS = 2.0

_measured: defaultdict[str, float] = defaultdict(float)


def function_of(nodeid: str) -> str:
    """Return a test's id without the case: ``test_planning.py::test_fits[int8]`` is ``test_planning.py::test_fits``."""
    path, _, name = nodeid.partition("::")
    return f"{Path(path).name}::{name.partition('[')[0]}"


def read_times() -> dict[str, float]:
    """Return the seconds of each test function."""
    times: dict[str, float] = json.loads(TIMES.read_text(encoding="utf-8"))
    return times


def mark_full(items: list[pytest.Item]) -> None:
    """Give tests of the full tier their mark."""
    times = read_times()
    for item in items:
        if times.get(function_of(item.nodeid), 0.0) >= FAST_SECONDS:
            item.add_marker(pytest.mark.full)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--write-times", action="store_true", help="write what each test function took into times.json")


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    _measured[function_of(report.nodeid)] += report.duration


def pytest_sessionfinish(session: pytest.Session) -> None:
    # Processes of pytest-xdist report to the first one.
    if session.config.getoption("--write-times") and not hasattr(session.config, "workerinput"):
        times = {name: round(seconds, 2) for name, seconds in sorted(_measured.items())}
        TIMES.write_text(json.dumps(times, indent=0) + "\n", encoding="utf-8")

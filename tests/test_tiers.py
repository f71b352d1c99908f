"""The two tiers together are all tests, and what is measured exists."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest
from tiers import FAST_SECONDS, function_of, read_times

HERE = Path(__file__).parent


def test_a_function_is_its_file_class_and_name() -> None:
    assert function_of("tests/test_a.py::test_b[c::d-[x]]") == "test_a.py::test_b"
    assert function_of("/srv/tests/test_a.py::TestA::test_b") == "test_a.py::TestA::test_b"


def test_most_functions_are_measured_and_most_are_fast() -> None:
    times = read_times()
    named = {
        f"{file.name}::{node.name}"
        for file in HERE.glob("test_*.py")
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8")))
        if isinstance(node, ast.FunctionDef) and node.name.startswith("test_")
    }
    measured = {f"{name.split('::')[0]}::{name.rpartition('::')[2]}" for name in times}
    gone = measured - named
    assert len(gone) < 0.1 * len(measured), f"run `make test-times`: {sorted(gone)[:5]} are not there any more"
    assert len(measured & named) > 0.7 * len(named), "run `make test-times`: many tests are new"
    assert sum(seconds < FAST_SECONDS for seconds in times.values()) > 0.6 * len(times)


def test_the_mark_follows_the_times(request: pytest.FixtureRequest) -> None:
    times = read_times()
    for item in request.session.items:
        slow = times.get(function_of(item.nodeid), 0.0) >= FAST_SECONDS
        assert (item.get_closest_marker("full") is not None) == slow, item.nodeid


def test_ci_runs_both_tiers() -> None:
    commands = (HERE.parent / ".ci" / "run").read_text(encoding="utf-8").split("\n")
    assert {"make test", "make test-full"} <= set(commands)
    makefile = (HERE.parent / "Makefile").read_text(encoding="utf-8")
    assert '-m "not slow and not full"' in makefile
    assert '-m "full and not slow"' in makefile

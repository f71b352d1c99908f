"""The comparison of peers' test suites with ours: what counts as a difference, and that calls are exchanged."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import peft
import pytest
import tiny

from lora_plugins.adapters.records import preparation_of

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "tools"))

from peers import exchange  # noqa: E402
from peers.data import KINDS, load_local  # noqa: E402
from peers.differences import choose_suspects, compare, read_listed  # noqa: E402


def outcomes(**tests: str) -> dict[str, dict[str, Any]]:
    return {f"tests/test_a.py::test_{name}": {"outcome": what, "error": "E", "lora": 1} for name, what in tests.items()}


BASELINE = outcomes(two="passed", three="failed")


def test_a_test_that_fails_only_with_us_is_a_difference() -> None:
    found = compare(outcomes(one="passed", two="failed"), BASELINE, [])
    assert (found.same, list(found.unlisted), found.agrees) == (1, ["tests/test_a.py::test_two"], False)


def test_a_test_that_is_skipped_only_with_us_is_a_difference() -> None:
    assert list(compare(outcomes(one="passed", two="skipped"), BASELINE, []).unlisted) == ["tests/test_a.py::test_two"]


def test_a_test_that_fails_without_us_too_is_no_difference() -> None:
    found = compare(outcomes(one="passed", three="failed"), BASELINE, [])
    assert (found.same, found.failing, found.agrees) == (1, 1, True)


def test_a_failing_test_that_was_not_run_without_us_is_a_difference() -> None:
    assert list(compare(outcomes(one="failed"), BASELINE, []).unlisted) == ["tests/test_a.py::test_one"]


def test_only_what_failed_is_run_without_us() -> None:
    tests = {
        **outcomes(one="passed", two="failed", three="skipped"),
        "tests/test_a.py::test_four": {"outcome": "failed"},
    }
    assert choose_suspects(tests) == ["tests/test_a.py::test_two", "tests/test_a.py::test_three"]


def test_listed_differences_agree() -> None:
    found = compare(outcomes(one="passed", two="failed"), BASELINE, ["tests/test_a.py::*_two"])
    assert (list(found.listed), found.agrees) == (["tests/test_a.py::test_two"], True)


def test_a_listed_test_that_is_the_same_is_stale() -> None:
    found = compare(outcomes(one="passed", two="passed"), BASELINE, ["tests/test_a.py::*_two"])
    assert (found.stale, found.agrees) == (["tests/test_a.py::*_two"], False)


def test_a_listed_test_that_was_not_run_is_not_stale() -> None:
    assert compare(outcomes(one="passed", two="passed"), BASELINE, ["tests/test_b.py::*"]).agrees


def test_brackets_in_a_listed_name_are_plain_text() -> None:
    found = compare(
        outcomes(**{"one[a-b]": "failed"}), outcomes(**{"one[a-b]": "passed"}), ["tests/test_a.py::test_one[*]"]
    )
    assert (len(found.listed), found.agrees) == (1, True)


def test_tests_that_call_no_lora_are_not_compared() -> None:
    alone = {name: {**test, "lora": 0} for name, test in outcomes(one="failed", two="passed").items()}
    found = compare(alone, {}, [])
    assert (found.same, found.agrees) == (0, True)


def test_every_listed_difference_names_a_file_that_is_run() -> None:
    from peers.run import PEFT, TRL

    listed = read_listed((ROOT / "docs" / "peers.md").read_text(encoding="utf-8"))
    known = {f"tests/{name}.py" for name in (*PEFT.files, *TRL.files)}
    assert listed
    assert {line.partition("::")[0] for line in listed} <= known
    assert len(listed) == len(set(listed))


def test_calls_are_exchanged_and_counted() -> None:
    before = dict(exchange.CALLS)
    model = exchange._make_counter(True)(tiny.llama(), peft.LoraConfig(target_modules=["q_proj"]))
    assert preparation_of(model) is not None
    model = exchange._make_counter(False)(tiny.llama(), peft.LoraConfig(target_modules=["q_proj"]))
    assert preparation_of(model) is None
    assert {"lora": before["lora"] + 2, "exchanged": before["exchanged"] + 1} == exchange.CALLS


def test_other_methods_stay_with_peft() -> None:
    before = dict(exchange.CALLS)
    model = exchange._make_counter(True)(
        tiny.llama(), peft.IA3Config(target_modules=["k_proj"], feedforward_modules=[])
    )
    assert isinstance(model, peft.PeftModel)
    assert before == exchange.CALLS


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("style", ["standard", "conversational"])
def test_local_data_have_both_splits(style: str, kind: str) -> None:
    data = load_local("trl-internal-testing/zen", f"{style}_{kind}")
    assert (len(data["train"]), len(data["test"])) == (17, 2)


def test_other_data_sets_are_an_error() -> None:
    with pytest.raises(LookupError, match="somebody/else"):
        load_local("somebody/else", "standard_preference")

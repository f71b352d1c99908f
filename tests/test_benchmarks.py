"""The page of the benchmarks is made of their results; how growth and ratios are worked out."""

from __future__ import annotations

import argparse
import importlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from statistics import geometric_mean
from types import ModuleType
from typing import Any

import pytest

ROOT = Path(__file__).parent.parent


@pytest.fixture(autouse=True)
def _programs_can_be_imported(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    before = set(sys.modules)
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    yield
    for name in ("page", "measure", "scaling", "defaults", "pretrained"):
        if name not in before:
            sys.modules.pop(name, None)


def module(name: str) -> ModuleType:
    return importlib.import_module(name)


def machine() -> dict[str, Any]:
    hardware = {"cpu": "a CPU", "cores": 2, "flags": ["avx2"], "memory_gib": 8, "gpu": None, "python": "3.11"}
    return {"hardware": hardware, "versions": {"torch": "2"}, "command": "python benchmarks/training.py"}


def training() -> dict[str, Any]:
    def row(memory: float, *rounds: float) -> dict[str, Any]:
        mean = geometric_mean(rounds)
        return {
            "tokens_per_second": 1000 / mean,
            "step_seconds": mean,
            "round_seconds": list(rounds),
            "step_range": [1.0, 2.0],
            "step_cpu_seconds": 3.0,
            "peak_mib": memory,
            "callback_share": 0.004,
        }

    return {
        **machine(),
        "settings": {
            "r": 8, "lora_alpha": 32, "lora_dropout": 0.05, "targets": ["q", "v"], "batch": 4, "length": 256,
            "rounds": 2, "steps": 5, "loss_steps": 60, "float": "bfloat16",
        },
        "speed": {"recipe-int8": row(3000, 10, 20), "ours-int8": row(1200, 4, 2), "ours-nf4": row(1100, 5, 10)},
        "learning": {"recipe-int8": {"held_out": 2.0}, "ours-int8": {"held_out": 2.01}},
    }  # fmt: skip


def test_committed_page_is_what_the_results_give() -> None:
    results = json.loads((ROOT / "docs" / "benchmarks.json").read_text(encoding="utf-8"))
    page = (ROOT / "docs" / "benchmarks.md").read_text(encoding="utf-8")
    assert page == module("page").render(results), "run python benchmarks/page.py"
    planning = (ROOT / "docs" / "planning.md").read_text(encoding="utf-8")
    assert planning == module("page").with_plan(planning, results), "run python benchmarks/page.py"


def test_committed_plans_hold() -> None:
    rows = json.loads((ROOT / "docs" / "benchmarks.json").read_text(encoding="utf-8"))["plan_memory"]["rows"]
    assert {row["base"] for row in rows} >= {"float32", "bfloat16", "int8-float32", "nf4-float32"}
    for row in rows:
        predicted, found = row["predicted"], row["measured"]
        for exact in ("weights", "gradients", "optimizer", "quantized_share"):
            assert predicted[exact] == found[exact], row
        assert predicted["peak"] == pytest.approx(found["peak"], rel=0.1), row


def test_ratios_are_worked_out_round_by_round(tmp_path: Path) -> None:
    text = module("page").render({"training": training()})
    assert "tokens a second, int8 against the recipe: 5.00 (2.50, 10.00)" in text
    assert "| lora-plugins, int8 | 354 | 5.00 |" in text
    assert "memory, int8 against the recipe: 0.40" in text
    assert "seconds, nf4 against int8: 2.50 (1.25, 5.00)" in text
    assert "| lora-plugins, int8 | 2.0100 | +0.50 % |" in text
    assert "the callback's own time: 0.40 % of a step" in text
    assert "TRL in int8:" not in text, "what was not measured is left out"
    assert "`python benchmarks/scaling.py --write` puts it here" in text
    module("page").chart(training(), tmp_path / "chart.svg")
    assert "lora-plugins, nf4" in (tmp_path / "chart.svg").read_text(encoding="utf-8")


def test_speeds_are_compared_within_a_round() -> None:
    """A machine that is slower in one round is so for both."""
    faster = module("page").times_faster
    assert faster({"round_seconds": [1.0, 4.0]}, {"round_seconds": [2.0, 8.0]}) == [2, 2]
    assert faster({"round_seconds": [1.0, 4.0]}, {"round_seconds": [2.0, 2.0]}) == [2, 0.5]
    with pytest.raises(ValueError, match="zip"):
        faster({"round_seconds": [1.0]}, {"round_seconds": [2.0, 2.0]})


def test_growth_is_told_in_stretches() -> None:
    series = [
        {"value": 1, "growth": None},
        {"value": 2, "growth": 1.05},
        {"value": 4, "growth": 0.9},
        {"value": 8, "growth": 1.4},
    ]
    told = module("scaling").findings({"batch": series})
    assert told == ["batch: linear from 1 to 4, then more than linear from 4 to 8"]


# -- the table of defaults -----------------------------------------------------------------------


def defaults_row(targets: str, loss: float, **fields: Any) -> dict[str, Any]:
    row = {"model": "SmolLM2-135M", "text": "manual", "rank": 8, "rate": 1e-3, "seconds": 20, "steps": 9, "first": 3.5}
    row |= {"step_cpu_seconds": 1.1, "peak": 2**30, "trainable": 460_800, "modules": ["q_proj", "v_proj"]}
    return {**row, "targets": targets, "loss": loss, **fields}


def defaults(*rows: dict[str, Any]) -> dict[str, Any]:
    hardware = {**machine()["hardware"], "threads": 1}
    settings = {"batch": 1, "length": 64, "held_out": 12, "seconds": 20.0, "seed": 42}
    return {**machine(), "hardware": hardware, "settings": settings, "rows": list(rows)}


def test_the_best_of_each_choice_of_targets_is_shown_over_ranks_and_rates() -> None:
    rows = [
        defaults_row("default", 3.2),
        defaults_row("default", 3.1, rate=2e-3),
        defaults_row("all-linear", 3.05, rank=2),
        defaults_row("all-linear", 3.15),
    ]
    text = "\n".join(module("page").defaults_section(defaults(*rows)))
    assert "| SmolLM2-135M | manual | 20 | 3.5000 | 3.1000 (r=8, 0.002) | **3.0500** (r=2, 0.001) |" in text
    assert "default (q_proj, v_proj) | 8 | 0.002 | 460,800 | 1.100 | 9 | 3.5000 | 3.1000 | 1024 |" in text
    assert "This table has 1 text and 1 model." in text


def test_rows_can_be_added_and_take_the_place_of_the_same_combination(monkeypatch: pytest.MonkeyPatch) -> None:
    program = module("defaults")
    known = defaults(defaults_row("default", 3.2), defaults_row("all-linear", 3.1))
    monkeypatch.setattr(program, "recorded", lambda: {"defaults": known})
    monkeypatch.setattr(program, "hardware", lambda: known["hardware"])
    monkeypatch.setattr(program, "versions", lambda: known["versions"])
    monkeypatch.setattr(sys, "argv", ["defaults.py", "--add"])
    options = argparse.Namespace(add=True, **known["settings"])
    put = program.put_together(options, [defaults_row("all-linear", 3.0), defaults_row("attention", 3.3)])
    assert [(row["targets"], row["loss"]) for row in put["rows"]] == [
        ("default", 3.2),
        ("all-linear", 3.0),
        ("attention", 3.3),
    ]
    assert put["command"].endswith(" && python benchmarks/defaults.py --add")
    alone = program.put_together(argparse.Namespace(**{**vars(options), "add": False}), [])
    assert alone["rows"] == []


@pytest.mark.parametrize("other", [{"length": 128}, {"seconds": 60.0}, {"seed": 7}, {"batch": 2}, {"held_out": 8}])
def test_rows_of_other_settings_are_not_put_into_one_table(
    other: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    program = module("defaults")
    known = defaults(defaults_row("default", 3.2))
    for name, value in {
        "recorded": {"defaults": known},
        **{key: known[key] for key in ("hardware", "versions")},
    }.items():
        monkeypatch.setattr(program, name, lambda value=value: value)
    options = {"add": True, **known["settings"]}
    assert len(program.put_together(argparse.Namespace(**options), [])["rows"]) == 1
    with pytest.raises(SystemExit, match="of other settings"):
        program.put_together(argparse.Namespace(**{**options, **other}), [])


# -- the models that are made for it ---------------------------------------------------------------


@pytest.mark.parametrize("seconds", ["0", "-1", "nan", "inf", "soon"])
def test_a_model_is_not_trained_for_no_time(
    seconds: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["pretrained.py", "gpt2", "folder", f"--seconds={seconds}"])
    monkeypatch.setattr(module("pretrained"), "pretrain", lambda *given: pytest.fail(f"trains {given}"))
    with pytest.raises(SystemExit) as end:
        module("pretrained").main()
    assert end.value.code == 2
    assert f"argument --seconds: must be a number above zero, not {seconds!r}" in capsys.readouterr().err


def test_what_the_page_calls_the_small_gpt2_is_its_size() -> None:
    model = module("pretrained").make_model("gpt2", 0)
    assert round(sum(one.numel() for one in model.parameters()), -5) == 1_100_000
    described = module("page").DEFAULTS_MODELS["GPT-2-1M"]
    assert "1.1 million weights" in described
    assert "python benchmarks/pretrained.py gpt2 GPT-2-1M" in described


def test_what_a_small_model_was_trained_on_is_one_line_without_a_comma_at_its_end() -> None:
    line = module("pretrained").describe(1_000, [4.0, 2.0])
    assert line == "1,000 weights, 2 steps of 8 x 128 tokens, loss of the last 2 steps 3.000"

"""The program for one GPU works before a card is there: every part runs here with tiny shapes."""

from __future__ import annotations

import copy
import importlib
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parent.parent
SETTINGS = ["2x16", "1x32", "2x16+checkpointing", "1x32+checkpointing"]


@pytest.fixture
def parts(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    before = set(sys.modules)
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    yield importlib.import_module("gpu_parts")
    for name in ("page", "measure", "gpu", "gpu_parts"):
        if name not in before:
            sys.modules.pop(name, None)


@pytest.mark.parametrize(
    ("shape", "backend"),
    [("bloomz-7b1", "int8"), ("bloomz-7b1", "nf4"), ("llama-3.1-8b", "float"), ("qwen3-30b-a3b", "int8")],
)
def test_every_way_of_computing_agrees(shape: str, backend: str, parts: Any) -> None:
    found = parts.check_backend(shape, backend, tiny=True)
    assert len(found["checks"]) == 9
    assert [check for check in found["checks"] if not check["holds"]] == []


def test_a_branch_that_computes_something_else_is_found(parts: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from lora_plugins.adapters import fused

    forward = fused.LoraBranch.forward
    monkeypatch.setattr(fused.LoraBranch, "forward", staticmethod(lambda *args: forward(*args) * 1.01))
    checks = parts.check_backend("bloomz-7b1", "float", tiny=True)["checks"]
    assert not next(check for check in checks if check["name"] == "fused branch against PEFT's: gradients")["holds"]


@pytest.mark.parametrize(
    "contender", ["recipe-int8", "peft-bf16", "ours-int8", "ours-int8-lean", "ours-nf4", "ours-bf16"]
)
def test_every_contender_is_measured_in_every_setting(contender: str, parts: Any) -> None:
    found = parts.measure_contender("bloomz-7b1", contender, tiny=True, steps=2)
    # Two layers of width 64: 8 x (64 + 192) weights each.
    assert found["trainable"] == 2 * 8 * (64 + 192)
    assert list(found["settings"]) == SETTINGS
    for setting in found["settings"].values():
        assert len(setting["seconds"]) == 2
        assert setting["allocated"] > 100_000


def test_the_plan_is_what_is_measured(parts: Any) -> None:
    planned = parts.predict("bloomz-7b1", tiny=True)
    measured = parts.measure_contender("bloomz-7b1", "ours-int8", tiny=True, steps=1)["settings"]
    for name in SETTINGS:
        assert planned["ours-int8"][name] == pytest.approx(measured[name]["allocated"], rel=0.05), name


def test_published_counts_are_those_of_the_shape(parts: Any) -> None:
    from lora_plugins import plan

    made = plan(parts.make_config("bloomz-7b1", tiny=False), length=8, dtype="bfloat16", **parts.LORA)
    assert (made.trainable, made.total) == parts.PUBLISHED["bloomz-7b1"] == (3_932_160, 7_072_948_224)


@pytest.fixture
def results(parts: Any) -> dict[str, Any]:
    """What the program would have found on a card."""
    gpu = importlib.import_module("gpu")
    second = {"seconds": [2.0, 4.0, 3.0], "allocated": 10 * 2**30, "reserved": 12 * 2**30}
    fast = {"seconds": [1.0, 1.5, 2.0], "allocated": 8 * 2**30, "reserved": 9 * 2**30}

    def speed(name: str, setting: dict[str, Any]) -> Any:
        counts = {"trainable": 3_932_160, "total": 7_072_948_224, "prepared": 9.0}
        settings = {"4x512": setting, "1x2048": {"error": "out of memory: tried 3 GiB"}}
        return gpu.Job("speed", "bloomz-7b1", name), {**counts, "settings": settings}

    checks = [{"name": "fused", "found": 0.5, "limit": 0.03, "holds": False}]
    done = [
        *(speed(name, setting) for name, setting in (("recipe-int8", second), ("ours-int8", fast)) * 2),
        (gpu.Job("right", "bloomz-7b1", "int8"), {"backend": "int8", "checks": checks}),
        (gpu.Job("plan", "bloomz-7b1", ""), {"ours-int8": {"4x512": 8 * 2**30 + 2**28}}),
        (gpu.Job("speed", "bloomz-7b1", "ours-nf4"), {"error": "RuntimeError: no kernel"}),
    ]
    hardware = {"cpu": "a CPU", "cores": 2, "flags": ["avx2"], "memory_gib": 8, "gpu": "a card", "python": "3.11"}
    return {
        "command": "python benchmarks/gpu.py",
        "hardware": hardware,
        "versions": {"torch": "2"},
        "settings": {"tiny": False, "rounds": 2, "steps": 3, "minutes": 8.0, "r": 8, "lora_alpha": 32},
        "shapes": gpu.summarize(done),
        "left_out": ["speed qwen3-30b-a3b ours-nf4"],
    }


def test_the_page_shows_what_was_found(results: dict[str, Any]) -> None:
    text = importlib.import_module("page").render({"gpu": results})
    assert "| 4x512 | lora-plugins, int8 | 1365 | 2.00 (2.00, 2.00) | 8.000 | 9.000 | 8.250 | +3.1 % |" in text
    assert "| 1x2048 | the recipe, int8 | out of memory: tried 3 GiB |" in text
    assert "- lora-plugins, int8: 3,932,160 of 7,072,948,224 weights trained" in text
    assert "| fused | 5.0e-01 (3e-02) **wrong** |" in text
    assert "- left out, time was up: speed qwen3-30b-a3b ours-nf4" in text
    assert "a card" in text
    assert "GPUs. There was none" not in text


def test_what_is_not_right_ends_the_program_with_an_error(results: dict[str, Any]) -> None:
    find_failures = importlib.import_module("gpu").find_failures
    assert find_failures(results) == [
        "bloomz-7b1: speed ours-nf4: RuntimeError: no kernel",
        "bloomz-7b1, int8: fused is 0.5, above 0.03",
    ]
    other = copy.deepcopy(results)
    other["shapes"]["bloomz-7b1"]["speed"]["ours-int8"]["trainable"] = 4_915_200
    assert "4,915,200 of 7,072,948,224 trained, not as published" in find_failures(other)[-1]


def test_time_that_is_up_leaves_out_the_rest(parts: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = importlib.import_module("gpu")
    now = [0.0]

    def run_child(script: Path, arguments: list[str]) -> dict[str, Any]:
        now[0] += 60.0
        return {"checks": []}

    monkeypatch.setattr(gpu, "run_child", run_child)
    monkeypatch.setattr(gpu.time, "monotonic", lambda: now[0])
    done, left = gpu.run_jobs(gpu._parse(["--minutes", "8"]))
    assert 60 * len(done) <= 480
    assert len(done) + len(left) == 6 + 4 + 1 + 6 + 2 * (6 + 1 + 4)


def test_without_a_gpu_the_program_says_so(parts: Any, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    gpu = importlib.import_module("gpu")
    monkeypatch.setattr(gpu, "hardware", lambda: {"gpu": None})
    assert gpu.main([]) == 2
    assert "Use --tiny" in capsys.readouterr().err


@pytest.mark.slow
def test_the_whole_program_runs_in_tiny(tmp_path: Path) -> None:
    """Fifteen processes, from a folder of its own."""
    file = tmp_path / "results.json"
    program = [sys.executable, str(ROOT / "benchmarks" / "gpu.py"), "--tiny", "--rounds", "1", "--minutes", "60"]
    command = [*program, "--shapes", "bloomz-7b1", "--json", str(file)]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "### bloomz-7b1" in done.stdout
    results = json.loads(file.read_text(encoding="utf-8"))
    found = results["shapes"]["bloomz-7b1"]
    assert set(found["plan"]) == {"ours-int8", "ours-nf4", "ours-bf16"}
    assert len(found["speed"]) == 6
    assert results["left_out"] == []

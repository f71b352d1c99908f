"""What `plan` predicts against real training steps: small models here, SmolLM2 in processes of its own."""

from __future__ import annotations

import importlib
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import tiny

from lora_plugins.commands.demo.model import demo_model
from lora_plugins.errors import DemoError

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"


@pytest.fixture
def benchmark(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module("plan_memory")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A model of nine blocks: most of them are left out of the step that is simulated."""
    path = tmp_path_factory.mktemp("plan") / "base"
    sizes = {"hidden_size": 64, "intermediate_size": 160, "vocab_size": 1024, "max_position_embeddings": 128}
    tiny.llama(9, **sizes).save_pretrained(path)
    return str(path)


def assert_holds(benchmark: ModuleType, predicted: Any, found: Any) -> None:
    """All that was predicted holds, and so does the part of the peak that is no weight and no optimizer state."""
    assert benchmark.failures(predicted, found) == []
    # Gradients count for the whole step and are not all there at its peak.
    assert -0.05 * found.activations < predicted.peak - found.peak < found.gradients + 0.05 * found.activations


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize(
    "base", ["float32", "bfloat16", "int8-float32", "int8-bfloat16", "nf4-float32", "nf4-bfloat16"]
)
def test_small_step_takes_what_was_planned(benchmark: ModuleType, folder: str, base: str, checkpointing: bool) -> None:
    for batch_size, length in ((2, 100), (5, 64)):
        case = benchmark.Case(base, checkpointing, batch_size, length)
        assert_holds(benchmark, benchmark.predict(folder, case), benchmark.run(folder, case))


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_steps_of_smollm2_take_what_was_planned(benchmark: ModuleType) -> None:
    try:
        model = str(demo_model())
    except DemoError as error:
        pytest.skip(f"the demo's model is not here: {error}")
    cases = [
        benchmark.Case("float32", False, 2, 112),
        benchmark.Case("float32", True, 1, 200),
        benchmark.Case("int8-float32", True, 2, 112),
        benchmark.Case("nf4-float32", False, 1, 200),
        benchmark.Case("bfloat16", False, 1, 40),
        benchmark.Case("int8-bfloat16", False, 2, 24),
        benchmark.Case("nf4-bfloat16", True, 2, 24),
    ]
    for _, predicted, found in benchmark.compare(model, cases):
        assert_holds(benchmark, predicted, found)
        # The process held at least the tensors that were counted.
        assert found.resident_rise > found.peak - found.weights

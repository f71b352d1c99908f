"""Starting tests/engine_run.py under a launcher, reading what its ranks wrote, comparing it with one process."""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import peft
import pytest
import tiny
from safetensors.torch import load_file

from lora_plugins import plan, prepare_model
from lora_plugins.quantization.counting import count_parameters

SCRIPT = Path(__file__).with_name("engine_run.py")

#: Ways to start processes; each is followed by the script.
ALONE = [sys.executable]
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--standalone"]
ACCELERATE = [
    *(sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes=2"),
    *("--num_machines=1", "--mixed_precision=no", "--dynamo_backend=no", "--main_process_port=0"),
]

#: Elements of the tiny model with its adapters.
ELEMENTS = 25_632

#: What each rank wrote, by case.
Results = dict[str, list[dict[str, Any]]]


def launch(
    folder: Path, launcher: list[str], settings: dict[str, Any], environment: dict[str, str] | None = None
) -> Results:
    """Run the script to its end; every case of every rank must have written something."""
    folder.mkdir(parents=True, exist_ok=True)
    command = [*launcher, str(SCRIPT), str(folder), json.dumps(settings)]
    # Extensions are compiled by programs of this environment.
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    own = {"PATH": path, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TMPDIR": str(folder), **(environment or {})}
    done = subprocess.run(command, env={**os.environ, **own}, capture_output=True, text=True, timeout=500, check=False)
    assert done.returncode == 0, (done.stderr or done.stdout)[-4000:]
    ranks = 1 if launcher is ALONE else 2
    return {
        case: [json.loads((folder / case / f"rank{rank}.json").read_text()) for rank in range(ranks)]
        for case in settings["cases"]
    }


def assert_same_run(
    ranks: list[dict[str, Any]], one: dict[str, Any], *, resumed: bool = True, trained: int = 8
) -> None:
    """Every rank has the losses, the start and the end of the single process."""
    assert len(one["losses"]) == 6
    # LLM.int8() rounds activations in an evaluation: where a sum in another order lies on the other side of a step,
    # the last digit of a float becomes one of 8 bits.
    tolerance = 2e-5 if one["two_kernels"] else 2e-6
    for rank in ranks:
        assert rank["processes"] == rank["world_size"] == 2
        assert rank["losses"] == pytest.approx(one["losses"], abs=2e-6)
        assert rank["eval"] == pytest.approx(one["eval"], abs=tolerance)
        assert rank["norms"] == pytest.approx(one["norms"], rel=1e-4)
        assert rank["adapter"] == one["adapter"] == trained
        assert rank["predicted"] == one["predicted"]
        assert rank["generated"] == 5
        if resumed:
            assert rank["resumed"] == rank["losses"]
    starts = [list(rank["start"].values()) for rank in (*ranks, one)]
    assert starts[0] == starts[1] == starts[2], "the adapter starts with the same values, whatever was drawn before"
    assert ranks[0]["best_adapter"] == ranks[1]["best_adapter"]


def assert_detached(ranks: list[dict[str, Any]]) -> None:
    """`detach` gave back the base on every rank: whole, without the engine, and fit to be trained again."""
    for rank in ranks:
        found = rank["detached"]
        assert not found["adapters"]
        assert not found["sharded"]
        assert found["in_trainer"]
        assert found["classes"] == found["plain_classes"]
        assert found["same_weights"]
        assert found["difference"] == 0
        assert found["again"] == pytest.approx(rank["losses"], abs=2e-6)


def assert_counts(ranks: list[dict[str, Any]], quantization: Any = None, **lora: Any) -> None:
    """Every rank counts the weights of the whole model, whatever part of them it holds and however they are packed."""
    plain = prepare_model(tiny.llama(), r=4, compute_dtype="float32", quantization=quantization, **lora)
    in_float = count_parameters(prepare_model(tiny.llama(), r=4, compute_dtype="float32", **lora))
    expected = count_parameters(plain)
    assert (expected.trainable, expected.total) == (in_float.trainable, in_float.total)
    for rank in ranks:
        assert rank["counts"] == asdict(expected)


def assert_held(rank: dict[str, Any], strategy: str, quantization: Any = None, **lora: Any) -> None:
    """A rank holds what the plan says, to the byte, and the report on it says the same."""
    memory = _make_plan(strategy, json.dumps(quantization), json.dumps(lora)).chosen.memory
    held = rank["held"]
    assert held["weights"] == memory.weights == rank["reported"]
    assert held["gradients"] == memory.gradients
    if strategy == "fsdp":
        assert held["gathered"] == memory.communication
    assert held["optimizer"] + held["copies"] == memory.optimizer


@functools.cache
def _make_plan(strategy: str, quantization: str, lora: str) -> Any:
    return plan(
        tiny.llama(),
        r=4,
        compute_dtype="float32",
        quantization=json.loads(quantization),
        strategy=strategy,
        devices=2,
        batch_size=4,
        length=tiny.LENGTH,
        **json.loads(lora),
    )


def assert_divided(ranks: list[dict[str, Any]], one: dict[str, Any]) -> None:
    """Each rank holds its part of the quantized layers, scales and tables included, and nobody was warned."""
    for rank in ranks:
        assert 0.5 <= rank["held"]["quantized"] / one["held"]["quantized"] <= 0.55
        assert rank["warnings"] == []
        assert rank["local"] == rank["elements"] // 2


def assert_files(
    folder: Path, rank: dict[str, Any], name: str = "default", best_checkpoint: str = "checkpoint-2"
) -> None:
    """Checkpoints are whole, the best one is what the model holds, and PEFT loads it."""
    place = "" if name == "default" else name
    assert rank["best"] == best_checkpoint
    for part in ("checkpoint-2", "checkpoint-4", "checkpoint-6", "saved"):
        stored = load_file(folder / part / place / "adapter_model.safetensors")
        assert len(stored) == 8
        for key, tensor in stored.items():
            out = 32 if "q_proj" in key else 16
            assert tuple(tensor.shape) == ((4, 32) if "lora_A" in key else (out, 4)), key
    best = load_file(folder / best_checkpoint / place / "adapter_model.safetensors")
    live = {key.replace(f".{name}", ""): value for key, value in rank["best_adapter"].items()}
    assert {key: tensor.double().flatten().tolist() for key, tensor in best.items()} == live
    last = load_file(folder / "checkpoint-6" / place / "adapter_model.safetensors")
    assert all(not tensor.equal(last[key]) for key, tensor in best.items())
    reloaded = peft.PeftModel.from_pretrained(tiny.llama(), folder / "saved" / place)
    values = peft.get_peft_model_state_dict(reloaded)
    assert all(values[key].equal(tensor) for key, tensor in best.items())


def assert_conflict(ranks: list[dict[str, Any]], name: str = "default") -> None:
    """Every rank is told that a checkpoint is of another run, and by what."""
    assert len(ranks) == 2
    for rank in ranks:
        assert "is of another run" in rank["conflict"]
        assert f"{name}: lora_alpha was 32 and is 64" in rank["conflict"]
        assert "seed was 7 and is 8" in rank["conflict"]

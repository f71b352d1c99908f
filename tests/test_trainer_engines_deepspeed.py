"""DeepSpeed for real: ZeRO-2 and ZeRO-3 in two processes against one process on the same global batch."""

from __future__ import annotations

import json
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import tiny
from launching import (
    ALONE,
    ELEMENTS,
    TORCHRUN,
    Results,
    assert_conflict,
    assert_counts,
    assert_detached,
    assert_divided,
    assert_files,
    assert_held,
    assert_same_run,
    launch,
)

pytestmark = [
    pytest.mark.skipif(find_spec("deepspeed") is None, reason="deepspeed is not installed; run `make test-engines`"),
    # The first run compiles how processes of one machine talk to each other.
    pytest.mark.timeout(900),
]

#: Backends whose layers ZeRO-3 divides.
DIVIDED: dict[str, Any] = {"nf4": "nf4", "fp4": "fp4", "double": {"name": "nf4", "double_quant": True}}

ENVIRONMENT = {"DS_ACCELERATOR": "cpu"}


def configuration(stage: int) -> dict[str, Any]:
    """What people write into the JSON file; with the usual threshold nothing of so small a model is divided."""
    return {
        "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0},
        "zero_allow_untested_optimizer": True,
        "train_batch_size": "auto",
        "train_micro_batch_size_per_gpu": "auto",
        "gradient_accumulation_steps": "auto",
    }


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("deepspeed")
    tiny.llama().save_pretrained(path / "base")
    return path


@pytest.fixture(scope="module")
def alone(folder: Path) -> Results:
    cases: dict[str, Any] = {"fp32": {}, "int8": {"quantization": "int8"}, "nf4": {"quantization": "nf4"}}
    cases |= {name: {"quantization": DIVIDED[name], "resume": False} for name in ("fp4", "double")}
    return launch(folder / "alone", ALONE, {"cases": cases})


@pytest.fixture(scope="module")
def zero(folder: Path) -> Results:
    two, three = ({"arguments": {"deepspeed": configuration(stage)}} for stage in (2, 3))
    # The model is made before the arguments, or after them, when DeepSpeed partitions it while it is loaded.
    late = {"arguments_first": True, "pretrained": str(folder / "base")}
    loaded = {**three, **late}
    checkpointed = {**three["arguments"], "gradient_checkpointing": True}
    again = {"quantization": "int8", "model_init": True, "resume": False}
    cases = {
        "zero2_quanto": {**two, "quantization": "int8-quanto"},
        "zero2_fp32": {**two, "detach": True, "conflict": True},
        "zero2_int8": {**two, "quantization": "int8"},
        "zero2_loaded_fp32": {**two, **late},
        "zero2_loaded_int8": {**two, **late, "quantization": "int8"},
        "zero2_model_init": {**two, **again},
        "zero3_fp32": {**three, "detach": True},
        "zero3_int8": {**three, "quantization": "int8", "detach": True, "conflict": True},
        "zero3_model_init": {**three, **again},
        "zero3_nf4": {
            **three,
            "quantization": "nf4",
            "lora": {"adapter_name": "mine"},
            "detach": True,
            "conflict": True,
        },
        "zero3_loaded_fp32": loaded,
        "zero3_loaded_int8": {**loaded, "quantization": "int8", "detach": True},
        "zero3_loaded_cast": {**loaded, "lora": {"compute_dtype": "bfloat16"}},
        "zero3_save_on_one": {**three, "save_on_one": True, "resume": False},
    }
    divided = {
        "zero3_fp4": {**three, "quantization": "fp4", "resume": False, "arguments": checkpointed},
        "zero3_double": {**three, **late, "quantization": DIVIDED["double"], "resume": False, "detach": True},
    }
    arguments = {"use_cpu": False, "accelerator_config": {"use_configured_state": True}}
    settings = {"deepspeed": True, "arguments": arguments}
    found = [launch(folder / "zero", TORCHRUN, {**settings, "cases": part}, ENVIRONMENT) for part in (cases, divided)]
    return {**found[0], **found[1]}


@pytest.fixture(scope="module")
def accelerate(folder: Path) -> Results:
    file = folder / "zero3.json"
    file.write_text(json.dumps(configuration(3)))
    launcher = [
        *(sys.executable, "-m", "accelerate.commands.launch", "--use_deepspeed", "--num_processes=2"),
        *(f"--deepspeed_config_file={file}", "--num_machines=1", "--dynamo_backend=no", "--main_process_port=0"),
    ]
    late = {"arguments_first": True, "pretrained": str(folder / "base")}
    cases = {
        "fp32": {},
        "int8": {"quantization": "int8"},
        "loaded_fp32": late,
        "loaded_int8": {**late, "quantization": "int8"},
    }
    settings = {"arguments": {"use_cpu": False}, "cases": cases}
    return launch(folder / "accelerate", launcher, settings, ENVIRONMENT)


def assert_deepspeed(rank: dict[str, Any], optimizer: str) -> None:
    assert rank["distributed_type"] == "DistributedType.DEEPSPEED"
    assert rank["wrapper"] == "DeepSpeedEngine"
    assert rank["model"] == "PeftModelForCausalLM"
    assert rank["optimizer"] == optimizer


@pytest.mark.parametrize("quantization", ["fp32", "int8"])
@pytest.mark.parametrize("order", ["zero2", "zero2_loaded"])
def test_zero2(folder: Path, zero: Results, alone: Results, order: str, quantization: str) -> None:
    ranks = zero[f"{order}_{quantization}"]
    for rank in ranks:
        assert_deepspeed(rank, "DeepSpeedZeroOptimizer")
        assert rank["local"] == rank["elements"] == ELEMENTS, "ZeRO-2 divides gradients and optimizer, not weights"
        assert rank["warnings"] == []
    assert_same_run(ranks, alone[quantization][0])
    assert_files(folder / "zero" / f"{order}_{quantization}", ranks[0])


def assert_zero3(ranks: list[dict[str, Any]], elements: int = ELEMENTS) -> None:
    for rank in ranks:
        assert_deepspeed(rank, "DeepSpeedZeroOptimizer_Stage3")
        assert rank["elements"] == elements
        assert rank["local"] == elements // 2
        assert rank["sharded_adapter"] == rank["adapter"] == 8


@pytest.mark.parametrize("quantization", ["fp32", "int8"])
@pytest.mark.parametrize("order", ["zero3", "zero3_loaded"])
def test_zero3(folder: Path, zero: Results, alone: Results, order: str, quantization: str) -> None:
    case = f"{order}_{quantization}"
    assert_zero3(zero[case])
    for rank in zero[case]:
        said = [text for text in rank["warnings"] if "ZeRO-3 does not divide these quantized weights" in text]
        assert len(said) == len(rank["warnings"]) == (1 if quantization == "int8" else 0)
    assert_same_run(zero[case], alone[quantization][0])
    assert_files(folder / "zero" / case, zero[case][0])


@pytest.mark.parametrize("stage", [2, 3])
def test_every_model_of_model_init_is_prepared(folder: Path, zero: Results, alone: Results, stage: int) -> None:
    case = f"zero{stage}_model_init"
    if stage == 3:
        assert_zero3(zero[case])
    else:
        for rank in zero[case]:
            assert_deepspeed(rank, "DeepSpeedZeroOptimizer")
    assert_same_run(zero[case], alone["int8"][0], resumed=False)
    assert_files(folder / "zero" / case, zero[case][0])


@pytest.mark.parametrize(
    "case", ["zero2_fp32", "zero3_fp32", "zero3_int8", "zero3_loaded_int8", "zero3_nf4", "zero3_double"]
)
def test_detaching_gives_the_whole_base_back(zero: Results, case: str) -> None:
    assert_detached(zero[case])


@pytest.mark.parametrize("case", ["zero2_fp32", "zero3_int8", "zero3_nf4"])
def test_another_run_is_not_resumed(zero: Results, case: str) -> None:
    assert_conflict(zero[case], "mine" if case == "zero3_nf4" else "default")


@pytest.mark.parametrize("backend", DIVIDED)
def test_zero3_divides_four_bit_weights(folder: Path, zero: Results, alone: Results, backend: str) -> None:
    ranks, one = zero[f"zero3_{backend}"], alone[backend][0]
    # Quantized layers hold bytes: packed weights, scales and tables.
    weights = 2 * (2 * 32 * 32 + 2 * 16 * 32 + 3 * 64 * 32)
    assert_zero3(ranks, ELEMENTS - weights + 2 * ranks[0]["held"]["quantized"])
    assert_divided(ranks, one)
    assert_same_run(ranks, one, resumed=backend == "nf4")
    # Under another name of the adapter.
    assert_files(folder / "zero" / f"zero3_{backend}", ranks[0], "mine" if backend == "nf4" else "default", one["best"])


@pytest.mark.parametrize(
    "case",
    ["zero2_fp32", "zero2_int8", "zero3_fp32", "zero3_int8", "zero3_nf4", "zero3_fp4", "zero3_double"],
)
def test_ranks_hold_what_the_plan_says(zero: Results, case: str) -> None:
    stage, backend = case.split("_")
    for rank in zero[case]:
        assert_held(rank, stage, DIVIDED.get(backend, None if backend == "fp32" else backend))


@pytest.mark.parametrize("case", ["zero2_fp32", "zero3_fp32", "zero3_int8", "zero3_nf4", "zero3_loaded_int8"])
def test_every_rank_counts_the_whole_model(zero: Results, case: str) -> None:
    backend = case.split("_")[-1]
    assert_counts(zero[case], None if backend == "fp32" else backend)
    if case.startswith("zero3"):
        # Otherwise a count of the elements that a rank holds would be right too.
        assert all(rank["local"] < rank["counts"]["total"] for rank in zero[case])


@pytest.mark.parametrize("quantization", ["fp32", "int8"])
@pytest.mark.parametrize("order", ["", "loaded_"])
def test_accelerate_launch(folder: Path, accelerate: Results, alone: Results, order: str, quantization: str) -> None:
    case = order + quantization
    assert_zero3(accelerate[case])
    assert_same_run(accelerate[case], alone[quantization][0])
    assert_files(folder / "accelerate" / case, accelerate[case][0])


def test_casting_what_is_partitioned_is_refused(zero: Results) -> None:
    for rank in zero["zero3_loaded_cast"]:
        assert rank["error"].startswith("PreparationError: The weights were sharded in float32")


def test_weights_that_deepspeed_cant_exchange_are_refused(zero: Results) -> None:
    for rank in zero["zero2_quanto"]:
        assert rank["error"].startswith("UnsupportedTraining: Layers of int8-quanto cannot be trained under ZeRO-2. ")


def test_saving_on_one_rank_only_is_named_instead_of_hanging(folder: Path, zero: Results) -> None:
    first, second = zero["zero3_save_on_one"]
    assert first["error"].startswith("ProcessMissing: save_model() gathers a model that is spread over 2 processes")
    assert "error" not in second
    assert not (folder / "zero" / "zero3_save_on_one" / "alone").exists()

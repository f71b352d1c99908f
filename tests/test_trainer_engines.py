"""DDP and FSDP2 for real: two processes with gloo against one process on the same global batch."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import peft
import pytest
import tiny
import torch
from launching import (
    ACCELERATE,
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
from transformers import LlamaForCausalLM

from lora_plugins import attach, merge_and_save, prepare_model
from lora_plugins.errors import BrokenCheckpoint, UnsupportedTraining
from lora_plugins.trainer import engines
from registry import push_adapter

INT8 = {"quantization": "int8"}
#: Backends whose layers FSDP2 would break as well: tensors of a class of their own.
OTHERS = ["int8-quanto", "int8-torchao"]
#: Backends whose layers FSDP2 divides.
DIVIDED: dict[str, Any] = {"nf4": "nf4", "fp4": "fp4", "double": {"name": "nf4", "double_quant": True}}
DORA = {"quantization": "nf4", "lora": {"use_dora": True}}
ATTACHED = {"attach": True, "resume": False}
#: The head is trained as a copy; its frozen original is not a weight of the model.
HEAD = {"modules_to_save": ["lm_head"]}
SHARDED = {"arguments": {"fsdp_config": {"state_dict_type": "SHARDED_STATE_DICT"}}}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("engines")
    tiny.llama().save_pretrained(path / "base")
    return path


def load_four_bit(folder: Path) -> dict[str, Any]:
    """A base that was loaded as FSDP with QLoRA usually has it: packed weights in a float dtype."""
    return {"load_4bit": "bfloat16", "pretrained": str(folder / "base"), "resume": False}


@pytest.fixture(scope="module")
def alone(folder: Path) -> Results:
    others = {name: {"quantization": name, "resume": False} for name in (*OTHERS, "nf4")}
    return launch(folder / "alone", ALONE, {"cases": {"fp32": {}, "int8": INT8, **others}})


@pytest.fixture(scope="module")
def ddp(folder: Path) -> Results:
    cases = {
        "fp32": {"detach": True, "conflict": True},
        "int8": INT8,
        "model_init": {**INT8, "model_init": True, "resume": False},
        "nan": {"nan": True},
        "attached": ATTACHED,
        "fsdp_without_shim": {"arguments": {"fsdp": True}, "resume": False},
    }
    return launch(folder / "ddp", TORCHRUN, {"cases": cases})


@pytest.fixture(scope="module")
def fsdp(folder: Path) -> Results:
    cases = {
        "fp32": {"detach": True, "conflict": True},
        "int8": {**INT8, "detach": True, "conflict": True},
        "model_init": {**INT8, "model_init": True, "resume": False},
        "attached": ATTACHED,
        "sharded": {**SHARDED, "conflict": True},
        "sharded_int8": {**SHARDED, **INT8, "lora": {"adapter_name": "mine"}, "resume": False},
        **{name: {"quantization": name, "resume": False} for name in (*OTHERS, "nf4")},
        "head": {"lora": HEAD, "resume": False},
        "head_nf4": {"quantization": "nf4", "lora": HEAD, "resume": False},
        "hqq": {"quantization": "int8-hqq"},
        "ram": {**INT8, "arguments": {"fsdp_config": {"cpu_ram_efficient_loading": True}}},
        "save_on_one": {"save_on_one": True, "resume": False},
    }
    return launch(folder / "fsdp", TORCHRUN, {"fsdp": True, "arguments": {"fsdp": True}, "cases": cases})


@pytest.fixture(scope="module")
def alone_in_four_bits(folder: Path) -> Results:
    cases = {name: {"quantization": quantization, "resume": False} for name, quantization in DIVIDED.items()}
    extra = {"dora": {**DORA, "resume": False}, "loaded_nf4": load_four_bit(folder)}
    return launch(folder / "alone_in_four_bits", ALONE, {"cases": {**cases, **extra}})


#: Adapters on attention and on the experts of a mixture, whose stacks are quantized.
EXPERTS: dict[str, Any] = {
    name: {"experts": True, "quantization": name, "lora": {"experts": "routed"}, "resume": name == "nf4"}
    for name in ("int8", "nf4")
}


@pytest.fixture(scope="module")
def experts_alone(folder: Path) -> Results:
    cases = {name: {**case, "resume": False} for name, case in EXPERTS.items()}
    return launch(folder / "experts_alone", ALONE, {"cases": cases})


@pytest.fixture(scope="module")
def experts_ddp(folder: Path) -> Results:
    return launch(folder / "experts_ddp", TORCHRUN, {"cases": EXPERTS})


@pytest.fixture(scope="module")
def divided(folder: Path) -> Results:
    cases = {
        "nf4": {"quantization": "nf4", "detach": True, "conflict": True},
        "fp4": {"quantization": "fp4", "resume": False, "arguments": {"gradient_checkpointing": True}},
        "double": {"quantization": DIVIDED["double"], "resume": False, "detach": True},
        "sharded_nf4": {**SHARDED, "quantization": "nf4"},
        "bf16_nf4": {"quantization": "nf4", "resume": False, "detach": True, "arguments": {"bf16": True}},
        "loaded_nf4": load_four_bit(folder),
        "dora": {**DORA, "resume": False},
    }
    return launch(folder / "divided", TORCHRUN, {"fsdp": True, "arguments": {"fsdp": True}, "cases": cases})


@pytest.fixture(scope="module")
def native(folder: Path) -> Results:
    base = {"arguments_first": True, "pretrained": str(folder / "base"), "distributed_config": True}
    cases = {
        "fp32": {**base, "resume": False},
        "resume": {**base, "arguments": {"max_steps": 4}},
        "int8": {**base, **INT8},
    }
    return launch(folder / "native", ACCELERATE, {"arguments": {"save_only_model": True}, "cases": cases})


# -- DDP ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", ["fp32", "int8"])
def test_ddp(folder: Path, ddp: Results, alone: Results, case: str) -> None:
    for rank in ddp[case]:
        assert rank["distributed_type"] == "DistributedType.MULTI_CPU"
        assert rank["wrapper"] == "DistributedDataParallel"
        assert rank["model"] == "PeftModelForCausalLM"
        assert rank["local"] == rank["elements"] == ELEMENTS
        assert rank["sharded_adapter"] == 0
    assert_same_run(ddp[case], alone[case][0])
    assert_files(folder / "ddp" / case, ddp[case][0])


@pytest.mark.parametrize("quantization", ["fp32", "int8"])
def test_ranks_hold_what_the_plan_says(ddp: Results, fsdp: Results, quantization: str) -> None:
    backend = None if quantization == "fp32" else quantization
    for rank in ddp[quantization]:
        assert_held(rank, "ddp", backend)
    for rank in fsdp[quantization]:
        assert_held(rank, "fsdp", backend)
    # The share of a parameter that FSDP2 cannot divide evenly, and the step's number, are on every rank.
    assert fsdp["fp32"][0]["held"]["optimizer"] > ddp["fp32"][0]["held"]["optimizer"] // 2


def test_ddp_prepares_every_model_of_model_init(folder: Path, ddp: Results, alone: Results) -> None:
    assert_same_run(ddp["model_init"], alone["int8"][0], resumed=False)
    assert_files(folder / "ddp" / "model_init", ddp["model_init"][0])


def test_a_bad_loss_on_one_rank_stops_both(ddp: Results) -> None:
    first, second = ddp["nan"]
    assert first["error"].startswith("NonFiniteLoss")
    assert "another rank" in first["error"]
    assert second["error"].startswith("NonFiniteLoss")
    assert "step 3" in second["error"]


def test_the_shim_is_still_needed_and_plain_ddp_in_its_place_is_said_so(ddp: Results) -> None:
    """When this fails, accelerate runs FSDP2 on a CPU by itself: drop tests/force_fsdp.py."""
    for rank in ddp["fsdp_without_shim"]:
        assert rank["distributed_type"] == "DistributedType.MULTI_CPU"
        assert rank["local"] == ELEMENTS
        assert any("every process will hold the whole model" in text for text in rank["warnings"])


@pytest.mark.parametrize("case", ["fp32", "int8", "nf4"])
def test_every_rank_counts_the_whole_model(ddp: Results, fsdp: Results, alone: Results, case: str) -> None:
    quantization = None if case == "fp32" else case
    ranks = [*alone[case], *fsdp[case], *ddp.get(case, [])]
    assert_counts(ranks, quantization)
    # Otherwise a count of the elements that a rank holds would be right too.
    assert all(rank["local"] < rank["counts"]["total"] for rank in fsdp[case])


@pytest.mark.parametrize("case", ["head", "head_nf4"])
def test_a_head_that_is_trained_as_a_copy_counts_once_on_every_rank(fsdp: Results, case: str) -> None:
    assert_counts(fsdp[case], "nf4" if case == "head_nf4" else None, **HEAD)
    assert all(rank["counts"]["total"] < rank["elements"] or case == "head_nf4" for rank in fsdp[case])


@pytest.mark.parametrize("backend", EXPERTS)
def test_ddp_trains_adapters_on_quantized_experts(experts_ddp: Results, experts_alone: Results, backend: str) -> None:
    ranks, one = experts_ddp[backend], experts_alone[backend][0]
    for rank in ranks:
        assert rank["wrapper"] == "DistributedDataParallel"
        assert rank["counts"] == one["counts"]
        # Of the stacks alone; attention's layers are quantized besides.
        assert rank["counts"]["quantized"] > 2 * 4 * 3 * 32 * 64
        assert rank["warnings"] == []
    assert_same_run(ranks, one, resumed=backend == "nf4", trained=16)


# -- FSDP2 -------------------------------------------------------------------------------------


def assert_fsdp(rank: dict[str, Any]) -> None:
    assert rank["distributed_type"] == "DistributedType.FSDP"
    assert rank["wrapper"] == rank["model"] == "FSDPPeftModelForCausalLM"
    assert rank["sharded_adapter"] == rank["adapter"] == 8
    assert rank["elements"] == ELEMENTS


@pytest.mark.parametrize("case", ["fp32", "sharded"])
def test_fsdp2_shards_a_float_base(folder: Path, fsdp: Results, alone: Results, case: str) -> None:
    for rank in fsdp[case]:
        assert_fsdp(rank)
        assert rank["local"] == ELEMENTS // 2
        assert rank["warnings"] == []
    assert_same_run(fsdp[case], alone["fp32"][0])
    assert_files(folder / "fsdp" / case, fsdp[case][0])


@pytest.mark.parametrize("case", ["int8", "model_init", "sharded_int8"])
def test_fsdp2_keeps_int8_weights_whole_and_says_so(folder: Path, fsdp: Results, alone: Results, case: str) -> None:
    int8 = 2 * (2 * 32 * 32 + 2 * 16 * 32 + 3 * 64 * 32)
    for rank in fsdp[case]:
        assert_fsdp(rank)
        assert rank["local"] == int8 + (ELEMENTS - int8) // 2
        assert len(rank["warnings"]) == 1
        assert "FSDP2 does not divide these quantized weights" in rank["warnings"][0]
        assert "14 layers" in rank["warnings"][0]
    assert_same_run(fsdp[case], alone["int8"][0], resumed=case == "int8")
    assert_files(folder / "fsdp" / case, fsdp[case][0], "mine" if case == "sharded_int8" else "default")


@pytest.mark.parametrize("case", [*DIVIDED, "sharded_nf4", "loaded_nf4"])
def test_fsdp2_divides_four_bit_weights(folder: Path, divided: Results, alone_in_four_bits: Results, case: str) -> None:
    one = alone_in_four_bits[case.removeprefix("sharded_")][0]
    ranks = divided[case]
    for rank in ranks:
        assert rank["distributed_type"] == "DistributedType.FSDP"
        assert rank["sharded_adapter"] == rank["adapter"] == 8
        assert_held(rank, "fsdp", DIVIDED.get(case, "nf4"))
    assert_divided(ranks, one)
    assert_same_run(ranks, one, resumed=case in ("nf4", "sharded_nf4"))
    if one["best"] != "checkpoint-6":
        assert_files(folder / "divided" / case, ranks[0], best_checkpoint=one["best"])


def test_mixed_precision_does_not_cast_packed_weights(divided: Results, alone_in_four_bits: Results) -> None:
    """FSDP2 casts float parameters to bfloat16 before it gathers them; packed bits in a float dtype would be lost."""
    one = alone_in_four_bits["nf4"][0]
    for rank in divided["bf16_nf4"]:
        assert rank["losses"] == pytest.approx(one["losses"], abs=0.05)
        assert rank["detached"]["same_weights"]
        assert rank["detached"]["difference"] == 0
    assert_divided(divided["bf16_nf4"], one)


def test_layers_whose_weight_dora_reads_stay_whole_and_are_said_to(
    divided: Results, alone_in_four_bits: Results
) -> None:
    for rank in divided["dora"]:
        assert_held(rank, "fsdp", "nf4", use_dora=True)
        assert len(rank["warnings"]) == 1
        assert "holds all 4 layers" in rank["warnings"][0]
        assert rank["losses"] == pytest.approx(alone_in_four_bits["dora"][0]["losses"], abs=2e-6)


def test_every_rank_reports_its_own_bytes(divided: Results, alone_in_four_bits: Results) -> None:
    one = alone_in_four_bits["nf4"][0]
    assert one["reported"] == one["held"]["weights"]
    assert all(rank["reported"] < 0.55 * one["reported"] for rank in divided["nf4"])


def test_detaching_gives_four_bit_layers_back_as_bitsandbytes_made_them(divided: Results) -> None:
    for case in ("nf4", "double"):
        assert_detached(divided[case])


@pytest.mark.filterwarnings("error::registry.errors.AdapterWarning")
def test_a_checkpoint_over_divided_weights_is_published_and_merged(
    folder: Path, divided: Results, tmp_path: Path
) -> None:
    assert divided["loaded_nf4"]
    checkpoint = folder / "divided" / "loaded_nf4" / "checkpoint-6"
    assert push_adapter(checkpoint, "org/name", version="1.0.0", hub=tmp_path / "registry").created
    merge_and_save(checkpoint, tmp_path / "merged", "same", base=folder / "base", quantization="nf4", probe=None)
    base = LlamaForCausalLM.from_pretrained(folder / "base")
    trained = prepare_model(base, adapter=str(checkpoint), quantization="nf4", compute_dtype="float32").eval()
    merged = LlamaForCausalLM.from_pretrained(tmp_path / "merged").eval()
    ids = torch.arange(1, 13)[None]
    with torch.no_grad(), trained.disable_adapter():
        plain = trained(input_ids=ids).logits
    with torch.no_grad():
        assert torch.allclose(merged(input_ids=ids).logits, trained(input_ids=ids).logits, atol=1e-5)
        assert not torch.allclose(merged(input_ids=ids).logits, plain, atol=1e-3)


def test_another_run_over_divided_weights_is_not_resumed(divided: Results) -> None:
    assert_conflict(divided["nf4"])


@pytest.mark.parametrize("backend", OTHERS)
def test_fsdp2_with_other_backends(folder: Path, fsdp: Results, alone: Results, backend: str) -> None:
    for rank in fsdp[backend]:
        assert rank["distributed_type"] == "DistributedType.FSDP"
        assert rank["sharded_adapter"] == 8
        assert rank["local"] > rank["elements"] // 2
    assert_same_run(fsdp[backend], alone[backend][0], resumed=False)
    assert_files(folder / "fsdp" / backend, fsdp[backend][0])


def test_fsdp2_refuses_layers_with_a_state_of_their_own_form(fsdp: Results) -> None:
    for rank in fsdp["hqq"]:
        assert rank["error"].startswith("UnsupportedTraining: Layers of int8-hqq")


def test_a_sharded_checkpoint_is_there_beside_the_adapter(folder: Path, fsdp: Results) -> None:
    assert fsdp["sharded"]
    assert list((folder / "fsdp" / "sharded" / "checkpoint-2").glob("pytorch_model_fsdp_*/*.distcp"))


def test_another_run_is_not_resumed_under_ddp_and_fsdp2(ddp: Results, fsdp: Results) -> None:
    assert_conflict(ddp["fp32"])
    for case in ("fp32", "int8", "sharded"):
        assert_conflict(fsdp[case])


def test_fsdp2_refuses_what_would_break_int8_layers(fsdp: Results) -> None:
    for rank in fsdp["ram"]:
        assert rank["error"].startswith("UnsupportedTraining: cpu_ram_efficient_loading")


def test_saving_on_one_rank_only_is_named_instead_of_hanging(folder: Path, fsdp: Results) -> None:
    first, second = fsdp["save_on_one"]
    assert first["error"].startswith("ProcessMissing: save_model() gathers a model that is spread over 2 processes")
    assert "error" not in second
    assert not (folder / "fsdp" / "save_on_one" / "alone").exists()


def test_ranks_that_have_drawn_different_numbers_get_the_same_adapter(
    ddp: Results, fsdp: Results, alone: Results
) -> None:
    """DDP would send that of the first rank; FSDP2 would put one together from the parts of both."""
    assert_same_run(ddp["attached"], alone["fp32"][0], resumed=False)
    assert_same_run(fsdp["attached"], alone["fp32"][0], resumed=False)


def test_detaching_gives_the_whole_base_back(ddp: Results, fsdp: Results) -> None:
    """FSDP2 has exchanged the classes of the model and its blocks, and their parameters for parts."""
    for ranks in (ddp["fp32"], fsdp["fp32"], fsdp["int8"]):
        assert_detached(ranks)


# -- sharded while loading ---------------------------------------------------------------------


def test_distributed_config_under_accelerate_launch(folder: Path, native: Results, alone: Results) -> None:
    for rank in native["fp32"]:
        assert rank["distributed_type"] == "DistributedType.MULTI_CPU"
        assert rank["wrapper"] == rank["model"] == "PeftModelForCausalLM"
        adapter = 2 * (2 * 4 * 32 + 4 * 32 + 4 * 16)
        assert rank["local"] == adapter + (ELEMENTS - adapter) // 2, "the base is halved, the adapters are not"
        assert rank["sharded_adapter"] == 0
    assert_same_run(native["fp32"], alone["fp32"][0], resumed=False)
    assert_files(folder / "native" / "fp32", native["fp32"][0])


def test_quantizing_what_is_sharded_already_is_refused(native: Results) -> None:
    for rank in native["int8"]:
        assert rank["error"].startswith("UnsupportedTraining: The model was sharded while it was loaded")


def test_resuming_without_the_optimizer_is_refused(native: Results) -> None:
    for rank in native["resume"]:
        assert rank["error"].startswith("BrokenCheckpoint")
        assert "no state of the optimizer" in rank["error"]


# -- in one process ----------------------------------------------------------------------------


def test_resuming_without_the_optimizer_is_refused_in_one_process(tmp_path: Path) -> None:
    from lora_plugins import LoraCallback

    def make(**arguments: Any) -> Any:
        return tiny.trainer(
            tmp_path,
            callbacks=[LoraCallback(r=4)],
            save_strategy="steps",
            save_steps=2,
            save_only_model=True,
            **arguments,
        )

    make(max_steps=2).train()
    with pytest.raises(BrokenCheckpoint, match=r"LoraCallback\(adapter="):
        make().train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))


def test_processes_that_do_not_know_of_each_other_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = tiny.trainer(tmp_path)
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UnsupportedTraining, match=r"2 processes and this Trainer knows of 1.*use_cpu=True"):
        attach(trainer)
    assert not isinstance(trainer.model, peft.PeftModel)


def test_device_map_over_several_devices_with_several_processes_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = tiny.trainer(tmp_path)
    trainer.model.hf_device_map = {"model.layers.0": 0, "model.layers.1": 1}
    monkeypatch.setattr(type(trainer.args), "world_size", 2)
    with pytest.raises(UnsupportedTraining, match=r"Load it in each process with device_map=\{'': 0\}"):
        attach(trainer)


def test_fsdp1_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """accelerate makes no plugin of version 1 on a machine without accelerator, so one is put in its place."""
    trainer = tiny.trainer(tmp_path)
    monkeypatch.setattr(engines, "_find_fsdp_plugin", lambda trainer: SimpleNamespace(fsdp_version=1))
    with pytest.raises(UnsupportedTraining, match="FSDP version 1"):
        attach(trainer)


def prepare_under_zero(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stage: int, **lora: Any) -> None:
    """Prepare a model as a Trainer under ZeRO does before DeepSpeed gets it; this machine need not have DeepSpeed."""
    model = prepare_model(tiny.llama(), r=2, **lora)
    trainer = tiny.trainer(tmp_path, model)
    trainer.is_deepspeed_enabled = True
    monkeypatch.setattr(engines, "_read_zero_stage", lambda trainer: stage)
    engines.prepare_quantized(trainer, model)


@pytest.mark.parametrize("backend", ["nf4", "fp4", "int8"])
def test_dora_over_bitsandbytes_is_refused_by_name_under_zero3(
    backend: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """PEFT puts the weight anew when it reads it, and DeepSpeed's own error would name neither."""
    says = f"ZeRO-3 cannot train DoRA over {backend} layers, first .*q_proj.*FSDP2.*without DoRA"
    with pytest.raises(UnsupportedTraining, match=says):
        prepare_under_zero(tmp_path, monkeypatch, 3, quantization=backend, use_dora=True)


@pytest.mark.filterwarnings("ignore::lora_plugins.errors.PreparationWarning")
@pytest.mark.parametrize(
    ("stage", "lora"),
    [
        (3, {"quantization": "nf4"}),
        (3, {"quantization": "int8"}),
        (3, {"use_dora": True}),
        (2, {"quantization": "nf4", "use_dora": True}),
    ],
    ids=["nf4", "int8", "float DoRA", "ZeRO-2"],
)
def test_dora_or_zero3_alone_are_not_refused(
    stage: int, lora: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prepare_under_zero(tmp_path, monkeypatch, stage, **lora)


#: Ranks raise one after another, and each writes what it got.
RAISING = """
import sys
from pathlib import Path
from types import SimpleNamespace
from accelerate import PartialState
from lora_plugins import errors
from lora_plugins.trainer.engines import raise_together

class OfAPlugin(errors.UnknownCheck):
    pass

state = PartialState(cpu=True)
trainer = SimpleNamespace(accelerator=state)
got = []
for failing, error in enumerate([errors.ResumeConflict("other rank"), OfAPlugin("no such check")]):
    try:
        with raise_together(trainer):
            if state.process_index == failing:
                raise error
    except errors.LoraPluginsError as problem:
        got.append(f"{type(problem).__name__}: {problem}")
with raise_together(trainer):
    pass
Path(sys.argv[1], f"rank{state.process_index}").write_text("; ".join(got))
state.destroy_process_group()
"""


def test_an_error_of_one_process_is_the_same_error_on_the_others(tmp_path: Path) -> None:
    (tmp_path / "script.py").write_text(RAISING)
    environment = {**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1", "TMPDIR": str(tmp_path)}
    command = [*TORCHRUN, str(tmp_path / "script.py"), str(tmp_path)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    first, second = ((tmp_path / f"rank{rank}").read_text() for rank in (0, 1))
    assert first == "ResumeConflict: other rank; UnknownCheck: On another process: no such check"
    assert second == "ResumeConflict: On another process: other rank; OfAPlugin: no such check"

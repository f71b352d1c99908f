"""An adapter whose initialization changed the base is saved as plain LoRA; checkpoints keep it as it is trained."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora.corda import preprocess_corda
from peft.tuners.lora.loraga import preprocess_loraga
from safetensors.torch import load_file
from transformers import LlamaForCausalLM

from lora_plugins import LoraCallback, merge_and_save, prepare_model
from lora_plugins.errors import UnsavedTensors

IDS = torch.arange(1, 9)[None]
SAVING: dict[str, Any] = {"save_strategy": "steps", "save_steps": 2}
TARGETS = {"r": 4, "target_modules": ["q_proj", "v_proj"]}

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture
def base(tmp_path: Path) -> Path:
    tiny.llama().save_pretrained(tmp_path / "base")
    return tmp_path / "base"


def read(folder: Path) -> Any:
    return LlamaForCausalLM.from_pretrained(folder)


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model.eval()(IDS).logits
    return found


def settings(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "adapter_config.json").read_text())
    return found


def corda(base: Path) -> Any:
    """A model with adapters initialized by CorDA, from activations."""
    model, config = read(base), LoraConfig(**TARGETS, init_lora_weights="corda", task_type="CAUSAL_LM")
    preprocess_corda(model, config, run_model=lambda: model(IDS))
    return get_peft_model(model, config)


def lora_ga(base: Path) -> Any:
    """A model with adapters initialized by LoRA-GA, from gradients."""
    model = read(base)
    config = LoraConfig(**TARGETS, init_lora_weights="lora_ga", lora_ga_config={}, task_type="CAUSAL_LM")
    preprocess_loraga(model, config, train_step=lambda: model(input_ids=IDS, labels=IDS).loss.backward())
    return get_peft_model(model, config)


#: Initialization -> LoRA arguments, or what makes the model.
KINDS: dict[str, Any] = {
    "pissa": {"init_lora_weights": "pissa"},
    "pissa_niter_4": {"init_lora_weights": "pissa_niter_4", "use_rslora": True},
    "olora": {"init_lora_weights": "olora", "rank_pattern": {"v_proj": 2}, "alpha_pattern": {"v_proj": 4}},
    "corda": corda,
    "lora_ga": lora_ga,
}


@pytest.mark.parametrize("kind", KINDS)
def test_saved_is_plain_lora_and_checkpoints_keep_the_original(kind: str, base: Path, tmp_path: Path) -> None:
    made = KINDS[kind]
    model, callback = (made(base), LoraCallback()) if callable(made) else (read(base), LoraCallback(**TARGETS, **made))
    trainer = tiny.trainer(tmp_path / "out", model, [callback], **SAVING)
    trainer.train()
    trainer.save_model(str(tmp_path / "saved"))
    trainer.model.save_pretrained(tmp_path / "by hand")
    expected = logits(trainer.model)
    assert (logits(read(base)) - expected).abs().max() > 1e-3
    checkpoint = tmp_path / "out" / "checkpoint-4"
    assert settings(checkpoint)["init_lora_weights"] == kind
    assert settings(checkpoint)["r"] == 4
    for folder in (tmp_path / "saved", tmp_path / "by hand"):
        assert settings(folder)["init_lora_weights"] is True
        assert settings(folder)["r"] == 8
        loaded = PeftModel.from_pretrained(read(base), folder)
        torch.testing.assert_close(logits(loaded), expected, rtol=0, atol=2e-5)
    result = merge_and_save(tmp_path / "saved", tmp_path / "merged", "same", base=base, quantization="none")
    assert result.error is not None
    torch.testing.assert_close(logits(read(tmp_path / "merged")), expected, rtol=0, atol=2e-5)
    # The model goes on as it was.
    assert trainer.model.peft_config["default"].init_lora_weights == kind
    assert torch.equal(logits(trainer.model), expected)


def test_a_run_resumes_from_the_original(base: Path, tmp_path: Path) -> None:
    def run(folder: str, **options: Any) -> dict[str, torch.Tensor]:
        callback = LoraCallback(**TARGETS, init_lora_weights="pissa")
        trainer = tiny.trainer(tmp_path / folder, read(base), [callback], **SAVING)
        trainer.train(**options)
        trainer.save_model(str(tmp_path / folder / "saved"))
        return load_file(tmp_path / folder / "saved" / "adapter_model.safetensors")

    whole = run("whole")
    rest = run("rest", resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    assert all(torch.equal(whole[name], rest[name]) for name in whole)


def test_what_cannot_be_undone_is_written_and_said(tmp_path: Path) -> None:
    model = prepare_model(tiny.llama(), **TARGETS, init_lora_weights="pissa_niter_4")
    with pytest.raises(UnsavedTensors, match="the base's own are not on this machine") as raised:
        model.save_pretrained(tmp_path / "saved")
    assert "hold the adapter for the changed base only" in str(raised.value)
    assert (tmp_path / "saved" / "adapter_model.safetensors").is_file()
    # These two are made again by PEFT when it loads them.
    for init in ("pissa", "olora"):
        model = prepare_model(tiny.llama(), **TARGETS, init_lora_weights=init)
        model.save_pretrained(tmp_path / init)
        assert settings(tmp_path / init)["init_lora_weights"] == init
        assert torch.equal(logits(PeftModel.from_pretrained(tiny.llama(), tmp_path / init)), logits(model))


def test_a_base_that_was_quantized_by_loftq_is_named(base: Path, tmp_path: Path) -> None:
    """LoftQ leaves a rounded base, which no low rank makes good; PEFT computes it on CUDA only."""
    model = prepare_model(read(base), **TARGETS)
    model.peft_config["default"].init_lora_weights = "loftq"
    with torch.no_grad():
        for layer in model.get_base_model().model.layers:
            weight = layer.self_attn.q_proj.base_layer.weight
            weight.copy_((weight * 32).round() / 32)
    with pytest.raises(UnsavedTensors, match="LoftQ, or another base"):
        model.save_pretrained(tmp_path / "saved")


def test_saving_leaves_random_numbers_alone(base: Path, tmp_path: Path) -> None:
    model = prepare_model(read(base), **TARGETS, init_lora_weights="pissa")
    torch.manual_seed(1)
    expected = torch.rand(4)
    torch.manual_seed(1)
    model.save_pretrained(tmp_path / "saved")
    assert torch.equal(torch.rand(4), expected)

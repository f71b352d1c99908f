"""Trainers of ``trl.experimental`` through the callback: ORPO, CPO, GKD and online DPO."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from torch import nn

from lora_plugins import LoraCallback, attach, prepare_model
from lora_plugins.errors import (
    AdapterNotMoving,
    NonFiniteLoss,
    NothingTrainable,
    OptimizerMismatch,
    UnsupportedTraining,
)

pytest.importorskip("trl", reason="trl is not installed")

with warnings.catch_warnings():
    # TRL says on import that these may change.
    warnings.simplefilter("ignore")
    import trl.experimental  # noqa: F401 - for its warning
from trl_runs import EXPERIMENTAL, assert_trained, losses, make

NAMES = sorted(EXPERIMENTAL)


@pytest.mark.parametrize("quantization", [None, pytest.param("int8", marks=pytest.mark.slow)])
@pytest.mark.parametrize("kind", NAMES)
def test_twenty_steps_set_no_alarm_off(tmp_path: Path, kind: str, quantization: str | None) -> None:
    callback = LoraCallback(r=4, quantization=quantization)
    trainer = make(kind, tmp_path, callbacks=[callback], max_steps=20, save_strategy="steps", save_steps=10)
    trainer.train()
    assert_trained(trainer)
    assert trainer.state.global_step == 20
    assert len(losses(trainer)) == 20
    assert (tmp_path / "checkpoint-20" / "adapter_model.safetensors").is_file()


# -- planted faults ----------------------------------------------------------------------------


@pytest.mark.parametrize("kind", NAMES)
def test_a_layer_that_is_passed_by_is_found(tmp_path: Path, kind: str) -> None:
    trainer = make(kind, tmp_path, callbacks=[LoraCallback(r=4)], max_steps=20)
    layer = trainer.model.base_model.model.model.layers[1].self_attn.v_proj
    layer.forward = layer.base_layer.forward
    with pytest.raises(AdapterNotMoving, match=r"1 adapter tensors.*layers\.1\.self_attn\.v_proj\.lora_B"):
        trainer.train()


@pytest.mark.parametrize("kind", NAMES)
def test_adapters_that_are_not_in_the_optimizer_are_found(tmp_path: Path, kind: str) -> None:
    trainer = make(kind, tmp_path, callbacks=[LoraCallback(r=4)])
    trainer.create_optimizer()
    trainer.optimizer.param_groups[0]["params"].pop()
    with pytest.raises(OptimizerMismatch, match="1 trainable tensors are not in the optimizer"):
        trainer.train()


@pytest.mark.parametrize("kind", NAMES)
def test_frozen_adapters_are_found(tmp_path: Path, kind: str) -> None:
    trainer = make(kind, tmp_path, callbacks=[LoraCallback(r=4)])
    trainer.model.requires_grad_(False)
    with pytest.raises(NothingTrainable):
        trainer.train()


def test_distillation_without_labels_that_count_is_found(tmp_path: Path) -> None:
    trainer = make("gkd", tmp_path, callbacks=[LoraCallback(r=4)], lmbda=0.0)
    collate = trainer.data_collator

    def mask(rows: list[Any]) -> dict[str, torch.Tensor]:
        batch: dict[str, torch.Tensor] = collate(rows)
        return {**batch, "labels": torch.full_like(batch["labels"], -100)}

    trainer.data_collator = mask
    with pytest.raises(NonFiniteLoss, match=r"step 1.*Every label of this batch is -100"):
        trainer.train()


# -- the reference of online DPO ---------------------------------------------------------------


def first_kl(trainer: Any) -> float:
    return float(trainer.state.log_history[0]["objective/kl"])


@pytest.mark.parametrize("quantization", [None, "int8"])
@pytest.mark.parametrize("how", ["callback", "attach"])
def test_no_second_model_is_kept_as_reference(tmp_path: Path, how: str, quantization: str | None) -> None:
    settings: dict[str, Any] = {"r": 4, "lora_dropout": 0.0, "quantization": quantization, "compute_dtype": "float32"}
    callbacks = [LoraCallback(**settings)] if how == "callback" else None
    trainer = make("online_dpo", tmp_path, callbacks=callbacks, max_steps=2)
    if how == "attach":
        attach(trainer, **settings)
    assert trainer.ref_model is None
    trainer.train()
    # The model without its adapter is the same quantized model, so nothing lies between them at first.
    assert abs(first_kl(trainer)) < 1e-5
    assert_trained(trainer)


def test_a_reference_of_ones_own_stays(tmp_path: Path) -> None:
    own = tiny.llama(seed=5)
    trainer = make("online_dpo", tmp_path, callbacks=[LoraCallback(r=4)], ref_model=own, max_steps=1)
    assert trainer.ref_model is own
    trainer.train()
    assert abs(first_kl(trainer)) > 1e-3


@pytest.fixture
def stored(tmp_path: Path) -> Path:
    """An adapter that is not what the bare base model computes."""
    model = prepare_model(tiny.llama(), r=4)
    with torch.no_grad():
        for name, value in model.named_parameters():
            if "lora_B" in name:
                value.normal_(std=0.3)
    model.save_pretrained(tmp_path / "stored")
    return tmp_path / "stored"


@pytest.mark.parametrize("how", ["callback", "attach"])
def test_a_continued_adapter_compared_with_the_bare_base_is_refused(tmp_path: Path, stored: Path, how: str) -> None:
    def start() -> None:
        callbacks = [LoraCallback(adapter=stored)] if how == "callback" else None
        attach(make("online_dpo", tmp_path, callbacks=callbacks), adapter=stored)

    with pytest.raises(UnsupportedTraining, match=r"bare base model.*prepare_model\(base, adapter="):
        start()


@pytest.mark.parametrize("quantization", [None, "int8"])
def test_a_continued_adapter_is_compared_with_itself_as_the_refusal_advises(
    tmp_path: Path, stored: Path, quantization: str | None
) -> None:
    model = prepare_model(tiny.llama(), adapter=stored, quantization=quantization, compute_dtype="float32")
    trainer = make("online_dpo", tmp_path, model, [LoraCallback()], max_steps=2)
    reference: nn.Module = trainer.ref_model
    assert not any(parameter.requires_grad for parameter in reference.parameters())
    before = tiny.adapter_tensors(reference)
    trainer.train()
    # LLM.int8() has another kernel for what is evaluated.
    assert abs(first_kl(trainer)) < (1e-3 if quantization else 1e-5)
    assert_trained(trainer)
    after = tiny.adapter_tensors(reference)
    assert len(before) == 8
    assert all(torch.equal(value, after[name]) for name, value in before.items()), "the reference must not move"

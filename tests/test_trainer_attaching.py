"""The same model given twice, a second adapter, what cannot be attached: it works, or the message has the way on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import tiny
import torch
from accelerate import cpu_offload, disk_offload
from safetensors.torch import load_file

from lora_plugins import Int8PreparationCallback, LoraCallback, attach, detach, prepare_model
from lora_plugins.errors import AttachError, PreparationError, UnsupportedTraining

SECOND = peft.LoraConfig(r=2, target_modules=["o_proj"], task_type="CAUSAL_LM")


def _cell(folder: Path, model: Any) -> Any:
    return tiny.trainer(folder, model, [LoraCallback(r=4)])


def _attached(folder: Path, model: Any) -> Any:
    trainer = tiny.trainer(folder, model)
    attach(trainer, r=4)
    return trainer


def _int8(folder: Path, model: Any) -> Any:
    return tiny.trainer(folder, model, [Int8PreparationCallback()])


def _prepared(folder: Path, model: Any) -> Any:
    return prepare_model(model, r=4)


@pytest.mark.parametrize("first", [_cell, _attached, _prepared])
@pytest.mark.parametrize("second", [_cell, _attached, _prepared, _int8])
def test_a_model_given_a_second_time_is_told_who_has_wrapped_it(tmp_path: Path, first: Any, second: Any) -> None:
    model = tiny.llama()
    made = first(tmp_path, model)
    before = tiny.adapter_tensors(model)
    with pytest.raises(PreparationError, match=r"already holds the adapter 'default'.*notebook cell.*detach") as caught:
        second(tmp_path, model)
    assert "add_adapter" not in str(caught.value)
    assert before.keys() == tiny.adapter_tensors(model).keys(), "the first one is as it was"
    if first is not _prepared:
        made.train()


def test_after_detaching_a_second_trainer_gets_a_new_adapter(tmp_path: Path) -> None:
    model = tiny.llama()
    first = _cell(tmp_path, model)
    first.train()
    detach(first)
    second = _cell(tmp_path, model)
    assert all(not tensor.any() for tensor in tiny.adapter_tensors(second.model, "lora_B").values())
    second.train()


def test_a_second_trainer_goes_on_with_the_wrapped_model(tmp_path: Path) -> None:
    first = _cell(tmp_path, tiny.llama())
    first.train()
    before = tiny.adapter_tensors(first.model)
    second = tiny.trainer(tmp_path, first.model, [LoraCallback()])
    second.train()
    assert all(not torch.equal(value, before[name]) for name, value in tiny.adapter_tensors(second.model).items())


def test_arguments_for_an_adapter_that_is_there_name_the_way(tmp_path: Path) -> None:
    model = peft.get_peft_model(tiny.llama(), peft.LoraConfig(r=64, target_modules=["q_proj"]))
    with pytest.raises(PreparationError, match=r"r=8, the adapter has 64.*LoraCallback\(\) adds nothing"):
        tiny.trainer(tmp_path, model, [LoraCallback(r=8)])


@pytest.mark.parametrize("train_first", [False, True])
def test_a_second_adapter_is_trained_beside_the_first(tmp_path: Path, train_first: bool) -> None:
    trainer = _cell(tmp_path, tiny.llama())
    if train_first:
        trainer.train()
    first = tiny.adapter_tensors(trainer.model, ".default.")
    with pytest.raises(AttachError, match=r"add_adapter\(name, config\).*attach\(trainer\) without arguments"):
        attach(trainer, r=2)
    trainer.model.add_adapter("second", SECOND)
    trainer.model.set_adapter("second")
    attach(trainer)
    assert sum(isinstance(c, LoraCallback) for c in trainer.callback_handler.callbacks) == 1
    trainer.train()
    assert all(tensor.any() for tensor in tiny.adapter_tensors(trainer.model, "lora_B.second").values())
    assert all(torch.equal(v, first[n]) for n, v in tiny.adapter_tensors(trainer.model, ".default.").items())
    trainer.save_model()
    assert len(load_file(tmp_path / "second" / "adapter_model.safetensors")) == 4
    assert len(load_file(tmp_path / "adapter_model.safetensors")) == 8


@pytest.mark.parametrize("offload", ["disk", "cpu"])
@pytest.mark.parametrize("how", ["callback", "attach", "int8"])
def test_weights_that_are_elsewhere_are_named(tmp_path: Path, offload: str, how: str) -> None:
    model = tiny.llama()
    if offload == "disk":
        disk_offload(model, str(tmp_path / "weights"), torch.device("cpu"))
    else:
        cpu_offload(model, torch.device("cpu"))
    trainer = tiny.trainer(tmp_path, tiny.llama())
    trainer.model = trainer.model_wrapped = trainer.callback_handler.model = model
    callback = Int8PreparationCallback() if how == "int8" else LoraCallback(r=4)
    with pytest.raises(UnsupportedTraining, match=r"have no values in memory.*Load the model with device_map"):
        attach(trainer, r=4) if how == "attach" else callback.take(trainer)

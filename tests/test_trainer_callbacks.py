"""The seam into the Trainer: what is in it, in its optimizer and in its files."""

from __future__ import annotations

import copy
import inspect
import json
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any

import bitsandbytes as bnb
import peft
import pytest
import tiny
import torch
from safetensors.torch import load_file
from transformers import Trainer, TrainerCallback
from transformers.integrations.peft import MIN_PEFT_VERSION
from versions import needs

from lora_plugins import Int8PreparationCallback, LoraCallback, attach, prepare_model
from lora_plugins.adapters.settings import LoraSettings
from lora_plugins.errors import (
    AttachError,
    ModelReplaced,
    OptimizerConflict,
    PreparationError,
    TrainerNotFound,
)
from lora_plugins.trainer.attaching import detach


def optimizer_ids(trainer: Trainer) -> set[int]:
    return {id(p) for group in trainer.optimizer.param_groups for p in group["params"]}


def trainable_ids(trainer: Trainer) -> set[int]:
    return {id(p) for p in trainer.model.parameters() if p.requires_grad}


def assert_trained_lora_only(trainer: Trainer, layers: int = 2) -> None:
    """The optimizer holds the adapters and nothing else, and each of them has moved."""
    assert isinstance(trainer.model, peft.PeftModel)
    assert optimizer_ids(trainer) == trainable_ids(trainer)
    moved = tiny.adapter_tensors(trainer.model, "lora_B")
    assert len(moved) == 2 * layers
    assert all(tensor.abs().max() > 0 for tensor in moved.values())


def checkpoint_keys(folder: Path) -> set[str]:
    return set(load_file(folder / "adapter_model.safetensors"))


# -- the constructor path ----------------------------------------------------------------------


def test_constructor_trains_the_adapters_and_nothing_else(tmp_path: Path) -> None:
    model = tiny.llama()
    before = copy.deepcopy(model.state_dict())
    trainer = tiny.trainer(tmp_path, model, [LoraCallback(r=4)])
    start = tiny.adapter_tensors(trainer.model, "lora_A")
    trainer.train()
    assert_trained_lora_only(trainer)
    for name, tensor in tiny.adapter_tensors(trainer.model, "lora_A").items():
        assert not torch.equal(tensor, start[name])
    base = trainer.model.unload().state_dict()
    for name, tensor in before.items():
        assert torch.equal(base[name], tensor), name


@needs("peft", MIN_PEFT_VERSION, "transformers' own add_adapter refuses it")
def test_naive_injection_at_train_begin_trains_nothing(tmp_path: Path) -> None:
    """The trap that the constructor path avoids: the run ends green with every B still zero."""

    class Naive(TrainerCallback):
        def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
            model.add_adapter(peft.LoraConfig(target_modules=["q_proj", "v_proj"]))

    trainer = tiny.trainer(tmp_path, callbacks=[Naive()])
    trainer.train()
    assert all(not t.any() for t in tiny.adapter_tensors(trainer.model, "lora_B").values())


def test_class_instead_of_instance_uses_the_defaults(tmp_path: Path) -> None:
    trainer = tiny.trainer(tmp_path, callbacks=[LoraCallback])
    config = trainer.model.peft_config["default"]
    assert (config.r, config.lora_alpha, config.lora_dropout) == (8, 32, 0.05)
    assert config.target_modules == {"q_proj", "v_proj"}
    assert config.task_type == "CAUSAL_LM"


@pytest.mark.parametrize("quantization", ["int8", "nf4"])
def test_quantized_base_trains_and_keeps_its_weights(tmp_path: Path, quantization: str) -> None:
    trainer = tiny.trainer(tmp_path, callbacks=[LoraCallback(r=4, quantization=quantization)])
    kind = {"int8": bnb.nn.Linear8bitLt, "nf4": bnb.nn.Linear4bit}[quantization]
    layers = [m for m in trainer.model.modules() if isinstance(m, kind)]
    assert len(layers) == 14
    assert type(trainer.model.get_base_model().lm_head) is torch.nn.Linear
    before = [layer.weight.detach().clone() for layer in layers]
    trainer.train()
    assert_trained_lora_only(trainer)
    for layer, weight in zip(layers, before, strict=True):
        assert torch.equal(layer.weight, weight)
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert len(losses) == 4


def test_adapter_changes_nothing_at_injection_and_a_gets_no_first_gradient(tmp_path: Path) -> None:
    model = tiny.llama().eval()
    ids = torch.arange(1, 13)[None]
    with torch.no_grad():
        before = model(ids).logits
    wrapped = prepare_model(model, r=4, lora_dropout=0.0)
    with torch.no_grad():
        assert torch.equal(wrapped(ids).logits, before)
    wrapped(input_ids=ids, labels=ids).loss.backward()
    gradients = {n: p.grad for n, p in wrapped.named_parameters() if p.requires_grad}
    assert all(not g.any() for n, g in gradients.items() if "lora_A" in n)
    assert all(g.any() for n, g in gradients.items() if "lora_B" in n)


def test_initial_weights_do_not_depend_on_earlier_random_numbers(tmp_path: Path) -> None:
    states = []
    for draws in (0, 5):
        model = tiny.llama()
        torch.rand(draws)
        position = torch.random.get_rng_state()
        states.append(tiny.adapter_tensors(prepare_model(model, seed=3)))
        assert torch.equal(torch.random.get_rng_state(), position)
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


def test_callback_finds_its_own_trainer_among_several(tmp_path: Path) -> None:
    first = tiny.trainer(tmp_path / "a", callbacks=[LoraCallback(r=2)])
    second = tiny.trainer(tmp_path / "b", callbacks=[LoraCallback(r=4)])
    assert first.model.peft_config["default"].r == 2
    assert second.model.peft_config["default"].r == 4


def test_callback_in_two_trainers_watches_the_second_and_says_so_in_the_first(tmp_path: Path) -> None:
    callback = LoraCallback(r=2)
    first = tiny.trainer(tmp_path / "a", callbacks=[callback])
    second = tiny.trainer(tmp_path / "b", callbacks=[callback])
    with pytest.raises(AttachError, match="another Trainer"):
        first.train()
    second.train()
    assert_trained_lora_only(second)


def test_on_init_end_without_a_trainer_names_attach() -> None:
    with pytest.raises(TrainerNotFound, match="attach"):
        LoraCallback().on_init_end(None, None, None)


# -- add_callback and attach -------------------------------------------------------------------


def test_add_callback_is_an_error_that_names_attach(tmp_path: Path) -> None:
    trainer = tiny.trainer(tmp_path)
    trainer.add_callback(LoraCallback())
    with pytest.raises(TrainerNotFound, match="attach"):
        trainer.train()


def test_attach_after_add_callback_works(tmp_path: Path) -> None:
    trainer = tiny.trainer(tmp_path)
    trainer.add_callback(LoraCallback(r=2))
    attach(trainer)
    trainer.train()
    assert_trained_lora_only(trainer)
    assert trainer.model.peft_config["default"].r == 2
    assert sum(isinstance(c, LoraCallback) for c in trainer.callback_handler.callbacks) == 1


def test_attach_before_training(tmp_path: Path) -> None:
    trainer = tiny.trainer(tmp_path)
    attach(trainer, r=4, quantization="int8")
    trainer.train()
    assert_trained_lora_only(trainer)


def test_attach_to_a_trainer_that_has_trained_drops_its_old_optimizer(tmp_path: Path) -> None:
    trainer = tiny.trainer(tmp_path)
    trainer.train()
    old = optimizer_ids(trainer)
    assert len(old) > 4
    attach(trainer, r=4)
    assert trainer.optimizer is None
    trainer.train()
    assert_trained_lora_only(trainer)
    assert not old & optimizer_ids(trainer)


def test_attach_after_an_evaluation(tmp_path: Path) -> None:
    trainer = tiny.trainer(tmp_path)
    base_loss = trainer.evaluate(tiny.rows(8, seed=2))["eval_loss"]
    attach(trainer, r=4)
    assert trainer.evaluate(tiny.rows(8, seed=2))["eval_loss"] == pytest.approx(base_loss, abs=1e-6)
    trainer.train()
    assert_trained_lora_only(trainer)
    assert trainer.evaluate(tiny.rows(8, seed=2))["eval_loss"] != pytest.approx(base_loss, abs=1e-6)


def test_attach_inside_train_is_refused_and_after_a_failed_train_is_not(tmp_path: Path) -> None:
    class Inside(TrainerCallback):
        def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
            attach(trainer, r=2)

    trainer = tiny.trainer(tmp_path, callbacks=[Inside()])
    with pytest.raises(AttachError, match="inside train"):
        trainer.train()
    assert trainer.is_in_train, "transformers leaves this set after a failure"
    trainer.remove_callback(Inside)
    attach(trainer, r=2)
    trainer.train()
    assert_trained_lora_only(trainer)


def test_second_attach_is_refused_and_detach_gives_the_base_back(tmp_path: Path) -> None:
    model = tiny.llama()
    expected = model.state_dict()
    trainer = tiny.trainer(tmp_path, model, [LoraCallback(r=4)])
    with pytest.raises(AttachError, match="detach"):
        attach(trainer, r=2)
    trainer.train()
    base = detach(trainer)
    assert base is trainer.model
    assert not isinstance(base, peft.PeftModel)
    assert base.state_dict().keys() == expected.keys()
    attach(trainer, r=2)
    trainer.train()
    assert trainer.model.peft_config["default"].r == 2
    assert_trained_lora_only(trainer)


def test_detach_drops_a_given_optimizer_that_has_trained_the_adapters(tmp_path: Path) -> None:
    model = tiny.llama()
    given = torch.optim.SGD(model.parameters(), lr=0.1)
    trainer = tiny.trainer(
        tmp_path, model, [LoraCallback(r=4)], trainer_arguments={"optimizers": (given, None)}, max_steps=2
    )
    assert detach(trainer) is model
    assert trainer.optimizer is given, "it has not trained yet"
    attach(trainer, r=4)
    trainer.train()
    assert detach(trainer) is model
    assert trainer.optimizer is None
    attach(trainer, r=2)
    trainer.train()
    assert_trained_lora_only(trainer)


# -- models that arrive prepared ---------------------------------------------------------------


def test_trainer_refuses_a_quantized_base_and_takes_it_from_prepare_model(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    from lora_plugins import quantization_config

    tiny.llama().save_pretrained(tmp_path / "base")
    for name in ("int8", "nf4"):
        model = AutoModelForCausalLM.from_pretrained(tmp_path / "base", quantization_config=quantization_config(name))
        with pytest.raises(ValueError, match="purely quantized"):
            tiny.trainer(tmp_path / "run", model, [LoraCallback()])
        trainer = tiny.trainer(tmp_path / "run", prepare_model(model, r=4), [LoraCallback(r=4)])
        trainer.train()
        assert_trained_lora_only(trainer)


def test_prepare_model_takes_the_flag_off_a_dequantized_model(tmp_path: Path) -> None:
    """A model loaded from GGUF holds float weights and is still marked as quantized."""
    gguf = pytest.importorskip("transformers.quantizers.quantizer_gguf", reason="transformers 5.5 marks no such model")
    from transformers.utils.quantization_config import GgufConfig, QuantizationMethod

    model = tiny.llama()
    model.is_quantized, model.quantization_method = True, QuantizationMethod.GGUF
    model.config.quantization_config = GgufConfig()
    model.hf_quantizer = gguf.GgufHfQuantizer(model.config.quantization_config)
    with pytest.raises(ValueError, match="purely quantized"):
        tiny.trainer(tmp_path, model)
    trainer = tiny.trainer(tmp_path, prepare_model(model, r=4, quantization="int8"), [LoraCallback()])
    trainer.train()
    assert_trained_lora_only(trainer)


def test_peft_model_is_recognised_and_never_wrapped_or_quantized_twice(tmp_path: Path) -> None:
    model = prepare_model(tiny.llama(), r=4, quantization="int8")
    weights = [m.weight.data_ptr() for m in model.modules() if isinstance(m, bnb.nn.Linear8bitLt)]
    trainer = tiny.trainer(tmp_path, model, [LoraCallback(r=4, quantization="int8")])
    assert trainer.model is model
    assert [m.weight.data_ptr() for m in model.modules() if isinstance(m, bnb.nn.Linear8bitLt)] == weights
    assert sum(isinstance(m, peft.PeftModel) for m in model.modules()) == 1
    trainer.train()
    assert_trained_lora_only(trainer)


def test_contradicting_arguments_for_a_peft_model_are_refused(tmp_path: Path) -> None:
    model = prepare_model(tiny.llama(), r=4)
    with pytest.raises(PreparationError, match=r"r=8, the adapter has 4"):
        tiny.trainer(tmp_path, model, [LoraCallback(r=8)])
    with pytest.raises(PreparationError, match="int8"):
        prepare_model(prepare_model(tiny.llama(), quantization="nf4"), quantization="int8")


@needs("peft", MIN_PEFT_VERSION, "transformers' own add_adapter refuses it")
def test_adapters_of_add_adapter_are_refused_because_resume_and_best_crash(tmp_path: Path) -> None:
    model = tiny.llama()
    model.add_adapter(peft.LoraConfig(target_modules=["q_proj"]))
    with pytest.raises(PreparationError, match="add_adapter"):
        tiny.trainer(tmp_path, model, [LoraCallback()])


# -- Int8PreparationCallback -------------------------------------------------------------------


def test_int8_under_existing_adapters_keeps_them(tmp_path: Path) -> None:
    model = peft.get_peft_model(
        tiny.llama(), peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    )
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_()
    before = {n: (id(p), p.requires_grad, p.detach().clone()) for n, p in model.named_parameters() if "lora_" in n}
    trainer = tiny.trainer(tmp_path, model, [Int8PreparationCallback()])
    assert trainer.model is model
    after = {n: p for n, p in model.named_parameters() if "lora_" in n}
    assert after.keys() == before.keys()
    for name, (identity, grad, value) in before.items():
        assert id(after[name]) == identity
        assert after[name].requires_grad == grad
        assert torch.equal(after[name], value)
    assert sum(isinstance(m, bnb.nn.Linear8bitLt) for m in model.modules()) == 14
    trainer.train()
    assert_trained_lora_only(trainer)


def test_merging_works_after_quantizing_under_adapters(tmp_path: Path) -> None:
    from lora_plugins.quantization.lora_layer import QuantizedLoraLinear

    model = peft.get_peft_model(tiny.llama(), peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"]))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1)
    trainer = tiny.trainer(tmp_path, model, [Int8PreparationCallback(compute_dtype="float32")])
    layer = trainer.model.base_model.model.model.layers[0].self_attn.q_proj
    assert type(layer) is QuantizedLoraLinear
    ids = torch.arange(1, 13)[None]
    with torch.no_grad():
        adapted = model.train()(ids).logits
        with model.disable_adapter():
            bare = model(ids).logits
        merged = model.merge_and_unload().train()(ids).logits
    assert (merged - adapted).abs().mean() < 0.1 * (bare - adapted).abs().mean()


def test_kbit_preparation_freezes_adapters_and_ours_does_not(tmp_path: Path) -> None:
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"])
    naive = peft.prepare_model_for_kbit_training(peft.get_peft_model(tiny.llama(), config))
    assert not any(p.requires_grad for p in naive.parameters())
    ours = tiny.trainer(tmp_path, peft.get_peft_model(tiny.llama(), config), [Int8PreparationCallback()])
    assert len(trainable_ids(ours)) == 8


def test_int8_alone_freezes_and_marks_a_plain_model(tmp_path: Path) -> None:
    from lora_plugins.errors import NothingTrainable

    trainer = tiny.trainer(tmp_path, callbacks=[Int8PreparationCallback()])
    model = trainer.model
    assert model.is_quantized
    assert model.is_loaded_in_8bit
    assert type(model.hf_quantizer).__name__ == "Bnb8BitHfQuantizer"
    assert not any(p.requires_grad for p in model.parameters())
    with pytest.raises(NothingTrainable):
        trainer.train()


def test_plain_model_prepared_here_and_wrapped_afterwards(tmp_path: Path) -> None:
    trainer = tiny.trainer(tmp_path, callbacks=[Int8PreparationCallback()])
    attach(trainer, r=4)
    trainer.train()
    assert_trained_lora_only(trainer)


# -- checkpoints -------------------------------------------------------------------------------


@pytest.mark.parametrize("quantization", [None, "int8", "nf4"])
def test_checkpoints_hold_the_adapter_only(tmp_path: Path, quantization: str | None) -> None:
    trainer = tiny.trainer(
        tmp_path, callbacks=[LoraCallback(r=4, quantization=quantization)], save_strategy="steps", save_steps=2
    )
    trainer.train()
    folder = tmp_path / "checkpoint-4"
    assert not (folder / "model.safetensors").exists()
    assert all("lora_" in key for key in checkpoint_keys(folder))
    assert len(checkpoint_keys(folder)) == 8


@pytest.mark.parametrize("name", ["default", "mine"])
@pytest.mark.parametrize("quantization", [None, "int8"])
def test_resume_equals_an_uninterrupted_run(tmp_path: Path, name: str, quantization: str | None) -> None:
    def make(folder: str, **arguments: Any) -> Trainer:
        callback = LoraCallback(r=4, adapter_name=name, quantization=quantization)
        return tiny.trainer(tmp_path / folder, callbacks=[callback], save_strategy="steps", save_steps=2, **arguments)

    whole = make("whole")
    whole.train()
    make("part", max_steps=4).train()
    resumed = make("part")
    start = tiny.adapter_tensors(resumed.model, "lora_B")
    assert all(not tensor.any() for tensor in start.values())
    resumed.train(resume_from_checkpoint=str(tmp_path / "part" / "checkpoint-2"))
    expected = tiny.adapter_tensors(whole.model)
    for key, tensor in tiny.adapter_tensors(resumed.model).items():
        assert torch.allclose(tensor, expected[key], atol=1e-6), key


class WorseLater(TrainerCallback):
    """Makes the first evaluation the best one."""

    def on_evaluate(self, args: Any, state: Any, control: Any, metrics: dict[str, float], **kwargs: Any) -> None:
        metrics["eval_score"] = -float(state.global_step)


@pytest.mark.parametrize("name", ["default", "mine"])
@pytest.mark.parametrize("quantization", [None, "int8"])
def test_best_adapter_equals_its_file(tmp_path: Path, name: str, quantization: str | None) -> None:
    trainer = tiny.trainer(
        tmp_path,
        callbacks=[LoraCallback(r=4, adapter_name=name, quantization=quantization), WorseLater()],
        trainer_arguments={"eval_dataset": tiny.rows(8, seed=2)},
        max_steps=6,
        eval_strategy="steps",
        eval_steps=2,
        save_strategy="steps",
        save_steps=2,
        load_best_model_at_end=True,
        greater_is_better=True,
        metric_for_best_model="eval_score",
        learning_rate=1e-2,
    )
    trainer.train()
    best = Path(trainer.state.best_model_checkpoint)
    place = best if name == "default" else best / name
    stored = load_file(place / "adapter_model.safetensors")
    live = peft.get_peft_model_state_dict(trainer.model, adapter_name=name)
    assert stored.keys() == live.keys()
    assert all(torch.equal(stored[key], live[key]) for key in stored)
    last = tmp_path / "checkpoint-6" / ("" if name == "default" else name) / "adapter_model.safetensors"
    assert best.name == "checkpoint-2"
    assert any(not torch.equal(load_file(last)[key], live[key]) for key in stored)


def test_upstream_keeps_the_last_weights_of_an_adapter_with_another_name(tmp_path: Path) -> None:
    """Shows the trap: without the callback the best checkpoint is reported and not restored."""
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"])
    model = peft.get_peft_model(tiny.llama(), config, adapter_name="mine")
    trainer = tiny.trainer(
        tmp_path,
        model,
        callbacks=[WorseLater()],
        trainer_arguments={"eval_dataset": tiny.rows(8, seed=2)},
        eval_strategy="steps",
        eval_steps=2,
        save_strategy="steps",
        save_steps=2,
        load_best_model_at_end=True,
        greater_is_better=True,
        metric_for_best_model="eval_score",
    )
    trainer.train()
    best = Path(trainer.state.best_model_checkpoint)
    assert best.name == "checkpoint-2"
    stored = load_file(best / "mine" / "adapter_model.safetensors")
    live = peft.get_peft_model_state_dict(model, adapter_name="mine")
    assert any(not torch.equal(stored[key], live[key]) for key in stored)


def test_training_goes_on_after_the_best_model_was_loaded(tmp_path: Path) -> None:
    trainer = tiny.trainer(
        tmp_path,
        callbacks=[LoraCallback(r=4)],
        trainer_arguments={"eval_dataset": tiny.rows(8, seed=2)},
        eval_strategy="steps",
        eval_steps=2,
        save_strategy="steps",
        save_steps=2,
        load_best_model_at_end=True,
    )
    trainer.train()
    before = tiny.adapter_tensors(trainer.model)
    trainer.train()
    after = tiny.adapter_tensors(trainer.model)
    assert_trained_lora_only(trainer)
    assert any(not torch.equal(after[key], before[key]) for key in before)


def test_several_calls_of_train_go_on_with_the_same_adapter(tmp_path: Path) -> None:
    trainer = tiny.trainer(tmp_path, callbacks=[LoraCallback(r=4, quantization="int8")])
    model = trainer.model
    trainer.train()
    first = tiny.adapter_tensors(trainer.model)
    trainer.train()
    assert trainer.model is model
    assert any(not torch.equal(t, first[n]) for n, t in tiny.adapter_tensors(trainer.model).items())
    assert_trained_lora_only(trainer)


# -- model_init --------------------------------------------------------------------------------


@pytest.mark.parametrize("quantization", [None, "int8"])
def test_model_init_prepares_every_model(tmp_path: Path, quantization: str | None) -> None:
    made: list[Any] = []

    def model_init() -> Any:
        made.append(tiny.llama())
        return made[-1]

    trainer = tiny.trainer(
        tmp_path,
        callbacks=[LoraCallback(r=4, quantization=quantization)],
        trainer_arguments={"model_init": model_init},
        save_strategy="steps",
        save_steps=4,
    )
    for _ in range(2):
        trainer.train()
        assert_trained_lora_only(trainer)
    assert len(made) == 3
    assert len(checkpoint_keys(tmp_path / "checkpoint-4")) == 8
    detach(trainer)
    assert "call_model_init" not in vars(trainer)


# -- continuing --------------------------------------------------------------------------------


@pytest.mark.parametrize("quantization", [None, "int8", "nf4"])
def test_adapter_folder_is_continued(tmp_path: Path, quantization: str | None) -> None:
    first = tiny.trainer(tmp_path / "first", callbacks=[LoraCallback(r=4, quantization=quantization)])
    first.train()
    first.save_model()
    second = tiny.trainer(
        tmp_path / "second",
        callbacks=[LoraCallback(adapter=tmp_path / "first", quantization=quantization, adapter_name="more")],
    )
    trained = peft.get_peft_model_state_dict(first.model)
    loaded = peft.get_peft_model_state_dict(second.model, adapter_name="more")
    assert trained.keys() == loaded.keys()
    assert all(torch.equal(trained[key], loaded[key]) for key in trained)
    second.train()
    assert_trained_lora_only(second)
    after = peft.get_peft_model_state_dict(second.model, adapter_name="more")
    assert all(not torch.equal(trained[key], after[key]) for key in trained)


def test_adapter_of_another_shape_is_refused(tmp_path: Path) -> None:
    from lora_plugins.errors import AdapterMismatch

    prepare_model(tiny.llama(layers=3), r=4).save_pretrained(tmp_path / "three")
    with pytest.raises(AdapterMismatch, match="have no place in it"):
        prepare_model(tiny.llama(layers=2), adapter=tmp_path / "three")


# -- heads and other models --------------------------------------------------------------------


def test_new_classification_head_is_trained_and_saved(tmp_path: Path) -> None:
    trainer = tiny.trainer(
        tmp_path,
        tiny.bert_classifier(),
        [LoraCallback(r=4, quantization="int8")],
        data=tiny.classes(),
        save_strategy="steps",
        save_steps=4,
    )
    head = {n: p.detach().clone() for n, p in trainer.model.named_parameters() if "classifier" in n and p.requires_grad}
    assert head
    trainer.train()
    after = dict(trainer.model.named_parameters())
    assert all(not torch.equal(after[name], value) for name, value in head.items())
    assert any("classifier" in key for key in checkpoint_keys(tmp_path / "checkpoint-4"))


def test_gpt2_conv1d_is_quantized_and_trained(tmp_path: Path) -> None:
    model = tiny.gpt2().eval()
    ids = torch.arange(1, 13)[None]
    with torch.no_grad():
        before = model(ids).logits
    trainer = tiny.trainer(tmp_path, model, [LoraCallback(r=4, quantization="int8", compute_dtype="float32")])
    with torch.no_grad():
        assert (trainer.model.train()(ids).logits - before).abs().mean() < 0.2 * before.abs().mean()
    trainer.train()
    assert optimizer_ids(trainer) == trainable_ids(trainer)
    assert all(t.any() for t in tiny.adapter_tensors(trainer.model, "lora_B").values())


# -- optimizers --------------------------------------------------------------------------------


def test_given_optimizer_is_kept_and_gets_the_adapters(tmp_path: Path) -> None:
    model = tiny.llama()
    attention = [p for n, p in model.named_parameters() if "q_proj" in n]
    rest = [p for n, p in model.named_parameters() if "q_proj" not in n]
    optimizer = torch.optim.AdamW(
        [{"params": rest, "lr": 1e-3}, {"params": attention, "lr": 5e-3, "weight_decay": 0.0}]
    )
    trainer = tiny.trainer(
        tmp_path,
        model,
        [LoraCallback(r=4)],
        trainer_arguments={"optimizers": (optimizer, None)},
        lr_scheduler_type="constant",
    )
    trainer.train()
    assert trainer.optimizer.optimizer is optimizer
    assert_trained_lora_only(trainer)
    names = {id(p): n for n, p in trainer.model.named_parameters()}
    groups = [{names[id(p)] for p in group["params"]} for group in optimizer.param_groups]
    assert all("v_proj" in name for name in groups[0])
    assert all("q_proj" in name for name in groups[1])
    assert [group["lr"] for group in optimizer.param_groups] == [1e-3, 5e-3]
    assert optimizer.param_groups[1]["weight_decay"] == 0.0


def test_given_optimizer_with_state_is_refused(tmp_path: Path) -> None:
    model = tiny.llama()
    optimizer = torch.optim.AdamW(model.parameters())
    model(input_ids=torch.arange(4)[None], labels=torch.arange(4)[None]).loss.backward()
    optimizer.step()
    with pytest.raises(OptimizerConflict, match="already holds state"):
        tiny.trainer(tmp_path, model, [LoraCallback()], trainer_arguments={"optimizers": (optimizer, None)})


def test_given_optimizer_that_has_trained_is_not_replaced_in_silence(tmp_path: Path) -> None:
    model = tiny.llama()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    trainer = tiny.trainer(tmp_path, model, trainer_arguments={"optimizers": (optimizer, None)})
    trainer.train()
    with pytest.raises(OptimizerConflict, match="SGD"):
        attach(trainer)


def test_loraplus_groups_are_left_as_they_are(tmp_path: Path) -> None:
    from peft.optimizers import create_loraplus_optimizer

    model = prepare_model(tiny.llama(), r=4)
    optimizer = create_loraplus_optimizer(model, torch.optim.AdamW, lr=1e-3, loraplus_lr_ratio=8.0)
    before = [[id(p) for p in group["params"]] for group in optimizer.param_groups]
    trainer = tiny.trainer(tmp_path, model, [LoraCallback()], trainer_arguments={"optimizers": (optimizer, None)})
    trainer.train()
    assert [[id(p) for p in group["params"]] for group in optimizer.param_groups] == before
    assert {group["initial_lr"] for group in optimizer.param_groups if group["params"]} == {1e-3, 8e-3}
    assert_trained_lora_only(trainer)


# -- replaced models ---------------------------------------------------------------------------


def test_model_replaced_after_the_start_is_noticed(tmp_path: Path) -> None:
    trainer = tiny.trainer(tmp_path, callbacks=[LoraCallback()])
    trainer.model = trainer.model_wrapped = tiny.llama()
    with pytest.raises(ModelReplaced):
        trainer.train()


def test_report_line_and_record(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trainer = tiny.trainer(tmp_path, callbacks=[LoraCallback(r=4, quantization="int8")])
    line = capsys.readouterr().out
    assert "trainable params: 896 ||" in line
    callback = next(c for c in trainer.callback_handler.callbacks if isinstance(c, LoraCallback))
    assert callback.report is not None
    assert callback.report.trainable == sum(p.numel() for p in trainer.model.parameters() if p.requires_grad)
    assert callback.report.total == sum(p.numel() for p in tiny.llama().parameters()) + callback.report.trainable
    assert json.loads(json.dumps(callback.report.to_dict()))["quantization"] == "int8"


# -- one list of arguments ---------------------------------------------------------------------


@pytest.mark.parametrize("function", [prepare_model, LoraCallback, Int8PreparationCallback])
def test_an_argument_has_one_default_wherever_it_is_given(function: Any) -> None:
    """Each signature is written out for its readers; `LoraSettings` holds what they share."""
    shared = {item.name: item.default for item in fields(LoraSettings) if item.default is not MISSING}
    given = {name: one.default for name, one in inspect.signature(function).parameters.items() if name in shared}
    if function is Int8PreparationCallback:
        assert given.pop("quantization") == "int8"
    else:
        assert set(given) == set(shared)
    assert given == {name: shared[name] for name in given}

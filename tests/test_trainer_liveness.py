"""Every way of training nothing is found and named, and none of the harmless ones is."""

from __future__ import annotations

import functools
import re
from pathlib import Path
from typing import Any

import peft
import pytest
import tiny
import torch
from datasets import Dataset
from safetensors.torch import load_file, save_file
from transformers import LlamaForCausalLM, Trainer, TrainerCallback

from lora_plugins import LoraCallback, prepare_model
from lora_plugins.errors import (
    AdapterNotMoving,
    BrokenCheckpoint,
    DeadLoss,
    FrozenHead,
    LivenessWarning,
    NonFiniteLoss,
    NothingTrainable,
    OptimizerMismatch,
)
from lora_plugins.models.wrapping import base_of


def assert_moved(trainer: Trainer) -> None:
    assert all(tensor.any() for tensor in tiny.adapter_tensors(trainer.model, "lora_B").values())


# -- at the beginning --------------------------------------------------------------------------


def test_adapter_loaded_for_inference_is_not_trainable(tmp_path: Path) -> None:
    prepare_model(tiny.llama(), r=4).save_pretrained(tmp_path / "adapter")
    model = peft.PeftModel.from_pretrained(tiny.llama(), tmp_path / "adapter")
    trainer = tiny.trainer(tmp_path, model, [LoraCallback()])
    with pytest.raises(NothingTrainable, match="is_trainable"):
        trainer.train()


def test_preparation_after_the_adapters_is_named(tmp_path: Path) -> None:
    trainer = tiny.trainer(tmp_path, callbacks=[LoraCallback(r=4)])
    peft.prepare_model_for_kbit_training(trainer.model)
    with pytest.raises(NothingTrainable, match="prepare_model_for_kbit_training"):
        trainer.train()


def test_optimizer_without_the_adapters(tmp_path: Path) -> None:
    class Own(Trainer):
        def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
            some = [p for n, p in self.model.named_parameters() if p.requires_grad and "q_proj" in n]
            self.optimizer = torch.optim.AdamW(some)
            return self.optimizer

    trainer = tiny.trainer(tmp_path, callbacks=[LoraCallback(r=4)], cls=Own)
    with pytest.raises(OptimizerMismatch, match=r"4 trainable tensors are not in the optimizer.*v_proj"):
        trainer.train()


def test_optimizer_with_frozen_tensors(tmp_path: Path) -> None:
    class Own(Trainer):
        def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
            self.optimizer = torch.optim.AdamW(self.model.parameters())
            return self.optimizer

    trainer = tiny.trainer(tmp_path, callbacks=[LoraCallback(r=4)], cls=Own)
    with pytest.raises(OptimizerMismatch, match="frozen tensors are in it"):
        trainer.train()


def test_frozen_new_head_is_named(tmp_path: Path) -> None:
    config = peft.LoraConfig(r=4, target_modules=["query", "value"])
    model = peft.get_peft_model(tiny.bert_classifier(), config)
    trainer = tiny.trainer(tmp_path, model, [LoraCallback()], data=tiny.classes())
    with pytest.raises(FrozenHead, match="classifier"):
        trainer.train()


# -- movement ----------------------------------------------------------------------------------


def test_optimizer_that_moves_copies(tmp_path: Path) -> None:
    class Useless(torch.optim.SGD):
        def step(self, closure: Any = None) -> None:
            return None

    class Own(Trainer):
        def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
            self.optimizer = Useless([p for p in self.model.parameters() if p.requires_grad], lr=0.1)
            return self.optimizer

    trainer = tiny.trainer(tmp_path, callbacks=[LoraCallback(r=4)], cls=Own)
    with pytest.raises(AdapterNotMoving, match=r"have not moved after 1 steps.*optimizer left them"):
        trainer.train()
    assert trainer.state.global_step == 0


def test_adapters_whose_output_is_not_used(tmp_path: Path) -> None:
    model = prepare_model(tiny.llama(), r=4)
    layer = model.base_model.model.model.layers[1].self_attn.v_proj
    base = layer.base_layer
    layer.forward = lambda x, *args, **kwargs: torch.nn.functional.linear(x, base.weight)  # type: ignore[method-assign]
    trainer = tiny.trainer(tmp_path, model, [LoraCallback()])
    with pytest.raises(AdapterNotMoving, match=r"1 adapter tensors.*layers\.1\.self_attn\.v_proj\.lora_B.*no gradient"):
        trainer.train()


def test_a_that_never_moves_is_found_at_the_second_step(tmp_path: Path) -> None:
    class OnlyB(Trainer):
        def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
            loss = super().training_step(*args, **kwargs)
            for name, parameter in self.model.named_parameters():
                if "lora_A" in name:
                    parameter.grad = None
            return loss

    trainer = tiny.trainer(tmp_path, callbacks=[LoraCallback(r=4)], cls=OnlyB)
    with pytest.raises(AdapterNotMoving, match=r"after 2 steps.*lora_A"):
        trainer.train()
    assert trainer.state.global_step == 1


def test_warmup_that_starts_at_zero_is_no_alarm(tmp_path: Path) -> None:
    trainer = tiny.trainer(tmp_path, callbacks=[LoraCallback(r=4)], warmup_steps=3, max_steps=6)
    trainer.train()
    assert_moved(trainer)


@pytest.mark.parametrize("fp16", [False, True])
def test_very_long_warmup_is_no_alarm(tmp_path: Path, fp16: bool) -> None:
    arguments: dict[str, Any] = {"bf16": True} if fp16 else {}
    trainer = tiny.trainer(
        tmp_path, callbacks=[LoraCallback(r=4)], warmup_steps=1_000_000, learning_rate=1e-4, max_steps=5, **arguments
    )
    trainer.train()
    assert_moved(trainer)


def test_gradient_accumulation_is_no_alarm(tmp_path: Path) -> None:
    trainer = tiny.trainer(
        tmp_path, callbacks=[LoraCallback(r=4)], gradient_accumulation_steps=3, per_device_train_batch_size=2
    )
    trainer.train()
    assert_moved(trainer)


def test_frozen_reference_adapter_is_no_alarm(tmp_path: Path) -> None:
    model = prepare_model(tiny.llama(), r=4)
    model.add_adapter("reference", peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"]))
    model.set_adapter("default")
    assert not any(p.requires_grad for n, p in model.named_parameters() if "reference" in n)
    trainer = tiny.trainer(tmp_path, model, [LoraCallback()])
    trainer.train()
    assert all(t.any() for n, t in tiny.adapter_tensors(model, "lora_B").items() if "default" in n)
    assert all(not t.any() for n, t in tiny.adapter_tensors(model, "lora_B").items() if "reference" in n)


def test_run_without_any_learning_rate_warns(tmp_path: Path) -> None:
    trainer = tiny.trainer(tmp_path, callbacks=[LoraCallback(r=4)], max_steps=1, warmup_steps=10)
    with pytest.warns(LivenessWarning, match="learning rate zero in 1"):
        trainer.train()


# -- loss --------------------------------------------------------------------------------------


class Scaled(Trainer):
    """A Trainer whose loss is multiplied by ``factors[global_step]`` where given."""

    factors: dict[int, float]

    def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
        return super().compute_loss(*args, **kwargs) * self.factors.get(self.state.global_step, 1.0)


@pytest.mark.parametrize("factor", [float("nan"), float("inf")])
def test_non_finite_loss_stops_the_run_although_the_log_hides_it(tmp_path: Path, factor: float) -> None:
    Scaled.factors = {2: factor}
    hidden = tiny.trainer(tmp_path / "hidden", cls=Scaled)
    hidden.train()
    assert all(entry["loss"] == entry["loss"] for entry in hidden.state.log_history if "loss" in entry)
    trainer = tiny.trainer(tmp_path / "ours", callbacks=[LoraCallback(r=4)], cls=Scaled)
    with pytest.raises(NonFiniteLoss, match=r"in step 3, batch 1 of 1.*log would have shown"):
        trainer.train()
    assert trainer.state.global_step == 2


def test_batch_of_ignored_labels_is_named(tmp_path: Path) -> None:
    data = tiny.rows(16).to_dict()
    data["labels"][5] = [-100] * tiny.LENGTH

    class PerBatchMean(Trainer):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            self.model_accepts_loss_kwargs = False

    trainer = tiny.trainer(
        tmp_path,
        callbacks=[LoraCallback(r=4)],
        data=Dataset.from_dict(data),
        cls=PerBatchMean,
        per_device_train_batch_size=1,
        gradient_accumulation_steps=4,
        train_sampling_strategy="sequential",
    )
    with pytest.raises(NonFiniteLoss, match=r"in step 2, batch 2 of 4.*Every label of this batch is -100"):
        trainer.train()


def test_zero_loss_with_zero_gradients_stops_after_three_steps(tmp_path: Path) -> None:
    Scaled.factors = dict.fromkeys(range(10), 0.0)
    trainer = tiny.trainer(tmp_path, callbacks=[LoraCallback(r=4)], cls=Scaled, max_steps=8)
    with pytest.raises(DeadLoss, match="up to step 3"):
        trainer.train()


def test_one_zero_loss_is_no_alarm(tmp_path: Path) -> None:
    Scaled.factors = {0: 0.0, 2: 0.0}
    trainer = tiny.trainer(tmp_path, callbacks=[LoraCallback(r=4)], cls=Scaled, max_steps=6)
    trainer.train()
    assert_moved(trainer)


def die(trainer: Trainer, first: int, last: int = 10_000, *, masked: bool = False) -> None:
    """Let the loss be exactly zero from one step to another; ``masked``: because NaN is taken for zero."""
    base = base_of(trainer.model)
    forward = base.forward

    @functools.wraps(forward)
    def dying(*args: Any, **kwargs: Any) -> Any:
        output = forward(*args, **kwargs)
        if first <= trainer.state.global_step < last:
            output.loss = (output.loss * float("nan")).nan_to_num() if masked else output.loss * 0.0
        return output

    base.forward = dying


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("skipped", [[], ["adapter-not-moving"]])
def test_a_loss_that_dies_in_the_middle_stops_the_run(tmp_path: Path, masked: bool, skipped: list[str]) -> None:
    callback = LoraCallback(r=4, skip_checks=skipped)
    trainer = tiny.trainer(tmp_path, callbacks=[callback], max_steps=40, logging_steps=40)
    die(trainer, 5, masked=masked)
    with pytest.raises(DeadLoss, match=r"20 steps in a row, up to step 25.*skip_checks=\['dead-loss'\]"):
        trainer.train()


def test_a_loss_that_is_zero_for_a_while_is_no_alarm(tmp_path: Path) -> None:
    trainer = tiny.trainer(tmp_path, callbacks=[LoraCallback(r=4)], max_steps=26, logging_steps=40)
    die(trainer, 5, 24)
    trainer.train()


def margin(logits: torch.Tensor) -> torch.Tensor:
    # A sum of two, because the Trainer multiplies a loss in place.
    return torch.relu(0.05 - logits[..., 0].mean()) + 0.0


class Margin(Trainer):  # type: ignore[misc]
    """A loss of one's own that is zero once it is satisfied, with labels."""

    def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        return margin(model(input_ids=inputs["input_ids"]).logits)


class MarginModel(LlamaForCausalLM):  # type: ignore[misc]
    """A model of one's own with such a loss in its forward."""

    def forward(self, input_ids: Any = None, labels: Any = None, **kwargs: Any) -> Any:
        output = super().forward(input_ids=input_ids, **kwargs)
        output.loss = margin(output.logits)
        return output


def pass_on(outputs: Any, labels: Any, num_items_in_batch: Any = None) -> torch.Tensor:
    return margin(outputs["logits"])


@pytest.mark.parametrize("how", ["Trainer", "model", "function"])
def test_a_margin_that_is_satisfied_is_no_alarm_however_long(tmp_path: Path, how: str) -> None:
    model: Any = MarginModel(tiny.llama().config) if how == "model" else tiny.llama()
    own = {"compute_loss_func": pass_on} if how == "function" else {}
    trainer = tiny.trainer(
        tmp_path,
        model,
        [LoraCallback(r=4, lora_dropout=0.0)],
        cls=Margin if how == "Trainer" else Trainer,
        data=tiny.rows(4),
        trainer_arguments=own,
        max_steps=45,
        learning_rate=0.03,
        lr_scheduler_type="constant",
    )
    trainer.train()
    losses = [row["loss"] for row in trainer.state.log_history if "loss" in row]
    assert losses[0] > 0
    assert losses[-25:] == [0.0] * 25, "the case shows something"


def test_run_whose_gradients_are_all_zero_fails_at_its_end(tmp_path: Path) -> None:
    Scaled.factors = dict.fromkeys(range(10), 0.0)
    trainer = tiny.trainer(tmp_path, callbacks=[LoraCallback(r=4)], cls=Scaled, max_steps=2)
    with pytest.raises(AdapterNotMoving, match="All 2 steps"):
        trainer.train()


# -- checkpoints -------------------------------------------------------------------------------


class Spoil(TrainerCallback):
    """Changes the adapter file of each checkpoint before the check sees it."""

    def __init__(self, change: Any) -> None:
        self.change = change

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.change(Path(args.output_dir) / f"checkpoint-{state.global_step}" / "adapter_model.safetensors")


def _cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-100])


def _drop(file: Path) -> None:
    tensors = load_file(file)
    tensors.pop(next(iter(tensors)))
    save_file(tensors, file)


def _zero(file: Path) -> None:
    save_file({name: torch.zeros_like(tensor) for name, tensor in load_file(file).items()}, file)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (Path.unlink, "has no adapter_model.safetensors"),
        (_cut, "cannot be used"),
        (_drop, "1 tensors of the model are not in it"),
        (_zero, "are not what the model holds"),
    ],
)
def test_broken_checkpoint_fails_the_save(tmp_path: Path, change: Any, message: str) -> None:
    trainer = tiny.trainer(tmp_path, callbacks=[Spoil(change), LoraCallback(r=4)], save_strategy="steps", save_steps=2)
    with pytest.raises(BrokenCheckpoint, match=re.escape(message)):
        trainer.train()

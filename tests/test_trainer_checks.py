"""Alarms: none that a healthy run can set off, each with a name and a switch, and the faults are still found."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import peft
import pytest
import tiny
import torch
from datasets import Dataset
from torch import nn
from transformers import BeitConfig, BeitForImageClassification, SwinConfig, SwinForImageClassification, Trainer

from lora_plugins import Int8PreparationCallback, LoraCallback, attach, prepare_model
from lora_plugins.errors import (
    AdapterNotMoving,
    DeadLoss,
    FrozenHead,
    LivenessError,
    ModelReplaced,
    NonFiniteLoss,
    NothingTrainable,
    OptimizerMismatch,
    ProcessMissing,
    UnknownCheck,
)
from lora_plugins.trainer.checks import CHECKS, check_name
from lora_plugins.trainer.losses import DEAD_STEPS

ROOT = Path(__file__).parent.parent


def assert_moved(trainer: Trainer) -> None:
    assert all(tensor.any() for tensor in tiny.adapter_tensors(trainer.model, "lora_B").values())


# -- names and switches ------------------------------------------------------------------------


def test_every_error_of_a_run_is_a_check_with_a_name() -> None:
    names = {check.name for check in CHECKS}
    assert {check_name(error) for error in LivenessError.__subclasses__()} - names == {check_name(ProcessMissing)}
    assert len(names) == len(CHECKS)


def test_docs_list_every_check() -> None:
    page = (ROOT / "docs" / "checks.md").read_text()
    rows = re.findall(r"^\| `([a-z-]+)` \| `(\w+)` \| ([^|]+) \| ([^|]+) \|", page, flags=re.M)
    assert rows == [(check.name, check.error.__name__, check.when, check.finds) for check in CHECKS]


@pytest.mark.parametrize("callback", [LoraCallback, Int8PreparationCallback])
def test_a_misspelt_check_is_named_with_what_was_meant(callback: Any) -> None:
    with pytest.raises(UnknownCheck, match=r"'dead-los'.*Did you mean 'dead-loss'"):
        callback(skip_checks=["dead-los"])
    with pytest.raises(UnknownCheck, match="process-missing"):
        callback(skip_checks="process-missing")


class Zero(Trainer):
    """A loss of zero, from a step on; the graph stays."""

    first = 0

    def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
        return super().compute_loss(*args, **kwargs) * float(self.state.global_step < self.first)


class Infinite(Trainer):
    def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
        loss = super().compute_loss(*args, **kwargs)
        return loss * (float("inf") if self.state.global_step == 1 else 1)


class Frozen(torch.optim.SGD):
    def step(self, closure: Any = None) -> None:
        """Move nothing."""


class Unmoved(Trainer):
    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        self.optimizer = Frozen([p for p in self.model.parameters() if p.requires_grad], lr=0.1)
        return self.optimizer


class Missing(Trainer):
    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        self.optimizer = torch.optim.SGD([p for p in self.model.parameters() if p.requires_grad][:3], lr=0.1)
        return self.optimizer


def faulty(folder: Path, name: str, skip: list[str]) -> Trainer:
    """A Trainer with the fault that a check finds."""
    callback = LoraCallback(r=4, skip_checks=skip)
    if name in ("dead-loss", "non-finite-loss", "adapter-not-moving", "optimizer-mismatch"):
        classes = {"dead-loss": Zero, "non-finite-loss": Infinite, "adapter-not-moving": Unmoved}
        return tiny.trainer(folder, callbacks=[callback], cls=classes.get(name, Missing))
    if name == "frozen-head":
        model = peft.get_peft_model(tiny.bert_classifier(), peft.LoraConfig(r=4, target_modules=["query", "value"]))
        return tiny.trainer(folder, model, [LoraCallback(skip_checks=skip)], data=tiny.classes())
    trainer = tiny.trainer(folder, callbacks=[callback])
    if name == "nothing-trainable":
        trainer.model.requires_grad_(False)
    else:
        assert name == "model-replaced"
        trainer.model = trainer.model_wrapped = peft.get_peft_model(tiny.llama(), peft.LoraConfig(r=4))
    return trainer


FAULTS = {
    "dead-loss": DeadLoss,
    "non-finite-loss": NonFiniteLoss,
    "adapter-not-moving": AdapterNotMoving,
    "optimizer-mismatch": OptimizerMismatch,
    "frozen-head": FrozenHead,
    "model-replaced": ModelReplaced,
    "nothing-trainable": NothingTrainable,
}


@pytest.mark.parametrize("name", FAULTS)
def test_an_alarm_says_how_it_is_switched_off_and_that_works(tmp_path: Path, name: str) -> None:
    with pytest.raises(FAULTS[name], match=re.escape(f"skip_checks=['{name}']")) as caught:
        faulty(tmp_path, name, []).train()
    assert str(caught.value).count("skip_checks=") == 1
    # Other checks look at the same fault, too.
    trainer = faulty(tmp_path, name, [name, "adapter-not-moving"])
    if name == "nothing-trainable":
        with pytest.raises(RuntimeError, match="does not require grad"):
            trainer.train()
    else:
        trainer.train()


def test_a_check_that_is_off_leaves_the_others_on(tmp_path: Path) -> None:
    trainer = tiny.trainer(tmp_path, callbacks=[LoraCallback(r=4, skip_checks=["dead-loss"])], cls=Infinite)
    with pytest.raises(NonFiniteLoss):
        trainer.train()


def test_checks_are_switched_off_for_attach_and_int8_too(tmp_path: Path) -> None:
    trainer = tiny.trainer(tmp_path, cls=Zero)
    attach(trainer, r=4, skip_checks=["dead-loss", "adapter-not-moving"])
    trainer.train()
    model = peft.get_peft_model(tiny.llama(), peft.LoraConfig(r=4))
    callback = Int8PreparationCallback(skip_checks=["dead-loss", "adapter-not-moving"])
    tiny.trainer(tmp_path, model, [callback], cls=Zero).train()


# -- loss --------------------------------------------------------------------------------------


class Advantages(Trainer):
    """A policy gradient: batches without labels, weighted by advantages that may all be zero."""

    values: tuple[float, ...] = ()

    def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        logits = model(input_ids=inputs["input_ids"]).logits.log_softmax(-1)
        step = self.state.global_step
        return -(logits[:, :-1].gather(2, inputs["input_ids"][:, 1:, None]) * self.values[step]).mean()


def unlabelled() -> Dataset:
    return Dataset.from_dict({"input_ids": tiny.rows(32)["input_ids"]})


def test_advantages_that_are_zero_at_first_are_no_alarm(tmp_path: Path) -> None:
    class Run(Advantages):
        values = (0.0, 0.0, 0.0, 0.0, 0.0, 1.0, 0.0, 1.0)

    trainer = tiny.trainer(tmp_path, callbacks=[LoraCallback(r=4)], cls=Run, data=unlabelled(), max_steps=8)
    trainer.train()
    assert_moved(trainer)


def test_a_run_whose_advantages_are_all_zero_fails_at_its_end(tmp_path: Path) -> None:
    class Run(Advantages):
        values = (0.0,) * 8

    trainer = tiny.trainer(tmp_path, callbacks=[LoraCallback(r=4)], cls=Run, data=unlabelled(), max_steps=8)
    with pytest.raises(AdapterNotMoving, match="All 8 steps"):
        trainer.train()


def test_a_margin_that_is_satisfied_after_some_steps_is_no_alarm(tmp_path: Path) -> None:
    class Run(Zero):
        first = 3

    trainer = tiny.trainer(tmp_path, callbacks=[LoraCallback(r=4)], cls=Run, max_steps=10)
    trainer.train()
    assert_moved(trainer)


class MeanOrZero(Trainer):
    """A loss that is zero where nothing counts, as many own losses are."""

    def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        labels = inputs.pop("labels")
        logits = model(**inputs).logits[:, :-1]
        inputs["labels"] = labels
        total = nn.functional.cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten(), reduction="sum")
        return total / (labels[:, 1:] != -100).sum().clamp(min=1)


def masked(first: int, rows: int = 32) -> Dataset:
    data = tiny.rows(rows).to_dict()
    data["labels"] = [[-100] * tiny.LENGTH if i < first else row for i, row in enumerate(data["labels"])]
    return Dataset.from_dict(data)


@pytest.mark.parametrize(("first", "alarm"), [(5, False), (12, False), (32, True)])
def test_masked_batches_are_an_alarm_only_if_nothing_else_comes(tmp_path: Path, first: int, alarm: bool) -> None:
    trainer = tiny.trainer(
        tmp_path,
        callbacks=[LoraCallback(r=4)],
        data=masked(first),
        cls=MeanOrZero,
        per_device_train_batch_size=1,
        max_steps=30,
        train_sampling_strategy="sequential",
    )
    if not alarm:
        trainer.train()
        assert_moved(trainer)
        return
    with pytest.raises(DeadLoss, match=r"in 20 steps.*every label is -100"):
        trainer.train()


def test_labels_that_count_and_give_no_loss_are_an_alarm_at_once(tmp_path: Path) -> None:
    trainer = tiny.trainer(tmp_path, callbacks=[LoraCallback(r=4)], cls=Zero, max_steps=8)
    with pytest.raises(DeadLoss, match=f"in {DEAD_STEPS} steps in a row, up to step {DEAD_STEPS}"):
        trainer.train()


# -- movement ----------------------------------------------------------------------------------


def pictures(count: int = 24) -> Dataset:
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randn(count, 3, 32, 32, generator=generator)
    return Dataset.from_dict({"pixel_values": pixels.tolist(), "labels": [i % 2 for i in range(count)]}).with_format(
        "torch"
    )


def beit() -> Any:
    return BeitForImageClassification(
        BeitConfig(
            hidden_size=32,
            num_hidden_layers=4,
            num_attention_heads=4,
            intermediate_size=64,
            image_size=32,
            patch_size=8,
            drop_path_rate=0.5,
        )
    )


def swin() -> Any:
    return SwinForImageClassification(
        SwinConfig(
            image_size=32,
            patch_size=4,
            embed_dim=16,
            depths=[2, 2],
            num_heads=[2, 2],
            window_size=4,
            drop_path_rate=0.5,
        )
    )


@pytest.mark.parametrize("make", [beit, swin])
@pytest.mark.parametrize("seed", range(3))
def test_stochastic_depth_is_no_alarm(tmp_path: Path, make: Any, seed: int) -> None:
    torch.manual_seed(seed)
    trainer = tiny.trainer(
        tmp_path,
        make(),
        [LoraCallback(r=2)],
        data=pictures(),
        per_device_train_batch_size=1,
        max_steps=12,
        seed=seed,
    )
    trainer.train()


def test_stochastic_depth_of_ones_own_is_no_alarm(tmp_path: Path) -> None:
    model = tiny.llama()
    trainer = tiny.trainer(tmp_path, model, [LoraCallback(r=4)], per_device_train_batch_size=1, max_steps=12)
    layers = model.model.layers
    for index in range(len(layers)):
        block = layers[index]
        forward = block.forward

        def skip(hidden: torch.Tensor, *args: Any, forward: Any = forward, **kwargs: Any) -> torch.Tensor:
            keep = (torch.rand(()) < 0.5).to(hidden.dtype)
            return hidden + keep * (forward(hidden, *args, **kwargs) - hidden)

        block.forward = skip
    trainer.train()


def test_a_branch_whose_gradient_is_always_zero_is_found_in_time(tmp_path: Path) -> None:
    model = prepare_model(tiny.llama(), r=4)
    layer = model.base_model.model.model.layers[1].self_attn.v_proj
    forward = layer.forward
    layer.forward = lambda x, *args, **kwargs: layer.base_layer(x) + 0.0 * forward(x, *args, **kwargs)
    trainer = tiny.trainer(tmp_path, model, [LoraCallback()], max_steps=25, per_device_train_batch_size=1)
    with pytest.raises(AdapterNotMoving, match=r"after 20 steps.*layers\.1\.self_attn\.v_proj"):
        trainer.train()


@pytest.mark.parametrize(("rate", "momentum"), [(1e-4, 0.0), (1e-5, 0.0), (1e-4, 0.9)])
def test_plain_sgd_is_no_alarm(tmp_path: Path, rate: float, momentum: float) -> None:
    model = tiny.llama()
    optimizer = torch.optim.SGD(model.parameters(), lr=rate, momentum=momentum)
    trainer = tiny.trainer(tmp_path, model, [LoraCallback(r=4)], trainer_arguments={"optimizers": (optimizer, None)})
    trainer.train()
    assert_moved(trainer)
    optim = tiny.trainer(tmp_path, callbacks=[LoraCallback(r=4)], optim="sgd", learning_rate=rate)
    optim.train()


def test_a_group_with_a_rate_of_zero_is_no_alarm_where_others_move(tmp_path: Path) -> None:
    model = prepare_model(tiny.llama(), r=4)
    groups = [
        {"params": [p for n, p in model.named_parameters() if "lora_A" in n], "lr": 0.0},
        {"params": [p for n, p in model.named_parameters() if "lora_B" in n], "lr": 0.01},
    ]
    optimizer = torch.optim.AdamW(groups)
    trainer = tiny.trainer(tmp_path, model, [LoraCallback()], trainer_arguments={"optimizers": (optimizer, None)})
    trainer.train()
    assert_moved(trainer)


def test_a_head_frozen_on_purpose_has_a_switch(tmp_path: Path) -> None:
    model = peft.get_peft_model(tiny.bert_classifier(), peft.LoraConfig(r=4, target_modules=["query", "value"]))
    trainer = tiny.trainer(tmp_path, model, [LoraCallback(skip_checks=["frozen-head"])], data=tiny.classes())
    trainer.train()
    assert_moved(trainer)

"""Optimizers that users pass in: what a group holds beside its tensors stays in step with them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from peft.optimizers import create_lorafa_optimizer, create_loraplus_optimizer
from transformers import Trainer

from lora_plugins import Int8PreparationCallback, LoraCallback, attach, detach, prepare_model
from lora_plugins.errors import AdapterNotMoving, BrokenCheckpoint, OptimizerConflict, OptimizerMismatch


def run(folder: Path, model: Any, optimizer: Any, callback: Any = None, **arguments: Any) -> Trainer:
    trainer = tiny.trainer(
        folder,
        model,
        [callback or LoraCallback(r=4)],
        trainer_arguments={"optimizers": (optimizer, None)},
        save_strategy="steps",
        save_steps=2,
        **arguments,
    )
    trainer.train()
    return trainer


def assert_in_step(trainer: Trainer) -> None:
    """Names in the optimizer and in its file are those of its tensors."""
    names = {id(p): name for name, p in trainer.model.named_parameters()}
    stored = torch.load(Path(trainer.args.output_dir, "checkpoint-4", "optimizer.pt"), weights_only=True)
    for group, saved in zip(trainer.optimizer.param_groups, stored["param_groups"], strict=True):
        assert group["param_names"] == [names[id(p)] for p in group["params"]] == saved["param_names"]
        assert len(saved["param_names"]) == len(saved["params"])
    assert all(tensor.any() for tensor in tiny.adapter_tensors(trainer.model, "lora_B").values())


@pytest.mark.parametrize("make", [torch.optim.AdamW, torch.optim.SGD, torch.optim.Adamax])
def test_names_of_tensors_follow_them(tmp_path: Path, make: Any) -> None:
    model = tiny.llama()
    trainer = run(tmp_path, model, make(model.named_parameters(), lr=0.01))
    assert_in_step(trainer)
    detach(trainer)
    attach(trainer, r=2)
    trainer.train()


def test_names_follow_in_groups(tmp_path: Path) -> None:
    model = tiny.llama()
    named = list(model.named_parameters())
    groups = [
        {"params": [pair for pair in named if "q_proj" in pair[0]], "lr": 0.02},
        {"params": [pair for pair in named if "q_proj" not in pair[0]]},
    ]
    trainer = run(tmp_path, model, torch.optim.AdamW(groups, lr=0.01))
    assert_in_step(trainer)
    assert [len(group["params"]) for group in trainer.optimizer.param_groups] == [4, 4]


class PerTensor(torch.optim.SGD):
    """An optimizer with a list of its own beside the tensors, as LoRA-FA and Muon variants have."""

    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for parameter, factor in zip(group["params"], group["factors"], strict=True):
                if parameter.grad is not None:
                    parameter.data.add_(parameter.grad, alpha=-group["lr"] * factor)


def test_a_list_of_ones_own_gives_adapters_what_their_layers_weight_had(tmp_path: Path) -> None:
    model = tiny.llama()
    named = list(model.named_parameters())
    factors = [2.0 if "q_proj" in name else 1.0 for name, _ in named]
    optimizer = PerTensor([{"params": [p for _, p in named], "factors": factors}], lr=0.5)
    trainer = run(tmp_path, model, optimizer)
    names = {id(p): name for name, p in trainer.model.named_parameters()}
    (group,) = optimizer.param_groups
    assert [names[id(p)].count("q_proj") + 1.0 for p in group["params"]] == group["factors"]
    assert len(group["params"]) == 8


def test_a_list_that_cannot_be_continued_is_named(tmp_path: Path) -> None:
    model = tiny.llama()
    some = [p for name, p in model.named_parameters() if "q_proj" not in name]
    optimizer = PerTensor([{"params": some, "factors": [1.0] * len(some)}], lr=0.5)
    with pytest.raises(OptimizerConflict, match=r"holds factors for each.*q_proj.*prepare_model"):
        run(tmp_path, model, optimizer)


def test_settings_that_are_as_long_as_the_tensors_are_no_list_of_theirs(tmp_path: Path) -> None:
    model = tiny.llama()
    two = [p for name, p in model.named_parameters() if "layers.0.self_attn.q_proj" in name or "embed" in name]
    trainer = run(tmp_path, model, torch.optim.AdamW(two, lr=0.01, betas=[0.9, 0.99]))  # type: ignore[arg-type]
    assert tuple(trainer.optimizer.param_groups[0]["betas"]) == (0.9, 0.99)


@pytest.mark.parametrize("callback", [LoraCallback, Int8PreparationCallback])
def test_lorafa_trains_b_and_leaves_a(tmp_path: Path, callback: Any) -> None:
    model = prepare_model(tiny.llama(), r=4, lora_alpha=8)
    start = tiny.adapter_tensors(model)
    optimizer = create_lorafa_optimizer(model, r=4, lora_alpha=8, lr=0.01)
    trainer = run(tmp_path, model, optimizer, callback())
    now = tiny.adapter_tensors(trainer.model)
    assert all(torch.equal(now[name], start[name]) == ("lora_A" in name) for name in start)
    (group,) = optimizer.param_groups
    names = {id(p): name for name, p in trainer.model.named_parameters()}
    assert group["names"] == [names[id(p)] for p in group["params"]]
    assert len(group["scaling_factors"]) == len(group["params"]) == 8


def test_loraplus_keeps_its_rates(tmp_path: Path) -> None:
    model = prepare_model(tiny.llama(), r=4)
    optimizer = create_loraplus_optimizer(model, torch.optim.AdamW, lr=1e-3, loraplus_lr_ratio=8.0)
    trainer = run(tmp_path, model, optimizer, lr_scheduler_type="constant")
    rates = {group["lr"] for group in trainer.optimizer.param_groups if group["params"]}
    assert rates == {1e-3, 8e-3}


@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="this torch has no Muon")
def test_muon_trains_the_matrices_of_an_adapter(tmp_path: Path) -> None:
    model = tiny.llama()
    matrices = [(name, p) for name, p in model.named_parameters() if p.ndim == 2]
    trainer = run(tmp_path, model, torch.optim.Muon(matrices, lr=0.01))
    assert_in_step(trainer)


def test_frozen_weights_of_the_base_still_do_not_belong_into_an_optimizer(tmp_path: Path) -> None:
    model = prepare_model(tiny.llama(), r=4)
    trainer = tiny.trainer(tmp_path, model, [LoraCallback()])
    trainer.create_optimizer()
    trainer.optimizer.add_param_group({"params": [model.get_input_embeddings().weight]})
    with pytest.raises(
        OptimizerMismatch, match=r"1 frozen tensors.*embed_tokens.*skip_checks=\['optimizer-mismatch'\]"
    ):
        trainer.train()


# -- optimizers of other packages --------------------------------------------------------------

#: Options of an optimizer that projects gradients.
GALORE = {"optim_target_modules": ["q_proj", "v_proj"], "optim_args": "rank=2, update_proj_gap=2, scale=0.5"}


def start(folder: Path, quantization: str | None = None, **options: Any) -> Trainer:
    callback = LoraCallback(r=4, lora_dropout=0.0, quantization=quantization)
    defaults = {"save_strategy": "steps", "save_steps": 2, "lr_scheduler_type": "constant"}
    return tiny.trainer(folder, callbacks=[callback], **{**defaults, **options})


def assert_resumes_to_the_same_end(folder: Path, steps: int = 4, **options: Any) -> Trainer:
    first = start(folder / "first", max_steps=steps, **options)
    first.train()
    again = start(folder / "again", max_steps=steps, **options)
    again.train(resume_from_checkpoint=str(folder / "first" / "checkpoint-2"))
    ends = [tiny.adapter_tensors(trainer.model) for trainer in (first, again)]
    assert all(torch.equal(value, ends[1][name]) for name, value in ends[0].items())
    held = {id(p) for group in again.optimizer.param_groups for p in group["params"]}
    assert held == {id(p) for p in again.model.parameters() if p.requires_grad}
    assert all(tensor.any() for tensor in tiny.adapter_tensors(again.model, "lora_B").values())
    return again


@pytest.mark.parametrize("quantization", [None, "int8"])
@pytest.mark.parametrize("optim", ["schedule_free_adamw", "schedule_free_sgd"])
def test_schedule_free_optimizers_resume_to_the_same_end(tmp_path: Path, optim: str, quantization: str | None) -> None:
    pytest.importorskip("schedulefree", reason="schedulefree is not installed")
    assert_resumes_to_the_same_end(tmp_path, optim=optim, quantization=quantization)


def test_rectified_adam_that_moves_nothing_at_first_is_no_alarm(tmp_path: Path) -> None:
    pytest.importorskip("schedulefree", reason="schedulefree is not installed")
    assert_resumes_to_the_same_end(tmp_path, steps=10, optim="schedule_free_radam")
    with pytest.raises(AdapterNotMoving, match="none of the 8 adapter tensors in 4 steps"):
        start(tmp_path / "short", optim="schedule_free_radam").train()


@pytest.mark.parametrize("optim", ["galore_adamw", "galore_adafactor"])
def test_galore_trains_the_adapters_only_and_resumes_to_the_same_end(tmp_path: Path, optim: str) -> None:
    pytest.importorskip("galore_torch", reason="galore_torch is not installed")
    trainer = assert_resumes_to_the_same_end(tmp_path, optim=optim, **GALORE)
    ranks = [group.get("rank") for group in trainer.optimizer.param_groups]
    assert ranks == [None, 2]
    assert len(trainer.optimizer.param_groups[1]["params"]) == 8


class Patient(torch.optim.SGD):
    """Collects gradients and moves nothing before its third step, as rectified Adam does before its sixth."""

    WAITS = 3

    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for parameter in group["params"]:
                state = self.state[parameter]
                state["sum"] = state.get("sum", 0) + parameter.grad
                state["count"] = state.get("count", 0) + 1
                if state["count"] >= self.WAITS:
                    parameter.data -= group["lr"] * state["sum"]


def test_an_optimizer_that_collects_gradients_first_is_no_alarm(tmp_path: Path) -> None:
    model = prepare_model(tiny.llama(), r=4)
    trainer = run(tmp_path, model, Patient([p for p in model.parameters() if p.requires_grad], lr=0.01), LoraCallback())
    assert all(tensor.any() for tensor in tiny.adapter_tensors(trainer.model, "lora_B").values())


def test_an_optimizer_that_never_begins_is_found(tmp_path: Path) -> None:
    class Waiting(Patient):
        WAITS = 1000

    def start_waiting(steps: int) -> None:
        model = prepare_model(tiny.llama(), r=4)
        optimizer = Waiting([p for p in model.parameters() if p.requires_grad], lr=0.01)
        run(tmp_path, model, optimizer, LoraCallback(), max_steps=steps)

    with pytest.raises(AdapterNotMoving, match="none of the 8 adapter tensors in 4 steps"):
        start_waiting(4)
    with pytest.raises(AdapterNotMoving, match="after 20 steps"):
        start_waiting(30)


def test_frozen_weights_leave_an_optimizer_with_target_modules(tmp_path: Path, monkeypatch: Any) -> None:
    def create(self: Trainer, model: Any = None) -> Any:
        # What transformers makes for GaLore and APOLLO: all parameters, trained or not.
        named = list(self.model.named_parameters())
        groups = [
            {"params": [p for name, p in named if "q_proj" not in name]},
            {"params": [p for name, p in named if "q_proj" in name], "rank": 2},
        ]
        self.optimizer = torch.optim.AdamW(groups, lr=0.01)
        return self.optimizer

    monkeypatch.setattr(Trainer, "create_optimizer", create)
    assert_resumes_to_the_same_end(tmp_path, optim_target_modules=["q_proj"])


def test_a_state_with_objects_of_elsewhere_is_refused_by_name(tmp_path: Path) -> None:
    first = start(tmp_path)
    first.train()
    file = tmp_path / "checkpoint-2" / "optimizer.pt"
    state = torch.load(file, weights_only=True)
    state["state"][0]["projector"] = Path("elsewhere")
    torch.save(state, file)
    again = start(tmp_path / "again")
    with pytest.raises(BrokenCheckpoint, match=r"holds objects that torch does not load.*pathlib.*add_safe_globals"):
        again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))

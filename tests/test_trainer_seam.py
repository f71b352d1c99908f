"""What is put over a Trainer's methods: each has its reason, and undoing it takes nothing of others away."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import tiny
from transformers import Trainer

from lora_plugins import LoraCallback, attach, detach
from lora_plugins.trainer.seam import WRAPPERS


def put_over(trainer: Trainer, name: str, calls: list[str]) -> Any:
    """Put a function over a method, as another library would."""
    before = getattr(trainer, name)

    def method(*args: Any, **kwargs: Any) -> Any:
        calls.append(name)
        return before(*args, **kwargs)

    setattr(trainer, name, method)
    return method


def test_every_wrapped_method_is_one_of_the_trainer_and_has_a_reason() -> None:
    assert all(callable(getattr(Trainer, row.method)) and row.why for row in WRAPPERS)


def test_a_detached_trainer_has_its_own_methods(tmp_path: Path) -> None:
    trainer = tiny.trainer(tmp_path)
    attach(trainer, r=4)
    assert {row.method for row in WRAPPERS} <= vars(trainer).keys()
    detach(trainer)
    assert not {row.method for row in WRAPPERS} & vars(trainer).keys()


def test_detaching_keeps_what_others_have_put_over_a_method_since(tmp_path: Path) -> None:
    calls: list[str] = []
    trainer = tiny.trainer(tmp_path, max_steps=1)
    first = put_over(trainer, "training_step", calls)
    attach(trainer, r=4)
    names = sorted({row.method for row in WRAPPERS} - {"call_model_init"})
    later = {name: put_over(trainer, name, calls) for name in names}
    trainer.train()
    steps = [name for name in calls if name != "create_optimizer"]
    assert steps == ["training_step", "training_step"], "the one put on before, and the one put on since"
    detach(trainer)
    assert {name: vars(trainer)[name] for name in names} == later
    calls.clear()
    trainer.model.requires_grad_(True)
    trainer.train()
    trainer.save_model()
    assert sorted(set(calls)) == ["create_optimizer", "save_model", "training_step"]
    assert calls.count("training_step") == 2
    assert (tmp_path / "model.safetensors").is_file()
    del trainer.training_step
    assert first not in vars(trainer).values()


def test_attaching_again_after_others_have_wrapped_counts_each_loss_once(tmp_path: Path) -> None:
    trainer = tiny.trainer(tmp_path, max_steps=1)
    attach(trainer, r=4)
    put_over(trainer, "training_step", [])
    detach(trainer)
    callback = attach(trainer, r=4)
    seen: list[Any] = []
    add = callback.losses.add
    callback.losses.add = lambda *args: (seen.append(1), add(*args))[1]  # type: ignore[assignment,method-assign]
    trainer.callback_handler.callbacks.remove(callback)
    trainer.train()
    assert len(seen) == 1


def test_a_copied_callback_shares_nothing_with_its_original(tmp_path: Path) -> None:
    original = LoraCallback(r=4, target_modules=["q_proj", "v_proj"], skip_checks=["dead-loss"])
    trainer = tiny.trainer(tmp_path, callbacks=[original])
    trainer.train()
    for copied in (copy.deepcopy(original), pickle.loads(pickle.dumps(original))):
        assert (copied._trainer, copied._undo, copied.movement.watched) == (None, [], [])
        assert copied.movement is not original.movement
        assert copied.losses is not original.losses
        assert copied.settings == original.settings
        assert copied.settings.lora["target_modules"] is not original.settings.lora["target_modules"]
        assert copied.checks.skipped == original.checks.skipped
        assert copied.report == original.report
        other = tiny.trainer(tmp_path, callbacks=[copied])
        other.train()
        assert original.trainer is trainer
        assert copied.trainer is other


def test_two_copies_train_side_by_side(tmp_path: Path) -> None:
    original = LoraCallback(r=4)
    trainers = [tiny.trainer(tmp_path, callbacks=[copy.deepcopy(original)]) for _ in range(2)]
    for trainer in trainers:
        trainer.train()
        assert all(tensor.any() for tensor in tiny.adapter_tensors(trainer.model, "lora_B").values())

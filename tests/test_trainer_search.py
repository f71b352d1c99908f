"""Hyper-parameter search: every trial makes a new model, and every one of them trains its adapters only."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import tiny
from safetensors.torch import load_file
from transformers import Trainer, TrainerCallback

from lora_plugins import LoraCallback, attach

pytest.importorskip("optuna", reason="optuna is not installed")


class Trials(TrainerCallback):
    """Notes what each trial trained with which settings."""

    def __init__(self) -> None:
        self.seen: list[dict[str, Any]] = []

    def on_train_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        self.seen.append(
            {
                "model": type(model).__name__,
                "trained": {name for name, p in model.named_parameters() if p.requires_grad},
                "optimizer": {id(p) for group in kwargs["optimizer"].param_groups for p in group["params"]},
                "parameters": {id(p) for p in model.parameters() if p.requires_grad},
                "moved": all(t.any() for t in tiny.adapter_tensors(model, "lora_B").values()),
                "rate": args.learning_rate,
                "best": state.best_model_checkpoint,
                "tensors": peft.get_peft_model_state_dict(model),
                "base": id(model.get_base_model()),
            }
        )


@pytest.mark.parametrize(("quantization", "late"), [(None, False), ("int8", True)])
def test_three_trials_train_lora_only(tmp_path: Path, quantization: str | None, late: bool) -> None:
    made: list[Any] = []

    def model_init(trial: Any = None) -> Any:
        made.append(tiny.llama())
        return made[-1]

    trials = Trials()
    trainer = tiny.trainer(
        tmp_path,
        callbacks=[trials] if late else [LoraCallback(r=4, quantization=quantization), trials],
        cls=Trainer,
        trainer_arguments={"model_init": model_init, "eval_dataset": tiny.rows(8, seed=2)},
        max_steps=2,
        eval_strategy="steps",
        eval_steps=1,
        save_strategy="steps",
        save_steps=1,
        load_best_model_at_end=True,
    )
    if late:
        attach(trainer, r=4, quantization=quantization)
    rates = iter([1e-2, 2e-2, 3e-2])
    best = trainer.hyperparameter_search(
        hp_space=lambda trial: {"learning_rate": trial.suggest_float("learning_rate", rate := next(rates), rate)},
        n_trials=3,
        backend="optuna",
        direction="minimize",
    )
    assert best.hyperparameters["learning_rate"] in (1e-2, 2e-2, 3e-2)
    assert [trial["rate"] for trial in trials.seen] == [1e-2, 2e-2, 3e-2]
    assert len(made) == 4, "one for the Trainer, one for each trial"
    assert len({trial["base"] for trial in trials.seen}) == 3
    for trial in trials.seen:
        assert trial["model"] == "PeftModelForCausalLM"
        assert len(trial["trained"]) == 8
        assert all("lora_" in name for name in trial["trained"])
        assert trial["optimizer"] == trial["parameters"]
        assert trial["moved"]
        stored = load_file(Path(trial["best"]) / "adapter_model.safetensors")
        assert stored.keys() == trial["tensors"].keys()
        assert all(tensor.equal(trial["tensors"][name]) for name, tensor in stored.items())
    assert not list(tmp_path.rglob("model.safetensors"))

"""A run that resumes is the run that was: what differs is named, and how to insist."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import peft
import pytest
import tiny
import torch
from transformers import Trainer

from lora_plugins import Int8PreparationCallback, LoraCallback
from lora_plugins.errors import BrokenCheckpoint, LivenessWarning, ResumeConflict
from lora_plugins.trainer.resuming import RUN_FILE

SETTINGS: dict[str, Any] = {"r": 4, "lora_alpha": 8, "lora_dropout": 0.0, "target_modules": ["q_proj", "v_proj"]}


def run(folder: Path, arguments: dict[str, Any] | None = None, *, callback: Any = None, **options: Any) -> Trainer:
    callback = callback or LoraCallback(**{**SETTINGS, **(arguments or {})})
    options = {"save_strategy": "steps", "save_steps": 2, "lr_scheduler_type": "constant", **options}
    return tiny.trainer(folder, options.pop("model", None), [callback], **options)


@pytest.fixture(scope="module")
def first(tmp_path_factory: pytest.TempPathFactory) -> Trainer:
    trainer = run(tmp_path_factory.mktemp("first"))
    trainer.train()
    return trainer


def checkpoint(trainer: Trainer) -> str:
    return str(Path(trainer.args.output_dir, "checkpoint-2"))


def trained(trainer: Trainer) -> dict[str, torch.Tensor]:
    return tiny.adapter_tensors(trainer.model)


def test_the_same_run_goes_on_to_the_same_end(tmp_path: Path, first: Trainer) -> None:
    again = run(tmp_path)
    again.train(resume_from_checkpoint=checkpoint(first))
    assert all(torch.equal(value, trained(first)[name]) for name, value in trained(again).items())


def test_longer_and_quieter_is_the_same_run(tmp_path: Path, first: Trainer) -> None:
    again = run(tmp_path, max_steps=6, logging_steps=3, save_strategy="no", disable_tqdm=False)
    again.train(resume_from_checkpoint=checkpoint(first))
    assert again.state.global_step == 6


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"lora_alpha": 64}, "default: lora_alpha was 8 and is 64"),
        ({"use_rslora": True}, "use_rslora was False and is True"),
        ({"r": 8}, "r was 4 and is 8.*shapes differ"),
        (
            {"target_modules": ["q_proj", "v_proj", "o_proj"]},
            "target_modules was.*4 tensors of the model are not in it",
        ),
        ({"target_modules": ["q_proj"]}, "target_modules was.*it has 4 tensors that the model lacks"),
        ({"target_modules": ["q_proj", "k_proj"]}, "target_modules was"),
        ({"lora_dropout": 0.3}, "lora_dropout was 0.0 and is 0.3"),
        ({"rank_pattern": {"q_proj": 4}}, "rank_pattern was None and is"),
        ({"use_dora": True}, "use_dora was False and is True"),
        ({"quantization": "int8", "compute_dtype": "float32"}, "quantization was None and is 'int8'"),
    ],
)
def test_another_adapter_or_base_is_named(
    tmp_path: Path, first: Trainer, arguments: dict[str, Any], message: str
) -> None:
    with pytest.raises(ResumeConflict, match=message) as caught:
        run(tmp_path, arguments).train(resume_from_checkpoint=checkpoint(first))
    assert "skip_checks=['resume-conflict']" in str(caught.value)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"seed": 8}, "seed was 7 and is 8"),
        ({"data_seed": 3}, "data_seed was None and is 3"),
        ({"per_device_train_batch_size": 2}, "per_device_train_batch_size was 4 and is 2"),
        ({"gradient_accumulation_steps": 2}, "gradient_accumulation_steps was 1 and is 2"),
        ({"data": tiny.rows(24)}, "rows was 32 and is 24"),
        ({"optim": "sgd"}, "optim was '.*' and is 'sgd'"),
    ],
)
def test_another_order_of_the_rows_is_named(
    tmp_path: Path, first: Trainer, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ResumeConflict, match=message):
        run(tmp_path, **options).train(resume_from_checkpoint=checkpoint(first))


@pytest.mark.parametrize("how", ["alpha", "seed"])
def test_whoever_insists_goes_on(tmp_path: Path, first: Trainer, how: str) -> None:
    settings = {**SETTINGS, "lora_alpha": 64 if how == "alpha" else 8}
    callback = LoraCallback(**settings, skip_checks=["resume-conflict"])
    again = run(tmp_path, callback=callback, seed=7 if how == "alpha" else 8)
    again.train(resume_from_checkpoint=checkpoint(first))
    assert again.state.global_step == 4


def test_another_shape_cannot_be_insisted_on(tmp_path: Path, first: Trainer) -> None:
    again = run(tmp_path, callback=LoraCallback(**{**SETTINGS, "r": 8}, skip_checks=["resume-conflict"]))
    with pytest.raises(BrokenCheckpoint, match="shapes differ"):
        again.train(resume_from_checkpoint=checkpoint(first))


def test_adapters_from_elsewhere_are_compared_too(tmp_path: Path) -> None:
    def start(alpha: int) -> Trainer:
        config = peft.LoraConfig(r=4, lora_alpha=alpha, target_modules=["q_proj"], task_type="CAUSAL_LM")
        model = peft.get_peft_model(tiny.llama(), config, adapter_name="mine")
        return run(tmp_path, callback=Int8PreparationCallback(), model=model)

    start(8).train()
    with pytest.raises(ResumeConflict, match="mine: lora_alpha was 8 and is 64"):
        start(64).train(resume_from_checkpoint=True)
    start(8).train(resume_from_checkpoint=True)


def _change(file: Path, *keys: str, value: Any) -> None:
    data = json.loads(file.read_text())
    inner = data
    for key in keys[:-1]:
        inner = inner[key]
    inner[keys[-1]] = value
    file.write_text(json.dumps(data))


def test_other_releases_are_a_warning(tmp_path: Path) -> None:
    run(tmp_path).train()
    _change(tmp_path / "checkpoint-4" / RUN_FILE, "versions", "torch", value="1.0")
    with pytest.warns(LivenessWarning, match=r"other releases.*torch was '1.0'"):
        run(tmp_path, max_steps=6).train(resume_from_checkpoint=True)


def test_a_checkpoint_of_an_older_release_resumes(tmp_path: Path, first: Trainer) -> None:
    run(tmp_path).train()
    (tmp_path / "checkpoint-4" / RUN_FILE).unlink()
    again = run(tmp_path, max_steps=6)
    again.train(resume_from_checkpoint=True)
    assert again.state.global_step == 6


def test_a_configuration_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    run(tmp_path).train()
    (tmp_path / "checkpoint-4" / "adapter_config.json").write_text("{")
    with pytest.raises(BrokenCheckpoint, match=r"adapter_config\.json cannot be read"):
        run(tmp_path).train(resume_from_checkpoint=True)


def test_a_run_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    run(tmp_path).train()
    (tmp_path / "checkpoint-4" / RUN_FILE).write_text("[]")
    with pytest.raises(BrokenCheckpoint, match=RUN_FILE):
        run(tmp_path).train(resume_from_checkpoint=True)

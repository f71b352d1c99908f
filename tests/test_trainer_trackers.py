"""What arrives in the trackers: the figures of the parameter report and of the liveness checks."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest
import tiny
from transformers import Trainer

from lora_plugins import LoraCallback, ParameterReportCallback

#: Figures of a run whose first step has no learning rate; watching ends when every tensor has moved.
LIVENESS = {
    "liveness/tensors": 8,
    "liveness/tensors_moved": 8,
    "liveness/steps_counted": 2,
    "liveness/steps_without_gradient": 0,
    "liveness/steps_without_rate": 1,
    "liveness/steps_skipped": 0,
}


def train(folder: Path, tracker: str, **arguments: Any) -> tuple[Trainer, dict[str, float]]:
    """Train with a warm-up that starts at zero; return what must have arrived in the end."""
    trainer = tiny.trainer(
        folder,
        callbacks=[LoraCallback(r=4, quantization="int8"), ParameterReportCallback()],
        report_to=[tracker],
        warmup_steps=2,
        **arguments,
    )
    trainer.train()
    report = next(c for c in trainer.callback_handler.callbacks if isinstance(c, ParameterReportCallback)).report
    assert report is not None
    return trainer, {**report.scalars(), **LIVENESS}


def test_tensorboard(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    _, expected = train(tmp_path, "tensorboard")
    (events,) = tmp_path.rglob("events.out.tfevents.*")
    log = EventAccumulator(str(events.parent))
    log.Reload()
    values = {tag.removeprefix("train/"): log.Scalars(tag) for tag in log.Tags()["scalars"]}
    assert {name: values[name][-1].value for name in expected} == pytest.approx(expected)
    moved = [(event.step, event.value) for event in values["liveness/tensors_moved"]]
    assert moved == [(3, 8), (4, 8)], "sent when all have moved, and in the last step"
    assert len(values["loss"]) == 4


def test_mlflow(tmp_path: Path, local_mlflow: Any) -> None:
    _, expected = train(tmp_path / "output", "mlflow")
    client = local_mlflow.MlflowClient()
    experiment = client.get_experiment_by_name("adapters")
    (run,) = client.search_runs([experiment.experiment_id])
    values = {name.removeprefix("train/"): value for name, value in run.data.metrics.items()}
    assert {name: values[name] for name in expected} == pytest.approx(expected)
    assert "loss" in values


@pytest.mark.parametrize("run", ["first", "second in this process"])
def test_wandb_offline(tmp_path: Path, offline_wandb: Any, run: str) -> None:
    _, expected = train(tmp_path / "output", "wandb")
    summary = dict(offline_wandb.run.summary)
    offline_wandb.finish()
    # Its service writes the file, and ends after it.
    offline_wandb.teardown()
    values = {name.removeprefix("train/"): value for name, value in summary.items()}
    assert {name: values[name] for name in expected} == pytest.approx(expected)
    (recorded,) = tmp_path.rglob("*.wandb")
    for _ in range(200):
        if b"liveness/tensors_moved" in recorded.read_bytes():
            break
        time.sleep(0.1)
    else:
        pytest.fail(f"{recorded} has no figures of the liveness check")
    assert json.loads((tmp_path / "output" / "parameter_report.json").read_text())["trainable"] == 896

"""The report's line: shown by default, silenced as transformers' messages are."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import tiny
from transformers import TrainerCallback
from transformers.utils import logging as of_transformers

from lora_plugins import LoraCallback, ParameterReportCallback
from lora_plugins.logs import get_logger


@pytest.fixture(autouse=True)
def _levels() -> Iterator[None]:
    ours, its = get_logger().level, of_transformers.get_verbosity()
    yield
    get_logger().setLevel(ours)
    of_transformers.set_verbosity(its)


def make(folder: Path) -> None:
    tiny.trainer(folder, callbacks=[LoraCallback(r=4), ParameterReportCallback()], max_steps=1).train()


def silence_ours() -> None:
    logging.getLogger("lora_plugins").setLevel(logging.WARNING)


@pytest.mark.parametrize("silence", [silence_ours, of_transformers.set_verbosity_error])
def test_the_line_is_shown_unless_silenced(tmp_path: Path, capsys: pytest.CaptureFixture[str], silence: Any) -> None:
    make(tmp_path)
    assert capsys.readouterr().out.count("trainable params:") == 1
    silence()
    make(tmp_path)
    assert "trainable params:" not in capsys.readouterr().out


def test_warnings_are_shown_while_transformers_is_silent(capsys: pytest.CaptureFixture[str]) -> None:
    of_transformers.set_verbosity_error()
    get_logger().warning("look here")
    assert capsys.readouterr().out == "look here\n"


def test_a_program_that_has_set_logging_up_keeps_its_handlers() -> None:
    code = """
import logging
import os
logger = logging.getLogger("lora_plugins")
logger.addHandler(logging.NullHandler())
logger.setLevel(logging.ERROR)
from lora_plugins.logs import get_logger, is_shown
assert get_logger() is logger and len(logger.handlers) == 1 and logger.level == logging.ERROR and not is_shown()
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_the_environment_silences() -> None:
    code = "from lora_plugins.logs import is_shown; print(is_shown())"

    for level, shown in (("warning", "False"), ("info", "True"), ("nonsense", "True")):
        env = {**os.environ, "LORA_PLUGINS_VERBOSITY": level}
        run = subprocess.run([sys.executable, "-c", code], check=True, env=env, capture_output=True, text=True)
        assert run.stdout.strip() == shown


class Tracker(TrainerCallback):
    """A tracker that is not one of transformers."""

    def __init__(self) -> None:
        self.seen: dict[str, float] = {}

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        self.seen.update(logs)


def test_trackers_of_others_get_the_figures(tmp_path: Path) -> None:
    tracker = Tracker()
    trainer = tiny.trainer(tmp_path, callbacks=[LoraCallback(r=4), ParameterReportCallback(), tracker])
    trainer.train()
    assert tracker.seen["parameters/trainable"] == 896
    assert tracker.seen["liveness/tensors_moved"] == 8


def test_figures_are_not_printed_between_the_progress_bars(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for quiet in (True, False):
        callbacks = [LoraCallback(r=4), ParameterReportCallback()]
        tiny.trainer(tmp_path, callbacks=callbacks, disable_tqdm=quiet).train()
        output = capsys.readouterr()
        assert "parameters/trainable" not in output.out + output.err


def test_a_run_with_evaluation_and_generation_is_quiet(tmp_path: Path) -> None:
    """int8 with all optional libraries installed: at most ten lines besides the Trainer's own."""
    code = f"""
import logging
import torch
from datasets import Dataset
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments
from lora_plugins import LoraCallback, ParameterReportCallback

sizes = dict(hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4)
model = LlamaForCausalLM(LlamaConfig(vocab_size=200, **sizes)).bfloat16()
ids = torch.randint(0, 200, (16, 16)).tolist()
data = Dataset.from_dict({{"input_ids": ids, "labels": ids}})
args = TrainingArguments(
    {str(tmp_path)!r}, max_steps=4, use_cpu=True, report_to=[], eval_strategy="steps", eval_steps=2, save_steps=2,
    load_best_model_at_end=True, logging_steps=1, disable_tqdm=True,
)
callbacks = [LoraCallback(r=8, quantization="int8"), ParameterReportCallback()]
trainer = Trainer(model, args, train_dataset=data, eval_dataset=data, callbacks=callbacks)
trainer.train()
trainer.model.generate(torch.tensor([[1, 2, 3]]), max_new_tokens=8)
for _ in range(2):
    logging.getLogger("bitsandbytes.autograd._functions").error("an error each time")
    logging.getLogger("mine").warning("my own words")
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=tmp_path)
    lines = [line for line in (done.stdout + done.stderr).splitlines() if line.strip()]
    assert sum(line.startswith("{") for line in lines) == 7
    assert lines.count("an error each time") == 2
    assert lines.count("my own words") == 2
    rest = [line for line in lines if not line.startswith(("{", "an error", "my own"))]
    assert sum("inputs will be cast" in line for line in rest) <= 1
    assert sum("trainable params" in line for line in rest) == 1
    assert len(rest) <= 10, "\n".join(rest)

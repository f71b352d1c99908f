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

"""The Trainer's own ``push_to_hub``, against a Hub on loopback: the adapter arrives, the base does not."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import tiny
from safetensors.torch import load, load_file

from lora_plugins import LoraCallback, attach
from lora_plugins.errors import UnsupportedTraining
from registry.testing import LoopbackHub

SCRIPT = Path(__file__).with_name("push_run.py")


@pytest.mark.parametrize("strategy", ["end", "every_save", "checkpoint", "all_checkpoints"])
def test_every_strategy_pushes_the_adapter(tmp_path: Path, strategy: str) -> None:
    with LoopbackHub() as hub:
        environment = {
            **os.environ,
            "HF_ENDPOINT": hub.endpoint,
            "HF_TOKEN": hub.token,
            "HF_HUB_OFFLINE": "0",
            "HF_HUB_DISABLE_XET": "1",
            "HF_HOME": str(tmp_path / "home"),
        }
        done = subprocess.run(
            [sys.executable, str(SCRIPT), str(tmp_path / "run"), strategy],
            env=environment, capture_output=True, text=True, timeout=300, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr[-3000:]
        files = set(hub.files("org/pushed"))
        pushed = load(hub.read("org/pushed", "adapter_model.safetensors"))
    assert {"adapter_config.json", "adapter_model.safetensors", "README.md"} <= files
    assert "model.safetensors" not in files
    written = load_file(tmp_path / "run" / "checkpoint-4" / "adapter_model.safetensors")
    assert pushed.keys() == written.keys()
    assert all(pushed[name].equal(written[name]) for name in written)
    checkpoints = {name.split("/")[0] for name in files if name.endswith("/adapter_model.safetensors")}
    expected = {"checkpoint": {"last-checkpoint"}, "all_checkpoints": {"checkpoint-2", "checkpoint-4"}}
    assert checkpoints == expected.get(strategy, set())


def test_strategy_that_would_push_no_adapter_is_refused(tmp_path: Path) -> None:
    trainer = tiny.trainer(tmp_path)
    trainer.args.push_to_hub = True
    trainer.args.hub_strategy = "every_save"
    with pytest.raises(UnsupportedTraining, match=r"'every_save'.*'mine'"):
        attach(trainer, adapter_name="mine")
    assert not any(isinstance(known, LoraCallback) for known in trainer.callback_handler.callbacks)

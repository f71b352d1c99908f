"""An adapter whose base is on a Hub: the commit of the base is recorded, and the one that is loaded later."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import tiny
from transformers import PreTrainedModel

from registry.testing import LoopbackHub

SCRIPT = Path(__file__).with_name("hub_run.py")


@pytest.fixture
def place(tmp_path: Path) -> Iterator[tuple[LoopbackHub, Callable[[str], Any]]]:
    """A Hub, and a function that runs a step of the script as a user of that Hub."""
    with LoopbackHub() as hub:
        environment = {
            **os.environ,
            "HF_ENDPOINT": hub.endpoint,
            "HF_TOKEN": hub.token,
            "HF_HUB_OFFLINE": "0",
            "HF_HUB_DISABLE_XET": "1",
            "HF_HOME": str(tmp_path / "home"),
            "LORA_REGISTRY_CACHE": str(tmp_path / "cache"),
        }
        environment.pop("LORA_REGISTRY", None)

        def step(name: str) -> Any:
            done = subprocess.run(
                [sys.executable, str(SCRIPT), name, str(tmp_path / "base")],
                env=environment, capture_output=True, text=True, timeout=300, check=False,
            )  # fmt: skip
            assert done.returncode == 0, done.stderr[-3000:]
            return json.loads(done.stdout.splitlines()[-1])

        yield hub, step


def put(hub: LoopbackHub, model: PreTrainedModel, folder: Path) -> str:
    model.save_pretrained(folder)
    return hub.commit("org/base", {file.name: file.read_bytes() for file in folder.iterdir()})


def test_the_base_is_pinned(place: tuple[LoopbackHub, Callable[[str], Any]], tmp_path: Path) -> None:
    hub, step = place
    hub.create_repo("org/base")
    trained_on = put(hub, tiny.llama(), tmp_path / "base")
    pushed = step("push")
    assert (pushed["base"], pushed["commit"]) == ("org/base", trained_on)
    config = json.loads(hub.read("org/name", "adapter_config.json", "v1.2.0"))
    assert (config["base_model_name_or_path"], config["revision"]) == ("org/base", trained_on)

    put(hub, tiny.llama(seed=1), tmp_path / "later")
    used = step("use")
    assert used.pop("identity") == "verified"
    assert used == dict.fromkeys(("loaded", "plain", "auto"), pushed["logits"])

"""``train --push``: the adapter is published after the run, or refused before it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import twin
from safetensors.torch import load_file

from lora_plugins.commands.cli import main
from registry import pull_adapter, versions


@pytest.fixture
def arguments(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    twin.make_base(tmp_path / "base", steps=4)
    twin.write_jsonl(tmp_path / "train.jsonl", twin.dialogues(24))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("LORA_REGISTRY", f"file://{tmp_path / 'registry'}")
    monkeypatch.setenv("LORA_REGISTRY_CACHE", str(tmp_path / "cache"))
    given = [
        "--model",
        "base",
        "--dataset",
        "train.jsonl",
        "--output_dir",
        "run",
        "--chunk-length",
        "64",
        "--report_to",
    ]
    return ["train", *given, "none", "--max_steps", "2", "--merge", "none", "--save_strategy", "no"]


def test_the_adapter_of_a_run_is_published(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main([*arguments, "--push", "org/name@minor", "--push_base_model", f"org/base@{'b' * 40}"])
    assert not ended.value.code, capsys.readouterr().err
    assert "Published org/name@0.1.0 (" in capsys.readouterr().out
    adapter = pull_adapter("org/name")
    assert (adapter.manifest.base.id, adapter.manifest.base.commit) == ("org/base", "b" * 40)
    assert adapter.manifest.training["steps"] == 2
    assert adapter.manifest.training["quantization"] == "int8"
    saved = load_file("run/adapter/adapter_model.safetensors")
    published = load_file(Path(adapter.path, "adapter_model.safetensors"))
    assert saved.keys() == published.keys()
    assert all(torch.equal(saved[name], published[name]) for name in saved)
    assert adapter.check(Path("base")).identity == "verified"


def test_what_cannot_be_published_is_refused_before_the_run(
    arguments: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LORA_REGISTRY", "https://hub.invalid")
    with pytest.raises(SystemExit) as ended:
        main([*arguments, "--push", "org/name@1.0.0"])
    assert ended.value.code == 1
    assert "the folder 'base', which nobody else can load" in capsys.readouterr().err
    assert not Path("run", "adapter").exists()
    monkeypatch.setenv("LORA_REGISTRY", f"file://{Path('registry').absolute()}")
    with pytest.raises(LookupError):
        versions("org/name")

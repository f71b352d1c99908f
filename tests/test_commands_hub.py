"""``--hub``: every command that takes an adapter takes it from any registry, and never ignores the option."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import tiny
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from lora_plugins import prepare_model
from lora_plugins.commands.cli import app, main
from lora_plugins.plugins.host import plugin_host
from registry import push_adapter

PROGRAM = plugin_host().build_program(app)
COMMANDS = PROGRAM.commands

Run = Callable[..., tuple[int, str]]

#: A command that takes an adapter, written as it is used.
USES = {
    "doctor": ["doctor", "ADAPTER"],
    "export": ["export", "ADAPTER", "exported", "--to", "peft", "--base", "BASE"],
    "merge": ["merge", "ADAPTER", "merged", "--no-probe", "--base", "BASE"],
    "plan": ["plan", "BASE", "--adapter", "ADAPTER"],
    "report": ["report", "ADAPTER"],
    "reproduce": ["reproduce", "ADAPTER", "--check"],
    "servers": ["servers", "ADAPTER", "--base", "BASE"],
    "try": ["try", "ADAPTER", "--prompt", "1 2 3", "--raw", "--max-new-tokens", "2", "--base", "BASE"],
}
#: Exit codes of a run that worked: doctor has notes and warnings, and a script's run cannot be repeated.
FINE = {"doctor": {0, 3}, "reproduce": {0, 1}}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("hub")
    tiny.llama().save_pretrained(folder / "base")
    words = Tokenizer(models.WordLevel({str(number): number for number in range(96)}, unk_token="0"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=words, unk_token="0", eos_token="1").save_pretrained(folder / "base")
    model = prepare_model(AutoModelForCausalLM.from_pretrained(folder / "base"), r=2)
    for name, tensor in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(tensor, std=0.02)
    push_adapter(model, "org/name", version="1.0.0", hub=folder / "registry")
    model.save_pretrained(folder / "adapter")
    return folder


@pytest.fixture
def run(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """Runs the program in an empty folder, with `LORA_REGISTRY` on another registry; gives exit code and output."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("LORA_REGISTRY_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("LORA_REGISTRY", str(tmp_path / "another"))

    def call(adapter: str, *words: str) -> tuple[int, str]:
        with pytest.raises(SystemExit) as ended:
            main([{"ADAPTER": adapter, "BASE": str(folder / "base")}.get(word, word) for word in words])
        said = capsys.readouterr()
        return int(ended.value.code or 0), " ".join((said.out + said.err).replace("│", " ").split())

    return call


def test_every_command_with_an_adapter_has_the_option() -> None:
    def takes_one(parameter: object) -> bool:
        return "org/name" in (getattr(parameter, "help", None) or "")

    taking = {name for name, command in COMMANDS.items() if any(takes_one(one) for one in command.params)}
    assert set(USES) <= taking | {"doctor", "plan"}
    lacking = {name for name in taking | set(USES) if not any("--hub" in one.opts for one in COMMANDS[name].params)}
    assert lacking == set()


@pytest.mark.parametrize("use", sorted(USES))
def test_the_adapter_comes_from_the_registry_that_was_named(use: str, folder: Path, run: Run) -> None:
    code, output = run("org/name@1.0.0", *USES[use], "--hub", str(folder / "registry"))
    assert code in FINE.get(use, {0}), output
    code, output = run("org/name@1.0.0", *USES[use])
    assert code == 1, output
    assert "another" in output, "the registry of the variable does not have it"


@pytest.mark.parametrize("use", sorted(USES))
def test_a_folder_is_in_no_registry(use: str, folder: Path, run: Run) -> None:
    code, output = run(str(folder / "adapter"), *USES[use], "--hub", str(folder / "registry"))
    assert code == 2, output
    assert "is a folder: leave --hub out" in output


def test_a_registry_without_an_adapter_is_refused(folder: Path, run: Run) -> None:
    code, output = run("", "plan", "BASE", "--hub", str(folder / "registry"))
    assert code == 2
    assert "--hub: needs an adapter in that registry" in output

"""Every command: its help, usage errors, --json, Ctrl-C, and tables on narrow and wide terminals."""

from __future__ import annotations

import inspect
import io
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import typer
from rich.console import Console
from transformers import BloomConfig

from lora_plugins import LoraCallback, plan
from lora_plugins.commands.cli import app, main
from lora_plugins.commands.wording import find_options, use_option_names
from lora_plugins.errors import UnknownArgument
from lora_plugins.plugins.host import plugin_host
from registry.commands import terminal

PROGRAM = plugin_host().build_program(app)


def list_commands(group: Any, *path: str) -> list[str]:
    """The commands of a program by their words: ``"plan"``, ``"registry serve"``."""
    inner = getattr(group, "commands", None)
    if inner is None:
        return [" ".join(path)]
    return sorted(name for word, command in inner.items() for name in list_commands(command, *path, word))


def find_command(group: Any, name: str) -> Any:
    """The command of these words."""
    for word in name.split():
        group = group.commands[word]
    return group


COMMANDS = list_commands(PROGRAM)


@pytest.fixture
def call(capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    """The program in this process: exit code, and what it wrote to stdout and stderr."""

    def run(*words: str) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as ended:
            main(words)
        said = capsys.readouterr()
        return int(ended.value.code or 0), said.out, said.err

    return run


@pytest.fixture
def small() -> Any:
    """A plan with every column that the table of the memory has."""
    config = BloomConfig(hidden_size=64, n_layer=2, n_head=4, vocab_size=128)
    return plan(config, quantization="int8", memory="24GiB", devices=2, strategy="fsdp")


@pytest.mark.parametrize("width", [60, 80, 200])
def test_the_list_of_commands_is_never_cut(call: Any, monkeypatch: pytest.MonkeyPatch, width: int) -> None:
    monkeypatch.setenv("TERMINAL_WIDTH", str(width))
    monkeypatch.setenv("COLUMNS", str(width))
    code, text, _ = call("--help")
    assert code == 0
    assert not re.search(r"\.\.\.$", text.partition("Commands:")[2], re.MULTILINE)
    assert max(map(len, text.splitlines())) <= width
    words = " ".join(text.split())
    for name in PROGRAM.commands:
        summary = inspect.cleandoc(PROGRAM.commands[name].help).partition("\n\n")[0]
        assert f"{name} {' '.join(summary.split())}" in words


@pytest.mark.parametrize("name", COMMANDS)
def test_help_has_examples_that_the_command_takes(call: Any, name: str) -> None:
    code, text, _ = call(*name.split(), "--help")
    assert code == 0
    assert "--json" in text
    examples = re.findall(rf"^ +lora-plugins {name}\b(.*)$", text, re.MULTILINE)
    assert examples or name == "demo"
    for flag in re.findall(r"(?<= )--[\w-]+", " ".join(examples)):
        assert text.count(flag) > sum(example.count(flag) for example in examples), f"{flag} is not in the help"


@pytest.mark.parametrize("name", COMMANDS)
def test_an_unknown_option_is_an_error_of_usage(call: Any, name: str) -> None:
    needed = ["--model", "x", "--dataset", "y"] if name == "train" else []
    code, out, err = call(*name.split(), *needed, "--nosuch-option", "x")
    assert (code, out) == (2, "")
    assert "nosuch" in err
    assert "Traceback" not in err


@pytest.mark.parametrize("name", sorted({*COMMANDS} - {"demo", "gc", "list", "lock", "plugins", "registry serve"}))
def test_arguments_that_are_missing_are_an_error_of_usage(call: Any, name: str) -> None:
    code, out, err = call(*name.split())
    assert (code, out) == (2, "")
    assert err.strip()


@pytest.mark.parametrize("name", COMMANDS)
def test_ctrl_c_ends_a_command_without_a_traceback(call: Any, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    def interrupted(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    host = plugin_host()
    build = host.build_program

    def build_interrupted(program: typer.Typer, called: str) -> Any:
        built = build(program, called)
        find_command(built, name).callback = interrupted
        return built

    monkeypatch.setattr(host, "build_program", build_interrupted)
    given = {"new-plugin": 1, "plan": 1, "merge": 2, "push": 2, "yank": 1, "alias": 1, "mirror": 2, "pull": 1}
    given |= {"doctor": 1, "note": 1, "servers": 1, "try": 1, "verify": 1, "versions": 1, "show": 1, "diff": 2}
    given |= {"report": 1, "reproduce": 1, "registry export": 1}
    options = {"export": ["x", "x", "--to", "gguf"], "adopt": ["x", "x", "--version", "1"]}
    code, out, err = call(*name.split(), *options.get(name, ["x"] * given.get(name, 0)))
    assert code in (1, 130)
    assert out == ""
    assert err.strip() in ("Aborted!", "Aborted.", "")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["plan", "./nosuch"], "The file or folder ./nosuch does not exist"),
        (["plan", "x", "--lora", "r"], "'r' is not FIELD=VALUE"),
        (["train", "--model", "x", "--dataset", "y", "--lora_r", "8"], "Did you mean --r?"),
        (["train", "--model", "x", "--dataset", "y", "--load_in_4bit"], "--quantization nf4"),
        (["versions", "org/name", "--hub", "somewhere"], "with --hub or in LORA_REGISTRY"),
    ],
)
def test_errors_are_in_the_words_of_the_command_line(call: Any, words: list[str], message: str) -> None:
    code, _, err = call(*words)
    assert code in (1, 2)
    assert message in " ".join(err.split())


def test_a_folder_without_a_model_is_named(call: Any, tmp_path: Path) -> None:
    code, _, err = call("plan", str(tmp_path))
    assert code == 1
    assert f"The folder {tmp_path} has no config.json" in err


@pytest.mark.parametrize("start", ["/", "./", "../here/"])
def test_a_path_is_a_registry(call: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, start: str) -> None:
    here = tmp_path / "here"
    here.mkdir()
    monkeypatch.chdir(here)
    given = f"{here}/adapters" if start == "/" else f"{start}adapters"
    code, _, err = call("versions", "org/name", "--hub", given)
    assert code == 1
    shown = re.search(r"org/name does not exist in file://(.*)", err)
    assert shown is not None
    assert Path(shown[1]).resolve() == here / "adapters"


@pytest.mark.parametrize(
    ("message", "expected"),
    [
        ("To replace them, pass force=True (--force): the files", "To replace them, pass --force: the files"),
        ("Push it with version='1.2.0' or version=\"patch\".", "Push it with --version 1.2.0 or --version patch."),
        ("Pass hub=. Then", "Pass --hub. Then"),
        ("pass private=False", "pass --no-private"),
        ("or pass force=False.", "or pass no --force."),
        ("with message=None it", "with no --message it"),
        ("dry_run=False (--dry-run) writes", "no --dry-run writes"),
        ("push with version='patch' (--version patch).", "push with --version patch."),
        ("name=number and nosuch=True", "name=number and nosuch=True"),
        ("push_adapter(force=True) in Python", "push_adapter(force=True) in Python"),
    ],
)
def test_keyword_arguments_become_options(message: str, expected: str) -> None:
    assert use_option_names(message, find_options(PROGRAM.commands["push"])) == expected


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("rank", "'r'"),
        ("lora_r", "'r'"),
        ("lora_rank", "'r'"),
        ("lora_target_modules", "'target_modules'"),
        ("lora_modules_to_save", "'modules_to_save'"),
        ("lora_task_type", "'task_type'"),
        ("peft_use_dora", "'use_dora'"),
        ("lora_target_linear", "target_modules='all-linear'"),
        ("load_in_8bit", "quantization='int8'"),
        ("load_in_4bit", "quantization='nf4'"),
        ("target_module", "'target_modules'"),
    ],
)
def test_names_of_other_tools_are_understood_in_messages(name: str, meant: str) -> None:
    with pytest.raises(UnknownArgument, match=re.escape(f"Did you mean {meant}?")):
        LoraCallback(**{name: 8})


@pytest.mark.parametrize("width", [60, 80, 200])
def test_no_figure_of_a_plan_is_cut(small: Any, width: int) -> None:
    stream = io.StringIO()
    Console(file=stream, width=width, color_system=None).print(small)
    text = stream.getvalue()
    assert "…" not in text
    assert max(map(len, text.splitlines())) <= width
    table = text.partition("Memory on each device")[2]
    columns = {"weights", "activations", "quantized", "gradients", "optimizer", "communication"}
    left_out = set(re.findall(r"\w+", table.partition("the terminal is narrow:")[2].partition(".")[0]))
    head = table.splitlines()[2]
    assert {name for name in columns if name in head} == columns - left_out
    assert bool(left_out) == (width < 200)
    for row in small.rows:
        assert row.label in table


def test_the_backend_that_was_asked_for_is_shown(small: Any) -> None:
    summary = str(small).partition("Targets from")[0]
    assert re.search(r"base\s+│\s+int8, \d+\.\d% of the weights quantized", summary)
    assert "memory needed" in summary


@pytest.mark.parametrize("width", [60, 200])
def test_tables_of_the_registry_cut_nothing(monkeypatch: pytest.MonkeyPatch, width: int) -> None:
    stream = io.StringIO()
    monkeypatch.setattr(stream, "isatty", lambda: True)
    monkeypatch.setattr(terminal.sys, "stdout", stream)
    monkeypatch.setenv("COLUMNS", str(width))
    name = "base_model.model.model.layers.0.self_attn.q_proj"
    norms = ("norm before", "norm after", "norm of change")
    terminal.print_rows(("layer", *norms), [(name, "12.34", "0.0001234", "1.235e+04")], figures=norms)
    text = re.sub(r"\x1b\[[\d;]*m", "", stream.getvalue())
    assert "…" not in text
    assert max(map(len, text.splitlines())) <= width
    assert "".join(re.findall(r"^│ (\S*) ", text, re.MULTILINE)) == name
    for figure in ("12.34", "0.0001234", "1.235e+04"):
        assert figure in text


def test_what_new_plugin_wrote_as_json(call: Any, tmp_path: Path) -> None:
    code, out, _ = call("new-plugin", "mytype", "--folder", str(tmp_path / "made"), "--json")
    assert code == 0
    made = json.loads(out)
    assert made["folder"] == str(tmp_path / "made")
    assert "pyproject.toml" in made["files"]

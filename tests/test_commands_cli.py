"""The program: instant where it must be, expected errors as messages, plugins listed."""

from __future__ import annotations

import json
import subprocess
import sys
import warnings
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import pytest

import lora_plugins
from lora_plugins.commands import cli
from lora_plugins.errors import LoraPluginsError, PluginWarning
from registry.errors import InvalidReference

PLUGINS = Path(__file__).parent / "plugins"

HEAVY = ("torch", "transformers", "peft", "bitsandbytes", "datasets", "accelerate", "huggingface_hub", "matplotlib")

#: Runs some code and then prints which of the heavy packages that has loaded, as its last line.
_REPORT = """
import atexit, json, sys
atexit.register(lambda: print(json.dumps([name for name in {heavy} if name in sys.modules])))
"""


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Run the program in a process of its own, with fake distributions on its path."""

    def call(*arguments: str, cases: tuple[str, ...] = (), **environment: str) -> subprocess.CompletedProcess[str]:
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        code = f"import sys; sys.path[:0] = {[str(PLUGINS / case) for case in cases]!r}; "
        code += "from lora_plugins.commands.cli import main; main()"
        command = [sys.executable, "-c", code, *arguments]
        return subprocess.run(command, capture_output=True, text=True, timeout=120)

    return call


def loaded_by(code: str, *arguments: str) -> list[str]:
    """Which heavy packages a new process has loaded after running some code."""
    program = _REPORT.format(heavy=HEAVY) + code
    done = subprocess.run([sys.executable, "-c", program, *arguments], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    loaded: list[str] = json.loads(done.stdout.splitlines()[-1])
    return loaded


RUN = "from lora_plugins.commands.cli import main; main()"


@pytest.mark.parametrize(
    ("code", "arguments"),
    [
        ("import lora_plugins", ()),
        ("import lora_plugins; lora_plugins.Architecture, lora_plugins.Quantizer, lora_plugins.hookimpl", ()),
        ("import lora_plugins; dir(lora_plugins)", ()),
        ("import registry", ()),
        (RUN, ("--help",)),
        (RUN, ("--version",)),
        (RUN, ("plugins",)),
        (RUN, ("plugins", "--json")),
        (RUN, ("demo", "--help")),
    ],
)
def test_instant_things_load_nothing_heavy(code: str, arguments: tuple[str, ...]) -> None:
    assert loaded_by(code, *arguments) == []


def test_what_is_loaded_is_seen() -> None:
    """The check above must not pass because it sees nothing."""
    assert "torch" in loaded_by("import lora_plugins; lora_plugins.LoraCallback")


def test_all_is_sorted_and_every_name_is_there() -> None:
    assert lora_plugins.__all__ == sorted(lora_plugins.__all__)
    for name in lora_plugins.__all__:
        thing = getattr(lora_plugins, name)
        assert name == "hookimpl" or (thing.__name__ == name and thing.__module__.startswith("lora_plugins."))
    assert set(lora_plugins.__all__) <= set(dir(lora_plugins))
    public = {name for name in vars(lora_plugins) if name.isidentifier() and name[0] != "_"}
    submodules = {name for name in public if f"lora_plugins.{name}" in sys.modules}
    assert public - submodules - {"annotations", "importlib", "TYPE_CHECKING", "Any"} <= set(lora_plugins.__all__)
    with pytest.raises(AttributeError, match="no attribute 'LoraCalback'"):
        lora_plugins.LoraCalback  # noqa: B018


def test_help_lists_the_commands(run: Callable[..., subprocess.CompletedProcess[str]]) -> None:
    done = run("--help", cases=("working",))

    assert done.returncode == 0
    for command in ("demo", "plugins", "say-hello"):
        assert f"\n  {command} " in done.stdout
    assert done.stderr == ""


def test_a_plugins_command_runs(run: Callable[..., subprocess.CompletedProcess[str]]) -> None:
    assert run("say-hello", cases=("working",)).stdout == "hello from a plugin\n"


def test_listing_says_what_each_provides(run: Callable[..., subprocess.CompletedProcess[str]]) -> None:
    done = run("plugins", cases=("working", "overriding", "clash_one", "clash_two", "misspelt_hook"))

    assert done.returncode == 0
    lines = done.stdout.splitlines()
    assert (
        "working (fake-working 1.2.3): 1 architecture (working); 1 quantization backend (halves); 1 command (say-hello)"
        in lines
    )
    [builtin] = [line for line in lines if line.startswith("architectures (lora-plugins ")]
    count, shown = builtin.split(": ")[1].split(" architectures (")
    assert int(count) >= 40
    assert shown.count(",") == 4
    assert shown.endswith(", …)")
    assert "    overrides the built-in architecture 'bloom'" in lines
    assert "    overrides the built-in command 'demo'" in lines
    assert any(line.startswith("    clash: The architecture 'contested' is registered by clash-one") for line in lines)
    assert any(line.startswith("misspelt-hook (fake-misspelt-hook 1.0): disabled: it implements") for line in lines)
    assert done.stderr.startswith("warning: Plugin misspelt-hook (fake-misspelt-hook 1.0) is disabled: ")
    assert done.stderr.count("\n") == 1


def test_listing_as_json_is_complete(run: Callable[..., subprocess.CompletedProcess[str]]) -> None:
    plugins = json.loads(run("plugins", "--json", cases=("working", "import_error")).stdout)

    by_name = {plugin["name"]: plugin for plugin in plugins}
    assert by_name["working"] == {
        "name": "working",
        "distribution": "fake-working",
        "version": "1.2.3",
        "builtin": False,
        "architectures": ["working"],
        "quantizers": ["halves"],
        "requires": {"halves": ["pluggy>=1", "no-such-thing>=1.2"]},
        "packages": {
            "halves": {
                "installed": {"pluggy": version("pluggy"), "no-such-thing": None},
                "missing": "no-such-thing is not installed; run `pip install 'no-such-thing>=1.2'`",
            }
        },
        "commands": ["say-hello"],
        "checks": [],
        "formats": [],
        "servers": [],
        "disabled": None,
        "notes": [],
    }
    assert by_name["import-error"]["disabled"].startswith("it raised RuntimeError")
    assert len(by_name["architectures"]["architectures"]) >= 40
    found = {name: state for plugin in plugins for name, state in plugin["packages"].items()}
    assert found["nf4"] == {"installed": {"bitsandbytes": version("bitsandbytes")}, "missing": None}
    builtin = {name for plugin in plugins if plugin["builtin"] for name in plugin["quantizers"]}
    assert len(builtin) >= 9
    assert all(found[name]["installed"] for name in builtin), "every built-in backend says what it needs"


def test_listing_says_which_packages_are_missing_and_how_to_get_them(
    run: Callable[..., subprocess.CompletedProcess[str]],
) -> None:
    lines = run("plugins", cases=("working", "unreadable_requirement", "bare_requirement")).stdout.splitlines()
    assert f"    fp4, int8, nf4: bitsandbytes {version('bitsandbytes')} installed" in lines
    assert "    halves: no-such-thing is not installed; run `pip install 'no-such-thing>=1.2'`" in lines
    assert "    guess: 'hqq newer than 1' in its `requires` is nothing that `pip install` could read" in lines
    [refused] = [line for line in lines if line.startswith("bare-requirement")]
    assert refused.endswith("disabled: its backend 'bare' must have a tuple of strings in `requires`, not 'hqq'")


def test_listing_on_a_terminal_is_a_table(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "100")
    monkeypatch.setenv("TERM", "dumb")
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    with pytest.raises(SystemExit) as end:
        cli.main(["plugins"])

    assert end.value.code == 0
    table = capsys.readouterr().out
    assert "┃ plugin" in table
    text = " ".join(table.replace("│", " ").split())
    assert "3 quantization backends" in text
    assert f"bitsandbytes {version('bitsandbytes')}" in text


def test_a_misspelt_block_is_reported(run: Callable[..., subprocess.CompletedProcess[str]]) -> None:
    done = run("plugins", cases=("working",), LORA_PLUGINS_BLOCK="wroking")
    assert done.stderr == "warning: LORA_PLUGINS_BLOCK names 'wroking', which is not a plugin\n"

    done = run("plugins", cases=("working",), LORA_PLUGINS_BLOCK="working")
    assert done.stderr == ""
    assert "working (fake-working 1.2.3): disabled: blocked by LORA_PLUGINS_BLOCK or block=" in done.stdout


# -- errors ------------------------------------------------------------------------------------


def test_an_expected_error_is_a_message_and_an_exit_code(run: Callable[..., subprocess.CompletedProcess[str]]) -> None:
    done = run("contested", "x", cases=("clash_one", "clash_two"))

    assert done.returncode == 1
    assert done.stdout == ""
    assert done.stderr.startswith("lora-plugins: The command 'contested' is registered by clash-one")
    assert "Traceback" not in done.stderr
    assert done.stderr.count("\n") == 1


def test_debug_shows_where_it_came_from(run: Callable[..., subprocess.CompletedProcess[str]]) -> None:
    done = run("contested", "x", cases=("clash_one", "clash_two"), LORA_PLUGINS_DEBUG="1")

    assert done.returncode == 1
    assert "Traceback" in done.stderr
    assert "PluginError: The command 'contested'" in done.stderr


def test_an_unexpected_error_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*arguments: object) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr(cli, "_run", fail)
    with pytest.raises(ZeroDivisionError):
        cli.main([])


def test_wrong_usage_has_the_usual_exit_code(run: Callable[..., subprocess.CompletedProcess[str]]) -> None:
    assert run("no-such-command").returncode == 2
    assert run("demo", "--steps", "many").returncode == 2


def test_warnings_of_ours_take_a_line_and_others_stay(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def warn(*arguments: object) -> None:
        warnings.simplefilter("always")
        warnings.warn("first\n   second", PluginWarning, stacklevel=1)
        warnings.warn("somebody else's", UserWarning, stacklevel=1)

    monkeypatch.setattr(cli, "_run", warn)
    with pytest.warns(UserWarning, match="somebody else's") as others:
        cli.main([])

    assert [str(warning.message) for warning in others] == ["somebody else's"]
    assert capsys.readouterr().err == "warning: first second\n"


def test_which_errors_are_expected() -> None:
    class PluginsOwn(Exception):
        says_it_all = True

    class Child(PluginsOwn):
        """Inherits it."""

    assert cli.is_expected(LoraPluginsError("x"))
    assert cli.is_expected(InvalidReference("x"))
    assert cli.is_expected(Child("x"))
    assert not cli.is_expected(ValueError("x"))


def test_an_expected_error_of_a_plugin_is_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    class QuotaReached(Exception):
        says_it_all = True

    def fail(*arguments: object) -> None:
        raise QuotaReached("3 of 3 runs are used; wait until tomorrow")

    monkeypatch.setattr(cli, "_run", fail)
    with pytest.raises(SystemExit) as stopped:
        cli.main([])
    assert stopped.value.code == 1
    assert capsys.readouterr().err == "lora-plugins: 3 of 3 runs are used; wait until tomorrow\n"

"""The registry's commands: instant, with answers as text and JSON, and no raw text from outside on the terminal."""

from __future__ import annotations

import contextlib
import io
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import tiny
import yaml
from adapters import saved

from lora_plugins.commands.cli import main, program
from lora_plugins.plugins.host import plugin_host
from registry.errors import LockMismatch, RegistryError, RepositoryConflict
from registry.hubs.folder import FolderHub
from registry.testing import LoopbackHub

COMMANDS = [
    "push",
    "adopt",
    "doctor",
    "list",
    "note",
    "pull",
    "versions",
    "show",
    "verify",
    "diff",
    "yank",
    "alias",
    "lock",
    "mirror",
    "gc",
    "registry",
]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    root = tmp_path_factory.mktemp("commands")
    return [saved(tiny.llama(), root / str(seed), seed=seed) for seed in range(2)]


@pytest.fixture(autouse=True)
def _place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LORA_REGISTRY", f"file://{tmp_path / 'registry'}")
    monkeypatch.setenv("LORA_REGISTRY_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)


def run(*arguments: object, code: int = 0) -> str:
    """What a command prints."""
    output = io.StringIO()
    with contextlib.redirect_stdout(output), pytest.raises(SystemExit) as ended:
        program([str(argument) for argument in arguments])
    assert (ended.value.code or 0) == code, output.getvalue()
    return output.getvalue()


def answer(*arguments: object, code: int = 0) -> Any:
    return json.loads(run(*arguments, "--json", code=code))


def push(folder: Path, version: str, *more: object) -> Any:
    return answer("push", folder, "org/name", "--version", version, "--base-model", f"org/base@{'b' * 40}", *more)


def test_the_program_has_the_commands() -> None:
    listed = run("--help")
    assert all(f"\n  {name} " in listed for name in COMMANDS)
    [plugin] = [info for info in plugin_host().plugins if info.name == "registry"]
    assert (plugin.builtin, plugin.disabled, sorted(plugin.commands)) == (True, None, sorted(COMMANDS))


@pytest.mark.parametrize("arguments", [("--help",), ("push", "--help"), ("versions", "org/name")])
def test_they_start_without_anything_heavy(arguments: tuple[str, ...], folders: list[Path]) -> None:
    if arguments[0] == "versions":
        push(folders[0], "1.0.0")
    heavy = ("torch", "transformers", "peft", "huggingface_hub", "matplotlib", "numpy")
    code = (
        f"import atexit, sys; atexit.register(lambda: print([n for n in {heavy} if n in sys.modules]));"
        "from lora_plugins.commands.cli import main; main()"
    )
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "[]"


def test_from_push_to_gc(folders: list[Path], tmp_path: Path) -> None:
    first = push(folders[0], "1.0.0", "--metric", "loss=0.5")
    assert (first["version"], first["created"]) == ("1.0.0", True)
    assert push(folders[0], "1.0.0")["created"] is False
    assert push(folders[1], "minor", "--metric", "loss=0.25", "--message", "Better")["version"] == "1.1.0"

    assert [release["version"] for release in answer("versions", "org/name")] == ["1.0.0", "1.1.0"]
    assert run("versions", "org/name").splitlines()[0].split("\t")[0] == "1.0.0"
    shown = answer("show", "org/name@1.1.0")
    assert shown["manifest"]["metrics"] == {"loss": 0.25}
    assert shown["manifest"]["parent_version"] == "1.0.0"
    assert f"org/base at {'b' * 40}" in run("show", "org/name")

    pulled = answer("pull", "org/name", "--lock")
    assert (Path(pulled["path"]) / "adapter_model.safetensors").is_file()
    assert run("pull", "org/name@1.1.0").strip() == pulled["path"]
    assert json.loads((tmp_path / "adapters.lock").read_text())["adapters"]["org/name"]["version"] == "1.1.0"
    assert answer("lock", "org/name@1.0.0")["org/name"]["version"] == "1.0.0"
    assert answer("pull", "org/name", "--frozen")["version"] == "1.0.0"
    (tmp_path / "adapters.lock").unlink()

    differing = answer("diff", "org/name@1.0.0", "org/name@1.1.0")
    assert differing["metrics"] == {"loss": [0.5, 0.25]}
    assert len(differing["layers"]) == 4
    assert all(layer["change"] > 0 for layer in differing["layers"])
    assert "metrics: loss 0.5 -> 0.25" in run("diff", "org/name@1.0.0", "org/name@1.1.0")

    assert answer("verify", "org/name@1.0.0")["ok"] is True
    assert "all as published" in run("verify", "org/name")
    assert answer("yank", "org/name@1.1.0", "--reason", "wrong data")["yanked"] == "wrong data"
    assert answer("pull", "org/name")["version"] == "1.0.0"
    assert "withdrawn: wrong data" in run("versions", "org/name")
    assert answer("yank", "org/name@1.1.0", "--undo")["yanked"] is None

    assert answer("alias", "org/name@1.0.0", "champion")["version"] == "1.0.0"
    assert answer("alias", "org/name@1.1.0", "champion", "--expect", "1.0.0")["version"] == "1.1.0"
    assert [move["version"] for move in answer("alias", "org/name")["champion"]] == ["1.0.0", "1.1.0"]
    assert answer("pull", "org/name@champion")["version"] == "1.1.0"
    run("alias", "org/name", "champion", "--remove")

    other = f"file://{tmp_path / 'other'}"
    copied = answer("mirror", "org/name", other)
    assert [(row["release"], row["state"]) for row in copied] == [
        ("org/name@1.0.0", "copied"),
        ("org/name@1.1.0", "copied"),
    ]
    assert answer("show", "org/name", "--hub", other)["digest"] == copied[1]["digest"] == shown["digest"]
    assert answer("gc")["deleted"] is False
    assert "nothing to do" in run("gc", "--delete")


def test_a_damaged_release_is_told_by_the_exit_code(folders: list[Path], tmp_path: Path) -> None:
    push(folders[0], "1.0.0")
    [weights] = [p for p in (tmp_path / "registry").rglob("adapter_model.safetensors") if p.is_file()]
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.chmod(0o644)
    weights.write_bytes(content)
    found = answer("verify", "org/name", code=1)
    assert found["ok"] is False
    assert "adapter_model.safetensors" in found["problems"][0]


def test_what_is_wrong_is_said_in_one_line(
    folders: list[Path], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for arguments, message in [
        (["pull", "org/missing"], "org/missing"),
        (["pull", "nonsense"], "has to be org/name"),
        (["push", "/nowhere", "org/name"], "/nowhere is not a folder"),
        (["versions", "org/name", "--hub", "somewhere"], "is not a registry"),
    ]:
        with pytest.raises(SystemExit) as caught:
            main(arguments)
        assert caught.value.code == 1
        error = capsys.readouterr().err
        assert error.startswith("lora-plugins: ")
        assert message in error
        assert "Traceback" not in error
    run("push", folders[0], "org/name", "--metric", "loss", code=2)
    run("yank", "org/name@1.0.0", code=2)


def test_a_folder_named_without_a_dot_is_suggested(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "registry").mkdir()
    for name, suggested in (("registry", True), ("elsewhere", False)):
        with pytest.raises(SystemExit):
            main(["versions", "org/name", "--hub", name])
        assert (f"Did you mean the folder './{name}'?" in capsys.readouterr().err) is suggested


def test_text_from_outside_cannot_move_the_cursor(folders: list[Path]) -> None:
    push(folders[0], "1.0.0")
    from registry.commands.terminal import visible

    assert visible("\x1b[2Jred\u202e\r\nnext\u2028line\0") == "[2Jred next line"
    with pytest.raises(RegistryError):
        run("yank", "org/name@1.0.0", "--reason", "two\nlines")
    run("yank", "org/name@1.0.0", "--reason", "a reason with é")
    assert "\\u00e9" in run("versions", "org/name", "--json")


def test_the_same_on_a_hub(folders: list[Path], loopback_hub: LoopbackHub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LORA_REGISTRY", loopback_hub.endpoint)
    monkeypatch.setenv("HF_TOKEN", loopback_hub.token)
    monkeypatch.setattr("registry.hubs.client.configured_endpoint", lambda: loopback_hub.endpoint)
    base = f"org/base@{'b' * 40}"
    pushed = answer("push", folders[0], "org/name", "--version", "1.0.0", "--base-model", base, "--private")
    assert loopback_hub.repo("org/name").private
    assert answer("pull", "org/name")["commit"] == pushed["commit"]
    proposed = answer("push", folders[1], "org/name", "--version", "1.1.0", "--base-model", base, "--create-pr")
    assert proposed["url"]
    assert [release["version"] for release in answer("versions", "org/name")] == ["1.0.0"]


def test_a_dry_run_lists_the_files_and_publishes_nothing(folders: list[Path], tmp_path: Path) -> None:
    base = ("--base-model", f"org/base@{'b' * 40}")
    listed = run("push", folders[0], "org/name", "--version", "1.0.0", "--dry-run", *base)
    assert "adapter_model.safetensors\twritten\n" in listed
    assert "Nothing was changed; this would publish org/name@1.0.0" in listed
    assert not (tmp_path / "registry").exists()
    push(folders[0], "1.0.0")
    changes = push(folders[1], "1.1.0", "--dry-run")["changes"]
    assert changes["replaced"] == sorted(
        ["README.md", "adapter_config.json", "adapter_manifest.json", "adapter_model.safetensors"]
    )
    assert [each["version"] for each in answer("versions", "org/name")] == ["1.0.0"]


def test_a_push_into_a_base_models_repository_needs_force(folders: list[Path], tmp_path: Path) -> None:
    hub = FolderHub(tmp_path / "registry")
    hub.create("org/name")
    files = {"config.json": b'{"model_type": "llama"}', "model.safetensors": b"weights"}
    hub.commit("org/name", "main", files, parent=hub.refs("org/name").branches["main"], message="")
    with pytest.raises(RepositoryConflict, match=r"model\.safetensors.*--force"):
        push(folders[0], "1.0.0")
    assert push(folders[0], "1.0.0", "--force")["changes"]["left"] == ["config.json", "model.safetensors"]


def test_foreign_tags_are_listed_as_foreign(folders: list[Path], tmp_path: Path) -> None:
    commit = push(folders[0], "1.0.0", "--license", "mit", "--dataset", "org/data", "--language", "en")["commit"]
    hub = FolderHub(tmp_path / "registry")
    hub.create_tag("org/name", "v2.0.0", commit)
    lines = [line.split("\t") for line in run("versions", "org/name").splitlines()]
    assert lines == [["1.0.0", commit[:12], "", ""], ["v2.0.0", commit[:12], "", "foreign tag, not a release"]]
    card = hub.read("org/name", commit, "README.md", 10**6).decode()
    front = yaml.safe_load(card.split("---\n")[1])
    assert (front["license"], front["datasets"], front["language"]) == ("mit", ["org/data"], ["en"])


def test_two_versions_are_compared_whatever_the_lock_file_has(folders: list[Path], tmp_path: Path) -> None:
    push(folders[0], "1.0.0")
    push(folders[1], "1.1.0")
    run("pull", "org/name@1.0.0", "--lock")
    found = answer("diff", "org/name@1.0.0", "org/name@1.1.0")
    assert found["layers"]
    page = tmp_path / "page.html"
    run("report", "org/name@1.1.0", "--output", page)
    assert "org/name@1.1.0" in page.read_text()


def test_a_pull_beside_the_lock_says_how_to_change_it(folders: list[Path], capfd: pytest.CaptureFixture[str]) -> None:
    push(folders[0], "1.0.0")
    push(folders[1], "1.1.0")
    run("pull", "org/name@1.0.0", "--lock")
    with pytest.raises(LockMismatch, match=r"To change the lock: lora-plugins pull org/name@1\.1\.0 --lock"):
        program(["pull", "org/name@1.1.0"])
    run("pull", "org/name@1.1.0", "--lock")
    assert answer("lock")

"""Damaged, hostile and odd files given to ``train``: one error of ours with file and line, and nothing hangs."""

from __future__ import annotations

import json
import os
import pickle
import time
import zipfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import tiny
import torch

from lora_plugins import LoraCallback
from lora_plugins.commands.cli import program
from lora_plugins.errors import ArgumentsError, DataError, ResumeError
from lora_plugins.recipe.config_file import read_flags
from lora_plugins.recipe.data import load_splits
from lora_plugins.recipe.output import RUN_FILE, check_same_run
from lora_plugins.recipe.parser import parse
from lora_plugins.recipe.resume import checkpoint_defect

DEEP = 50_000


@pytest.fixture(autouse=True)
def _quickly() -> Iterator[None]:
    """Libraries are loaded; whatever waits or grows takes longer."""
    start = time.monotonic()
    yield
    assert time.monotonic() - start < 30


# -- YAML --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "line", "says"),
    [
        ("r: 4\nlora: &a [*a]\n", 2, "contains itself"),
        ("r: 4\n\nlora: &a {b: {c: *a}}\n", 3, "contains itself"),
        ("r: 4\nlora: " + "[" * 100 + "]" * 100, 2, "deep"),
        ("lora: " + "[" * DEEP + "]" * DEEP, None, "nested too deeply"),
        ("r: 4\nrun_name: 2024-01-01\n", 2, "a date cannot be .* Put it in quotes"),
        ("run_name: 2024-01-01 10:00:00\n", 1, "a date"),
        ("lora: {a: 2024-01-01}\n", 1, "a date"),
        ("run_name: !!binary aGVsbG8=\n", 1, "binary data"),
        ("run_name: !!python/object:os.system {}\n", 1, "python/object"),
        ("target_modules: !!set {q_proj, v_proj}\n", 1, "set"),
        ("r: 4\nmax_steps: " + "9" * 5001 + "\n", 2, "the value of max_steps cannot be read: .*digits"),
        ("a: &a [1,1,1,1,1,1,1,1,1,1]\nb: &b [*a,*a,*a,*a,*a,*a,*a,*a,*a,*a]\n"
         "c: &c [*b,*b,*b,*b,*b,*b,*b,*b,*b,*b]\nd: &d [*c,*c,*c,*c,*c,*c,*c,*c,*c,*c]\n", None, "10,000 in all"),
        ("r: 4\nrank: 8\n", 2, "'rank' is not a flag"),
        ("r: 4\nlearning_rate: [1, 2]\n", 2, "learning_rate takes one value"),
        ("r: 4\n  x: [\n", 2, "cannot be read"),
        ("- r\n", None, "must hold 'name: value' lines, not a list"),
    ],
)  # fmt: skip
def test_yaml_that_is_no_list_of_flags_is_told_with_its_line(
    text: str, line: int | None, says: str, tmp_path: Path
) -> None:
    file = tmp_path / "run.yaml"
    file.write_text(text)
    with pytest.raises(ArgumentsError, match=says) as error:
        parse(["--config", str(file), "--model", "m", "--dataset", "d"])
    assert str(file) in str(error.value)
    assert line is None or f"line {line}" in str(error.value)


def test_yaml_that_is_not_utf8_or_not_a_file(tmp_path: Path) -> None:
    (tmp_path / "latin.yaml").write_bytes(b"r: 4\nrun_name: caf\xe9\n")
    with pytest.raises(ArgumentsError, match=r"latin\.yaml cannot be read: line 2 is not UTF-8"):
        read_flags(tmp_path / "latin.yaml")
    os.mkfifo(tmp_path / "pipe.yaml")
    with pytest.raises(ArgumentsError, match="it is a pipe, not a file"):
        read_flags(tmp_path / "pipe.yaml")
    with pytest.raises(ArgumentsError, match="it is a folder, not a file"):
        read_flags(tmp_path)
    with pytest.raises(ArgumentsError, match="it is a device, not a file"):
        read_flags(Path("/dev/zero"))


def test_anchors_and_merged_mappings_still_work(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text("lora: &l {use_dora: true}\nquantization:\n  <<: *l\n  name: nf4\n")
    assert {name: value for name, (value, _) in read_flags(file).items()} == {
        "lora": {"use_dora": True},
        "quantization": {"use_dora": True, "name": "nf4"},
    }


# -- data --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("empty.jsonl", b"", "the file is empty"),
        ("blank.jsonl", b"\n\n  \n", "the file has no rows"),
        ("empty.csv", b"", "the file is empty"),
        ("zeros.jsonl", b'{"a": 1}\n' + b"\0" * 100, "line 2: a NUL byte"),
        ("zeros.csv", b"a,b\n1,\0\n", "line 2: a NUL byte"),
        ("latin.jsonl", b'{"a": "x"}\n{"a": "caf\xe9"}\n', "line 2 is not UTF-8"),
        ("utf16.csv", "a,b\n1,2\n".encode("utf-16"), "is not UTF-8|NUL byte"),
        ("deep.json", b"[" * DEEP + b"]" * DEEP, "line 1: the values are nested more than 200 deep"),
        ("deep.jsonl", b'{"a": 1}\n{"a": ' + b'{"b":' * DEEP + b"1" + b"}" * DEEP + b"}\n", "line 2: .*nested"),
        ("wide.jsonl", json.dumps({f"c{i}": i for i in range(100_000)}).encode(), "columns"),
        ("wide.json", json.dumps([{f"c{i}": i for i in range(100_000)}]).encode(), "columns"),
        ("wide.csv", ",".join(f"c{i}" for i in range(100_000)).encode() + b"\n", "100,000 columns"),
        ("cut.parquet", b"PAR1xxxxPAR1", "cannot be read"),
        ("empty.parquet", b"", "the file is empty"),
    ],
)
def test_data_that_loaders_crash_or_hang_on_are_refused(name: str, content: bytes, says: str, tmp_path: Path) -> None:
    file = tmp_path / name
    file.write_bytes(content)
    for source in (file, tmp_path):
        with pytest.raises(DataError, match=says) as error:
            load_splits(str(source))
        assert name in str(error.value)


@pytest.mark.parametrize("name", ["pipe.jsonl", "pipe.csv", "pipe.parquet"])
def test_data_from_a_pipe_are_refused_at_once(name: str, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / name)
    with pytest.raises(DataError, match="it is a pipe, not a file"):
        load_splits(str(tmp_path / name))


def test_brackets_and_colons_in_texts_are_texts(tmp_path: Path) -> None:
    text = "[" * 500 + '"\\' + ":{" * 20_000
    file = tmp_path / "rows.jsonl"
    file.write_text("\n".join(json.dumps({"a": text, "b": "\\"}) for _ in range(100)) + "\n")
    assert load_splits(str(file))["train"][99]["a"] == text


# -- checkpoints -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    run = tiny.trainer(folder, tiny.llama(), [LoraCallback(r=4)], max_steps=2, save_strategy="steps", save_steps=2)
    run.train()
    return folder / "checkpoint-2"


def test_sound_checkpoint_is_complete(checkpoint: Path) -> None:
    assert checkpoint_defect(checkpoint) is None


def encrypt(file: Path) -> None:
    content = bytearray(file.read_bytes())
    for signature, flags in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):
        start = content.find(signature)
        while start >= 0:
            content[start + flags] |= 1
            start = content.find(signature, start + 4)
    file.write_bytes(content)


def compress(file: Path) -> None:
    """A few kilobytes that unpack to more than a gigabyte."""
    block = bytes(1 << 20)
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive, archive.open("data.pkl", "w") as member:
        for _ in range(64):
            member.write(block)


def odd_method(file: Path) -> None:
    content = bytearray(file.read_bytes())
    for signature, place in ((b"PK\x03\x04", 8), (b"PK\x01\x02", 10)):
        content[content.find(signature) + place] = 97
    file.write_bytes(content)


def pipe(file: Path) -> None:
    file.unlink()
    os.mkfifo(file)


def pickled(file: Path) -> None:
    class Evil:
        def __reduce__(self) -> tuple[Callable[..., object], tuple[str]]:
            return os.mkdir, (str(file.parent / "made by a pickle"),)

    torch.save({"state": Evil()}, file)


def legacy_pickle(file: Path) -> None:
    file.write_bytes(pickle.dumps({"state": {}}))


def deep(file: Path) -> None:
    file.write_text('{"global_step": 2, "a": ' + "[" * DEEP + "]" * DEEP + "}")


@pytest.mark.parametrize(
    ("name", "damage"),
    [
        ("trainer_state.json", deep),
        ("adapter_config.json", deep),
        ("trainer_state.json", lambda file: file.write_text("[]")),
        ("trainer_state.json", lambda file: file.write_text('{"global_step": 2, "log_history": 5, "foreign": 1}')),
        ("trainer_state.json", pipe),
        ("adapter_model.safetensors", pipe),
        ("optimizer.pt", encrypt),
        ("optimizer.pt", compress),
        ("optimizer.pt", odd_method),
        ("optimizer.pt", pipe),
        ("optimizer.pt", pickled),
        ("scheduler.pt", legacy_pickle),
        ("scheduler.pt", lambda file: file.write_bytes(zlib.compress(b"x"))),
        ("rng_state.pth", pickled),
        ("rng_state.pth", lambda file: file.write_bytes(file.read_bytes()[:-50])),
    ],
)
def test_damaged_checkpoint_is_told_and_nothing_of_it_is_run(
    name: str, damage: Callable[[Path], object], checkpoint: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "checkpoint-2"
    folder.mkdir()
    for file in checkpoint.iterdir():
        if file.is_file():
            (folder / file.name).write_bytes(file.read_bytes())
    assert checkpoint_defect(folder) is None
    damage(folder / name)
    assert checkpoint_defect(folder)
    assert not (folder / "made by a pickle").exists()


@pytest.mark.parametrize("content", ["[" * DEEP, "[]", "{", b"\xff".decode("latin-1")])
def test_damaged_record_of_a_run_is_an_error_of_ours(content: str, tmp_path: Path) -> None:
    (tmp_path / RUN_FILE).write_bytes(content.encode("latin-1"))
    with pytest.raises(ResumeError, match=rf"{RUN_FILE} cannot be read: .*Start anew"):
        check_same_run(tmp_path, {"r": 4})


# -- no arguments ------------------------------------------------------------------------------


def test_train_without_arguments_says_in_five_lines_what_it_needs(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        program(["train"])
    assert end.value.code == 2
    text = capsys.readouterr().err
    assert len(text.strip().splitlines()) == 5
    assert "--model" in text
    assert "--dataset" in text

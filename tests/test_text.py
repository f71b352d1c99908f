"""Texts that many modules need."""

from __future__ import annotations

import importlib
import json
import os
import stat
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from lora_plugins.text import did_you_mean, dtype_name, one_line, write_json


def test_nearest_names_are_suggested() -> None:
    assert did_you_mean("int9", ["int8", "nf4"]) == " Did you mean 'int8'?"
    assert did_you_mean("q_prj", ["q_proj", "k_proj", "v_proj"], most=2, show=str) == " Did you mean q_proj or v_proj?"


def test_nothing_near_gives_no_sentence() -> None:
    assert did_you_mean("zzz", ["int8", "nf4"]) == ""
    assert did_you_mean(8, iter(())) == ""


def test_names_of_dtypes_have_no_module() -> None:
    assert dtype_name(torch.bfloat16) == "bfloat16"
    assert dtype_name("float32") == "float32"


def test_an_error_becomes_one_line() -> None:
    assert one_line(ValueError("a\n  b\tc")) == "a b c"


def test_json_is_complete_or_not_there(tmp_path: Path) -> None:
    path = tmp_path / "new" / "file.json"
    write_json(path, {"path": Path("x")})
    assert json.loads(path.read_text()) == {"path": "x"}
    circle: dict[str, object] = {}
    circle["self"] = circle
    with pytest.raises(ValueError, match="Circular"):
        write_json(path, circle)
    assert json.loads(path.read_text()) == {"path": "x"}
    assert [item.name for item in path.parent.iterdir()] == ["file.json"]


@pytest.mark.parametrize("planted", ["metrics.json.partial", ".metrics.json.partial", "metrics.json"])
def test_a_link_that_others_planted_is_not_followed(planted: str, tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("mine")
    (tmp_path / planted).symlink_to(tmp_path / "secret")
    write_json(tmp_path / "metrics.json", {"loss": 1})
    assert (tmp_path / "secret").read_text() == "mine"
    assert not (tmp_path / "metrics.json").is_symlink()
    assert json.loads((tmp_path / "metrics.json").read_text()) == {"loss": 1}


def test_files_and_folders_of_others_beside_a_json_file_stay(tmp_path: Path) -> None:
    (tmp_path / "a.json.partial").mkdir()
    (tmp_path / "b.json.partial").write_text("theirs")
    for name in ("a.json", "b.json"):
        write_json(tmp_path / name, {})
    assert (tmp_path / "a.json.partial").is_dir()
    assert (tmp_path / "b.json.partial").read_text() == "theirs"


def test_a_json_file_that_two_write_at_once_is_one_of_theirs(tmp_path: Path) -> None:
    path = tmp_path / "run.json"
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda number: write_json(path, [number] * 2000), range(200)))
    values = json.loads(path.read_text())
    assert len(values) == 2000
    assert len(set(values)) == 1
    assert [item.name for item in tmp_path.iterdir()] == ["run.json"]


@pytest.mark.skipif(os.name == "nt", reason="Windows has other permissions")
def test_a_json_file_can_be_read_by_whom_the_umask_lets(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        write_json(tmp_path / "a.json", {})
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "a.json").stat().st_mode) == 0o640


@pytest.mark.parametrize(
    ("module", "name"),
    [
        ("lora_plugins.merging", "merge_and_save"),
        ("lora_plugins.packing", "pack"),
        ("lora_plugins.cli", "is_expected"),
        ("lora_plugins.cli", "program"),
        ("lora_plugins.targets", "resolve_targets"),
        ("lora_plugins.builtin.bitsandbytes", "Int8"),
        ("registry.errors", "BaseUnknown"),
        ("registry.errors", "NotLocked"),
    ],
)
def test_documented_names_of_the_first_version_still_work(module: str, name: str) -> None:
    with pytest.warns(DeprecationWarning, match=name):
        assert callable(getattr(importlib.import_module(module), name))


def test_a_name_that_never_was_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match=r"module 'lora_plugins\.packing' has no attribute 'pak'"):
        importlib.import_module("lora_plugins.packing").pak  # noqa: B018

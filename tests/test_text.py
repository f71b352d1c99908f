"""Texts that many modules need."""

from __future__ import annotations

import importlib
import json
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

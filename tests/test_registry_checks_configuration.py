"""What each check of a configuration finds, by itself: what it names, and what it leaves alone."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from releases import draft

from registry.checks import configuration as module
from registry.checks.adapter_files import AdapterFiles
from registry.checks.configuration import CHECKS, changes_base, describe_lost, list_unknown
from registry.formats.adapter_config import AdapterConfig
from registry.formats.manifest import Manifest

PLAIN = {"peft_type": "LORA", "r": 2, "target_modules": ["q_proj"], "base_model_name_or_path": "org/base"}
MANIFEST = draft("1.0.0").manifest


@pytest.fixture(autouse=True)
def _peft(monkeypatch: pytest.MonkeyPatch) -> None:
    """A PEFT that knows few fields, so that nothing here depends on the one that is installed."""
    known = frozenset({*PLAIN, "lora_alpha", "peft_version", "revision", "init_lora_weights"})
    monkeypatch.setattr(module, "read_known_fields", lambda: known)
    monkeypatch.setattr(module, "read_peft_version", lambda: "0.19.0")


def parse(**fields: Any) -> AdapterConfig:
    return AdapterConfig.parse(json.dumps({**PLAIN, **fields}).encode())


def find(name: str, manifest: Manifest | None = None, **fields: Any) -> list[str]:
    return examine(name, AdapterFiles(Path(), "The adapter x", given={"config": parse(**fields), "manifest": manifest}))


def examine(name: str, files: AdapterFiles) -> list[str]:
    [check] = [each for each in CHECKS if each.name == name]
    return [finding.message for finding in check.examine(files)]


# -- initializations -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("init", ["pissa", "PiSSA_niter_4", "olora", "CorDA", "lora_ga", "loftq"])
def test_what_changes_the_base_is_told_from_what_does_not(init: str) -> None:
    assert changes_base(init)
    assert not any(changes_base(plain) for plain in (True, False, None, "gaussian", "eva", "orthogonal", "mica", 1.5))


def test_an_initialization_that_cannot_be_repeated_is_lost() -> None:
    for kept in (True, False, None, "gaussian", "Gaussian", "EVA", "orthogonal", "true", "pissa", "OLoRA"):
        assert describe_lost(kept) is None
        assert find("lost-initialization", init_lora_weights=kept) == []
    for lost in ("pissa_niter_4", "corda", "loftq", "magic", ["gaussian"]):
        assert f"it was initialised with {lost!r}, which changes" in str(describe_lost(lost))
    [told] = find("lost-initialization", init_lora_weights="loftq")
    assert told.startswith("The adapter x: it was initialised with 'loftq'")
    assert find("lost-initialization") == []


def test_an_initialization_that_is_repeated_at_each_load_is_told() -> None:
    [told] = find("changing-initialization", init_lora_weights="pissa")
    assert told.startswith("init_lora_weights='pissa' takes a part out of the base's weights")
    for other in (True, "gaussian", "pissa_niter_4", "loftq"):  # the last two are lost, which is told elsewhere
        assert find("changing-initialization", init_lora_weights=other) == []
    assert find("changing-initialization") == []


# -- fields that PEFT does not know --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("version", "needed"),
    [("0.20.0", True), ("0.19.1.dev0@abcdef", True), ("0.19.0", False), ("0.5.0", False), (None, False), ("x", False)],
)
def test_an_unknown_field_counts_if_a_newer_peft_wrote_it(version: str | None, needed: bool) -> None:
    found = list_unknown(parse(peft_version=version, use_magic=True, more=2), None)
    assert found == ((["more", "use_magic"], []) if needed else ([], ["more", "use_magic"]))


@pytest.mark.parametrize("value", [None, {}, [], False])
def test_an_unknown_field_that_says_nothing_is_no_reason(value: object) -> None:
    assert list_unknown(parse(peft_version="0.20.0", use_magic=value), None) == ([], [])


def test_a_field_that_every_peft_has_forgotten_counts_whoever_wrote_it() -> None:
    assert list_unknown(parse(enable_lora=[True]), None) == (["enable_lora"], [])
    [told] = find("unknown-fields", enable_lora=[True])
    assert "saved by PEFT of another release with enable_lora=[True], which PEFT 0.19.0 does not know" in told
    assert "No release of PEFT since 0.3 knows them" in told
    [told] = find("unknown-fields", peft_version="0.20.0", use_magic=1)
    assert "The adapter x was saved by PEFT 0.20.0 with use_magic=1, which" in told
    assert "pip install -U peft" in told
    assert find("unknown-fields", use_magic=1) == []


def test_a_manifest_tells_which_fields_are_not_at_their_defaults() -> None:
    """It lists only these, if it was written with the PEFT that wrote the configuration."""
    config = parse(peft_version="0.20.0", use_magic=True)
    same = replace(MANIFEST, peft_version="0.20.0", config={"r": 2})
    assert list_unknown(config, same) == ([], ["use_magic"])
    assert list_unknown(config, replace(same, config={"use_magic": True})) == (["use_magic"], [])
    assert list_unknown(config, replace(same, peft_version="0.21.0")) == (["use_magic"], [])


@pytest.mark.parametrize(("fields", "version"), [(None, "0.19.0"), (frozenset(), None)])
def test_without_a_peft_nothing_is_unknown(monkeypatch: pytest.MonkeyPatch, fields: Any, version: str | None) -> None:
    monkeypatch.setattr(module, "read_known_fields", lambda: fields)
    monkeypatch.setattr(module, "read_peft_version", lambda: version)
    assert list_unknown(parse(peft_version="99", use_magic=True), None) == ([], [])


# -- what cannot be read, and what does not agree ------------------------------------------------------------------


def test_a_configuration_that_cannot_be_read_is_told(tmp_path: Path) -> None:
    for content in (b"{", b"{}", json.dumps({**PLAIN, "r": 0}).encode()):
        (tmp_path / "adapter_config.json").write_bytes(content)
        [told] = examine("configuration", AdapterFiles(tmp_path))
        assert told.startswith("adapter_config.json cannot be used: ")
    (tmp_path / "adapter_config.json").write_text(json.dumps(PLAIN))
    assert examine("configuration", AdapterFiles(tmp_path)) == []


def test_a_manifest_of_another_adapter_is_told(tmp_path: Path) -> None:
    assert find("manifest-agreement") == []
    assert find("manifest-agreement", MANIFEST) == []
    [told] = find("manifest-agreement", MANIFEST, r=4)
    assert "do not agree: r is 4, and 2 by the manifest" in told
    (tmp_path / "adapter_manifest.json").write_bytes(b"{")
    [told] = examine("manifest-agreement", AdapterFiles(tmp_path, given={"config": parse()}))
    assert "not JSON" in told


# -- values --------------------------------------------------------------------------------------------------------


def test_a_router_is_told() -> None:
    [told] = find("arrow-router", arrow_config={"top_k": 2})
    assert told.startswith("arrow_config makes it a router")
    assert find("arrow-router") == find("arrow-router", arrow_config=None) == []


@pytest.mark.parametrize(
    ("fields", "zero"),
    [
        ({}, False),
        ({"lora_alpha": 4}, False),
        ({"lora_alpha": 0}, True),
        ({"lora_alpha": 0.0, "alpha_pattern": {"q_proj": 0}}, True),
        ({"lora_alpha": 0, "alpha_pattern": {"q_proj": 0, "v_proj": 1}}, False),
        ({"lora_alpha": 4, "alpha_pattern": {"q_proj": 0}}, False),
    ],
)
def test_an_alpha_of_zero_changes_nothing(fields: dict[str, Any], zero: bool) -> None:
    assert [told[:15] for told in find("zero-alpha", **fields)] == (["lora_alpha is 0"] if zero else [])


@pytest.mark.parametrize(
    ("fields", "told"),
    [
        ({}, []),
        ({"lora_alpha": 0}, []),
        ({"lora_alpha": 200}, []),
        ({"lora_alpha": 202}, ["lora_alpha=202 with r=2 multiplies updates by 101; usual is 0.01 to 100"]),
        ({"lora_alpha": 0.02}, []),
        ({"lora_alpha": 0.01}, ["lora_alpha=0.01 with r=2 multiplies updates by 0.005"]),
        ({"lora_alpha": -4}, ["lora_alpha=-4 with r=2 multiplies updates by -2"]),
        ({"lora_alpha": 400, "r": 16, "use_rslora": True}, []),
        ({"lora_alpha": 404, "r": 16, "use_rslora": True}, ["lora_alpha=404 with r=16 multiplies updates by 101"]),
        ({"lora_alpha": 404, "r": 16}, []),
        ({"alpha_pattern": {"q": 1000}}, ["alpha 1000 with rank 2 of 'q' multiplies updates by 500"]),
        ({"lora_alpha": 150, "rank_pattern": {"k": 1}}, ["alpha 150 with rank 1 of 'k' multiplies updates by 150"]),
        ({"lora_alpha": 4, "rank_pattern": {"k": 4}, "alpha_pattern": {"k": 8}}, []),
    ],
)
def test_an_odd_scaling_is_told_with_what_makes_it(fields: dict[str, Any], told: list[str]) -> None:
    found = find("odd-scaling", **fields)
    assert [message[: len(start)] for message, start in zip(found, told, strict=True)] == told


def test_a_rank_as_large_as_the_weights_is_told() -> None:
    assert find("odd-rank", r=2048) == find("odd-rank", rank_pattern={"q": 2048}) == []
    for fields in ({"r": 2049}, {"rank_pattern": {"q": 2049}}):
        [told] = find("odd-rank", **fields)
        assert told.startswith("The rank is 2,049; above 2,048,")


# -- the base ------------------------------------------------------------------------------------------------------


def test_a_base_that_is_a_folder_or_missing_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert find("local-base") == find("no-base") == []
    for name in ("/srv/base", "../base", str(tmp_path)):
        assert find("local-base", base_model_name_or_path=name) == [
            f"base_model_name_or_path is {name!r}, a folder of the machine that trained it"
        ]
        assert find("no-base", base_model_name_or_path=name) == []
    (tmp_path / "org" / "base").mkdir(parents=True)
    assert len(find("local-base")) == 1
    for nothing in (None, ""):
        assert find("local-base", base_model_name_or_path=nothing) == []
        [told] = find("no-base", base_model_name_or_path=nothing)
        assert told.startswith("base_model_name_or_path is empty")


def test_a_base_whose_revision_may_move_is_told() -> None:
    assert find("no-revision", revision="a" * 40) == []
    assert find("no-revision", base_model_name_or_path=None) == []
    assert find("no-revision") == ["revision is empty: the base may have changed since the training"]
    for moving in ("main", "a" * 39, "v1.0"):
        assert find("no-revision", revision=moving) == [
            f"revision is {moving!r}, which may move: the base may have changed since the training"
        ]

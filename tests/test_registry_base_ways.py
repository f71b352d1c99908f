"""Every way from a release to a model gives the same answer: the table in docs/loading.md."""

from __future__ import annotations

import dataclasses
import json
import re
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from adapters import adapted, pulled
from huggingface_hub import constants
from safetensors.torch import load_file, save_file

from lora_plugins import LoraCallback, merge_and_save, plan, prepare_model
from registry import BaseMismatch, check_contract
from registry.formats.records import TensorRecord
from registry.pulling.adapter import Adapter
from registry.testing import LoopbackHub

PAGE = Path(__file__).parent.parent / "docs" / "loading.md"
NAME = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"


def base(seed: int = 0, commit: str | None = None, **config: Any) -> Any:
    """A small base as if it was loaded from a hub, with norms that are not all ones."""
    model = tiny.llama(2, seed, **config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.add_(torch.linspace(0.0, 0.1, parameter.numel()))
    model.config._name_or_path = "org/base"
    model.config._commit_hash = commit
    return model


def with_other_mlp(commit: str | None = None) -> Any:
    """A base that differs where no fingerprint looks."""
    model = base(commit=commit)
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight.add_(0.1)
    return model


@pytest.fixture
def commits(loopback_hub: LoopbackHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """Three commits of a base: the one of the training, one with another card, one with other weights."""
    monkeypatch.setattr(constants, "ENDPOINT", loopback_hub.endpoint)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    loopback_hub.create_repo("org/base")
    found = {}
    for kind, model in (("trained", base()), ("same", base()), ("other", with_other_mlp())):
        model.save_pretrained(tmp_path / kind)
        files = {file.name: file.read_bytes() for file in (tmp_path / kind).iterdir()}
        found[kind] = loopback_hub.commit("org/base", {**files, "README.md": kind.encode()})
    return found


def edited(
    adapter: Adapter, folder: Path, change: Callable[[dict[str, Any]], None] | None = None, **config: Any
) -> Adapter:
    """A release with other tensors or fields, as whoever published it could have made it."""
    folder.mkdir()
    old = Path(adapter.path)
    fields = {**json.loads((old / "adapter_config.json").read_text()), **config}
    (folder / "adapter_config.json").write_text(json.dumps(fields))
    tensors = load_file(old / "adapter_model.safetensors")
    if change is not None:
        change(tensors)
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    records = {name: TensorRecord("F32", tuple(tensor.shape)) for name, tensor in tensors.items()}
    known = {**adapter.manifest.config, **{key: value for key, value in config.items() if key != "peft_version"}}
    manifest = dataclasses.replace(adapter.manifest, tensors=records, config=known)
    if "peft_version" in config:
        manifest = dataclasses.replace(manifest, peft_version=config["peft_version"])
    (folder / "adapter_manifest.json").write_bytes(manifest.to_bytes())
    return dataclasses.replace(adapter, manifest=manifest, path=str(folder))


def overwrite_norm(tensors: dict[str, Any]) -> None:
    tensors["base_model.model.model.norm.weight"] = torch.ones(32)


#: Row of the table -> the adapter and the base at hand, of the release, a folder and the commits.
CASES: dict[str, Callable[[Adapter, Path, dict[str, str]], tuple[Adapter, Any]]] = {
    "its own base": lambda a, _, c: (a, base(commit=c["trained"])),
    "other revision, same weights": lambda a, _, c: (a, base(commit=c["same"])),
    "other revision, other weights": lambda a, _, c: (a, with_other_mlp(c["other"])),
    "another base of the same shape": lambda a, _, c: (a, base(seed=1)),
    "another vocabulary": lambda a, _, c: (a, base(vocab_size=100)),
    "another rank": lambda a, f, c: (edited(a, f, r=8), base()),
    "a field that PEFT would drop": lambda a, f, c: (edited(a, f, use_magic=True, peft_version="99.0"), base()),
    "a tensor is missing": lambda a, f, c: (edited(a, f, lambda t: t.pop(NAME)), base()),
    "a tensor too many": lambda a, f, c: (edited(a, f, overwrite_norm), base()),
}


def merge(adapter: Adapter, model: Any, folder: Path) -> None:
    """Merge into the base in a folder, of huggingface_hub's cache where its commit is known."""
    commit = model.config._commit_hash
    place = folder / "models--org--base" / "snapshots" / commit if commit else folder / "base"
    model.save_pretrained(place)
    merge_and_save(adapter.path, folder / "merged", base=place, quantization="none", probe=None)


def train(adapter: Adapter, model: Any, folder: Path) -> None:
    tiny.trainer(folder, model, [LoraCallback(adapter=adapter)], max_steps=1).train()


#: Column of the table -> how the adapter gets to the model.
WAYS: dict[str, Callable[[Adapter, Any, Path], Any]] = {
    "`check`": lambda adapter, model, _: adapter.check(model),
    "`load`": lambda adapter, model, _: adapter.load(model),
    "`check_contract`": lambda adapter, model, _: check_contract(adapter.path, model),
    "`prepare_model(adapter=)`": lambda adapter, model, _: prepare_model(model, adapter=adapter),
    "`LoraCallback(adapter=)`": train,
    "`merge_and_save`": merge,
    "`plan(adapter=)`": lambda adapter, model, _: plan(model, adapter=adapter, length=8),
}


def table() -> dict[str, dict[str, str]]:
    """The table of the page: case -> way -> answer."""
    lines = [line for line in PAGE.read_text().splitlines() if line.startswith("|")]
    start = next(number for number, line in enumerate(lines) if "`LoraCallback(adapter=)`" in line)
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[start : start + 2 + len(CASES)]]
    return {row[0]: dict(zip(rows[0][1:], row[1:], strict=True)) for row in rows[2:]}


def test_the_table_has_every_case_and_every_way() -> None:
    assert list(table()) == list(CASES)
    assert all(list(answers) == list(WAYS) for answers in table().values())
    assert all(len(set(answers.values())) == 1 for answers in table().values())


@pytest.mark.parametrize("case", CASES)
def test_every_way_gives_the_answer_of_the_table(case: str, commits: dict[str, str], tmp_path: Path) -> None:
    release = pulled(adapted(base(commit=commits["trained"])), tmp_path / "release")
    assert (release.manifest.base.id, release.manifest.base.commit) == ("org/base", commits["trained"])
    for number, (way, go) in enumerate(WAYS.items()):
        adapter, model = CASES[case](release, tmp_path / f"edited-{number}", commits)
        answer, reason = "fits", ""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                go(adapter, model, tmp_path / f"run-{number}")
            except BaseMismatch as error:
                answer, reason = "refused", str(error)
        assert answer == table()[case][way], (way, reason)
        if answer == "refused":
            assert not [name for name, _ in model.named_parameters() if "lora_" in name], way


def test_two_revisions_of_one_base_are_named(commits: dict[str, str], tmp_path: Path) -> None:
    release = pulled(adapted(base(commit=commits["trained"])), tmp_path / "release")
    result = release.check(base(commit=commits["same"]))
    assert result.identity == "verified"
    assert f"weight files and configuration of {commits['same'][:12]}" in result.details
    text = rf"at commit {commits['other'][:12]}, the adapter was trained at {commits['trained'][:12]}"
    with pytest.raises(BaseMismatch, match=text):
        release.check(with_other_mlp(commits["other"]))


def test_two_revisions_are_two_bases_where_nobody_can_compare_them(
    commits: dict[str, str], tmp_path: Path, loopback_hub: LoopbackHub
) -> None:
    release = pulled(adapted(base(commit=commits["trained"])), tmp_path / "release")
    loopback_hub.delete_repo("org/base")
    with pytest.raises(BaseMismatch, match="whether their weights are the same cannot be found out"):
        release.check(base(commit=commits["same"]))


def test_another_revision_in_a_folder_of_the_cache_is_refused(commits: dict[str, str], tmp_path: Path) -> None:
    """The layout of huggingface_hub's cache says which commit a folder is."""
    release = pulled(adapted(base(commit=commits["trained"])), tmp_path / "release")
    folder = tmp_path / "models--org--base" / "snapshots" / commits["other"]
    folder.parent.mkdir(parents=True)
    (tmp_path / "other").rename(folder)
    with pytest.raises(BaseMismatch, match=re.escape(commits["other"][:12])):
        release.check(folder)


def test_the_branch_of_a_base_that_moved_on_is_refused(
    commits: dict[str, str], tmp_path: Path, loopback_hub: LoopbackHub
) -> None:
    release = pulled(adapted(base(commit=commits["trained"])), tmp_path / "release")
    at = {"base_hub": loopback_hub.endpoint, "token": loopback_hub.token}
    assert release.check("org/base", **at).identity == "verified"
    assert release.check(f"org/base@{commits['same']}", **at).identity == "verified"
    with pytest.raises(BaseMismatch, match="weight files or configurations differ"):
        release.check("org/base@main", **at)

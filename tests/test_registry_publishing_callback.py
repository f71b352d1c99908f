"""Publishing from a training run: when it ends, with what it found out, and nothing lost when it cannot be."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from safetensors.torch import load_file

from lora_plugins import LoraCallback, merge_and_save, prepare_model
from registry import pull_adapter, push_adapter, versions
from registry.errors import (
    InvalidAdapter,
    InvalidReference,
    SignatureNotFound,
    UnknownBase,
    UnknownSigner,
    VersionExists,
)
from registry.hubs.folder import FolderHub
from registry.publishing.callback import UNPUBLISHED, PushToRegistryCallback


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LORA_REGISTRY_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("LORA_REGISTRY", f"file://{tmp_path / 'registry'}")
    monkeypatch.chdir(tmp_path)


def trainer(folder: Path, *callbacks: Any, **arguments: Any) -> Any:
    extra = {"eval_dataset": tiny.rows(8, seed=5)} if "eval_strategy" in arguments else {}
    return tiny.trainer(
        folder / "run", tiny.llama(), [LoraCallback(r=4), *callbacks], trainer_arguments=extra, **arguments
    )


def test_the_adapter_is_published_when_training_ends(tmp_path: Path) -> None:
    push = PushToRegistryCallback("org/name", version="minor")
    run = trainer(tmp_path, push, eval_strategy="steps", eval_steps=2)
    run.train()
    assert push.published is not None
    assert str(push.published) == "org/name@0.1.0"
    adapter = pull_adapter("org/name")
    manifest = adapter.manifest
    assert manifest.training["steps"] == 4
    assert manifest.metrics["eval_loss"] == pytest.approx(run.state.log_history[-2]["eval_loss"])
    assert {"README.md", "loss.png"} <= set(manifest.files)
    card = Path(adapter.path, "README.md").read_text()
    assert "![Training loss by step](loss.png)" in card
    assert "eval\\_loss" in card
    stored = load_file(Path(adapter.path, "adapter_model.safetensors"))
    live = tiny.adapter_tensors(run.model)
    assert len(stored) == len(live) > 0
    assert all(torch.equal(stored[name.replace(".default", "")], tensor) for name, tensor in live.items())
    assert adapter.check(tiny.llama()).identity == "verified"


@pytest.mark.parametrize("load", [False, True])
def test_the_best_checkpoint_is_published(tmp_path: Path, load: bool) -> None:
    push = PushToRegistryCallback("org/name", version="1.0.0", when="best", base_model=f"org/base@{'b' * 40}")
    run = trainer(
        tmp_path, push, max_steps=6, eval_strategy="steps", eval_steps=2, save_strategy="steps", save_steps=2,
        metric_for_best_model="eval_loss", load_best_model_at_end=load,
        # The loss falls, and so the first checkpoint counts as the best.
        greater_is_better=True,
    )  # fmt: skip
    run.train()
    best = Path(run.state.best_model_checkpoint)
    assert best.name == "checkpoint-2"
    manifest = pull_adapter("org/name").manifest
    stored = load_file(Path(pull_adapter("org/name").path, "adapter_model.safetensors"))
    expected = load_file(best / "adapter_model.safetensors")
    assert all(torch.equal(stored[name], tensor) for name, tensor in expected.items())
    assert manifest.metrics["eval_loss"] == pytest.approx(run.state.best_metric)
    assert manifest.training["steps"]


def test_continuing_from_a_published_adapter(tmp_path: Path) -> None:
    trainer(tmp_path, PushToRegistryCallback("org/name", version="1.0.0")).train()
    first = load_file(Path(pull_adapter("org/name").path, "adapter_model.safetensors"))
    push = PushToRegistryCallback("org/name", version="minor")
    run = tiny.trainer(tmp_path / "again", tiny.llama(), [LoraCallback(adapter="org/name@1.0"), push], max_steps=2)
    start = tiny.adapter_tensors(run.model)
    assert all(torch.equal(first[name.replace(".default", "")], tensor) for name, tensor in start.items())
    run.train()
    assert [release.version for release in versions("org/name")] == ["1.0.0", "1.1.0"]
    assert pull_adapter("org/name").manifest.parent_version == "1.0.0"


def test_a_run_continues_from_no_release_without_the_required_signature(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("model_signing", reason="comes with the extra: pip install 'lora-plugins[signing]'")
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    keys = {name: (tmp_path / f"{name}.key", tmp_path / f"{name}.pub") for name in ("ours", "theirs")}
    for private, public in keys.values():
        key = ec.generate_private_key(ec.SECP256R1())
        private.write_bytes(key.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        ))  # fmt: skip
        public.write_bytes(key.public_key().public_bytes(
            serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
        ))  # fmt: skip
    run = trainer(tmp_path, PushToRegistryCallback("org/name", version="1.0.0"))
    run.train()
    push_adapter(run.model, "org/signed", version="1.0.0", sign=keys["ours"][0])
    ways: dict[str, Callable[[str], object]] = {
        "callback": lambda name: tiny.trainer(tmp_path / "again", tiny.llama(), [LoraCallback(adapter=name)]),
        "prepare": lambda name: prepare_model(tiny.llama(), adapter=name),
        "merge": lambda name: merge_and_save(name, tmp_path / "merged", base=tmp_path),
        "load": lambda name: pull_adapter(name).load(tiny.llama(), trust_identity=True),
    }
    for way in ways.values():
        monkeypatch.setenv("LORA_REGISTRY_REQUIRE_SIGNATURE", str(keys["ours"][1]))
        with pytest.raises(SignatureNotFound, match="is not signed"):
            way("org/name@1.0.0")
        monkeypatch.setenv("LORA_REGISTRY_REQUIRE_SIGNATURE", str(keys["theirs"][1]))
        with pytest.raises(UnknownSigner):
            way("org/signed@1.0.0")
    monkeypatch.setenv("LORA_REGISTRY_REQUIRE_SIGNATURE", str(keys["ours"][1]))
    assert prepare_model(tiny.llama(), adapter="org/signed@1.0.0")
    # One run's own key: what was pulled with it is passed on.
    monkeypatch.delenv("LORA_REGISTRY_REQUIRE_SIGNATURE")
    pulled = pull_adapter("org/signed", require_signature=keys["ours"][1])
    assert tiny.trainer(tmp_path / "passed", tiny.llama(), [LoraCallback(adapter=pulled)])


def test_what_cannot_be_published_is_refused_before_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InvalidReference):
        PushToRegistryCallback("name")
    with pytest.raises(InvalidReference):
        PushToRegistryCallback("org/name", version="one")
    with pytest.raises(ValueError, match="must be 'end' or 'best'"):
        PushToRegistryCallback("org/name", when="soon")  # type: ignore[arg-type]
    run = trainer(tmp_path, PushToRegistryCallback("org/name", when="best"))
    with pytest.raises(InvalidAdapter, match="set eval_strategy"):
        run.train()
    plain = tiny.trainer(tmp_path / "plain", tiny.llama(), [PushToRegistryCallback("org/name")])
    with pytest.raises(InvalidAdapter, match="no adapters; put LoraCallback before"):
        plain.train()
    monkeypatch.setenv("LORA_REGISTRY", "https://hub.invalid")
    run = trainer(tmp_path, PushToRegistryCallback("org/name"))
    with pytest.raises(UnknownBase, match="a model without a name, which nobody else can load"):
        run.train()
    assert run.state.global_step == 0


def test_a_push_that_fails_loses_nothing(tmp_path: Path) -> None:
    trainer(tmp_path, PushToRegistryCallback("org/name", version="1.0.0")).train()
    other = trainer(tmp_path / "other", PushToRegistryCallback("org/name", version="1.0.0"), seed=8)
    with pytest.raises(VersionExists, match=r"lora-plugins push \S+ org/name --version 1\.0\.0"):
        other.train()
    kept = load_file(tmp_path / "other" / "run" / UNPUBLISHED / "adapter_model.safetensors")
    live = tiny.adapter_tensors(other.model)
    assert all(torch.equal(kept[name.replace(".default", "")], tensor) for name, tensor in live.items())
    assert len(list(FolderHub(tmp_path / "registry").names())) == 1

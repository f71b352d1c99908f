"""The manifest: what is written is read again, what a stranger writes is refused, and the schema says the same."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import registry
from registry.errors import InvalidManifest
from registry.formats.manifest import MAX_ALIASES, MAX_MANIFEST, Manifest
from registry.formats.paths import allowed
from registry.formats.records import BaseKind, BaseRecord, FileRecord, Fingerprint, TensorPrint, TensorRecord

SCHEMA = json.loads(Path(registry.__file__).with_name("adapter_manifest.schema.json").read_text())
SHA = hashlib.sha256(b"").hexdigest()
A = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"

MANIFEST = Manifest(
    version="1.2.0",
    base=BaseRecord("org/base", "b" * 40, Fingerprint({"hidden_size": 32}, {"norm.weight": TensorPrint(SHA, "BF16")})),
    architecture=BaseKind("llama", "LlamaForCausalLM", 96),
    config={"r": 8, "target_modules": ["q_proj"], "peft_type": "LORA"},
    files={
        "adapter_config.json": FileRecord(10, SHA),
        "adapter_model.safetensors": FileRecord(1000, SHA),
        "README.md": FileRecord(5, SHA),
        "loss.png": FileRecord(5, SHA),
    },
    tensors={A: TensorRecord("F32", (8, 32))},
    created="2026-01-31T12:00:00Z",
    parent_version="1.1.0",
    peft_version="0.21.2",
    tokenizer_hash=SHA,
    training={"steps": 4, "arguments": {"learning_rate": 1e-4}},
    metrics={"eval_loss": 0.5},
)


def document() -> dict[str, Any]:
    """The manifest as JSON values, to be spoilt."""
    return json.loads(MANIFEST.to_bytes())


def test_what_is_written_is_read_again() -> None:
    again = Manifest.parse(MANIFEST.to_bytes())
    assert again == MANIFEST
    assert again.digest == MANIFEST.digest == hashlib.sha256(MANIFEST.to_bytes()).hexdigest()
    jsonschema.validate(document(), SCHEMA)


def test_the_digest_is_that_of_the_bytes_that_were_read() -> None:
    data = json.dumps({**document(), "something_new": 1}).encode()
    read = Manifest.parse(data)
    assert read.to_bytes() == data
    assert read.digest == hashlib.sha256(data).hexdigest() != MANIFEST.digest
    assert dataclasses.replace(read).digest == MANIFEST.digest


def test_a_base_may_have_as_many_names_as_are_allowed() -> None:
    names = tuple(f"org/b{number}" for number in range(MAX_ALIASES))
    read = Manifest.parse(json.dumps({**document(), "base": {"id": "org/base", "aliases": names}}).encode())
    assert read.base.aliases == names
    assert len(str(Manifest.parse(json.dumps({**document(), "version": ".".join("1" * 64)}).encode()).version)) == 127


def test_the_content_digest_leaves_out_times_metrics_and_cards() -> None:
    files = {**MANIFEST.files, "README.md": FileRecord(6, SHA), "adapter_config.json": FileRecord(11, SHA)}
    told = {"created": "2027-01-31T12:00:00Z", "metrics": {}, "training": {}, "peft_version": None, "files": files}
    assert dataclasses.replace(MANIFEST, **told, version="2.0.0").content_digest == MANIFEST.content_digest
    for picture in (
        {},
        {"loss.png": FileRecord(7, SHA)},
        {"loss.png": FileRecord(5, SHA), "more.png": FileRecord(5, SHA)},
    ):
        shown = {name: file for name, file in MANIFEST.files.items() if name != "loss.png"} | picture
        assert dataclasses.replace(MANIFEST, files=shown).content_digest == MANIFEST.content_digest
    weights = {**MANIFEST.files, "adapter_model.safetensors": FileRecord(1000, "f" * 64)}
    for change in (
        {"files": weights},
        {"config": {"r": 9}},
        {"base": BaseRecord("org/base", "c" * 40)},
        {"tokenizer_hash": None},
    ):
        assert dataclasses.replace(MANIFEST, **change).content_digest != MANIFEST.content_digest


SPOILT: dict[str, tuple[str, Any]] = {
    "version": ("version", "v1.2.0"),
    "version not normalized": ("version", "1.2.0-rc.1"),
    "version without end": ("version", "1" * 5000),
    "version of 129 characters": ("version", ".".join("1" * 65)),
    "version of two lines": ("version", "1.2.0\n"),
    "no version": ("version", None),
    "newer format": ("format", 2),
    "format is true": ("format", True),
    "base is a path": ("base", {"id": "/etc/passwd"}),
    "base is a relative path": ("base", {"id": "../secret"}),
    "base is a URL": ("base", {"id": "https://example.com/x"}),
    "commit is a branch": ("base", {"id": "org/base", "commit": "main"}),
    "aliases are a text": ("base", {"id": "org/base", "aliases": "org/same"}),
    "an alias is a path": ("base", {"id": "org/base", "aliases": ["org/same", "../secret"]}),
    "an alias is a URL": ("base", {"id": "org/base", "aliases": ["https://example.com/x", "org/same"]}),
    "too many aliases": ("base", {"id": "org/base", "aliases": [f"org/b{n}" for n in range(MAX_ALIASES + 1)]}),
    "fingerprint is a text": ("base", {"fingerprint": "x"}),
    "no tensors": ("tensors", {}),
    "tensors is a list": ("tensors", []),
    "tensor with a negative size": ("tensors", {A: {"dtype": "F32", "shape": [-1]}}),
    "tensor with a fraction": ("tensors", {A: {"dtype": "F32", "shape": [1.5]}}),
    "tensor of 9 dimensions": ("tensors", {A: {"dtype": "F32", "shape": [1] * 9}}),
    "tensor with a strange dtype": ("tensors", {A: {"dtype": "../x", "shape": [1]}}),
    "tensor name is a path": ("tensors", {"../../x": {"dtype": "F32", "shape": [1]}}),
    "tensor name of 1 MB": ("tensors", {"a" * 1_000_000: {"dtype": "F32", "shape": [1]}}),
    "size is a text": ("files", {**document()["files"], "README.md": {"size": "5", "sha256": SHA}}),
    "10 TB": ("files", {**document()["files"], "README.md": {"size": 10**13, "sha256": SHA}}),
    "short hash": ("files", {**document()["files"], "README.md": {"size": 5, "sha256": "abc"}}),
    "no weights": ("files", {"adapter_config.json": {"size": 5, "sha256": SHA}}),
    "metrics hold a text": ("metrics", {"loss": "low"}),
    "metrics hold a truth": ("metrics", {"loss": True}),
    "created is no time": ("created", "yesterday"),
    "config is null": ("config", None),
    "training is a list": ("training", [1]),
}


@pytest.mark.parametrize("case", SPOILT)
def test_a_spoilt_manifest_is_refused_by_name(case: str) -> None:
    key, value = SPOILT[case]
    spoilt = {**document(), key: value}
    with pytest.raises(InvalidManifest, match=rf"^adapter_manifest\.json: .*{key if key != 'files' else ''}") as caught:
        Manifest.parse(json.dumps(spoilt).encode())
    assert len(str(caught.value)) < 500


def test_tensor_names_that_are_code_are_refused_although_the_schema_cannot_say_so() -> None:
    for name in ("__class__", "a.__class__.b", "a..b", ".a", "a."):
        with pytest.raises(InvalidManifest, match="name of a tensor"):
            Manifest.parse(json.dumps({**document(), "tensors": {name: {"dtype": "F32", "shape": [1]}}}).encode())


HOSTILE_JSON = {
    "not JSON": b"<html>",
    "empty": b"",
    "not UTF-8": b'{"a": "\xff"}',
    "a list": b"[]",
    "deep": b"[" * 1_000_000 + b"]" * 1_000_000,
    "deep in training": b'{"format": 1, "training": ' + b'{"a":' * 60 + b"1" + b"}" * 61,
    "large": b'"' + b"a" * (MAX_MANIFEST + 1) + b'"',
    "key twice": b'{"format": 1, "format": 1}',
    "NaN": b'{"format": NaN}',
    "Infinity": b'{"metrics": {"a": 1e999}}',
    "long number": b'{"format": ' + b"9" * 5000 + b"}",
    "half a surrogate": b'{"format": "\\ud800"}',
}


@pytest.mark.parametrize("case", HOSTILE_JSON)
def test_hostile_json_is_refused(case: str) -> None:
    with pytest.raises(InvalidManifest, match=r"^adapter_manifest\.json: "):
        Manifest.parse(HOSTILE_JSON[case])


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_what_the_schema_refuses_the_parser_refuses_too(data: st.DataObject) -> None:
    spoilt = document()
    target: Any = spoilt
    while isinstance(target, dict) and target:
        key = data.draw(st.sampled_from(sorted(target)))
        if not isinstance(target[key], dict) or data.draw(st.booleans()):
            junk = st.one_of(st.none(), st.integers(), st.text(max_size=4), st.lists(st.integers(), max_size=2))
            target[key] = data.draw(junk | st.just({}))
            break
        target = target[key]
    if not jsonschema.Draft202012Validator(SCHEMA).is_valid(spoilt):
        with pytest.raises(InvalidManifest):
            Manifest.parse(json.dumps(spoilt).encode())


HOSTILE_NAMES = [
    "../../x", "/abs", "C:\\x", "\\\\srv\\x", "..\\x", "a/../../x", "", ".", "..", "a\0b", "README.md\n", "x" * 5000,
    "README.md.", "README.md ", "CON", "con.png/x", ".git/config", ".git/hooks/post-checkout", ".cache/huggingface/x",
    ".env", "conftest.py", "x.pth", "sitecustomize.py", "readme.md", "README.MD", "adapter_model.bin",
    "adapter_model.pt", "Adapter_config.json", "adapter_config.json/", "./adapter_config.json", "adapter_conﬁg.json",
    "é.png", "e\u0301.png", "tokenizer.py", "optimizer.pt", "training_args.bin", "rng_state.pth", "loss.svg",
    "..png", "a/b.png", "A.png",
]  # fmt: skip


@pytest.mark.parametrize("name", HOSTILE_NAMES)
def test_no_other_file_name_is_allowed(name: str) -> None:
    assert not allowed(name)
    spoilt = {**document(), "files": {**document()["files"], name: {"size": 1, "sha256": SHA}}}
    with pytest.raises(InvalidManifest, match="which a release cannot hold") as caught:
        Manifest.parse(json.dumps(spoilt).encode())
    assert "\0" not in str(caught.value)
    assert len(str(caught.value)) < 400


def test_names_that_are_allowed() -> None:
    for name in ("adapter_config.json", "loss.png", "tokenizer.json", "adapter_manifest.json", ".gitattributes"):
        assert allowed(name)
    assert not allowed("model.safetensors")


def test_the_facts_that_a_person_sees_first() -> None:
    import dataclasses

    from releases import draft

    made = draft("1.0.0").manifest
    told = [
        ({}, None),
        ({"quantization": "nf4"}, "nf4"),
        ({"quantization": {"name": "nf4"}, "quantized_share": 0.5}, "nf4, 50.0% of the weights"),
        ({"quantization": {"name": "nf4"}, "quantized_share": "half"}, "nf4"),
        ({"quantized_share": 0.5}, None),
    ]
    for training, expected in told:
        facts = dict(dataclasses.replace(made, training=training, metrics={"eval_loss": 1.5}).list_facts())
        assert (facts["quantization"], facts["base"], facts["eval_loss"]) == (expected, f"org/base@{'b' * 12}", 1.5)
    assert not made.unversioned
    assert dataclasses.replace(made, version=f"0+g{'a' * 40}").unversioned

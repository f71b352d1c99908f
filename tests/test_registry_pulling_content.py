"""What the files of a release say is compared with its manifest before they enter the cache."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from pathlib import Path
from typing import Any

import numpy
import pytest
from releases import CONFIG, MODULE, contents, draft
from safetensors.numpy import save

from registry.errors import IntegrityError, InvalidAdapter, TooLarge, UnsafeFile
from registry.formats.manifest import Manifest
from registry.formats.records import FileRecord, TensorRecord
from registry.formats.weights import MAX_HEADER
from registry.pulling.content import check_content, check_sizes

CONFIG_FILE, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


def release(folder: Path, **files: bytes) -> Manifest:
    """Write the files of a release with some of its own, and return a manifest with their hashes."""
    named = {
        {"config": CONFIG_FILE, "weights": WEIGHTS, "tokenizer": "tokenizer_config.json"}[k]: v
        for k, v in files.items()
    }
    there = {**contents(), **named}
    for name, data in there.items():
        (folder / name).write_bytes(data)
    records = {name: FileRecord(len(data), hashlib.sha256(data).hexdigest()) for name, data in there.items()}
    return dataclasses.replace(draft("1.0.0").manifest, files=records)


def weights(**changed: Any) -> bytes:
    tensors = {"lora_A": numpy.ones((2, 8), "f4"), "lora_B": numpy.ones((8, 2), "f4"), **changed}
    return save({f"{MODULE}.{name}.weight": tensor for name, tensor in tensors.items()})


def test_a_sound_release_passes_without_a_warning(tmp_path: Path) -> None:
    manifest = release(tmp_path, tokenizer=b'{"model_max_length": 10}')
    check_sizes(manifest)
    assert check_content(tmp_path, manifest) == ()


@pytest.mark.parametrize(
    ("files", "error", "says"),
    [
        ({"config": b"{}"}, UnsafeFile, "peft_type"),
        ({"config": json.dumps({**CONFIG, "r": 4}).encode()}, IntegrityError, "do not agree"),
        ({"config": json.dumps({**CONFIG, "trust_remote_code": True}).encode()}, UnsafeFile, "trust_remote_code"),
        ({"weights": b"x" * 200}, UnsafeFile, "not a safetensors file"),
        ({"weights": weights(lora_B=numpy.ones((16, 2), "f4"))}, IntegrityError, "not those of the manifest"),
        ({"weights": weights(lora_A=numpy.ones((2, 8), "f2"))}, IntegrityError, "not those of the manifest"),
        ({"weights": weights(more=numpy.ones(2, "f4"))}, IntegrityError, "not those of the manifest"),
        ({"weights": weights(lora_A=numpy.full((2, 8), numpy.nan, "f4"))}, InvalidAdapter, "NaN"),
        ({"tokenizer": b'{"auto_map": {"AutoTokenizer": ["evil.T", null]}}'}, UnsafeFile, "auto_map"),
        ({"tokenizer": b"{"}, UnsafeFile, "tokenizer_config"),
        ({"tokenizer": b"[]"}, UnsafeFile, "tokenizer_config"),
    ],
)
def test_what_is_not_sound_is_refused(tmp_path: Path, files: Any, error: type[Exception], says: str) -> None:
    manifest = release(tmp_path, **files)
    with pytest.raises(error, match=says):
        check_content(tmp_path, manifest)


def test_zeros_are_said(tmp_path: Path) -> None:
    manifest = release(tmp_path, weights=weights(lora_B=numpy.zeros((8, 2), "f4")))
    [told] = check_content(tmp_path, manifest)
    assert "changes nothing" in told


def sized(**sizes: int) -> Manifest:
    made = draft("1.0.0").manifest
    files = {name.replace("__", "."): FileRecord(size, "0" * 64) for name, size in sizes.items()}
    return dataclasses.replace(made, files={**made.files, **files})


def test_sizes_that_cannot_be_are_refused_before_a_download() -> None:
    data = 2 * (2 * 8 * 4)
    for size in (data + 8, data + 8 + MAX_HEADER):
        check_sizes(sized(adapter_model__safetensors=size))
    for size in (0, data + 7, data + 9 + MAX_HEADER, 10**10):
        with pytest.raises(UnsafeFile, match="the tensors of its manifest take 128"):
            check_sizes(sized(adapter_model__safetensors=size))
    check_sizes(sized(README__md=256 * 1024**2))
    with pytest.raises(TooLarge, match=r"README\.md has 268,435,457 bytes"):
        check_sizes(sized(README__md=256 * 1024**2 + 1))
    huge = dataclasses.replace(
        sized(adapter_model__safetensors=10**13), tensors={f"{MODULE}.lora_A.weight": TensorRecord("F32", (10**12,))}
    )
    with pytest.raises(TooLarge, match="adapter_model"):
        check_sizes(huge)

"""Releases without a model: small, real adapter files and the manifests that belong to them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path

import numpy
from packaging.version import Version
from safetensors.numpy import save

from registry.formats.manifest import Manifest
from registry.formats.records import BaseKind, BaseRecord, FileRecord, TensorRecord
from registry.formats.references import parse_version, version_text
from registry.hubs.protocol import Hub
from registry.publishing.publish import Draft, Published, publish

NAME = "org/adapter"
CREATED = "2026-01-31T12:00:00Z"
MODULE = "base_model.model.model.layers.0.self_attn.q_proj"
CONFIG = {
    "peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["q_proj"], "base_model_name_or_path": "org/base",
}  # fmt: skip


def contents(seed: int = 0, width: int = 8) -> dict[str, bytes]:
    """The files of an adapter whose values follow from ``seed``."""
    random = numpy.random.default_rng(seed)
    tensors = {
        f"{MODULE}.lora_A.weight": random.standard_normal((2, width), dtype=numpy.float32),
        f"{MODULE}.lora_B.weight": random.standard_normal((width, 2), dtype=numpy.float32),
    }
    return {
        "adapter_config.json": json.dumps(CONFIG).encode(),
        "adapter_model.safetensors": save(tensors),
        "README.md": b"---\ntags:\n- lora-plugins\n---\n# Card\n",
    }


def draft(version: str, seed: int = 0, *, width: int = 8, created: str = CREATED, **more: bytes) -> Draft:
    """A release that is not published."""
    files = {**contents(seed, width), **{name.replace("_", "."): data for name, data in more.items()}}
    manifest = Manifest(
        version=version_text(parse_version(version)),
        base=BaseRecord("org/base", "b" * 40),
        architecture=BaseKind("llama", "LlamaForCausalLM", 96),
        config={"r": 2, "target_modules": ["q_proj"]},
        files={name: FileRecord(len(data), hashlib.sha256(data).hexdigest()) for name, data in files.items()},
        tensors={
            f"{MODULE}.lora_A.weight": TensorRecord("F32", (2, width)),
            f"{MODULE}.lora_B.weight": TensorRecord("F32", (width, 2)),
        },
        created=created,
    )
    return Draft(manifest, dict(files))


def release(hub: Hub, version: str, seed: int = 0, *, name: str = NAME, created: str = CREATED) -> Published:
    """Publish one."""

    def made(chosen: Version, before: Version | None) -> Draft:
        return draft(str(chosen), seed, created=created)

    return publish(hub, name, version if version in ("patch", "minor", "major") else parse_version(version), made)


def folder_of(path: Path) -> Mapping[str, bytes]:
    """All files of a folder with their content."""
    return {file.name: file.read_bytes() for file in path.iterdir()}

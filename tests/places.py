"""Helpers of the tests that pull from hubs of both kinds."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy
import pytest
from hubs import Place
from releases import MODULE, NAME, draft
from safetensors.numpy import save

from registry.formats.records import FileRecord, TensorRecord
from registry.formats.references import parse_version
from registry.publishing.publish import publish
from registry.pulling.cache import VARIABLE
from registry.pulling.fetch import Fetched
from registry.pulling.lockfile import Lock
from registry.pulling.pull import fetch_adapter

__all__ = ["fetch", "pair", "publish_weights", "snapshot", "use_own_folders"]

_DTYPES = {
    "float16": "F16", "float32": "F32", "float64": "F64", "int8": "I8", "int32": "I32", "int64": "I64", "bool": "BOOL",
}  # fmt: skip


def use_own_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Give a test a cache and a working directory of its own, and don't wait for the disk."""
    monkeypatch.setenv(VARIABLE, str(tmp_path / "cache"))
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    monkeypatch.setattr("registry.publishing.publish.PATIENCE", 0.2)
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)


def fetch(place: Place, reference: str = NAME, **options: Any) -> Fetched:
    """Pull from a place."""
    lock = Lock.choose(options.pop("lock", None), frozen=options.pop("frozen", False))
    arguments = {"hub": place.hub, "token": None, "offline": False, "cache_dir": None, **options}
    return fetch_adapter(reference, lock=lock, **arguments)


def pair(first: Any = None, second: Any = None, module: str = MODULE) -> dict[str, numpy.ndarray]:
    """The two halves of a LoRA module; ones, where nothing else is given."""
    halves = {"A": numpy.ones((2, 8), "f4") if first is None else first}
    halves["B"] = numpy.ones((8, 2), "f4") if second is None else second
    return {f"{module}.lora_{half}.weight": value for half, value in halves.items()}


def publish_weights(place: Place, tensors: Mapping[str, numpy.ndarray] | bytes, version: str = "1.0.0") -> None:
    """Publish weights with a manifest that fits them, as an attacker can: nobody looks at them before pull does."""
    honest = draft(version)
    content = tensors if isinstance(tensors, bytes) else save(dict(tensors))
    record = FileRecord(len(content), hashlib.sha256(content).hexdigest())
    manifest = replace(honest.manifest, files={**honest.manifest.files, "adapter_model.safetensors": record})
    if not isinstance(tensors, bytes):
        listed = {name: TensorRecord(_DTYPES[value.dtype.name], value.shape) for name, value in tensors.items()}
        manifest = replace(manifest, tensors=listed)
    spoilt = replace(honest, manifest=manifest, files={**honest.files, "adapter_model.safetensors": content})
    publish(place.hub, NAME, parse_version(version), lambda *_: spoilt)


def snapshot(folder: Path) -> list[str]:
    """Every file below a folder that has content."""
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file() and path.stat().st_size)

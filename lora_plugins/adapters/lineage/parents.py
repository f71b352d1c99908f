"""Describe the adapter that a run continues from, where it is loaded."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

from torch import nn

from lora_plugins.adapters.files import find_adapter_file
from lora_plugins.adapters.lineage.facts import NotKnown, explain
from lora_plugins.adapters.records import preparation_of
from lora_plugins.models.wrapping import base_of
from registry import MANIFEST_FILE, Reference, is_path

__all__ = ["describe_parent", "read_parent"]


def describe_parent(adapter: str | os.PathLike[str], folder: Path) -> dict[str, Any] | str:
    """Return name, version and hashes of an adapter, or the reason why they are not known.

    Args:
        adapter: How the user calls it: a folder or a reference.
        folder: Where it is loaded from. A reference is not resolved again, since it may move.
    """
    try:
        return _describe(adapter, folder)
    except Exception as error:
        return explain(error)


def _describe(adapter: str | os.PathLike[str], folder: Path) -> dict[str, Any] | str:
    file = find_adapter_file(folder, "default")
    if file is None:
        return "its folder has no weights"
    found: dict[str, Any] = {}
    if isinstance(adapter, str) and not is_path(adapter):
        found["name"] = Reference.parse(adapter).name
    with open(file, "rb") as weights:
        found["sha256"] = hashlib.file_digest(weights, "sha256").hexdigest()
    manifest = folder / MANIFEST_FILE
    if manifest.is_file():
        content = manifest.read_bytes()
        found |= {"version": json.loads(content).get("version"), "manifest": hashlib.sha256(content).hexdigest()}
    return found


def read_parent(model: nn.Module, *, trained: bool) -> dict[str, Any] | str:
    """Return which adapter a run continues from; ``"none"`` for a new one.

    Args:
        model: The model in the Trainer.
        trained: Whether it was trained before in this process.

    Raises:
        NotKnown: It is not known.
    """
    record = preparation_of(model) or preparation_of(base_of(model))
    if trained:
        raise NotKnown("the adapter was trained before in this process, and is in no file")
    if record is None:
        raise NotKnown("the model was not prepared by lora-plugins")
    if isinstance(record.parent, str) and record.parent != "none":
        raise NotKnown(record.parent)
    return record.parent

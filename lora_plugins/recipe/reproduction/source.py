"""Read the run that is to be had again: an adapter and its lineage."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from lora_plugins.adapters.files import ADAPTER_FILE
from lora_plugins.errors import ReproductionError
from registry import is_path, pull_adapter, read_lineage

__all__ = ["Original", "digest_adapter", "read_original"]


@dataclass(frozen=True)
class Original:
    """An adapter as it was trained first.

    Attributes:
        name: Reference or folder, for messages.
        folder: Folder of its files.
        lineage: What it was trained from.
        adapter: The pulled release, ``None`` for a folder.
    """

    name: str
    folder: Path
    lineage: Mapping[str, Any]
    adapter: Any = None

    def find_reason(self, field: str) -> str:
        """Return why a field of the lineage is missing."""
        reasons = self.lineage.get("not_recorded")
        known = reasons.get(field) if isinstance(reasons, Mapping) else None
        return str(known or "the release is older than this record")


def read_original(reference: str, hub: str | None = None) -> Original:
    """Read a release, an adapter's folder, or the output folder of a run.

    Raises:
        ReproductionError: The folder holds no adapter.
        RegistryError: The release cannot be pulled.
    """
    if not is_path(reference):
        adapter = pull_adapter(reference, hub=hub)
        return Original(str(adapter), Path(adapter.path), adapter.manifest.lineage, adapter)
    given = Path(os.path.expanduser(reference))
    folder = next((place for place in (given, given / "adapter") if (place / ADAPTER_FILE).is_file()), None)
    if folder is None:
        raise ReproductionError(
            f"{reference} holds no {ADAPTER_FILE}: give an adapter's folder, the output folder of a run that has "
            "finished, or org/name@version in the registry."
        )
    return Original(reference, folder, read_lineage(folder))


def digest_adapter(folder: Path) -> str:
    """Return the sha256 (hex) of an adapter's tensors: names, dtypes, shapes, values, in the order of the names.

    Raises:
        ReproductionError: Its file cannot be read.
    """
    try:
        tensors = load_file(folder / ADAPTER_FILE)
    except (OSError, SafetensorError) as error:
        raise ReproductionError(f"{folder / ADAPTER_FILE} cannot be read: {error}") from error
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].contiguous()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()

"""Read the run that is to be repeated: an adapter and its lineage."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from lora_plugins.adapters.files import ADAPTER_FILE
from lora_plugins.errors import ReproductionError
from registry import clean_lineage, expand_path, is_path, pull_adapter, read_lineage

__all__ = ["Original", "digest_adapter", "read_original"]

_OLDER = "the release is older than this record"


@dataclass(frozen=True)
class Original:
    """An adapter as it was trained first.

    Attributes:
        name: Reference or folder, for messages.
        folder: Folder of its files.
        lineage: What it was trained from, cleaned of names of places.
        adapter: The pulled release, ``None`` for a folder.
        raw: The lineage as the release has it, which anyone may have written.
    """

    name: str
    folder: Path
    lineage: Mapping[str, Any]
    adapter: Any = None
    raw: Mapping[str, Any] | None = None

    @property
    def recipe(self) -> Mapping[str, Any]:
        """The recipe as it was written."""
        found = (self.lineage if self.raw is None else self.raw).get("recipe")
        return found if isinstance(found, Mapping) else {}

    def find_reason(self, field: str) -> str:
        """Return why a field of the lineage is missing."""
        reasons = self.lineage.get("not_recorded")
        known = reasons.get(field) if isinstance(reasons, Mapping) else None
        return str(known or _OLDER)


def read_original(reference: str, hub: str | None = None) -> Original:
    """Read a release, an adapter's folder, or the output folder of a run.

    Raises:
        ReproductionError: The folder holds no adapter.
        RegistryError: The release cannot be pulled.
    """
    if not is_path(reference):
        adapter = pull_adapter(reference, hub=hub)
        raw = adapter.manifest.lineage
        return Original(str(adapter), Path(adapter.path), clean_lineage(raw, _OLDER), adapter, raw)
    given = expand_path(reference)
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

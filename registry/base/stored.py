"""An adapter on disk: configuration, tensors and manifest."""

from __future__ import annotations

import os
import stat
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from registry.checks.adapter_files import AdapterFiles
from registry.checks.table import enforce
from registry.errors import IntegrityError, InvalidAdapter, UnsafeFile
from registry.formats.adapter_config import MAX_CONFIG, AdapterConfig
from registry.formats.fields import COMMIT
from registry.formats.manifest import MANIFEST_FILE, MAX_MANIFEST, Manifest
from registry.formats.paths import ADAPTER_CONFIG, ADAPTER_WEIGHTS
from registry.formats.records import BaseRecord, TensorRecord
from registry.formats.references import expand_path
from registry.formats.tensors import vocabulary_of
from registry.formats.weights import read_file_header

if TYPE_CHECKING:
    import torch

__all__ = ["StoredAdapter"]


@dataclass(frozen=True)
class StoredAdapter:
    """An adapter as its files describe it.

    Attributes:
        title: Its name in messages.
        folder: Folder of its files.
        config: Its configuration.
        tensors: Dtype and shape of its tensors, by name.
        manifest: The manifest of its release; ``None`` for a plain adapter folder.
    """

    title: str
    folder: Path
    config: AdapterConfig
    tensors: Mapping[str, TensorRecord]
    manifest: Manifest | None = None

    @classmethod
    def read(cls, source: Any) -> StoredAdapter:
        """Read an adapter; a source with a ``manifest`` attribute is a pulled release, any other source is a folder.

        The values of a plain folder are checked here; those of a release were checked when it was pulled.

        Raises:
            InvalidAdapter: A file is missing, or the tensors are not those of a LoRA adapter.
            UnsafeFile: A file is not a regular file, or is malformed.
            InvalidManifest: The folder has a malformed manifest.
            IntegrityError: The folder has a manifest of another adapter.
        """
        folder = expand_path(source)
        config = AdapterConfig.parse(_read_regular(folder / ADAPTER_CONFIG, MAX_CONFIG), own=True)
        manifest: Manifest | None = getattr(source, "manifest", None)
        if manifest is not None:
            title = f"The adapter {source if manifest.unversioned else manifest.version}"
            return cls(title, folder, config, manifest.tensors, manifest)
        weights = folder / ADAPTER_WEIGHTS
        _require_regular(weights)
        header = read_file_header(weights)
        enforce(AdapterFiles(folder, given={"config": config, "header": header}), "load", ("header", "values"))
        if (folder / MANIFEST_FILE).exists():
            manifest = Manifest.parse(_read_regular(folder / MANIFEST_FILE, MAX_MANIFEST))
            if dict(manifest.tensors) != dict(header.tensors):
                raise IntegrityError(
                    f"{folder / MANIFEST_FILE} describes other tensors than those in {ADAPTER_WEIGHTS}: it belongs to "
                    "another adapter. Remove it, or pull the release again."
                )
        return cls(f"The adapter in {folder}", folder, config, header.tensors, manifest)

    @property
    def files(self) -> AdapterFiles:
        """The same files, as checks see them."""
        return AdapterFiles(self.folder, self.title, given={"config": self.config, "manifest": self.manifest})

    @property
    def base(self) -> BaseRecord:
        """The record of its base model: from the manifest, else from the configuration."""
        if self.manifest is not None:
            return self.manifest.base
        revision = self.config.fields.get("revision")
        commit = revision if isinstance(revision, str) and COMMIT.fullmatch(revision) else None
        return BaseRecord(self.config.base_id, commit)

    @property
    def class_name(self) -> str | None:
        """The class of the base model, if manifest or configuration name it."""
        recorded = self.manifest.architecture.class_name if self.manifest is not None else None
        return recorded or self.config.base_class

    @property
    def vocabulary(self) -> int | None:
        """The vocabulary size in training: from the tensors, else from the manifest."""
        return vocabulary_of(self.tensors) or (self.manifest.architecture.vocab_size if self.manifest else None)

    @property
    def carries_vocabulary(self) -> bool:
        """Whether the tensors hold the rows of a vocabulary, so that a base of another size can be resized to it."""
        return vocabulary_of(self.tensors) is not None

    def rows(self, name: str, count: int) -> torch.Tensor:
        """Read the first ``count`` rows of one of its tensors."""
        from safetensors import safe_open

        with safe_open(self.folder / ADAPTER_WEIGHTS, "pt") as file:
            found: torch.Tensor = file.get_slice(name)[:count]
        return found


def _require_regular(path: Path) -> None:
    try:
        status = os.stat(path)
    except FileNotFoundError:
        raise InvalidAdapter(
            f"{path.parent} has no {path.name}. An adapter folder holds {ADAPTER_CONFIG} and {ADAPTER_WEIGHTS}, as "
            "save_pretrained writes them."
        ) from None
    except OSError as error:
        raise UnsafeFile(f"{path} cannot be read: {error.strerror}") from None
    if not stat.S_ISREG(status.st_mode):
        raise UnsafeFile(f"{path} is not a regular file")


def _read_regular(path: Path, limit: int) -> bytes:
    """Return at most ``limit + 1`` bytes of a regular file; the parser refuses more than ``limit``."""
    _require_regular(path)
    try:
        with open(path, "rb") as file:
            return file.read(limit + 1)
    except OSError as error:
        raise UnsafeFile(f"{path} cannot be read: {error.strerror}") from None

"""The files of an adapter, each read once and when first asked for."""

from __future__ import annotations

import os
import stat
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from registry.errors import UnsafeFile
from registry.formats.adapter_config import MAX_CONFIG, AdapterConfig
from registry.formats.manifest import MANIFEST_FILE, MAX_MANIFEST, Manifest
from registry.formats.paths import ADAPTER_CONFIG, ADAPTER_WEIGHTS
from registry.formats.records import TensorRecord
from registry.formats.weights import Header, Values, read_open_header, scan_values

__all__ = ["AdapterFiles"]

_READ = ("config", "header", "names", "manifest")


@dataclass(frozen=True)
class AdapterFiles:
    """An adapter as checks see it. What is given is not read from the folder.

    Attributes:
        folder: Folder of the files.
        title: The adapter's name in messages.
        allow: Names of modules whose tensors may be large although they are not LoRA's.
        renames: New names of tensors, by their names in the file, under which checks see them.
        weights: The name of the safetensors file.
        base: The base model to compare with, in any form that `registry.check_contract` takes; ``None`` without one.
        given: What is known already, by the name of the property.
    """

    folder: Path
    title: str = "The adapter"
    allow: Sequence[str] = ()
    renames: Mapping[str, str] = field(default_factory=dict)
    weights: str = ADAPTER_WEIGHTS
    base: Any = None
    given: Mapping[str, Any] = field(default_factory=dict)

    @cached_property
    def names(self) -> tuple[str, ...]:
        """The names of all files, sorted."""
        found = self.given.get("names")
        return tuple(sorted(os.listdir(self.folder) if found is None else found))

    @cached_property
    def config(self) -> AdapterConfig:
        """The configuration.

        Raises:
            UnsafeFile: It is missing or malformed.
        """
        found: AdapterConfig | None = self.given.get("config")
        return found or AdapterConfig.parse(self.read(ADAPTER_CONFIG, MAX_CONFIG + 1), own=True)

    @cached_property
    def header(self) -> Header:
        """The header of the weights, with the names that are in the file.

        Raises:
            UnsafeFile: It is missing, or not a safetensors file.
        """
        found: Header | None = self.given.get("header")
        if found is not None:
            return found
        with open(_require_regular(self.folder / self.weights), "rb") as file:
            return read_open_header(file, self.weights, empty=bool(self.given.get("empty")))

    @cached_property
    def tensors(self) -> Mapping[str, TensorRecord]:
        """Dtype and shape of the tensors, by name."""
        return {self.renames.get(name, name): record for name, record in self.header.tensors.items()}

    @cached_property
    def values(self) -> Values:
        """What reading all values of the weights showed."""
        found: Values | None = self.given.get("values")
        seen = found or scan_values(self.folder / self.weights, self.header)
        return Values(
            frozenset(self.renames.get(name, name) for name in seen.zeros),
            {self.renames.get(name, name): problem for name, problem in seen.problems.items()},
        )

    @cached_property
    def manifest(self) -> Manifest | None:
        """The manifest of a release; ``None`` for other adapters.

        Raises:
            InvalidManifest: It is malformed.
        """
        if "manifest" in self.given or MANIFEST_FILE not in self.names:
            return self.given.get("manifest")
        return Manifest.parse(self.read(MANIFEST_FILE, MAX_MANIFEST + 1))

    def read(self, name: str, limit: int) -> bytes:
        """Return at most ``limit`` bytes of a regular file.

        Raises:
            UnsafeFile: It is missing, or not a regular file.
        """
        with open(_require_regular(self.folder / name), "rb") as file:
            return file.read(limit)

    def rename(self, renames: Mapping[str, str]) -> AdapterFiles:
        """Return the same files with tensors under further new names."""
        known = {name: renames.get(seen, seen) for name, seen in self.renames.items()}
        read: dict[str, Any] = {name: vars(self)[name] for name in _READ if name in vars(self)}
        return replace(self, renames={**renames, **known}, given={**self.given, **read})


def _require_regular(path: Path) -> Path:
    try:
        status = os.stat(path)
    except OSError as error:
        raise UnsafeFile(f"{path} cannot be read: {error.strerror}") from None
    if not stat.S_ISREG(status.st_mode):
        raise UnsafeFile(f"{path} is not a regular file")
    return path

"""Examine the files of a release before they enter the cache."""

from __future__ import annotations

from math import prod
from pathlib import Path

from registry.checks.adapter_files import AdapterFiles
from registry.checks.table import PARTS, enforce
from registry.disk.files import read_small
from registry.errors import IntegrityError, TooLarge, UnsafeFile
from registry.formats.adapter_config import MAX_CONFIG, AdapterConfig
from registry.formats.manifest import Manifest
from registry.formats.paths import ADAPTER_CONFIG, ADAPTER_WEIGHTS, max_size
from registry.formats.weights import MAX_HEADER, bits_of, read_file_header

__all__ = ["check_content", "check_sizes"]


def check_sizes(manifest: Manifest) -> None:
    """Check that the sizes in a manifest are plausible, before a file is downloaded.

    Raises:
        UnsafeFile: The size of the weights does not match their tensors.
        TooLarge: A file is larger than allowed for its kind.
    """
    for name, record in manifest.files.items():
        if record.size > max_size(name):
            raise TooLarge(f"{name} has {record.size:,} bytes, and may have {max_size(name):,}")
    data = sum(prod(tensor.shape) * bits_of(tensor.dtype) for tensor in manifest.tensors.values()) // 8
    size = manifest.files[ADAPTER_WEIGHTS].size
    if not data + 8 <= size <= data + 8 + MAX_HEADER:
        raise UnsafeFile(f"{ADAPTER_WEIGHTS} has {size:,} bytes, and the tensors of its manifest take {data:,}")


def check_content(folder: Path, manifest: Manifest) -> tuple[str, ...]:
    """Check the files that libraries will read: configuration, every value of the weights, tokenizer configuration.

    Returns:
        Warnings about harmless but useless content, with the remedy.

    Raises:
        UnsafeFile: A file is malicious or malformed.
        InvalidAdapter: The weights are unusable.
        IntegrityError: Tensors or configuration do not match the manifest.
    """
    config = AdapterConfig.parse(read_small(folder / ADAPTER_CONFIG, MAX_CONFIG + 1))
    header = read_file_header(folder / ADAPTER_WEIGHTS)
    if dict(header.tensors) != dict(manifest.tensors):
        raise IntegrityError(f"The tensors in {ADAPTER_WEIGHTS} are not those of the manifest")
    known = {"config": config, "header": header, "manifest": manifest, "names": tuple(manifest.files)}
    return tuple(enforce(AdapterFiles(folder, given=known), "pull", PARTS))

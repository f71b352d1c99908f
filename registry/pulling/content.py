"""Examine the files of a release before they enter the cache."""

from __future__ import annotations

from math import prod
from pathlib import Path

from registry.disk.files import read_small
from registry.errors import IntegrityError, TooLarge, UnsafeFile
from registry.formats.adapter_config import MAX_CONFIG, AdapterConfig
from registry.formats.agreement import check_agreement
from registry.formats.manifest import Manifest
from registry.formats.paths import ADAPTER_CONFIG, ADAPTER_WEIGHTS, max_size
from registry.formats.tensors import check_weights
from registry.formats.tokenizer_files import MAX_TOKENIZER_CONFIG, TOKENIZER_CONFIG, check_tokenizer_config
from registry.formats.weights import MAX_HEADER, bits_of, read_file_header

__all__ = ["check_content", "check_sizes"]


def check_sizes(manifest: Manifest) -> None:
    """Compare the sizes in a manifest with what its files can have, before one is downloaded.

    Raises:
        UnsafeFile: The weights are not as large as their tensors.
        TooLarge: Another file is larger than any of its kind.
    """
    for name, record in manifest.files.items():
        if record.size > max_size(name):
            raise TooLarge(f"{name} has {record.size:,} bytes, and may have {max_size(name):,}")
    data = sum(prod(tensor.shape) * bits_of(tensor.dtype) for tensor in manifest.tensors.values()) // 8
    size = manifest.files[ADAPTER_WEIGHTS].size
    if not data + 8 <= size <= data + 8 + MAX_HEADER:
        raise UnsafeFile(f"{ADAPTER_WEIGHTS} has {size:,} bytes, and the tensors of its manifest take {data:,}")


def check_content(folder: Path, manifest: Manifest) -> tuple[str, ...]:
    """Check the two files that libraries will read, every value of them.

    Returns:
        Warnings: what is not harmful and no use either, with the cure.

    Raises:
        UnsafeFile: Something would do harm.
        InvalidAdapter: The weights are of no use.
        IntegrityError: The tensors are not those of the manifest, or the configuration is not.
    """
    config = AdapterConfig.parse(read_small(folder / ADAPTER_CONFIG, MAX_CONFIG + 1))
    header = read_file_header(folder / ADAPTER_WEIGHTS)
    if dict(header.tensors) != dict(manifest.tensors):
        raise IntegrityError(f"The tensors in {ADAPTER_WEIGHTS} are not those of the manifest")
    check_agreement(manifest, config)
    if TOKENIZER_CONFIG in manifest.files:
        check_tokenizer_config(read_small(folder / TOKENIZER_CONFIG, MAX_TOKENIZER_CONFIG + 1))
    return check_weights(folder / ADAPTER_WEIGHTS, config).warnings

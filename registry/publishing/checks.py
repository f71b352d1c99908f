"""Check an adapter's files for a push, before anything is uploaded."""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

from registry.checks.adapter_files import AdapterFiles
from registry.checks.folder import CHECKS as FOLDER_CHECKS
from registry.checks.table import PARTS, enforce
from registry.checks.tensors import describe_large
from registry.errors import AdapterWarning, InvalidAdapter, TooLarge
from registry.formats.fields import is_finite
from registry.formats.records import FileRecord

__all__ = [
    "check_for_push",
    "check_metrics",
    "check_size",
    "check_tokenizer",
    "record_file",
    "warn_of_rest",
]

_CHUNK = 4 * 1024 * 1024


def check_for_push(files: AdapterFiles) -> None:
    """Run every check of a push on an adapter's configuration and weights.

    Raises:
        InvalidAdapter: They are unusable, or without effect.
        UnsafeFile: The file is malformed.
        TooLarge: Tensors other than LoRA's are large.
    """
    enforce(files, "push", PARTS)


def check_size(sizes: Mapping[str, int], allow: Sequence[str], total: int) -> None:
    """Refuse large tensors other than LoRA's.

    Args:
        sizes: Bytes of these tensors, by name.
        allow: Names of modules whose tensors may be large.
        total: Bytes of all tensors.

    Raises:
        TooLarge: Those not allowed have more than 32 MB in total.
    """
    reason = describe_large(sizes, allow, total)
    if reason is not None:
        raise TooLarge(reason)


def check_tokenizer(folder: Path, names: Collection[str]) -> None:
    """Refuse a tokenizer that makes transformers run code.

    Raises:
        UnsafeFile: It has ``auto_map`` or ``trust_remote_code``, or is malformed.
    """
    enforce(AdapterFiles(folder, given={"names": tuple(names)}), "push", ("files",), checks=FOLDER_CHECKS)


def warn_of_rest(source: Path) -> None:
    """Warn of files with tensors beside an adapter that are not published with it."""
    for message in enforce(AdapterFiles(source), "folder", ("files",), checks=FOLDER_CHECKS):
        warnings.warn(message, AdapterWarning, stacklevel=6)


def check_metrics(metrics: Mapping[str, float]) -> dict[str, float]:
    """Return metrics as floats.

    Raises:
        InvalidAdapter: One is not a finite number.
    """
    for name, value in metrics.items():
        if not isinstance(name, str) or not is_finite(value):
            raise InvalidAdapter(f"The metric {name!r} is {value!r}; metrics must be finite numbers by name")
    return {name: float(value) for name, value in metrics.items()}


def record_file(path: Path) -> FileRecord:
    """Return the size and the hash of a file."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
    return FileRecord(path.stat().st_size, digest.hexdigest())

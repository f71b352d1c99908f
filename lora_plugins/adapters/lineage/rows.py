"""Describe a data set: id and revision, hash, number of rows, columns."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from typing import Any

import pyarrow
from datasets import Dataset, IterableDataset

__all__ = ["describe_rows", "hash_rows"]

#: Larger data sets are not hashed: at 0.4 GB/s, their hash would hold up the training for longer than 20 s.
_MOST_BYTES = 8 << 30
_ROWS_AT_ONCE = 1000
#: How ``datasets`` notes a file of the Hub that it has loaded.
_FROM_HUB = re.compile(r"hf://datasets/(?P<id>[\w.-]+(?:/[\w.-]+)?)@(?P<revision>[0-9a-f]{40})/")


def describe_rows(data: Any) -> tuple[dict[str, Any], dict[str, str]]:
    """Return what is known of the rows that a run reads, and why the rest is not.

    Args:
        data: A data set of ``datasets``, or anything else that a Trainer takes.

    Returns:
        ``id`` and ``revision`` for a data set of the Hub, ``sha256`` of the rows, their number, the names of the
        columns; and for each that is missing the reason.
    """
    if isinstance(data, Mapping):
        parts = {str(name): describe_rows(part) for name, part in data.items()}
        missing = {f"{name}.{key}": why for name, (_, found) in parts.items() for key, why in found.items()}
        return {name: facts for name, (facts, _) in parts.items()}, missing
    kind = type(data).__name__
    facts: dict[str, Any] = {}
    missing = {}
    source = _find_source(data)
    facts |= source
    if not source:
        missing["id"] = "the data were not loaded from the Hub"
    names = getattr(data, "column_names", None)
    if isinstance(names, list):
        facts["columns"] = sorted(map(str, names))
    else:
        missing["columns"] = f"a {kind} does not name its columns"
    if isinstance(data, Dataset):
        facts["rows"] = len(data)
        size = data.data.nbytes
        if size <= _MOST_BYTES:
            facts["sha256"] = hash_rows(data)
        else:
            missing["sha256"] = f"the data have {size:,} bytes; above {_MOST_BYTES:,} they are not hashed"
        return facts, missing
    if hasattr(data, "__len__"):
        facts["rows"] = len(data)
    else:
        missing["rows"] = "the data are streamed"
    streamed = isinstance(data, IterableDataset) or "rows" in missing
    missing["sha256"] = "the data are streamed" if streamed else f"reading the rows of a {kind} may have side effects"
    return facts, missing


def hash_rows(data: Dataset) -> str:
    """Return the sha256 (hex) of the rows in their order: column names, types and values.

    It depends neither on where the data are stored nor on how they are split into chunks there.
    """
    digest = hashlib.sha256()
    columns = sorted(data.column_names)
    plain = data.with_format("arrow")
    for start in range(0, len(data), _ROWS_AT_ONCE):
        part: pyarrow.Table = plain[start : start + _ROWS_AT_ONCE]
        part = part.select(columns).replace_schema_metadata(None)
        if start == 0:
            types = [f"{field.name}: {field.type}" for field in part.schema]
            digest.update("\n".join(types).encode())
        # A copy has no bits of neighboring rows in its buffers, as a slice has.
        copied = part.take(pyarrow.array(range(len(part)))).combine_chunks()
        for batch in copied.to_batches():
            digest.update(batch.serialize())
    return digest.hexdigest()


def _find_source(data: Any) -> dict[str, str]:
    """Return id and revision of the Hub's data set that all files of these data are from."""
    checksums = getattr(getattr(data, "info", None), "download_checksums", None) or {}
    found = {match.groups() if (match := _FROM_HUB.match(str(url))) else None for url in checksums}
    if len(found) != 1 or None in found:
        return {}
    name, revision = found.pop() or ("", "")
    return {"id": name, "revision": revision}

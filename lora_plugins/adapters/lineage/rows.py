"""Describe a data set: id and revision, hash, number of rows, columns."""

from __future__ import annotations

import hashlib
import math
import re
import time
from collections.abc import Mapping
from functools import partial
from typing import Any

import pyarrow
from datasets import Dataset
from torch.utils.data import IterableDataset as TorchStream
from transformers.trainer_utils import has_length

from lora_plugins.adapters.lineage.facts import Facts, NotKnown

__all__ = ["describe_rows", "hash_rows"]

#: Larger data sets are not hashed: at 0.4 GB/s, their hash would hold up the training for longer than 20 s.
_MOST_BYTES = 8 << 30
#: The same for rows that are read one by one, in another order than they are stored.
_MOST_SHUFFLED_BYTES = 1 << 30
#: The other processes of a run wait meanwhile.
_MOST_SECONDS = 60.0
_ROWS_AT_ONCE = 1000
#: How ``datasets`` notes a file of the Hub that it has loaded.
_FROM_HUB = re.compile(r"hf://datasets/(?P<id>[\w.-]+(?:/[\w.-]+)?)@(?P<revision>[0-9a-f]{40})/")


def describe_rows(data: Any) -> tuple[dict[str, Any], dict[str, str]]:
    """Return what is known of the rows that a run reads, and why the rest is not.

    Args:
        data: A data set of ``datasets``, or anything else that a Trainer takes; several by name have a description
            each, and those in one of them are called ``name.inner``.

    Returns:
        ``id`` and ``revision`` for a data set of the Hub, ``sha256`` of the rows, their number, the names of the
        columns; and for each that is missing the reason.
    """
    if not isinstance(data, Mapping):
        return _describe_part(data)
    found: dict[str, Any] = {}
    missing: dict[str, str] = {}
    for name, part in data.items():
        facts, reasons = describe_rows(part)
        inner = {f"{name}.{key}": one for key, one in facts.items()}
        found |= inner if isinstance(part, Mapping) else {str(name): facts}
        missing |= {f"{name}.{key}": why for key, why in reasons.items()}
    return found, missing


def _describe_part(data: Any) -> tuple[dict[str, Any], dict[str, str]]:
    facts = Facts()
    for name, read in (("id", _find_source), ("columns", _list_columns), ("rows", _count), ("sha256", _hash)):
        facts.read(name, partial(read, data))
    source = facts.found.pop("id", {})
    return {**source, **facts.found}, facts.reasons


def _list_columns(data: Any) -> list[str]:
    names = getattr(data, "column_names", None)
    if not isinstance(names, list):
        raise NotKnown(f"a {type(data).__name__} does not name its columns")
    return sorted(map(str, names))


def _count(data: Any) -> int:
    if not has_length(data):
        raise NotKnown("the data are streamed")
    return len(data)


def _hash(data: Any) -> str:
    if not isinstance(data, Dataset):
        streamed = isinstance(data, TorchStream) or not has_length(data)
        kind = type(data).__name__
        raise NotKnown("the data are streamed" if streamed else f"reading the rows of a {kind} may have side effects")
    whole = data.data.nbytes
    # A mapping of indices makes each row a read of its own; the table below it is that of all rows.
    mapped = getattr(data, "_indices", None) is not None
    size = whole * len(data) // max(1, data.data.num_rows) if mapped else whole
    most, what = (_MOST_SHUFFLED_BYTES, "are shuffled or selected and ") if mapped else (_MOST_BYTES, "")
    if size > most:
        raise NotKnown(f"the data {what}have {size:,} bytes; above {most:,} they are not hashed")
    try:
        return hash_rows(data, seconds=_MOST_SECONDS)
    except TimeoutError:
        raise NotKnown(f"reading the rows takes longer than {_MOST_SECONDS:.0f} s") from None


def hash_rows(data: Dataset, *, seconds: float = math.inf) -> str:
    """Return the sha256 (hex) of the rows in their order: column names, types and values.

    It depends neither on where the data are stored nor on how they are split into chunks there.

    Args:
        data: The rows.
        seconds: Time that this may take.

    Raises:
        TimeoutError: It takes longer.
    """
    end = time.monotonic() + seconds
    digest = hashlib.sha256()
    columns = sorted(data.column_names)
    plain = data.with_format("arrow")
    for start in range(0, len(data), _ROWS_AT_ONCE):
        if time.monotonic() > end:
            raise TimeoutError(f"Reading the rows takes longer than {seconds} s")
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
        raise NotKnown("the data were not loaded from the Hub")
    name, revision = found.pop() or ("", "")
    return {"id": name, "revision": revision}

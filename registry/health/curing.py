"""Write a cured copy of an adapter."""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

from registry.checks.adapter_files import AdapterFiles
from registry.checks.record import Changes
from registry.errors import InvalidAdapter
from registry.formats.paths import ADAPTER_CONFIG, ADAPTER_WEIGHTS, CARD, TOKENIZER_FILES

__all__ = ["join_changes", "write_cured"]


def join_changes(parts: Iterable[Changes]) -> Changes:
    """Return changes that have the effect of several, one after the other."""
    joined = Changes()
    for part in parts:
        renames = {old: part.renames.get(new, new) for old, new in joined.renames.items()}
        joined = Changes(
            {**part.renames, **renames},
            (*joined.drop, *part.drop),
            (*joined.single, *part.single),
            {**joined.fields, **part.fields},
        )
    return joined


def write_cured(files: AdapterFiles, changes: Changes, target: Path) -> None:
    """Write an adapter with changes into a new folder: configuration, weights, tokenizer and card.

    Names in ``changes.drop`` and ``changes.single`` are those after the renames. Not copied are a manifest, which
    would no longer describe the adapter, and everything that PEFT does not load.

    Args:
        files: The adapter.
        changes: What to change.
        target: A folder that does not exist, or is empty.

    Raises:
        InvalidAdapter: The folder exists and is not empty, or a configuration or weights that cannot be read are to be
            copied.
    """
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise InvalidAdapter(f"{target} exists and is not an empty folder: give a new one for the cured copy")
    target.mkdir(parents=True, exist_ok=True)
    fields = {**files.config.fields, **changes.fields}
    (target / ADAPTER_CONFIG).write_text(json.dumps(fields, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    _write_weights(files, changes, target / ADAPTER_WEIGHTS)
    for name in sorted({*TOKENIZER_FILES, CARD} & set(files.names)):
        if (files.folder / name).is_file():
            (target / name).write_bytes(files.read(name, os.stat(files.folder / name).st_size))


def _write_weights(files: AdapterFiles, changes: Changes, path: Path) -> None:
    """Write the tensors in the order of the file, one at a time, with a header of their new names and dtypes."""
    header, entries, position = replace(files, renames={}).header, {}, 0
    kept: list[tuple[int, int, bool]] = []
    for name, (begin, end) in sorted(header.offsets.items(), key=lambda item: item[1]):
        record, new = header.tensors[name], changes.renames.get(name, name)
        if new in changes.drop:
            continue
        halved = new in changes.single and record.dtype == "F64"
        size = (end - begin) // 2 if halved else end - begin
        dtype = "F32" if halved else record.dtype
        entries[new] = {"dtype": dtype, "shape": record.shape, "data_offsets": [position, position + size]}
        kept.append((begin, end, halved))
        position += size
    text = json.dumps({"__metadata__": {"format": "pt", **header.metadata}, **entries}).encode()
    # Readers map the file into memory: the data begin at a multiple of 8 bytes.
    text += b" " * (-len(text) % 8)
    with open(files.folder / files.weights, "rb") as source, open(path, "xb") as target:
        target.write(len(text).to_bytes(8, "little") + text)
        for begin, end, halved in kept:
            source.seek(begin)
            data = source.read(end - begin)
            target.write(_halve(data) if halved else data)


def _halve(data: bytes) -> bytes:
    """Return float64 values as float32."""
    count = len(data) // 8
    return struct.pack(f"<{count}f", *struct.unpack(f"<{count}d", data))

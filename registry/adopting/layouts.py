"""Names of tensors in older layouts, and how PEFT writes them today."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from registry.checks.names import (
    add_prefix,
    collapse_prefix,
    remove_adapter_name,
    spell_down_up,
    spell_parameter,
)
from registry.errors import InvalidAdapter
from registry.formats.tensors import PREFIX
from registry.formats.weights import read_file_header

__all__ = ["Layout", "Renames", "find_renames", "rewrite"]

#: The base was wrapped for several processes before it got adapters.
_INNER = f"{PREFIX}module."
_CHUNK = 4 * 1024 * 1024
_SAVED = re.compile(r"\.modules_to_save\.(?:(?!weight$|bias$)[A-Za-z_]\w*\.)?")
#: The base's own copy of a module that an adapter replaces.
_ORIGINAL = re.compile(r"\.original_module\.")


@dataclass(frozen=True)
class Layout:
    """One way in which names differ from what PEFT writes.

    Attributes:
        title: Where it comes from, for the list that is shown.
        change: Returns the name as PEFT writes it; other names unchanged.
    """

    title: str
    change: Callable[[str], str]


def _remove(part: str) -> Callable[[str], str]:
    return lambda name: name.replace(part, "")


#: In the order in which they are applied: wrappers first, since they hide what is behind them.
LAYOUTS = (
    Layout("saved from a compiled model", _remove("_orig_mod.")),
    Layout("saved from an FSDP wrapper", _remove("_fsdp_wrapped_module.")),
    Layout("saved under activation checkpointing", _remove("_checkpoint_wrapped_module.")),
    Layout("saved from a DistributedDataParallel wrapper", lambda name: name.removeprefix("module.")),
    Layout("with the adapter's name in it", remove_adapter_name),
    Layout("as loralib names them", spell_parameter),
    Layout("with down and up for A and B", spell_down_up),
    Layout("with PEFT's wrapper of saved modules in it", lambda name: _SAVED.sub(".", name)),
    Layout("with the prefix twice", collapse_prefix),
    Layout(f"without the prefix {PREFIX}", add_prefix),
)


@dataclass(frozen=True)
class Renames:
    """What has to change so that PEFT finds every tensor.

    Attributes:
        renamed: New names by the old ones; names that stay are left out.
        dropped: Copies of the base's own tensors, which are not part of the adapter.
        reasons: The layouts that were found.
    """

    renamed: Mapping[str, str] = field(default_factory=dict)
    dropped: tuple[str, ...] = ()
    reasons: tuple[str, ...] = ()

    def __bool__(self) -> bool:
        return bool(self.renamed or self.dropped)


def find_renames(names: Collection[str]) -> Renames:
    """Find the names that PEFT would not find, and their names as it writes them today.

    Raises:
        InvalidAdapter: Two tensors would get the same name.
    """
    reasons: dict[str, None] = {}
    kept = [name for name in names if not _ORIGINAL.search(name)]
    now = {name: _write_as_peft(name, reasons) for name in kept}
    if now and all(new.startswith(_INNER) for new in now.values()):
        now = {name: PREFIX + new.removeprefix(_INNER) for name, new in now.items()}
        reasons["saved from a wrapper for several processes, inside the adapter"] = None
    taken: dict[str, str] = {}
    for name, new in now.items():
        if taken.setdefault(new, name) != name:
            raise InvalidAdapter(
                f"The tensors {taken[new]} and {name} are both {new} as PEFT names them: the file holds several "
                "adapters. Save each on its own with save_pretrained"
            )
    renamed = {name: new for name, new in now.items() if new != name}
    dropped = tuple(name for name in names if _ORIGINAL.search(name))
    return Renames(renamed, dropped, tuple(reasons))


def _write_as_peft(name: str, reasons: dict[str, None]) -> str:
    """Return a name as PEFT writes it, and note the layouts that it had."""
    for layout in LAYOUTS:
        changed = layout.change(name)
        reasons.update({layout.title: None} if changed != name else {})
        name = changed
    return name


def rewrite(source: Path, target: Path, renames: Renames) -> None:
    """Write a safetensors file with its tensors renamed; their bytes are copied as they are.

    Raises:
        UnsafeFile: The source is not a safetensors file.
        InvalidAdapter: No tensor is left.
    """
    header = read_file_header(source)
    kept = [name for name in sorted(header.offsets, key=lambda n: header.offsets[n]) if name not in renames.dropped]
    if not kept:
        raise InvalidAdapter("The adapter is empty: its file holds copies of the base's own tensors only")
    entries: dict[str, object] = {"__metadata__": {"format": "pt"}}
    position = 0
    for name in kept:
        begin, end = header.offsets[name]
        record = header.tensors[name]
        entries[renames.renamed.get(name, name)] = {
            "dtype": record.dtype,
            "shape": list(record.shape),
            "data_offsets": [position, position + end - begin],
        }
        position += end - begin
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with open(source, "rb") as data, open(target, "xb") as copy:
        copy.write(len(text).to_bytes(8, "little") + text)
        for name in kept:
            _copy_range(data, copy, *header.offsets[name])


def _copy_range(source: object, target: object, begin: int, end: int) -> None:
    source.seek(begin)  # type: ignore[attr-defined]
    while begin < end:
        chunk = source.read(min(_CHUNK, end - begin))  # type: ignore[attr-defined]
        if not chunk:
            raise InvalidAdapter("The file of the weights became shorter while it was read")
        target.write(chunk)  # type: ignore[attr-defined]
        begin += len(chunk)

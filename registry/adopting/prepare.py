"""Bring an adapter into the form that PEFT writes today."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from registry.adopting.cards import LICENCES, MAX_CARD, Original, read_original
from registry.adopting.layouts import Renames, find_renames, rewrite
from registry.adopting.pickles import convert
from registry.adopting.sources import Source
from registry.checks.folder import list_rest
from registry.disk.files import read_small
from registry.errors import InvalidAdapter, RegistryError, UnsafeFile
from registry.formats.adapter_config import MAX_CONFIG, AdapterConfig
from registry.formats.paths import ADAPTER_CONFIG, ADAPTER_WEIGHTS, CARD, TOKENIZER_FILES
from registry.formats.strict_json import JsonRefused, canonical, parse
from registry.formats.weights import read_file_header
from registry.publishing.checks import record_file
from registry.publishing.source import find_base_folder

__all__ = ["Prepared", "prepare"]

_STATE = "trainer_state.json"
_MAX_STATE = 64 * 1024 * 1024
_RAW = "adapter_model.raw"


@dataclass(frozen=True)
class Prepared:
    """An adapter as it will be published.

    Attributes:
        source: Where it is from.
        folder: The private folder that holds it.
        renames: The tensors that were renamed or left out.
        original: Licence and card of the original.
        weights_sha256: sha256 of the original's weights.
        changes: What was changed, one clause each.
        rest: Files with tensors that stay behind.
    """

    source: Source
    folder: Path
    renames: Renames
    original: Original
    weights_sha256: str
    changes: tuple[str, ...] = ()
    rest: tuple[str, ...] = field(default=())

    def facts(self) -> dict[str, Any]:
        """Return the facts for the manifest."""
        facts: dict[str, Any] = {**self.source.origin, "weights_sha256": self.weights_sha256}
        facts |= {"license": self.original.license} if self.original.license else {}
        facts |= {"changes": list(self.changes)} if self.changes else {}
        return {"adopted": facts}


def prepare(source: Source, folder: Path, *, from_pickle: bool) -> Prepared:
    """Copy an adapter into a private folder, and rewrite what PEFT would not load.

    Raises:
        InvalidAdapter: It has no configuration or no weights, or its tensors cannot be renamed.
        UnsafeFile: A file is malformed or malicious, or the weights are a pickle and ``from_pickle`` is not set.
        IntegrityError: A file is not the one that its commit names.
    """
    _require_files(source, from_pickle=from_pickle)
    pickle = source.pickle
    weights = pickle or ADAPTER_WEIGHTS
    for name in (ADAPTER_CONFIG, *sorted(TOKENIZER_FILES & set(source.files))):
        source.copy(name, folder / name)
    if source.files.get(_STATE, _MAX_STATE + 1) <= _MAX_STATE:
        source.copy(_STATE, folder / _STATE)
    changes = _rewrite_config(source, folder / ADAPTER_CONFIG)
    # copy_file examines a file of the final name, which a pickle does not have.
    source.copy(weights, folder / weights)
    digest = record_file(folder / weights).sha256
    if pickle is not None:
        convert(folder / pickle, folder / ADAPTER_WEIGHTS, f"{pickle} of {source.title}")
        (folder / pickle).unlink()
        changes.append(f"weights converted from the pickle {pickle}")
    renames = _rename(folder / ADAPTER_WEIGHTS, source.title)
    changes += [f"names of tensors {reason}" for reason in renames.reasons]
    changes += [f"{len(renames.dropped)} copies of the base's own tensors left out"] if renames.dropped else []
    rest = [name for name in list_rest(sorted(source.files)) if not name.startswith("adapter_model.")]
    return Prepared(source, folder, renames, _read_original(source, folder), digest, tuple(changes), tuple(rest))


def _require_files(source: Source, *, from_pickle: bool) -> None:
    if ADAPTER_CONFIG not in source.files:
        raise InvalidAdapter(
            f"{source.title} has no {ADAPTER_CONFIG}, without which base, rank and scaling are not known. Write the "
            "configuration it was trained with (LoraConfig(…).save_pretrained(folder)) beside the weights"
        )
    if source.pickle is not None and not from_pickle:
        raise UnsafeFile(
            f"{source.title} has its weights in {source.pickle}, a pickle, which runs code where it is read. "
            "from_pickle=True (--from-pickle) converts it in a process of its own that builds tensors only"
        )
    if source.pickle is None and ADAPTER_WEIGHTS not in source.files:
        raise InvalidAdapter(f"{source.title} has {ADAPTER_CONFIG} and no {ADAPTER_WEIGHTS}")


def _rewrite_config(source: Source, file: Path) -> list[str]:
    """Leave out what the configuration does not need and a release must not have; return what was changed."""
    data, changes = read_small(file, MAX_CONFIG + 1), []
    try:
        values = parse(data, MAX_CONFIG)
    except JsonRefused as reason:
        raise UnsafeFile(f"{source.title}: {ADAPTER_CONFIG} cannot be used: {reason}") from None
    try:
        config = AdapterConfig.parse(data, own=True)
    except UnsafeFile as error:
        raise UnsafeFile(f"{source.title}: {error}") from None
    fields = dict(config.fields)
    if fields != values:
        changes.append("auto_mapping to a class of the author's own left out")
    meant = find_base_folder(source.path, config.base_id) if source.path is not None else None
    if meant is not None:
        fields["base_model_name_or_path"] = str(meant)
    if fields != values:
        os.chmod(file, 0o600)
        file.write_bytes(canonical(fields))
    return changes


def _rename(file: Path, title: str) -> Renames:
    try:
        renames = find_renames(read_file_header(file).tensors)
        if renames:
            raw = file.with_name(_RAW)
            os.replace(file, raw)
            rewrite(raw, file, renames)
            raw.unlink()
    except RegistryError as error:
        raise type(error)(f"{title}: {error}") from None
    return renames


def _read_original(source: Source, folder: Path) -> Original:
    """Read the card and the licences through copies, which are deleted: a release has a card of its own."""
    names: Sequence[str] = [name for name in (CARD, *LICENCES) if source.files.get(name, MAX_CARD + 1) <= MAX_CARD]
    texts: Mapping[str, bytes] = {name: _read_text(source, name, folder) for name in names}
    return read_original(texts.get(CARD), {name: data for name, data in texts.items() if name != CARD})


def _read_text(source: Source, name: str, folder: Path) -> bytes:
    place = folder / f"{name}.original"
    source.copy(name, place)
    data = read_small(place, MAX_CARD)
    place.unlink()
    return data

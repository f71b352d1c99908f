"""Unversioned adapters: what a commit holds that nobody published.

Such an adapter has no manifest, so one is made from what the commit holds. Its version, ``0+g<commit>``, cannot be
published. The same commit always gives the same manifest, so its digest shows whether a hub serves other bytes later.
"""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import BinaryIO, cast

from registry.checks.adapter_files import AdapterFiles
from registry.checks.table import enforce
from registry.errors import IntegrityError, InvalidAdapter, InvalidReference, NotAdapter, TooLarge, UnsafeFile
from registry.formats.adapter_config import MAX_CONFIG, AdapterConfig
from registry.formats.fields import COMMIT, SHA256
from registry.formats.manifest import BASE_ID, Manifest
from registry.formats.paths import ADAPTER_CONFIG, ADAPTER_WEIGHTS, TOKENIZER_FILES, max_size
from registry.formats.records import BaseKind, BaseRecord, FileRecord
from registry.formats.references import check_folder, version_of_commit
from registry.formats.strict_json import shown
from registry.formats.tensors import holds_vocabulary, labels_of
from registry.formats.weights import Header, read_header
from registry.hubs.protocol import Hub

__all__ = [
    "PICKLES",
    "PlainAdapter",
    "download_file",
    "explain_found",
    "find_adapters",
    "make_manifest",
    "read_remote_header",
]

#: Weights in pickles, as older PEFT releases and Trainers save them.
PICKLES = ("adapter_model.bin", "adapter_model.pt", "adapter_model.pth")
#: Weights of other libraries, with what they are.
_OTHERS = {
    "adapters.safetensors": "an adapter of MLX",
    "pytorch_lora_weights.safetensors": "an adapter of diffusers",
}
#: A manifest has a time; this one must not change from pull to pull.
_NO_TIME = "1970-01-01T00:00:00Z"
_SHOWN = 5


@dataclass(frozen=True)
class PlainAdapter:
    """An adapter in a folder of a commit.

    Attributes:
        name: ``org/name``.
        commit: The commit.
        folder: Path of its folder; empty at the top of the repository.
        files: The files of the folder with their sizes, by name.
    """

    name: str
    commit: str
    folder: str
    files: Mapping[str, int]

    def __str__(self) -> str:
        return f"{self.name}/{self.folder}@{self.commit}" if self.folder else f"{self.name}@{self.commit}"

    def path(self, file: str) -> str:
        """Return the path of one of its files in the repository."""
        return f"{self.folder}/{file}" if self.folder else file

    @property
    def weights(self) -> str | None:
        """The file with its weights: safetensors, else a pickle; ``None`` if it has neither."""
        return next((name for name in (ADAPTER_WEIGHTS, *PICKLES) if name in self.files), None)

    def read_config(self, hub: Hub, *, own: bool = False) -> AdapterConfig:
        """Read its configuration.

        Raises:
            UnsafeFile: It cannot be used; see `AdapterConfig.parse`.
            NotAdapter: It has none.
        """
        if ADAPTER_CONFIG not in self.files:
            raise NotAdapter(self._explain_no_config())
        try:
            content = hub.read(self.name, self.commit, self.path(ADAPTER_CONFIG), MAX_CONFIG)
            return AdapterConfig.parse(content, own=own)
        except UnsafeFile as error:
            raise UnsafeFile(f"{self}: {error}") from None

    def describe(self, hub: Hub) -> str:
        """Return what its configuration says, as one clause."""
        try:
            config = self.read_config(hub)
        except (UnsafeFile, NotAdapter) as error:
            return str(error)
        targets = config.fields.get("target_modules")
        names = [targets] if isinstance(targets, str) else sorted(targets or ())
        more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
        adapted = f", targets {', '.join(map(str, names[:_SHOWN]))}{more}" if names else ""
        kind = ", weights in a pickle" if self.weights in PICKLES else "" if self.weights else ", without weights"
        return f"base {config.base_id or 'not named'}, rank {config.rank}{adapted}{kind}"

    def require_weights(self) -> int:
        """Return the size of its safetensors file.

        Raises:
            NotAdapter: It has no weights, or no configuration.
            UnsafeFile: Its weights are a pickle.
            TooLarge: The file is larger than allowed.
        """
        if ADAPTER_CONFIG not in self.files:
            raise NotAdapter(self._explain_no_config())
        size = self.files.get(ADAPTER_WEIGHTS)
        if size is None and self.weights is not None:
            raise UnsafeFile(
                f"{self} has its weights in {self.weights}, a pickle, which runs code where it is read. Convert it in "
                f"a process of its own and publish the result: lora-plugins adopt {self} <org/name> --version 1.0.0 "
                "--from-pickle"
            )
        if size is None:
            raise NotAdapter(f"{self} has {ADAPTER_CONFIG} and no {ADAPTER_WEIGHTS}: the weights were not uploaded")
        if size > max_size(ADAPTER_WEIGHTS):
            raise TooLarge(f"{self}: {ADAPTER_WEIGHTS} has {size:,} bytes, and may have {max_size(ADAPTER_WEIGHTS):,}")
        return size

    def _explain_no_config(self) -> str:
        kind = next((kind for name, kind in _OTHERS.items() if name in self.files), None)
        if kind is not None:
            return f"{self} holds {kind}, not of PEFT: convert it to PEFT's format first"
        return (
            f"{self} has {self.weights or 'files'} and no {ADAPTER_CONFIG}, without which base, rank and scaling are "
            "not known. Write the configuration it was trained with (LoraConfig(…).save_pretrained(folder)) beside the "
            "weights, and push that folder"
        )


def find_adapters(hub: Hub, name: str, commit: str) -> list[PlainAdapter]:
    """Return the adapters of a commit, the one at the top first; folders with weights and no configuration count too.

    Raises:
        CommitNotFound: The repository has no such commit.
    """
    folders: dict[str, dict[str, int]] = {}
    for path, size in hub.files(name, commit).items():
        place = PurePosixPath(path)
        folders.setdefault("" if str(place.parent) == "." else str(place.parent), {})[place.name] = size
    wanted = {ADAPTER_CONFIG, ADAPTER_WEIGHTS, *PICKLES, *_OTHERS}
    found = []
    for folder in sorted(folders):
        with contextlib.suppress(InvalidReference):  # names that nobody could write
            if not wanted.isdisjoint(folders[folder]):
                found.append(PlainAdapter(name, commit, check_folder(folder) if folder else "", folders[folder]))
    return found


def explain_found(found: Sequence[PlainAdapter], branch: str, describe: Callable[[PlainAdapter], str]) -> str:
    """Return what a repository without releases holds at the head of a branch, with both ways on."""
    first = found[0]
    told = [f"{each.folder or 'at the top'} ({describe(each)})" for each in found[:_SHOWN]]
    more = f" and {len(found) - _SHOWN} more" if len(found) > _SHOWN else ""
    what = "an unversioned adapter" if len(found) == 1 else f"{len(found)} unversioned adapters"
    every = "" if len(found) == 1 else "; --all takes all of them"
    return (
        f"{first.name} has no published version yet, and holds {what} at commit {first.commit} of {branch}: "
        f"{', '.join(told)}{more}. Take one as it is: {first}. Or publish it as a version: lora-plugins adopt "
        f"{first} <org/name> --version 1.0.0{every}"
    )


def make_manifest(hub: Hub, adapter: PlainAdapter) -> Manifest:
    """Make the manifest of an unversioned adapter from its configuration, its header, and the hub's hashes.

    Only the configuration and the header are read, and what the hub has no sha256 of. Whoever downloads the files
    compares them with the manifest. What is made here must never change: lock files hold the digest.

    Raises:
        NotAdapter: The commit has no such adapter.
        UnsafeFile: A file is malformed or malicious.
        InvalidAdapter: The tensors are not those of a LoRA adapter of this configuration.
        IntegrityError: A file is not the one that the commit names.
    """
    size = adapter.require_weights()
    config, header = adapter.read_config(hub), read_remote_header(hub, adapter, size)
    try:
        known = {"config": config, "header": header, "manifest": None, "names": ()}
        enforce(AdapterFiles(Path(), given=known), "pull", ("header", "configuration"))
    except InvalidAdapter as error:
        raise InvalidAdapter(
            f"{adapter}: {error} Names of older layouts and of wrappers are rewritten where an adapter is adopted: "
            f"lora-plugins adopt {adapter} <org/name> --version 1.0.0"
        ) from None
    names = [ADAPTER_CONFIG, ADAPTER_WEIGHTS]
    if holds_vocabulary(header.tensors):
        names += sorted(TOKENIZER_FILES & set(adapter.files))
    made = Manifest(
        version=version_of_commit(adapter.commit),
        base=_read_base(config),
        architecture=BaseKind(None, config.base_class, None, labels_of(header.tensors, config)),
        config=config.non_default({}),
        files=_read_records(hub, adapter, names),
        tensors=header.tensors,
        created=_NO_TIME,
        peft_version=config.peft_release,
    )
    return Manifest.parse(made.to_bytes())


def read_remote_header(hub: Hub, adapter: PlainAdapter, size: int) -> Header:
    """Read the header of an adapter's weights without downloading them.

    Raises:
        UnsafeFile: They are not a safetensors file, or a malicious one.
    """
    path = adapter.path(ADAPTER_WEIGHTS)

    def read(start: int, length: int) -> bytes:
        return hub.read_range(adapter.name, adapter.commit, path, start, length)

    try:
        return read_header(read, size, ADAPTER_WEIGHTS)
    except UnsafeFile as error:
        raise UnsafeFile(f"{adapter}: {error}") from None


def _read_base(config: AdapterConfig) -> BaseRecord:
    """Return the base that a configuration names; a folder of another machine is not recorded."""
    name, revision = config.base_id, config.fields.get("revision")
    known = name is not None and BASE_ID.fullmatch(name) is not None
    pinned = isinstance(revision, str) and COMMIT.fullmatch(revision) is not None
    return BaseRecord(name if known else None, revision if known and pinned else None)


def _read_records(hub: Hub, adapter: PlainAdapter, names: Sequence[str]) -> dict[str, FileRecord]:
    declared = hub.hashes(adapter.name, adapter.commit)
    return {name: _read_record(hub, adapter, name, declared.get(adapter.path(name), "")) for name in names}


def download_file(hub: Hub, adapter: PlainAdapter, name: str, sink: BinaryIO, declared: str) -> None:
    """Download a file of an adapter and compare it with the hash that its commit declares.

    Raises:
        IntegrityError: It is not the file that the commit names.
        TooLarge: It is larger than allowed.
    """
    size = adapter.files[name]
    if size > max_size(name):
        raise TooLarge(f"{adapter}: {name} has {size:,} bytes, and may have {max_size(name):,}")
    hashes = _Hashes(size, sink)
    hub.download(adapter.name, adapter.commit, adapter.path(name), cast("BinaryIO", hashes), size)
    _compare(adapter, name, hashes, declared)


def _compare(adapter: PlainAdapter, name: str, hashes: _Hashes, declared: str) -> None:
    found = hashes.sha256 if SHA256.fullmatch(declared) else hashes.git
    known = SHA256.fullmatch(declared) or COMMIT.fullmatch(declared)
    if hashes.tell() != adapter.files[name] or (known and found != declared):
        raise IntegrityError(
            f"{adapter}: {name} has {hashes.tell():,} bytes with the hash {found}, and the commit names "
            f"{adapter.files[name]:,} bytes with the hash {shown(declared)}"
        )


def _read_record(hub: Hub, adapter: PlainAdapter, name: str, declared: str) -> FileRecord:
    """Return size and sha256 of a file: as the commit declares them, or, for a file in git, from its bytes."""
    size = adapter.files[name]
    if size > max_size(name):
        raise TooLarge(f"{adapter}: {name} has {size:,} bytes, and may have {max_size(name):,}")
    if SHA256.fullmatch(declared):
        return FileRecord(size, declared)
    hashes = _Hashes(size)
    hub.download(adapter.name, adapter.commit, adapter.path(name), cast("BinaryIO", hashes), size)
    _compare(adapter, name, hashes, declared)
    return FileRecord(size, hashes.sha256)


class _Hashes:
    """A file object that hashes what is written to it, and passes it on to ``sink`` if there is one."""

    def __init__(self, size: int, sink: BinaryIO | None = None) -> None:
        self._size, self._sink, self._written = size, sink, 0
        self._sha256 = hashlib.sha256()
        self._git = hashlib.sha1(b"blob %d\0" % size, usedforsecurity=False)

    @property
    def sha256(self) -> str:
        return self._sha256.hexdigest()

    @property
    def git(self) -> str:
        """git's id of the content."""
        return self._git.hexdigest()

    def write(self, data: bytes) -> int:
        self._sha256.update(data)
        self._git.update(data)
        self._written += len(data)
        return len(data) if self._sink is None else self._sink.write(data)

    def tell(self) -> int:
        return self._written

    def seek(self, offset: int, whence: int = 0) -> int:
        """Seek to the start, which begins anew; other positions are refused."""
        if offset != 0 or whence != 0:
            raise ValueError("a hash can only begin anew")
        self.__init__(self._size, self._sink)  # type: ignore[misc]
        return 0 if self._sink is None else self._sink.seek(0)

    def truncate(self, size: int | None = None) -> int:
        return self._written if self._sink is None else self._sink.truncate(size)

"""Find adapters to adopt: in a commit, a folder or the Hub's cache."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import BinaryIO, cast

from registry.adopting.cached import Cached, copy_blob, find_cached
from registry.catalog.index import Index, Release, read_index
from registry.catalog.plain import PICKLES, PlainAdapter, download_file, find_adapters
from registry.disk.machine import CheckedSink
from registry.errors import InvalidAdapter, InvalidReference, NotAdapter, RegistryError
from registry.formats.paths import ADAPTER_CONFIG, ADAPTER_WEIGHTS, max_size
from registry.formats.references import Reference, check_folder, expand_path, is_path
from registry.hubs.protocol import MAIN, Hub
from registry.publishing.snapshot import copy_file

__all__ = ["Source", "find_sources", "is_local"]

_MOST_ENTRIES = 100_000
_DEEPEST = 4


@dataclass(frozen=True)
class Source:
    """An adapter that can be adopted.

    Attributes:
        title: What messages call it.
        folder: Its folder in the repository or below the given folder; empty for the place itself.
        files: Its files with their sizes, by name.
        origin: Where it is from, for manifest and card; never a path of this machine.
        copy: Copies one of its files.
        path: The folder on this machine, if it is one.
    """

    title: str
    folder: str
    files: Mapping[str, int]
    origin: Mapping[str, str]
    copy: Callable[[str, Path], None]
    path: Path | None = None

    @property
    def pickle(self) -> str | None:
        """The file with its weights, if that is a pickle."""
        return None if ADAPTER_WEIGHTS in self.files else next((name for name in PICKLES if name in self.files), None)


def is_local(source: object) -> bool:
    """Whether a source is a folder by its form: a path object, or a string that is visibly a path.

    Raises:
        InvalidReference: It may be a folder or the name of an adapter.
    """
    if is_path(source):
        return True
    text = str(source)
    if Path(text).is_dir():
        raise InvalidReference(
            f"{text[:200]!r} is a folder here, and could be the name of an adapter: write ./{text} for the folder, or "
            f"{text}@main for the adapter"
        )
    return False


def find_sources(source: str | os.PathLike[str], hub: Hub | None, *, every: bool) -> list[Source]:
    """Return the adapter that a source names, or, with ``every``, all adapters in and below it.

    Args:
        source: A reference as for `pull_adapter`, or a folder.
        hub: The hub for references.
        every: Whether to look in sub-folders, too.

    Raises:
        NotAdapter: There is none in a repository, or a published release.
        InvalidAdapter: There is none in a folder.
    """
    if hub is None:
        return _find_in_folder(expand_path(source), every=every)
    return _find_in_repository(Reference.parse(os.fspath(source)), hub, every=every)


# -- repositories ----------------------------------------------------------------------------------------------------


def _find_in_repository(reference: Reference, hub: Hub, *, every: bool) -> list[Source]:
    index = read_index(hub, reference.name)
    release = _resolve(index, replace(reference, branch=MAIN) if reference.bare else reference, every=every)
    if not release.unversioned:
        raise NotAdapter(
            f"{release} is published already: lora-plugins mirror copies it to another registry. To publish it under "
            "another name, pull it and push the folder"
        )
    there = find_adapters(hub, release.name, release.commit)
    inner = f"{release.folder}/" if release.folder else ""
    found = [a for a in there if a.folder == release.folder or (every and a.folder.startswith(inner))]
    if not found:
        raise NotAdapter(f"{release} on {hub.location} holds no adapter")
    hashes = hub.hashes(release.name, release.commit)
    return [_describe_remote(hub, adapter, hashes) for adapter in found]


def _resolve(index: Index, reference: Reference, *, every: bool) -> Release:
    """Return the release or commit; with ``every``, adapters may be in sub-folders only."""
    try:
        return index.resolve(reference, unversioned=True)
    except NotAdapter:
        commit = reference.commit or index.branches.get(reference.branch or "")
        if not every or commit is None:
            raise
        return Release.at_commit(reference.name, commit, reference.folder)


def _describe_remote(hub: Hub, adapter: PlainAdapter, hashes: Mapping[str, str]) -> Source:
    def copy(name: str, target: Path) -> None:
        with CheckedSink(target) as sink:
            download_file(hub, adapter, name, cast("BinaryIO", sink), hashes.get(adapter.path(name), ""))

    origin = {"repository": adapter.name, "commit": adapter.commit}
    origin |= {"folder": adapter.folder} if adapter.folder else {}
    # The address of a folder registry is a path of this machine.
    origin |= {} if hub.local else {"hub": hub.location}
    return Source(str(adapter), adapter.folder, adapter.files, origin, copy)


# -- folders ---------------------------------------------------------------------------------------------------------


def _find_in_folder(given: Path, *, every: bool) -> list[Source]:
    if not given.is_dir():
        raise InvalidAdapter(f"{given} is not a folder. A string without ./ or / at its beginning is a reference")
    cached = find_cached(given)
    root = (cached.root if cached else given).resolve()
    found = [_describe_local(root, folder, names, cached) for folder, names in _walk(root, every=every)]
    if found:
        return found
    nested = [folder for folder, _ in _walk(root, every=True)]
    known = f". It has adapters in {', '.join(nested[:5])}: name one of them, or take all (--all)" if nested else ""
    raise InvalidAdapter(f"{given} holds no {ADAPTER_CONFIG} and no adapter's weights{known}")


def _walk(root: Path, *, every: bool) -> list[tuple[str, list[str]]]:
    """Return the folders that hold an adapter's files, with the names in them."""
    wanted = {ADAPTER_CONFIG, ADAPTER_WEIGHTS, *PICKLES}
    found, seen = [], 0
    for parent, folders, names in os.walk(root, followlinks=False):
        seen += len(names) + len(folders)
        if seen > _MOST_ENTRIES:
            raise InvalidAdapter(f"{root} has more than {_MOST_ENTRIES:,} files: name the adapter's own folder")
        relative = Path(parent).relative_to(root).as_posix()
        deep = relative.count("/") + 1 >= _DEEPEST
        folders[:] = [] if not every or deep else sorted(name for name in folders if not name.startswith("."))
        if not wanted.isdisjoint(names):
            found.append(("" if relative == "." else relative, names))
    return found


def _describe_local(root: Path, folder: str, names: list[str], cached: Cached | None) -> Source:
    place = root / folder if folder else root
    sizes = {}
    for name in names:
        with contextlib.suppress(OSError):
            sizes[name] = (place / name).stat().st_size

    def copy(name: str, target: Path) -> None:
        if cached is not None and (place / name).is_symlink():
            copy_blob(cached, place / name, target)
        else:
            copy_file(place / name, target, max_size(name))

    origin = cached.origin(folder) if cached else {}
    return Source(str(place), _check(folder), sizes, origin, copy, place)


def _check(folder: str) -> str:
    """Return a folder whose name can be part of a repository's name later; others are named by their last part."""
    try:
        return check_folder(folder) if folder else ""
    except RegistryError:
        raise InvalidAdapter(f"{folder!r} is not a valid name for a folder of an adapter: rename it") from None

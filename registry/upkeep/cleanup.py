"""Delete unreachable data in folder registries and the cache."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from registry.disk.owners import delete
from registry.errors import RegistryError
from registry.hubs import open_hub
from registry.hubs.folder import FolderHub
from registry.hubs.objects import ObjectHub
from registry.hubs.protocol import Hub
from registry.pulling.cache import Cache

__all__ = ["Garbage", "collect_garbage"]


@dataclass(frozen=True)
class Garbage:
    """Unreachable data.

    Attributes:
        paths: Folders of commits, of cached releases, and unfinished ones of both.
        size: Bytes in them.
        deleted: Whether they were deleted.
        problems: What is damaged and could not be examined; nothing of it was deleted.
    """

    paths: tuple[Path | str, ...]
    size: int
    deleted: bool
    problems: tuple[str, ...] = ()


def collect_garbage(
    hub: Hub | str | os.PathLike[str] | None = None,
    *,
    dry_run: bool = True,
    cache_dir: str | os.PathLike[str] | None = None,
) -> Garbage:
    """Find unreachable data, and delete it unless this is a dry run.

    In a folder registry or an object store that is every commit older than a day that no branch or tag points to; every
    release, withdrawn or not, and every alias stays. In the cache it is every release that no recorded pull refers to
    and that no pull has returned within a day, so other processes may pull meanwhile. The Hugging Face Hub is left
    alone.

    Args:
        hub: The registry.
        dry_run: Whether to delete nothing.
        cache_dir: The cache.

    Raises:
        CacheError: The cache cannot be read or written.
    """
    place, cache = open_hub(hub, False), Cache(cache_dir)
    problems: list[str] = []
    in_registry = _find_unreachable(place, problems) if isinstance(place, FolderHub) else {}
    in_store = _find_unreachable(place, problems) if isinstance(place, ObjectHub) else {}
    forgotten = _find_forgotten(cache, problems)
    halves = cache.leftovers()
    size: dict[Path | str, int] = {path: _measure_folder(path) for paths in in_registry.values() for path in paths}
    size |= {f"{place.location}/{path}": bytes_ for paths in in_store.values() for path, bytes_ in paths.items()}
    size |= {path: _measure_folder(path) for path in [*map(cache.path, forgotten), *halves]}
    if not dry_run:
        for name, paths in {**in_registry, **in_store}.items():
            place.remove(name, paths)  # type: ignore[attr-defined]
        kept = [cache.path(digest) for digest in forgotten if not cache.remove(digest)]
        for path in kept:  # pulled again meanwhile
            del size[path]
        for path in halves:
            delete(path)
    return Garbage(tuple(size), sum(size.values()), not dry_run, tuple(problems))


def _find_unreachable(hub: FolderHub | ObjectHub, problems: list[str]) -> dict[str, Any]:
    """Return unreachable data by repository; a damaged repository does not stop the search in others."""
    found = {name: _find_unreachable_in(hub, name, problems) for name in hub.names()}
    return {name: paths for name, paths in found.items() if paths}


def _find_unreachable_in(hub: FolderHub | ObjectHub, name: str, problems: list[str]) -> Any:
    try:
        return hub.unreachable(name)
    except RegistryError as problem:
        problems.append(str(problem))
        return []


def _find_forgotten(cache: Cache, problems: list[str]) -> list[str]:
    try:
        known = [pulled for seen in cache.records() for pulled in (*seen.versions.values(), *seen.plain.values())]
    except RegistryError as problem:
        problems.append(str(problem))
        return []  # what a damaged record refers to is unknown
    remembered = {pulled.manifest for pulled in known}
    return [digest for digest in cache.digests() if digest not in remembered and not cache.is_leased(digest)]


def _measure_folder(folder: Path) -> int:
    """Return the bytes of a file or of a folder's files; those that another process deletes meanwhile count nothing."""
    if folder.is_symlink() or not folder.is_dir():
        return _measure_file(folder)
    return sum(_measure_file(Path(parent, name)) for parent, _, names in os.walk(folder) for name in names)


def _measure_file(path: Path) -> int:
    try:
        return path.lstat().st_size
    except FileNotFoundError:
        return 0

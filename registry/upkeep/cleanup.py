"""Finding and deleting what nobody can reach any more, in a folder registry and in the cache."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from registry.hubs import open_hub
from registry.hubs.folder import FolderHub
from registry.hubs.protocol import Hub
from registry.pulling.cache import Cache

__all__ = ["Garbage", "collect_garbage"]


@dataclass(frozen=True)
class Garbage:
    """What can't be reached.

    Attributes:
        paths: Folders of commits, of cached releases, and halves of both.
        size: Bytes in them.
        deleted: Whether they were deleted.
    """

    paths: tuple[Path, ...]
    size: int
    deleted: bool


def collect_garbage(
    hub: Hub | str | os.PathLike[str] | None = None,
    *,
    dry_run: bool = True,
    cache_dir: str | os.PathLike[str] | None = None,
) -> Garbage:
    """Find, and unless it is a dry run delete, what can't be reached.

    In a folder registry that is every commit that neither a branch nor a tag stands at and that is older than a day;
    every release, withdrawn or not, and every alias stays. In the cache it is every release of which no pull is
    remembered. A hub on the network keeps its own house.

    Args:
        hub: Which registry.
        dry_run: Whether to look only.
        cache_dir: The cache.
    """
    place, cache = open_hub(hub, False), Cache(cache_dir)
    found: dict[str, list[Path]] = {}
    if isinstance(place, FolderHub):
        found = {name: place.unreachable(name) for name in place.names()}
    remembered = {pulled.manifest for seen in cache.records() for pulled in seen.versions.values()}
    forgotten = [digest for digest in cache.digests() if digest not in remembered]
    cached = [*map(cache.path, forgotten), *cache.abandoned()]
    paths = [path for several in found.values() for path in several] + cached
    size = sum(map(_size, paths))
    if not dry_run:
        _delete(place, found, cache, forgotten)
    return Garbage(tuple(paths), size, not dry_run)


def _delete(hub: Hub, found: dict[str, list[Path]], cache: Cache, forgotten: Iterable[str]) -> None:
    if isinstance(hub, FolderHub):
        for name, paths in found.items():
            hub.remove(name, paths)
    for digest in forgotten:
        cache.remove(digest)
    for path in cache.abandoned():
        shutil.rmtree(path, ignore_errors=True)


def _size(folder: Path) -> int:
    return sum(path.lstat().st_size for path in folder.rglob("*") if not path.is_dir())

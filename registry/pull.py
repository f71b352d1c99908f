"""Pulling: from a reference to an adapter whose every byte has been checked."""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import replace

from registry.cache import Cache
from registry.fetch import Fetched, Fetcher, Progress
from registry.hubs import open_hub
from registry.hubs.protocol import Hub
from registry.lock import Lock, LockEntry
from registry.references import Reference

__all__ = ["fetch_adapter", "lock_adapters"]


def fetch_adapter(
    reference: str,
    *,
    hub: Hub | str | os.PathLike[str] | None,
    token: str | bool | None,
    lock: Lock,
    offline: bool,
    cache_dir: str | os.PathLike[str] | None,
    progress: Progress | None = None,
) -> Fetched:
    """Get the files of a release; see `pull_adapter`."""
    parsed = Reference.parse(reference)
    return Fetcher(open_hub(hub, token), Cache(cache_dir), lock, offline, progress).fetch(parsed)


def lock_adapters(
    references: Iterable[str] = (),
    *,
    hub: Hub | str | os.PathLike[str] | None = None,
    token: str | bool | None = None,
    lock: bool | str | os.PathLike[str] = True,
    cache_dir: str | os.PathLike[str] | None = None,
) -> dict[str, LockEntry]:
    """Write what references mean now to the lock file, in place of what it said about the same adapters.

    Args:
        references: See `pull_adapter`; without any, the adapters of the lock file are pulled and checked as they are.
        hub: Which registry.
        token: For the registry.
        lock: The lock file; by default ``adapters.lock`` in the working directory.
        cache_dir: The cache.

    Returns:
        The entries of the lock file by name.
    """
    chosen, wanted = Lock.choose(lock, frozen=False), list(references)
    use = replace(chosen, renew=bool(wanted))
    for reference in wanted or chosen.entries():
        fetch_adapter(reference, hub=hub, token=token, lock=use, offline=False, cache_dir=cache_dir)
    return dict(chosen.entries())

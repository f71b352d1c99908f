"""Pull an adapter: resolve a reference to a checked folder."""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import replace
from typing import TYPE_CHECKING

from registry.formats.references import Reference
from registry.hubs import open_hub
from registry.hubs.http.deadline import limit_operation
from registry.hubs.protocol import Hub
from registry.pulling.cache import Cache
from registry.pulling.fetch import Fetched, Fetcher, Progress
from registry.pulling.lockfile import Lock, LockEntry
from registry.pulling.signatures import SignatureRule
from registry.signing.keys import PathOrPaths

if TYPE_CHECKING:
    from registry.pulling.adapter import Adapter

__all__ = ["fetch_adapter", "lock_adapters", "pull_adapter"]


def pull_adapter(
    reference: str,
    *,
    hub: Hub | str | os.PathLike[str] | None = None,
    token: str | bool | None = None,
    lock: bool | str | os.PathLike[str] | None = None,
    frozen: bool = False,
    offline: bool = False,
    local_files_only: bool = False,
    cache_dir: str | os.PathLike[str] | None = None,
    progress: Progress | None = None,
    require_signature: PathOrPaths | None = None,
) -> Adapter:
    """Pull a release of an adapter as a checked, read-only folder in the cache.

    Args:
        reference: ``"org/name"`` is the newest stable release, ``"org/name>=1.2,<2"`` the newest one in a range;
            ``"org/name@1.2.0"``, ``"org/name@alias"`` and ``"org/name@<commit>"`` name one release.
        hub: The registry: ``https://…``, ``file:///…`` or a path; by default ``LORA_REGISTRY``, else the Hugging
            Face Hub.
        token: Token for the registry; by default the one that the user logged in with.
        lock: ``True`` or a path: use the lock file's versions, and add missing entries. By default ``adapters.lock``
            in the working directory is used if it exists, and not changed. ``False``: none.
        frozen: Pull only adapters that are in the lock file.
        offline: Use the cache only.
        local_files_only: The same under huggingface_hub's name.
        cache_dir: The cache; by default ``LORA_REGISTRY_CACHE``, else a folder in the user's cache folder.
        progress: Called with a file's name, its bytes so far and its total bytes during the download.
        require_signature: Accept only releases signed with this key: the path of a PEM file with a public key or a
            certificate, or several, of which any is accepted; by default those of ``LORA_REGISTRY_REQUIRE_SIGNATURE``.
            Needs ``pip install 'lora-plugins[signing]'``.

    Raises:
        InvalidReference: The reference is malformed.
        VersionNotFound: No release matches it.
        IntegrityError: The release has changed, or does not match its manifest.
        SignatureError: The required signature is missing, was tampered with, or is another key's or release's.
        InvalidKey: The key file cannot be used.
        LockError: The lock file does not allow it.
        HubError: The registry cannot be reached, and the cache has no matching release.
    """
    from registry.pulling.adapter import Adapter  # imported late: most commands do not need it

    place, token = open_hub(hub, token), None
    fetched = fetch_adapter(
        reference,
        hub=place,
        token=None,
        lock=Lock.choose(lock, frozen=frozen),
        offline=offline or local_files_only,
        cache_dir=cache_dir,
        progress=progress,
        require_signature=require_signature,
    )
    return Adapter(
        name=fetched.release.name,
        commit=fetched.release.commit,
        manifest=fetched.manifest,
        path=str(fetched.path),
        folder=fetched.release.folder,
    )


def fetch_adapter(
    reference: str,
    *,
    hub: Hub | str | os.PathLike[str] | None,
    token: str | bool | None,
    lock: Lock,
    offline: bool,
    cache_dir: str | os.PathLike[str] | None,
    progress: Progress | None = None,
    require_signature: PathOrPaths | None = None,
) -> Fetched:
    """Fetch the files of a release; see `pull_adapter`."""
    parsed, place, token = Reference.parse(reference), open_hub(hub, token), None
    cache = Cache(cache_dir)
    rule = SignatureRule.choose(require_signature, cache)
    with limit_operation():
        return Fetcher(place, cache, lock, offline, progress, signature=rule).fetch(parsed)


def lock_adapters(
    references: Iterable[str] = (),
    *,
    hub: Hub | str | os.PathLike[str] | None = None,
    token: str | bool | None = None,
    lock: bool | str | os.PathLike[str] = True,
    cache_dir: str | os.PathLike[str] | None = None,
    require_signature: PathOrPaths | None = None,
) -> dict[str, LockEntry]:
    """Resolve references and write the results to the lock file, replacing its entries for the same adapters.

    Args:
        references: See `pull_adapter`; without any, the locked versions of the lock file are pulled and checked.
        hub: The registry.
        token: Token for the registry.
        lock: The lock file; by default ``adapters.lock`` in the working directory.
        cache_dir: The cache.
        require_signature: See `pull_adapter`.

    Returns:
        The entries of the lock file by name.
    """
    place, token = open_hub(hub, token), None
    chosen, wanted = Lock.choose(lock, frozen=False), list(references)
    use = replace(chosen, renew=bool(wanted))
    for reference in wanted or chosen.entries():
        fetch_adapter(
            reference,
            hub=place,
            token=None,
            lock=use,
            offline=False,
            cache_dir=cache_dir,
            require_signature=require_signature,
        )
    return dict(chosen.entries())

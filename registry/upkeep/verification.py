"""Compare a release on a hub with its manifest, lock and earlier pulls."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, cast

from registry.catalog.index import Manifests, Release, index_of, read_manifest
from registry.catalog.state import read_state
from registry.disk.machine import CheckedSink, temporary_folder
from registry.errors import HubUnavailable, MachineError, RegistryError, SignatureError
from registry.formats.manifest import MANIFEST_FILE, Manifest
from registry.formats.paths import GIT_ATTRIBUTES, SIGNATURE_FILE
from registry.formats.records import FileRecord
from registry.formats.references import Reference
from registry.hubs import open_hub
from registry.hubs.http.deadline import limit_operation
from registry.hubs.protocol import Hub
from registry.pulling.cache import Cache, check_file
from registry.pulling.content import check_content, check_sizes
from registry.pulling.fetch import Fetcher
from registry.pulling.lockfile import Lock
from registry.signing.keys import Keys, PathOrPaths
from registry.signing.signatures import read_signature, verify_signature

__all__ = ["Verification", "verify"]


@dataclass(frozen=True)
class Verification:
    """Result of a verification.

    Attributes:
        release: The verified release.
        manifest: Its manifest; ``None`` if it cannot be read.
        problems: What is wrong, one sentence each; empty if nothing is.
        others: Files in the commit that the manifest does not list. They are not part of the release, and pulls ignore
            them; other programs that read the repository may not.
    """

    release: Release
    manifest: Manifest | None
    problems: tuple[str, ...]
    others: tuple[str, ...] = ()

    @property
    def ok(self) -> bool:
        """Whether nothing is wrong."""
        return not self.problems


def verify(
    reference: str,
    *,
    hub: Hub | str | os.PathLike[str] | None = None,
    token: str | bool | None = None,
    lock: bool | str | os.PathLike[str] | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    require_signature: PathOrPaths | None = None,
) -> Verification:
    """Download a release, even if it is cached, and compare it with its manifest, the lock and earlier pulls.

    Args:
        reference: The release, see `pull_adapter`.
        hub: The registry.
        token: For a hub on the network.
        lock: The lock file to compare with; by default the one in the working directory, if there is one.
        cache_dir: The cache to compare with.
        require_signature: See `pull_adapter`; a signature that is missing or wrong is a problem.

    Raises:
        VersionNotFound: There is no such release.
        HubError: The hub cannot be asked.
    """
    place, parsed, token = open_hub(hub, token), Reference.parse(reference), None
    keys = Keys.read(require_signature)
    with limit_operation():
        return _verify(place, parsed, Lock.choose(lock, frozen=False), Cache(cache_dir), keys)


def _verify(place: Hub, parsed: Reference, lock: Lock, cache: Cache, keys: Keys | None) -> Verification:
    refs = place.refs(parsed.name)
    manifests = Manifests(place, parsed.name)
    index = index_of(parsed.name, refs, read_state(place, parsed.name, refs), manifests)
    locked = None if not parsed.bare else lock.entries().get(parsed.key)
    if locked is not None and locked.unversioned:
        release = Release(parsed.name, locked.version, locked.commit, folder=parsed.folder)
    else:
        release = index.resolve(parsed, unversioned=True)
    fetcher = Fetcher(place, cache, lock)
    problems: list[str] = []
    manifest: Manifest | None = None
    others: tuple[str, ...] = ()
    try:
        manifest = read_manifest(fetcher.hub, release, manifests)
        problems += fetcher.compare(release, manifest, refs)
        problems += _check_signed(place, release, manifest, keys)
        others = _list_others(place, release, manifest)
        problems += _find_damaged(place, release, manifest)
    except (HubUnavailable, MachineError):
        raise
    except RegistryError as problem:
        problems.append(str(problem))
    return Verification(release, manifest, tuple(problems), others)


def _check_signed(hub: Hub, release: Release, manifest: Manifest, keys: Keys | None) -> list[str]:
    if keys is None:
        return []
    if release.unversioned:
        return [f"It is not published as a version, so it is not signed, and a signature by {keys} is required"]
    signature = read_signature(hub, release.name, release.commit)
    if signature is None:
        return [f"It is not signed, and a signature by {keys} is required"]
    try:
        verify_signature(release.name, manifest.to_bytes(), signature, keys)
    except SignatureError as problem:
        return [str(problem)]
    return []


def _list_others(hub: Hub, release: Release, manifest: Manifest) -> tuple[str, ...]:
    if release.unversioned:
        return ()  # what else the repository holds is none of its business
    listed = {*manifest.files, MANIFEST_FILE, SIGNATURE_FILE, GIT_ATTRIBUTES}
    return tuple(sorted(path for path in hub.files(release.name, release.commit) if path not in listed))


def _find_damaged(hub: Hub, release: Release, manifest: Manifest) -> list[str]:
    check_sizes(manifest)
    with temporary_folder() as folder:
        problems = [
            problem
            for name, record in manifest.files.items()
            if (problem := _find_difference(hub, release, folder, name, record)) is not None
        ]
        return problems or list(check_content(folder, manifest))


def _find_difference(hub: Hub, release: Release, folder: Path, name: str, record: FileRecord) -> str | None:
    try:
        with CheckedSink(folder / name) as sink:
            hub.download(release.name, release.commit, release.path(name), cast("BinaryIO", sink), record.size)
        check_file(folder, name, record)
    except (HubUnavailable, MachineError):
        raise
    except RegistryError as problem:
        return str(problem)
    return None

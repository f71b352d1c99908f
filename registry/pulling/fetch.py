"""From a reference to the checked files of a release: resolving, comparing with what was known before, downloading."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import BinaryIO, cast

from packaging.version import Version

from registry.catalog.index import Index, Release, index_of, read_manifest
from registry.catalog.state import STATE_BRANCH, State, read_state
from registry.errors import (
    HubFileNotFound,
    HubUnavailable,
    IntegrityError,
    Offline,
    RegistryError,
    ReleaseMoved,
    RepositoryReplaced,
    StaleWarning,
    YankedWarning,
)
from registry.formats.manifest import Manifest
from registry.formats.paths import ADAPTER_CONFIG, ADAPTER_WEIGHTS
from registry.formats.records import FileRecord
from registry.formats.references import Reference
from registry.hubs.protocol import Hub, Refs
from registry.pulling.cache import Cache, Pulled, Seen
from registry.pulling.lockfile import Lock, LockEntry

__all__ = ["Fetched", "Fetcher", "Progress"]

#: Called with the file's name, the bytes that are there and the bytes that it has.
Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Fetched:
    """A release whose files are in the cache, and are what the manifest says."""

    release: Release
    manifest: Manifest
    path: Path


@dataclass(frozen=True)
class _Before:
    """What was known of a version before: its commit and manifest, and the id of its repository."""

    version: str
    commit: str | None
    manifest: str | None
    repository: str | None


@dataclass(frozen=True)
class Fetcher:
    """Gets releases from one hub.

    Attributes:
        hub: Where from.
        cache: Where to.
        lock: What is fixed; entries are added to it if it is one that is written.
        offline: Use only what is in the cache.
        progress: Told about the bytes that arrive.
        quiet: Don't warn of withdrawn releases.
    """

    hub: Hub
    cache: Cache
    lock: Lock
    offline: bool = False
    progress: Progress | None = None
    quiet: bool = False

    def fetch(self, reference: Reference) -> Fetched:
        """Get a release.

        Raises:
            VersionNotFound: There is none that the reference means.
            IntegrityError: It is not what it was before, or not what its manifest says.
            HubError: The hub didn't do what it was asked for, and the cache does not have it.
        """
        entry = self.lock.find(reference)
        seen = self.cache.seen(self.hub.location, reference.name)
        if self.offline and not self.hub.local:
            return self._from_cache(reference, entry, seen)
        try:
            fetched = self._from_hub(reference, entry, seen)
        except HubUnavailable as error:
            return self._instead(reference, entry, seen, error)
        return self._told(fetched)

    def _instead(self, reference: Reference, entry: LockEntry | None, seen: Seen, error: HubUnavailable) -> Fetched:
        """What the cache has, where the hub does not answer."""
        try:
            fetched = self._from_cache(reference, entry, seen)
        except RegistryError as missing:
            raise (missing if isinstance(error, Offline) else error) from None
        if not isinstance(error, Offline):
            warnings.warn(f"{error}. {fetched.release} is taken from the cache.", StaleWarning, stacklevel=5)
        return fetched

    # -- from the hub --------------------------------------------------------------------------------------------

    def _from_hub(self, reference: Reference, entry: LockEntry | None, seen: Seen) -> Fetched:
        name = reference.name
        refs = self.hub.refs(name)
        state = self._state(name, refs, seen)
        index = index_of(name, refs, state)
        if entry is None:
            release: Release | None = index.resolve(reference)
        else:
            version = Version(entry.version)
            release = index.release(version) if version in index.versions else None
        before = self._before(name, release.version if release else str(entry and entry.version), seen)
        if release is None or before.commit not in (None, release.commit):
            raise self._moved(name, before, release)
        identity = self._identity(release, before)
        fetched = self._files(release, before)
        self._record(fetched, identity, state, refs.branches.get(STATE_BRANCH))
        return fetched

    def _before(self, name: str, version: str, seen: Seen) -> _Before:
        pulled, entry = seen.versions.get(version), self.lock.entries().get(name)
        # In a copy of the registry elsewhere commits and ids differ; the bytes may not.
        here = entry if entry is not None and entry.registry == self.hub.location else None
        repository = (here.repository if here else None) or seen.identity
        commit, manifest = (pulled.commit, pulled.manifest) if pulled else (None, None)
        if entry is not None and entry.version == version:
            commit, manifest = here.commit if here else commit, entry.manifest
        return _Before(version, commit, manifest, repository)

    def _record(self, fetched: Fetched, identity: str, state: State, state_commit: str | None) -> None:
        release, digest, base = fetched.release, fetched.manifest.digest, fetched.manifest.base

        def remembered(before: Seen) -> Seen:
            versions = {**before.versions, release.version: Pulled(release.commit, digest)}
            return replace(before, identity=identity, versions=versions, state=state, state_commit=state_commit)

        self.cache.remember(self.hub.location, release.name, remembered)
        entry = LockEntry(release.version, release.commit, digest, self.hub.location, identity, base.id, base.commit)
        self.lock.record(release.name, entry)

    def _state(self, name: str, refs: Refs, seen: Seen) -> State:
        commit = refs.branches.get(STATE_BRANCH)
        return seen.state if commit is not None and commit == seen.state_commit else read_state(self.hub, name, refs)

    def _moved(self, name: str, before: _Before, release: Release | None) -> IntegrityError:
        """Why a version that has been used before is not where it was."""
        if before.repository and self.hub.identity(name) != before.repository:
            return self._replaced(name)
        was = f"{name}@{before.version} on {self.hub.location} was commit {before.commit}"
        now = f"is commit {release.commit} now" if release else "is not there any more"
        return ReleaseMoved(
            f"{was} and {now}. A published version never changes, so somebody has moved or removed its tag. "
            f"{self._way_out(name)}"
        )

    def _identity(self, release: Release, before: _Before) -> str:
        """The id of the repository: as it was, if the release is known, else asked for and compared.

        Raises:
            RepositoryReplaced: It is another one.
        """
        if before.repository and before.commit == release.commit:
            return before.repository
        identity = self.hub.identity(release.name)
        if before.repository and identity != before.repository:
            raise self._replaced(release.name)
        return identity

    def _changed(self, release: Release, manifest: Manifest, digest: str | None) -> IntegrityError:
        return IntegrityError(
            f"The manifest of {release} has the sha256 {manifest.digest}, and had {digest} before. "
            f"{self._way_out(release.name)}"
        )

    def _replaced(self, name: str) -> RepositoryReplaced:
        return RepositoryReplaced(
            f"{name} on {self.hub.location} is not the repository that it was: the one from before was deleted, and "
            f"somebody has made another one of the same name. {self._way_out(name)}"
        )

    def _way_out(self, name: str) -> str:
        record = self.cache.record_path(self.hub.location, name)
        lock = f" and its entry in {self.lock.path}" if self.lock.path else ""
        return f"Ask its owner. If it is meant to be so, delete {record}{lock}."

    def _files(self, release: Release, before: _Before) -> Fetched:
        """The files of a release: from the cache, if they are there and undamaged."""
        # Whether this hub has what another one had is seen by its manifest only.
        known = before.manifest if before.commit is not None else None
        manifest = self.cache.manifest(known) if known else None
        if manifest is None:
            manifest = read_manifest(self.hub, release)
            if before.manifest not in (None, manifest.digest):
                raise self._changed(release, manifest, before.manifest)
        try:
            self.cache.check(manifest)
            path = self.cache.path(manifest.digest)
        except IntegrityError:
            path = self.cache.add(manifest, lambda name, record, sink: self._download(release, name, record, sink))
        check_content(path, manifest)
        return Fetched(release, manifest, path)

    def compare(self, release: Release, manifest: Manifest) -> list[str]:
        """How a release differs from what the lock and the cache say about it."""
        before = self._before(release.name, release.version, self.cache.seen(self.hub.location, release.name))
        problems = []
        if before.commit not in (None, release.commit):
            problems.append(str(self._moved(release.name, before, release)))
        if before.manifest not in (None, manifest.digest):
            problems.append(str(self._changed(release, manifest, before.manifest)))
        return problems

    def _download(self, release: Release, name: str, record: FileRecord, sink: BinaryIO) -> None:
        if self.progress is not None:
            sink = cast("BinaryIO", _Counted(sink, self.progress, name, record.size))
        try:
            self.hub.download(release.name, release.commit, name, sink, record.size)
        except HubFileNotFound:
            raise IntegrityError(f"{release} has no {name}, which its manifest lists") from None

    # -- from the cache ------------------------------------------------------------------------------------------

    def _from_cache(self, reference: Reference, entry: LockEntry | None, seen: Seen) -> Fetched:
        """What was pulled before.

        Raises:
            Offline: There is nothing.
        """
        if entry is not None:
            manifest = self.cache.manifest(entry.manifest)
            release = Release(reference.name, entry.version, entry.commit)
        else:
            there = {v: pulled for v, pulled in seen.versions.items() if self.cache.manifest(pulled.manifest)}
            index = Index(reference.name, {Version(v): pulled.commit for v, pulled in there.items()}, seen.state)
            try:
                release = index.resolve(reference)
            except RegistryError as reason:
                raise self._offline(f"{reason} in the cache") from None
            manifest = self.cache.manifest(there[release.version].manifest)
        if manifest is None:
            raise self._offline(f"{release} is not in the cache")
        self.cache.check(manifest)
        path = self.cache.path(manifest.digest)
        check_content(path, manifest)
        return self._told(Fetched(release, manifest, path))

    def _offline(self, reason: str) -> Offline:
        return Offline(
            f"{reason} {self.cache.folder}, and the network is off. Pull it once with a network, with this cache"
        )

    def _told(self, fetched: Fetched) -> Fetched:
        release = fetched.release
        if release.yanked is not None and not self.quiet:
            warnings.warn(f"{release} was withdrawn: {release.yanked}", YankedWarning, stacklevel=4)
        return fetched


def check_content(path: Path, manifest: Manifest) -> None:
    """Look at the two files that libraries will read: nothing in them may do harm, or differ from the manifest.

    Raises:
        UnsafeFile: Something would do harm.
        IntegrityError: The tensors are not those of the manifest.
    """
    from registry.formats.adapter_config import AdapterConfig
    from registry.formats.weights import read_file_header

    AdapterConfig.parse((path / ADAPTER_CONFIG).read_bytes())
    header = read_file_header(path / ADAPTER_WEIGHTS)
    if dict(header.tensors) != dict(manifest.tensors):
        raise IntegrityError(f"The tensors in {path / ADAPTER_WEIGHTS} are not those of the manifest")


class _Counted:
    """A file that tells how much was written to it."""

    def __init__(self, sink: BinaryIO, progress: Progress, name: str, size: int) -> None:
        self._sink, self._progress, self._name, self._size = sink, progress, name, size

    def write(self, data: bytes) -> int:
        written = self._sink.write(data)
        self._progress(self._name, self._sink.tell(), self._size)
        return written

    def tell(self) -> int:
        return self._sink.tell()

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        return self._sink.seek(offset, whence)

    def truncate(self, size: int | None = None) -> int:
        return self._sink.truncate(size)

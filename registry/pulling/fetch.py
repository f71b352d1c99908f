"""Fetch the checked files of the release that a reference names."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO, cast

from packaging.version import Version

from registry.catalog.index import Index, Manifests, Release, index_of, read_manifest
from registry.catalog.memory import Seen, find_lost_state, find_lost_tags
from registry.catalog.state import STATE_BRANCH, State, read_state
from registry.errors import (
    AdapterWarning,
    HubFileNotFound,
    HubUnavailable,
    IntegrityError,
    Offline,
    RegistryError,
    ReleaseMoved,
    RepositoryNotFound,
    RepositoryReplaced,
    SignatureNotFound,
    StaleWarning,
    YankedWarning,
)
from registry.formats.manifest import MANIFEST_FILE, MAX_MANIFEST, Manifest
from registry.formats.records import FileRecord
from registry.formats.references import Reference, tag_of, version_text, versions_in
from registry.hubs.protocol import Hub, Refs
from registry.pulling.cache import Cache
from registry.pulling.content import check_content, check_sizes
from registry.pulling.lockfile import Lock, LockEntry
from registry.pulling.signatures import SignatureRule

__all__ = ["Fetched", "Fetcher", "Progress"]

_EXAMPLES = 3
#: Manifests that are read from a folder to tell new tags of others from releases.
_READ_TAGS = 32
#: Called with the file's name, the bytes downloaded so far and its total bytes.
Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Fetched:
    """A release whose files are in the cache and match the manifest."""

    release: Release
    manifest: Manifest
    path: Path
    warnings: tuple[str, ...] = ()


@dataclass(frozen=True)
class _Before:
    """What was known of a version before: its commit, its manifest digest, and the id of its repository."""

    version: str
    commit: str | None
    manifest: str | None
    repository: str | None


@dataclass(frozen=True)
class Fetcher:
    """Fetches releases from one hub.

    Attributes:
        hub: The hub.
        cache: The cache for the files.
        lock: The lock file; entries are added if it is writable.
        offline: Use only the cache.
        progress: Called with download progress.
        quiet: Suppress warnings about withdrawn releases and their content.
        signature: The signature that a release must have, if any.
    """

    hub: Hub
    cache: Cache
    lock: Lock
    offline: bool = False
    progress: Progress | None = None
    quiet: bool = False
    signature: SignatureRule | None = None

    def fetch(self, reference: Reference) -> Fetched:
        """Fetch a release.

        Raises:
            VersionNotFound: No release matches the reference.
            IntegrityError: The release has changed, or does not match its manifest.
            HubError: The hub failed, and the cache does not have the release.
        """
        entry = self.lock.find(reference)
        seen = self.cache.seen(self.hub.location, reference.name)
        if self.offline and not self.hub.local:
            return self._warn(self._fetch_from_cache(reference, entry, seen))
        try:
            return self._warn(self._fetch_from_hub(reference, entry, seen))
        except (HubUnavailable, RepositoryNotFound) as error:
            if self.offline:
                return self._warn(self._fetch_from_cache(reference, entry, seen))  # folder deleted or not mounted
            if self.hub.local or not isinstance(error, HubUnavailable):
                raise  # an unreadable folder is not a network outage
            return self._warn(self._fetch_without_hub(reference, entry, seen, error))

    def _fetch_without_hub(
        self, reference: Reference, entry: LockEntry | None, seen: Seen, error: HubUnavailable
    ) -> Fetched:
        """Fetch a release from the cache because the hub does not answer."""
        try:
            fetched = self._fetch_from_cache(reference, entry, seen)
        except RegistryError as missing:
            raise (missing if isinstance(error, Offline) else error) from None
        if not isinstance(error, Offline):
            warnings.warn(f"{error}. {fetched.release} is taken from the cache.", StaleWarning, stacklevel=5)
        return fetched

    # -- from the hub --------------------------------------------------------------------------------------------

    def _fetch_from_hub(self, reference: Reference, entry: LockEntry | None, seen: Seen) -> Fetched:
        name = reference.name
        refs = self.hub.refs(name)
        self._check_tags(name, refs, seen, _find_pin(reference, entry))
        state = self._read_state(name, refs, seen)
        manifests = Manifests(self.hub, name, self._list_known(name, seen))
        index = index_of(name, refs, state, manifests)
        locked = _find_locked(reference, entry)
        release = index.resolve(reference, unversioned=True) if locked is None else _find_now(index, locked)
        before = self._find_before(release or cast("Release", locked), seen)
        if release is None or before.commit not in (None, release.commit):
            raise self._explain_move(name, before, release)
        identity = self._check_identity(release, before)
        fetched = self._fetch_files(release, before, manifests)
        self._record(fetched, identity, refs, index)
        return fetched

    def _check_tags(self, name: str, refs: Refs, seen: Seen, pinned: Version | str | None) -> None:
        """Refuse a hub where known versions vanished or moved.

        A pinned or locked version is available even if other versions vanished or moved.
        """
        lost = self._describe_lost_tags(name, refs, seen, pinned)
        if not lost:
            return
        if seen.identity and self.hub.identity(name) != seen.identity:
            raise self._explain_replacement(name)
        more = f" (and {len(lost) - _EXAMPLES} more)" if len(lost) > _EXAMPLES else ""
        raise ReleaseMoved(
            f"{'; '.join(lost[:_EXAMPLES])}{more}. A published version never changes, so somebody has moved or removed "
            f"its tag, or the registry shows an earlier state of itself. {self._describe_way_out(name)}"
        )

    def _describe_lost_tags(self, name: str, refs: Refs, seen: Seen, pinned: Version | str | None) -> list[str]:
        lost = []
        for tag, now in find_lost_tags(seen, refs.tags).items():
            [version] = versions_in([tag]) or [None]
            if version is None or pinned not in (None, version, seen.tags[tag]):
                continue
            if version_text(version) in seen.versions or self._was_release(name, version, seen.tags[tag]):
                lost.append(self._describe_move(name, version_text(version), seen.tags[tag], now))
        return lost

    def _was_release(self, name: str, version: Version, commit: str) -> bool:
        """Whether a lost tag pointed to the release of its version; foreign tags may move and vanish."""
        try:
            held = Manifest.parse(self.hub.read(name, commit, MANIFEST_FILE, MAX_MANIFEST))
        except HubFileNotFound:
            return False
        except RegistryError:
            return True  # a commit that cannot be read any more counts as one
        return Version(held.version) == version

    def _describe_move(self, name: str, version: str, before: str | None, now: str | None) -> str:
        what = f"is commit {now} now" if now else "is not there any more"
        return f"{name}@{version} on {self.hub.location} was commit {before} and {what}"

    def _list_known(self, name: str, seen: Seen) -> set[str]:
        """Return versions that were pulled or locked before: these are releases, wherever their tags point now."""
        entry = self.lock.entries().get(name)
        return {*seen.versions, *([entry.version] if entry is not None else [])}

    def _find_before(self, release: Release, seen: Seen) -> _Before:
        pulled, entry = seen.find(release), self.lock.entries().get(release.key)
        # A mirror of the registry has other commits and ids, but the same bytes.
        here = entry if entry is not None and entry.registry == self.hub.location else None
        repository = (here.repository if here else None) or seen.identity
        commit, manifest = (pulled.commit, pulled.manifest) if pulled else (None, None)
        if entry is not None and entry.version == release.version:
            commit, manifest = here.commit if here else commit, entry.manifest
        return _Before(release.version, commit, manifest, repository)

    def _record(self, fetched: Fetched, identity: str, refs: Refs, index: Index) -> None:
        release, digest, base = fetched.release, fetched.manifest.digest, fetched.manifest.base
        tags = {tag_of(version): commit for version, commit in index.versions.items()}

        def remember(before: Seen) -> Seen:
            seen = replace(before, identity=identity).with_pulled(release, digest)
            # Foreign tags come and go, so those that are known to be foreign are not remembered.
            foreign = index.known_foreign(set(tags) - set(seen.tags), most=_READ_TAGS if self.hub.local else 0)
            kept = {tag: commit for tag, commit in tags.items() if tag not in foreign}
            return seen.with_tags(kept).with_state(index.state, refs.branches.get(STATE_BRANCH))

        self.cache.remember(self.hub.location, release.name, remember)
        entry = LockEntry(release.version, release.commit, digest, self.hub.location, identity, base.id, base.commit)
        self.lock.record(release.key, entry)

    def _read_state(self, name: str, refs: Refs, seen: Seen) -> State:
        """Read withdrawals and aliases; they must not be older than what was seen before."""
        commit = refs.branches.get(STATE_BRANCH)
        if commit is not None and commit == seen.state_commit:
            return seen.state
        state = read_state(self.hub, name, refs)
        lost = self._describe_lost_state(name, seen, state, commit)
        if lost is None:
            return state
        if seen.identity and self.hub.identity(name) != seen.identity:
            raise self._explain_replacement(name)
        raise ReleaseMoved(f"{lost}. {self._describe_way_out(name)}")

    def _describe_lost_state(self, name: str, seen: Seen, state: State, commit: str | None) -> str | None:
        lost = find_lost_state(seen, state, commit)
        if not lost:
            return None
        return (
            f"{name} on {self.hub.location} shows an earlier state of itself: branch {STATE_BRANCH} was commit "
            f"{seen.state_commit} and {f'is commit {commit} now' if commit else 'is not there any more'}, without "
            f"{', '.join(lost[:_EXAMPLES])}"
        )

    def _explain_move(self, name: str, before: _Before, release: Release | None) -> IntegrityError:
        """Return the error for a known version that vanished or moved."""
        if before.repository and self.hub.identity(name) != before.repository:
            return self._explain_replacement(name)
        moved = self._describe_move(name, before.version, before.commit, release.commit if release else None)
        return ReleaseMoved(
            f"{moved}. A published version never changes, so somebody has moved or removed its tag. "
            f"{self._describe_way_out(name)}"
        )

    def _check_identity(self, release: Release, before: _Before) -> str:
        """Return the id of the repository: the known one for a known release, else the hub's after comparing it.

        Raises:
            RepositoryReplaced: The id has changed.
        """
        if before.repository and before.commit == release.commit:
            return before.repository
        identity = self.hub.identity(release.name)
        if before.repository and identity != before.repository:
            raise self._explain_replacement(release.name)
        return identity

    def _explain_change(self, release: Release, manifest: Manifest, digest: str | None) -> IntegrityError:
        return IntegrityError(
            f"The manifest of {release} has the sha256 {manifest.digest}, and had {digest} before. "
            f"{self._describe_way_out(release.name)}"
        )

    def _explain_replacement(self, name: str) -> RepositoryReplaced:
        return RepositoryReplaced(
            f"{name} on {self.hub.location} is not the repository that it was: the one from before was deleted, and "
            f"somebody has made another one of the same name. {self._describe_way_out(name)}"
        )

    def _describe_way_out(self, name: str) -> str:
        record = self.cache.record_path(self.hub.location, name)
        lock = f" and its entry in {self.lock.path}" if self.lock.path else ""
        return f"Ask its owner. If it is meant to be so, delete {record}{lock}."

    def _fetch_files(self, release: Release, before: _Before, manifests: Manifests) -> Fetched:
        """Fetch the files of a release: from the cache if they are there and undamaged, else from the hub."""
        # A release known from another hub is compared by its manifest.
        known = before.manifest if before.commit is not None else None
        manifest = self.cache.manifest(known) if known else None
        if manifest is None:
            manifest = read_manifest(self.hub, release, manifests)
            if before.manifest not in (None, manifest.digest):
                raise self._explain_change(release, manifest, before.manifest)
        return self._use_cache(release, manifest, download=True)

    def _use_cache(self, release: Release, manifest: Manifest, *, download: bool) -> Fetched:
        """Use the cached files if they are undamaged, else download them if allowed."""
        if self.signature is not None:
            _require_version(release)
            self.signature.check(release, manifest, self.hub if download else None)
        path = self.cache.path(manifest.digest)
        try:
            found = self.cache.use(manifest)
        except IntegrityError:
            if not download:
                raise
            found = self._add(release, manifest)
        if found is None:
            found = check_content(path, manifest)
            self.cache.note(manifest.digest, found)
        return Fetched(release, manifest, path, found)

    def _add(self, release: Release, manifest: Manifest) -> tuple[str, ...]:
        check_sizes(manifest)
        return self.cache.add(
            manifest,
            lambda name, record, sink: self._download(release, name, record, sink),
            lambda folder: check_content(folder, manifest),
        )

    def compare(self, release: Release, manifest: Manifest, refs: Refs) -> list[str]:
        """Return how a release and its repository differ from what lock file and cache record about them."""
        name = release.name
        seen = self.cache.seen(self.hub.location, name)
        before = self._find_before(release, seen)
        problems = self._describe_lost_tags(name, refs, seen, None)
        lost = self._describe_lost_state(name, seen, read_state(self.hub, name, refs), refs.branches.get(STATE_BRANCH))
        problems += [lost] if lost else []
        if before.commit not in (None, release.commit) and not any(f"@{release.version} " in each for each in problems):
            problems.append(str(self._explain_move(release.name, before, release)))
        if before.manifest not in (None, manifest.digest):
            problems.append(str(self._explain_change(release, manifest, before.manifest)))
        return problems

    def _download(self, release: Release, name: str, record: FileRecord, sink: BinaryIO) -> None:
        if self.progress is not None:
            sink = cast("BinaryIO", _Counted(sink, self.progress, name, record.size))
        try:
            self.hub.download(release.name, release.commit, release.path(name), sink, record.size)
        except HubFileNotFound:
            raise IntegrityError(f"{release} has no {name}, which its manifest lists") from None

    # -- from the cache ------------------------------------------------------------------------------------------

    def _fetch_from_cache(self, reference: Reference, entry: LockEntry | None, seen: Seen) -> Fetched:
        """Fetch a release that was pulled before.

        Raises:
            Offline: The cache has no matching release.
        """
        if entry is not None:
            manifest = self.cache.manifest(entry.manifest)
            release = Release(reference.name, entry.version, entry.commit, folder=reference.folder)
        elif (plain := self._find_plain(reference, seen)) is not None:
            release, manifest = plain
        else:
            there = {v: pulled for v, pulled in seen.versions.items() if self.cache.manifest(pulled.manifest)}
            index = Index(reference.name, {Version(v): pulled.commit for v, pulled in there.items()}, seen.state)
            try:
                release = index.resolve(reference)
            except RegistryError as reason:
                raise self._explain_offline(f"{reason} in the cache") from None
            manifest = self.cache.manifest(there[release.version].manifest)
        if manifest is None:
            raise self._explain_offline(f"{release} is not in the cache")
        return self._use_cache(release, manifest, download=False)

    def _find_plain(self, reference: Reference, seen: Seen) -> tuple[Release, Manifest | None] | None:
        """Return an unversioned adapter that was pulled before; ``None`` unless the reference names its commit."""
        if reference.commit is None:
            return None
        release = Release.at_commit(reference.name, reference.commit, reference.folder)
        pulled = seen.find(release)
        return None if pulled is None else (release, self.cache.manifest(pulled.manifest))

    def _explain_offline(self, reason: str) -> Offline:
        return Offline(
            f"{reason} {self.cache.folder}, and the network is off. Pull it once with a network, with this cache"
        )

    def _warn(self, fetched: Fetched) -> Fetched:
        release = fetched.release
        if release.yanked is not None and not self.quiet:
            warnings.warn(f"{release} was withdrawn: {release.yanked}", YankedWarning, stacklevel=4)
        for reason in () if self.quiet else fetched.warnings:
            warnings.warn(f"{release}: {reason}", AdapterWarning, stacklevel=4)
        return fetched


def _find_locked(reference: Reference, entry: LockEntry | None) -> Release | None:
    if entry is None:
        return None
    return Release(reference.name, entry.version, entry.commit, folder=reference.folder)


def _find_now(index: Index, locked: Release) -> Release | None:
    """Return a locked release as the hub has it now, or a locked commit; ``None`` if its tag is gone."""
    version = Version(locked.version)
    if locked.unversioned:
        return locked
    return index.release(version) if version in index.versions else None


def _require_version(release: Release) -> None:
    if release.unversioned:
        raise SignatureNotFound(
            f"{release} is not published as a version, so nobody has signed it, and a signature is required. Publish "
            f"it signed: lora-plugins adopt {release} <org/name> --version 1.0.0 --sign KEY"
        )


def _find_pin(reference: Reference, entry: LockEntry | None) -> Version | str | None:
    """Return the pinned or locked version or commit; ``None`` if the newest release is requested."""
    if entry is not None:
        return Version(entry.version)
    return reference.version or reference.commit


class _Counted:
    """A file that reports how much was written to it."""

    def __init__(self, sink: BinaryIO, progress: Progress, name: str, size: int) -> None:
        self._sink, self._progress, self._name, self._size = sink, progress, name, size

    def write(self, data: bytes) -> int:
        written = self._sink.write(data)
        self._progress(self._name, self._sink.tell(), self._size)
        return written

    def __getattr__(self, name: str) -> Any:
        return getattr(self._sink, name)

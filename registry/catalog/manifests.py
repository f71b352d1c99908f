"""Read the manifests of a repository's commits, each once."""

from __future__ import annotations

from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor

from packaging.version import Version

from registry.catalog.plain import PlainAdapter, find_adapters, make_manifest
from registry.catalog.release import Release
from registry.errors import CommitNotFound, HubFileNotFound, InvalidManifest, NotAdapter
from registry.formats.manifest import MANIFEST_FILE, MAX_MANIFEST, Manifest
from registry.formats.references import version_text
from registry.hubs.protocol import Hub

__all__ = ["Manifests"]

#: Manifests that are read concurrently.
_READERS = 8


class Manifests:
    """The manifests of one repository, each read once.

    Args:
        hub: The hub of the repository.
        name: ``org/name``.
        known: Versions known to be releases; their manifests need not be read.
    """

    def __init__(self, hub: Hub, name: str, known: Iterable[str] = ()) -> None:
        self._hub, self._name, self._known = hub, name, frozenset(known)
        self._found: dict[str, Manifest | InvalidManifest | None] = {}
        self._plain: dict[str, list[PlainAdapter]] = {}

    def read(self, commit: str) -> Manifest | None:
        """Return the manifest in a commit; ``None`` if it has none.

        Raises:
            InvalidManifest: Its manifest is malformed.
        """
        if commit not in self._found:
            self._found[commit] = self._read(commit)
        found = self._found[commit]
        if isinstance(found, InvalidManifest):
            raise found
        return found

    def read_ahead(self, commits: Iterable[str]) -> None:
        """Read the manifests of several commits concurrently."""
        missing = sorted({commit for commit in commits if commit not in self._found})
        if len(missing) > 1:
            with ThreadPoolExecutor(_READERS) as readers:
                self._found.update(zip(missing, readers.map(self._read, missing), strict=True))

    def list_plain(self, commit: str) -> list[PlainAdapter] | None:
        """Return the unversioned adapters of a commit; ``None`` if there is no such commit."""
        if commit not in self._plain:
            try:
                self._plain[commit] = find_adapters(self._hub, self._name, commit)
            except CommitNotFound:
                return None
        return self._plain[commit]

    def read_plain(self, release: Release) -> Manifest:
        """Return the manifest of an unversioned adapter.

        Raises:
            NotAdapter: Its commit has no such adapter.
        """
        for adapter in self.list_plain(release.commit) or ():
            if adapter.folder == release.folder:
                return make_manifest(self._hub, adapter)
        raise NotAdapter(f"{release} on {self._hub.location} holds no adapter")

    def describe_plain(self, adapter: PlainAdapter) -> str:
        """Return what the configuration of an unversioned adapter says."""
        return adapter.describe(self._hub)

    def find_request(self, ref: str) -> str:
        """Return the commit of a change request; see `Hub.change_request`."""
        return self._hub.change_request(self._name, ref)

    def has_read(self, commit: str) -> bool:
        """Whether the manifest of a commit was read already."""
        return commit in self._found

    def is_known(self, version: Version) -> bool:
        """Whether a version is known to be a release."""
        return version_text(version) in self._known

    def _read(self, commit: str) -> Manifest | InvalidManifest | None:
        try:
            return Manifest.parse(self._hub.read(self._name, commit, MANIFEST_FILE, MAX_MANIFEST))
        except (HubFileNotFound, CommitNotFound):
            return None
        except InvalidManifest as error:
            return error

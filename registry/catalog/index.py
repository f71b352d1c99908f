"""The releases of a repository at one moment, and which of them a reference means."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from packaging.version import Version

from registry.catalog.state import State, read_state
from registry.errors import (
    AliasNotFound,
    CommitNotFound,
    HubFileNotFound,
    IntegrityError,
    InvalidManifest,
    NotAdapter,
    VersionNotFound,
)
from registry.formats.manifest import MANIFEST_FILE, MAX_MANIFEST, Manifest
from registry.formats.references import Reference, newest_in, parse_version, version_text, versions_in
from registry.hubs.protocol import Hub, Refs

__all__ = ["Index", "Release", "read_index", "read_manifest"]

_SHOWN = 5


@dataclass(frozen=True)
class Release:
    """One published version of an adapter.

    Attributes:
        name: ``org/name``.
        version: Of the adapter.
        commit: That holds it.
        yanked: Why it was withdrawn; ``None`` if it wasn't.
        aliases: That stand for it.
    """

    name: str
    version: str
    commit: str
    yanked: str | None = None
    aliases: tuple[str, ...] = ()

    @property
    def prerelease(self) -> bool:
        """Whether it is only chosen when it is asked for."""
        return Version(self.version).is_prerelease

    def __str__(self) -> str:
        return f"{self.name}@{self.version}"


@dataclass(frozen=True)
class Index:
    """The versions of a repository with their commits, and their state."""

    name: str
    versions: Mapping[Version, str]
    state: State

    def releases(self) -> list[Release]:
        """All releases, oldest version first."""
        return [self.release(version) for version in sorted(self.versions)]

    def release(self, version: Version) -> Release:
        """The release of a version that is there."""
        text = version_text(version)
        yank = self.state.yanked.get(text)
        return Release(
            self.name, text, self.versions[version], yank.reason if yank else None, self.state.aliases_of(text)
        )

    def newest(self) -> Release | None:
        """The newest stable release that is not withdrawn."""
        version = newest_in(None, self._offered())
        return None if version is None else self.release(version)

    def resolve(self, reference: Reference) -> Release:
        """The release that a reference means.

        Raises:
            VersionNotFound: There is none; the message says which there are.
        """
        if reference.commit is not None:
            return self._by_commit(reference.commit)
        version = reference.version
        if reference.alias is not None:
            version = self._by_alias(reference.alias)
        if version is not None:
            if version not in self.versions:
                raise VersionNotFound(f"{self.name} has no version {version_text(version)}; it has {self._known()}")
            return self.release(version)
        version = newest_in(reference.range, self._offered())
        if version is None:
            raise VersionNotFound(self._why_none(reference))
        return self.release(version)

    def _offered(self) -> list[Version]:
        if not self.state.yanked:
            return list(self.versions)
        return [version for version in self.versions if version_text(version) not in self.state.yanked]

    def _by_commit(self, commit: str) -> Release:
        found = [version for version, candidate in self.versions.items() if candidate == commit]
        if not found:
            raise NotAdapter(f"{self.name}: commit {commit} is no published version; it has {self._known()}")
        return self.release(found[0])

    def _by_alias(self, alias: str) -> Version:
        version = self.state.version_of(alias)
        if version is None:
            aliases = sorted(known for known in self.state.aliases if self.state.version_of(known))
            known = f"the aliases are {', '.join(aliases)}" if aliases else "it has no aliases"
            raise AliasNotFound(f"{self.name} has no alias {alias}; {known}")
        return Version(version)

    def _why_none(self, reference: Reference) -> str:
        asked = f"no version in {reference.range}" if reference.range is not None else "no stable version"
        if not self.versions:
            return f"{self.name} has no published version yet"
        text = f"{self.name} has {asked}; it has {self._known()}"
        # A range that names a pre-release takes any.
        with_pre = [v for v in self._offered() if reference.range is None or reference.range.contains(v, True)]
        if with_pre:
            return f"{text}. Pre-releases are taken by name: {self.name}@{version_text(max(with_pre))}"
        if len(self._offered()) < len(self.versions):
            return f"{text}. Withdrawn versions are taken by name only"
        return text

    def _known(self) -> str:
        if not self.versions:
            return "none"
        newest = sorted(self.versions, reverse=True)
        texts = [
            version_text(version) + (" (withdrawn)" if version_text(version) in self.state.yanked else "")
            for version in newest[:_SHOWN]
        ]
        more = f" and {len(newest) - _SHOWN:,} older ones" if len(newest) > _SHOWN else ""
        return ", ".join(texts) + more


def read_index(hub: Hub, name: str, state: Callable[[Refs], State] | None = None) -> Index:
    """What a repository holds now.

    Args:
        hub: Where it is.
        name: ``org/name``.
        state: Reads the state, if not from the hub.

    Raises:
        RepositoryNotFound: There is no such repository.
    """
    refs = hub.refs(name)
    return index_of(name, refs, read_state(hub, name, refs) if state is None else state(refs))


def index_of(name: str, refs: Refs, state: State) -> Index:
    """The releases that tags publish."""
    versions = {version: refs.tags[tag] for version, tag in versions_in(refs.tags).items()}
    return Index(name, versions, state)


def read_manifest(hub: Hub, release: Release) -> Manifest:
    """Read the manifest of a release from its hub.

    Raises:
        NotAdapter: It has none.
        InvalidManifest: It has none that can be read.
        IntegrityError: It has that of another version.
    """
    try:
        data = hub.read(release.name, release.commit, MANIFEST_FILE, MAX_MANIFEST)
        manifest = Manifest.parse(data)
    except (HubFileNotFound, CommitNotFound):
        raise NotAdapter(
            f"{release} on {hub.location} has no {MANIFEST_FILE}: its tag was not set by this registry"
        ) from None
    except InvalidManifest as reason:
        raise InvalidManifest(f"{release} on {hub.location}: {reason}") from None
    if parse_version(manifest.version) != Version(release.version):
        raise IntegrityError(
            f"{release} on {hub.location} holds the manifest of version {manifest.version}: its tag is wrong"
        )
    return manifest

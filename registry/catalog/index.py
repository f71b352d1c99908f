"""The releases of a repository at one moment, and reference resolution.

Tags can be set by others, so a tag that looks like a version is a release only if its commit holds the manifest of
that version. Manifests are read only as needed: the newest version first, until one is a release.
"""

from __future__ import annotations

import contextlib
from collections.abc import Container, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

from packaging.version import Version

from registry.catalog.state import State, read_state
from registry.errors import (
    AliasNotFound,
    CommitNotFound,
    HubFileNotFound,
    IntegrityError,
    InvalidManifest,
    NotAdapter,
    RegistryError,
    VersionNotFound,
)
from registry.formats.manifest import MANIFEST_FILE, MAX_MANIFEST, Manifest
from registry.formats.references import Reference, is_in, parse_version, tag_of, version_text, versions_in
from registry.hubs.protocol import MAIN, Hub, Refs

__all__ = ["Index", "Manifests", "Release", "index_of", "line_of", "read_index", "read_manifest"]

_SHOWN = 5
#: Manifests that are read concurrently.
_READERS = 8


@dataclass(frozen=True)
class Release:
    """One published version of an adapter.

    Attributes:
        name: ``org/name``.
        version: Version of the adapter.
        commit: Commit holding the release.
        yanked: Reason for its withdrawal; ``None`` if it was not withdrawn.
        aliases: Aliases that point to it.
    """

    name: str
    version: str
    commit: str
    yanked: str | None = None
    aliases: tuple[str, ...] = ()

    @property
    def prerelease(self) -> bool:
        """Whether it is a pre-release, which is chosen only on request."""
        return Version(self.version).is_prerelease

    def __str__(self) -> str:
        return f"{self.name}@{self.version}"


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


@dataclass(frozen=True)
class Index:
    """The version tags of a repository, and what is known of the releases among them.

    Attributes:
        name: ``org/name``.
        versions: The versions named by tags, with their commits. Some may be foreign.
        state: Withdrawn versions and aliases.
        manifests: Reads the manifests that distinguish releases from foreign tags; ``None`` if all versions are
            releases.
        branches: The branches with their commits.
    """

    name: str
    versions: Mapping[Version, str]
    state: State
    manifests: Manifests | None = None
    branches: Mapping[str, str] = field(default_factory=dict)

    def releases(self) -> list[Release]:
        """Return all releases, oldest version first."""
        self._read_ahead()
        return [self.release(version) for version in sorted(self.versions) if self.is_release(version)]

    def foreign_tags(self) -> dict[str, str]:
        """Return the version tags whose commits hold no release, with these commits."""
        self._read_ahead()
        return {tag_of(v): self.versions[v] for v in sorted(self.versions) if not self.is_release(v)}

    def known_foreign(self, tags: Container[str], *, most: int) -> set[str]:
        """Return those of these tags that are known to be foreign.

        Args:
            tags: The tags.
            most: How many manifests may be read for it, besides those that were read already.
        """
        found = set()
        for version in (version for version in self.versions if tag_of(version) in tags):
            if self.manifests is not None and not self.manifests.has_read(self.versions[version]):
                most -= 1
                if most < 0:
                    continue
            with contextlib.suppress(RegistryError):  # not known
                if not self.is_release(version):
                    found.add(tag_of(version))
        return found

    def is_release(self, version: Version) -> bool:
        """Whether a version is a release rather than a foreign tag.

        A tag at the commit of another release is foreign, unless a branch holds the tag's own version: then the tag was
        moved off its release, and fetching that version raises an error. The same holds for a commit whose manifest
        names a version without a tag there.

        Raises:
            HubError: The hub does not answer.
        """
        if self.manifests is None or self.manifests.is_known(version):
            return True
        commit = self.versions[version]
        try:
            held = self.manifests.read(commit)
        except InvalidManifest:
            return True  # fetching it raises an error with the reason
        if held is None or Version(held.version) == version:
            return held is not None
        return self.versions.get(Version(held.version)) != commit or self._is_on_its_branch(version)

    def newest_of(self, versions: Iterable[Version]) -> Version | None:
        """Return the newest of these versions that is a release."""
        return next((version for version in sorted(versions, reverse=True) if self.is_release(version)), None)

    def _is_on_its_branch(self, version: Version) -> bool:
        """Whether a branch holds the release of a version whose tag is elsewhere."""
        return any(
            Version(manifest.version) == version
            for line in (MAIN, line_of(version))
            if (manifest := self._read_manifest_at(self.branches.get(line))) is not None
        )

    def _read_manifest_at(self, commit: str | None) -> Manifest | None:
        try:
            return None if commit is None or self.manifests is None else self.manifests.read(commit)
        except InvalidManifest:
            return None

    def _read_ahead(self) -> None:
        if self.manifests is not None:
            unknown = [commit for v, commit in self.versions.items() if not self.manifests.is_known(v)]
            self.manifests.read_ahead(unknown)

    def release(self, version: Version) -> Release:
        """Return the release of a version in this index."""
        text = version_text(version)
        yank = self.state.yanked.get(text)
        return Release(
            self.name, text, self.versions[version], yank.reason if yank else None, self.state.aliases_of(text)
        )

    def newest(self) -> Release | None:
        """Return the newest stable release that is not withdrawn."""
        version = self.newest_of(v for v in self._list_offered() if is_in(None, v))
        return None if version is None else self.release(version)

    def resolve(self, reference: Reference) -> Release:
        """Return the release that a reference resolves to.

        Raises:
            VersionNotFound: No release matches; the message lists the known ones.
        """
        if reference.commit is not None:
            return self._find_by_commit(reference.commit)
        version = reference.version
        if reference.alias is not None:
            version = self._find_by_alias(reference.alias)
        if version is not None:
            return self._find_by_version(version)
        version = self.newest_of(v for v in self._list_offered() if is_in(reference.range, v))
        if version is None:
            raise self._explain_none(reference)
        return self.release(version)

    def _list_offered(self) -> list[Version]:
        if not self.state.yanked:
            return list(self.versions)
        return [version for version in self.versions if version_text(version) not in self.state.yanked]

    def _find_by_version(self, version: Version) -> Release:
        if version not in self.versions:
            raise VersionNotFound(f"{self.name} has no version {version_text(version)}; it has {self._list_known()}")
        # A commit with another version's manifest is refused when it is read; that error names both versions.
        if not self.is_release(version) and self._read_manifest_at(self.versions[version]) is None:
            raise NotAdapter(
                f"{self.name} has no release {version_text(version)}: the tag {tag_of(version)} is foreign, its commit "
                f"holds no {MANIFEST_FILE}. Releases are {self._list_known()}"
            )
        return self.release(version)

    def _find_by_commit(self, commit: str) -> Release:
        found = self.newest_of(version for version, candidate in self.versions.items() if candidate == commit)
        if found is None:
            raise NotAdapter(
                f"{self.name}: commit {commit} is not a published version; releases are {self._list_known()}"
            )
        return self.release(found)

    def _find_by_alias(self, alias: str) -> Version:
        version = self.state.version_of(alias)
        if version is None:
            aliases = sorted(known for known in self.state.aliases if self.state.version_of(known))
            known = f"the aliases are {', '.join(aliases)}" if aliases else "it has no aliases"
            raise AliasNotFound(f"{self.name} has no alias {alias}; {known}")
        return Version(version)

    def _explain_none(self, reference: Reference) -> VersionNotFound:
        asked = f"no version in {reference.range}" if reference.range is not None else "no stable version"
        known = [parse_version(release.version) for release in self.releases()]
        if not known:
            foreign = ", ".join([*self.foreign_tags()][:_SHOWN])
            if foreign:
                return NotAdapter(f"{self.name} has no release: its tags ({foreign}) were not set by this registry")
            return VersionNotFound(f"{self.name} has no published version yet")
        text = f"{self.name} has {asked}; it has {self._list_known()}"
        # A range that names a pre-release allows all pre-releases.
        offered = [v for v in self._list_offered() if v in known]
        with_pre = [v for v in offered if reference.range is None or reference.range.contains(v, True)]
        if with_pre:
            text += f". Pre-releases are taken by name: {self.name}@{version_text(max(with_pre))}"
        elif len(offered) < len(known):
            text += ". Withdrawn versions are taken by name only"
        return VersionNotFound(text)

    def _list_known(self) -> str:
        newest = sorted((parse_version(release.version) for release in self.releases()), reverse=True)
        if not newest:
            return "none"
        texts = [
            version_text(version) + (" (withdrawn)" if version_text(version) in self.state.yanked else "")
            for version in newest[:_SHOWN]
        ]
        more = f" and {len(newest) - _SHOWN:,} older ones" if len(newest) > _SHOWN else ""
        return ", ".join(texts) + more


def line_of(version: Version) -> str:
    """Return the branch of a version that is not the newest stable one."""
    return f"release-{version_text(version)}"


def read_index(hub: Hub, name: str) -> Index:
    """Read the current index of a repository.

    Args:
        hub: The hub of the repository.
        name: ``org/name``.

    Raises:
        RepositoryNotFound: There is no such repository.
    """
    refs = hub.refs(name)
    return index_of(name, refs, read_state(hub, name, refs), Manifests(hub, name))


def index_of(name: str, refs: Refs, state: State, manifests: Manifests) -> Index:
    """Return the index of the releases that tags publish."""
    versions = {version: refs.tags[tag] for version, tag in versions_in(refs.tags).items()}
    return Index(name, versions, state, manifests, refs.branches)


def read_manifest(hub: Hub, release: Release, manifests: Manifests | None = None) -> Manifest:
    """Read the manifest of a release from its hub.

    Args:
        hub: The hub of the release.
        release: The release.
        manifests: Manifests of its repository that were read before.

    Raises:
        NotAdapter: Its commit has no manifest.
        InvalidManifest: The manifest is malformed.
        IntegrityError: The manifest is that of another version.
    """
    try:
        manifest = (manifests or Manifests(hub, release.name)).read(release.commit)
    except InvalidManifest as reason:
        raise InvalidManifest(f"{release} on {hub.location}: {reason}") from None
    if manifest is None:
        raise NotAdapter(f"{release} on {hub.location} has no {MANIFEST_FILE}: its tag was not set by this registry")
    if parse_version(manifest.version) != Version(release.version):
        raise IntegrityError(
            f"{release} on {hub.location} holds the manifest of version {manifest.version}: its tag is wrong"
        )
    return manifest

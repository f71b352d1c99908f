"""The releases of a repository at one moment, and which one is meant.

Anybody may set tags, so a tag that looks like a version is a release only if its commit holds the manifest of that
version. Manifests are read where the answer depends on them: the newest version first, until one is a release.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
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
    VersionNotFound,
)
from registry.formats.manifest import MANIFEST_FILE, MAX_MANIFEST, Manifest
from registry.formats.references import Reference, is_in, parse_version, tag_of, version_text, versions_in
from registry.hubs.protocol import MAIN, Hub, Refs

__all__ = ["Index", "Manifests", "Release", "index_of", "line_of", "read_index", "read_manifest"]

_SHOWN = 5
#: Manifests that are read at the same time.
_READERS = 8


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


class Manifests:
    """The manifests of one repository, each read once.

    Args:
        hub: Where it is.
        name: ``org/name``.
        known: Versions that are known to be releases, so that their manifests need not be read.
    """

    def __init__(self, hub: Hub, name: str, known: Iterable[str] = ()) -> None:
        self._hub, self._name, self._known = hub, name, frozenset(known)
        self._found: dict[str, Manifest | InvalidManifest | None] = {}

    def read(self, commit: str) -> Manifest | None:
        """Return the manifest in a commit; ``None`` if it has none.

        Raises:
            InvalidManifest: It has one that can't be read.
        """
        if commit not in self._found:
            self._found[commit] = self._read(commit)
        found = self._found[commit]
        if isinstance(found, InvalidManifest):
            raise found
        return found

    def read_ahead(self, commits: Iterable[str]) -> None:
        """Read several at the same time."""
        missing = sorted({commit for commit in commits if commit not in self._found})
        if len(missing) > 1:
            with ThreadPoolExecutor(_READERS) as readers:
                self._found.update(zip(missing, readers.map(self._read, missing), strict=True))

    def is_known(self, version: Version) -> bool:
        """Whether a version has been seen as a release before."""
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
    """The tags of a repository that look like versions, and what is known of the releases among them.

    Attributes:
        name: ``org/name``.
        versions: The versions that tags stand for, with their commits. Some may be foreign.
        state: Withdrawn versions and aliases.
        manifests: Where the manifests are read by which releases are told from foreign tags; ``None`` if all versions
            are releases.
        branches: The branches with their commits.
    """

    name: str
    versions: Mapping[Version, str]
    state: State
    manifests: Manifests | None = None
    branches: Mapping[str, str] = field(default_factory=dict)

    def releases(self) -> list[Release]:
        """All releases, oldest version first."""
        self._read_ahead()
        return [self.release(version) for version in sorted(self.versions) if self.is_release(version)]

    def foreign_tags(self) -> dict[str, str]:
        """Tags that look like versions and hold no release, with their commits."""
        self._read_ahead()
        return {tag_of(v): self.versions[v] for v in sorted(self.versions) if not self.is_release(v)}

    def is_release(self, version: Version) -> bool:
        """Whether a version is a release, and not somebody's tag.

        A tag at the commit of another release is foreign, too, unless a branch holds its own version: then it has been
        moved away from its release, which is an error for whoever asks for it. So is a commit with the manifest of a
        version that has no tag there.

        Raises:
            HubError: The hub didn't answer.
        """
        if self.manifests is None or self.manifests.is_known(version):
            return True
        commit = self.versions[version]
        try:
            held = self.manifests.read(commit)
        except InvalidManifest:
            return True  # whoever asks for it is told why it can't be read
        if held is None or Version(held.version) == version:
            return held is not None
        return self.versions.get(Version(held.version)) != commit or self._is_on_its_branch(version)

    def newest_of(self, versions: Iterable[Version]) -> Version | None:
        """The newest of these versions that is a release."""
        return next((version for version in sorted(versions, reverse=True) if self.is_release(version)), None)

    def _is_on_its_branch(self, version: Version) -> bool:
        """Whether a branch holds the release of a version whose tag is elsewhere."""
        return any(
            Version(manifest.version) == version
            for line in (MAIN, line_of(version))
            if (manifest := self._manifest_at(self.branches.get(line))) is not None
        )

    def _manifest_at(self, commit: str | None) -> Manifest | None:
        try:
            return None if commit is None or self.manifests is None else self.manifests.read(commit)
        except InvalidManifest:
            return None

    def _read_ahead(self) -> None:
        if self.manifests is not None:
            unknown = [commit for v, commit in self.versions.items() if not self.manifests.is_known(v)]
            self.manifests.read_ahead(unknown)

    def release(self, version: Version) -> Release:
        """The release of a version that is there."""
        text = version_text(version)
        yank = self.state.yanked.get(text)
        return Release(
            self.name, text, self.versions[version], yank.reason if yank else None, self.state.aliases_of(text)
        )

    def newest(self) -> Release | None:
        """The newest stable release that is not withdrawn."""
        version = self.newest_of(v for v in self._offered() if is_in(None, v))
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
            return self._by_version(version)
        version = self.newest_of(v for v in self._offered() if is_in(reference.range, v))
        if version is None:
            raise self._explain_none(reference)
        return self.release(version)

    def _offered(self) -> list[Version]:
        if not self.state.yanked:
            return list(self.versions)
        return [version for version in self.versions if version_text(version) not in self.state.yanked]

    def _by_version(self, version: Version) -> Release:
        if version not in self.versions:
            raise VersionNotFound(f"{self.name} has no version {version_text(version)}; it has {self._known()}")
        # One that holds another version's manifest is refused with both versions named when it is read.
        if not self.is_release(version) and self._manifest_at(self.versions[version]) is None:
            raise NotAdapter(
                f"{self.name} has no release {version_text(version)}: the tag {tag_of(version)} is foreign, its commit "
                f"holds no {MANIFEST_FILE}. Releases are {self._known()}"
            )
        return self.release(version)

    def _by_commit(self, commit: str) -> Release:
        found = self.newest_of(version for version, candidate in self.versions.items() if candidate == commit)
        if found is None:
            raise NotAdapter(f"{self.name}: commit {commit} is not a published version; releases are {self._known()}")
        return self.release(found)

    def _by_alias(self, alias: str) -> Version:
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
        text = f"{self.name} has {asked}; it has {self._known()}"
        # A range that names a pre-release takes any.
        offered = [v for v in self._offered() if v in known]
        with_pre = [v for v in offered if reference.range is None or reference.range.contains(v, True)]
        if with_pre:
            text += f". Pre-releases are taken by name: {self.name}@{version_text(max(with_pre))}"
        elif len(offered) < len(known):
            text += ". Withdrawn versions are taken by name only"
        return VersionNotFound(text)

    def _known(self) -> str:
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
    """The branch of a version that is not the newest stable one."""
    return f"release-{version_text(version)}"


def read_index(hub: Hub, name: str) -> Index:
    """What a repository holds now.

    Args:
        hub: Where it is.
        name: ``org/name``.

    Raises:
        RepositoryNotFound: There is no such repository.
    """
    refs = hub.refs(name)
    return index_of(name, refs, read_state(hub, name, refs), Manifests(hub, name))


def index_of(name: str, refs: Refs, state: State, manifests: Manifests) -> Index:
    """The releases that tags publish."""
    versions = {version: refs.tags[tag] for version, tag in versions_in(refs.tags).items()}
    return Index(name, versions, state, manifests, refs.branches)


def read_manifest(hub: Hub, release: Release, manifests: Manifests | None = None) -> Manifest:
    """Read the manifest of a release from its hub.

    Args:
        hub: Where it is.
        release: The release.
        manifests: Those of its repository that have been read.

    Raises:
        NotAdapter: It has none.
        InvalidManifest: It has none that can be read.
        IntegrityError: It has that of another version.
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

"""The releases of a repository at one moment, and reference resolution.

Tags can be set by others, so a tag that looks like a version is a release only if its commit holds the manifest of
that version. Manifests are read only as needed: the newest version first, until one is a release.
"""

from __future__ import annotations

import contextlib
from collections.abc import Container, Iterable, Mapping
from dataclasses import dataclass, field

from packaging.version import Version

from registry.catalog.manifests import Manifests
from registry.catalog.plain import explain_found
from registry.catalog.release import Release
from registry.catalog.state import STATE_BRANCH, State, read_state
from registry.errors import (
    AliasNotFound,
    CommitNotFound,
    IntegrityError,
    InvalidManifest,
    NotAdapter,
    ReferenceConflict,
    RegistryError,
    VersionNotFound,
)
from registry.formats.manifest import MANIFEST_FILE, Manifest
from registry.formats.references import (
    Reference,
    is_in,
    parse_version,
    tag_of,
    version_text,
    versions_in,
)
from registry.hubs.protocol import MAIN, Hub, Refs

__all__ = ["Index", "Manifests", "Release", "index_of", "line_of", "read_index", "read_manifest"]

_SHOWN = 5


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
        tags: The tags that are not versions, with their commits.
    """

    name: str
    versions: Mapping[Version, str]
    state: State
    manifests: Manifests | None = None
    branches: Mapping[str, str] = field(default_factory=dict)
    tags: Mapping[str, str] = field(default_factory=dict)

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

        A tag at a commit with another version's manifest (another release, or a change on top) is foreign, unless
        a branch holds the tag's own version: then the tag was moved off its release, and fetching that version raises
        an error.

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
        return self._is_on_its_branch(version)

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
        note = self.state.notes.get(text)
        return Release(
            self.name,
            text,
            self.versions[version],
            yank.reason if yank else None,
            self.state.aliases_of(text),
            note=note.text if note else None,
            tags=self.state.tags.get(text, ()),
        )

    def newest(self) -> Release | None:
        """Return the newest stable release that is not withdrawn."""
        version = self.newest_of(v for v in self._list_offered() if is_in(None, v))
        return None if version is None else self.release(version)

    def resolve(self, reference: Reference, *, unversioned: bool = False) -> Release:
        """Return the release that a reference resolves to.

        Args:
            reference: The reference.
            unversioned: Whether an adapter that was not published counts, too.

        Raises:
            VersionNotFound: No release matches; the message lists the known ones.
            ReferenceConflict: An alias and a branch have the same name.
        """
        found = self._resolve(reference)
        if found.unversioned and not unversioned:
            raise NotAdapter(
                f"{found} is not a published version; releases are {self._list_known()}. To make it one: lora-plugins "
                f"adopt {found} {self.name} --version 1.0.0"
            )
        return found

    def _resolve(self, reference: Reference) -> Release:
        commit, version, proposed = reference.commit, reference.version, False
        if reference.branch is not None:
            commit, proposed = self._find_head(reference.branch), reference.branch.startswith("refs/")
        if reference.alias is not None:
            version, commit = self._find_by_name(reference)
        if commit is not None:
            return self._find_by_commit(commit, reference.folder, proposed=proposed)
        if version is not None:
            return self._find_by_version(version)
        if reference.folder:
            raise self._explain_plain(reference) or self._explain_folder(reference)
        wanted = [version for version in self._list_offered() if is_in(reference.range, version)]
        version = self.newest_of(wanted) or self._find_spoilt(wanted)
        if version is None:
            raise self._explain_none(reference)
        return self.release(version)

    def _find_spoilt(self, versions: Iterable[Version]) -> Version | None:
        """Return the newest version whose commit has another version's manifest; fetching it raises an error.

        Where no release is left, such a tag is not passed over: it would read as a repository without releases.
        """
        return next((v for v in sorted(versions, reverse=True) if self._read_manifest_at(self.versions[v])), None)

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
                f"holds no {MANIFEST_FILE}. Releases are {self._list_known()}. What the commit holds is "
                f"{self.name}@{self.versions[version]}"
            )
        return self.release(version)

    def _find_by_commit(self, commit: str, folder: str = "", *, proposed: bool = False) -> Release:
        """Return the release in a commit, or the unversioned adapter; a release that is only proposed is the latter."""
        found = self.newest_of(version for version, candidate in self.versions.items() if candidate == commit)
        if found is not None and not folder:
            return self.release(found)
        there = self.manifests.list_plain(commit) if self.manifests is not None else None
        if there is not None and not folder and not proposed:
            self._refuse_untagged(commit)
        if there is not None and any(adapter.folder == folder for adapter in there):
            return Release.at_commit(self.name, commit, folder)
        place = f"{folder} of {self.name}" if folder else self.name
        text = f"{place}: commit {commit} is not a published version"
        if there is None:
            known = "" if self.manifests is None else ", and the repository has no such commit"
            raise NotAdapter(f"{text}{known}; releases are {self._list_known()}")
        others = ", ".join(str(adapter) for adapter in there[:_SHOWN])
        more = f" and {len(there) - _SHOWN} more" if len(there) > _SHOWN else ""
        raise NotAdapter(
            f"{text}, and holds no adapter{' in that folder' if folder else ''}"
            + (f". It has them in folders: {others}{more}" if there else f"; releases are {self._list_known()}")
        )

    def _refuse_untagged(self, commit: str) -> None:
        """Refuse a commit with the manifest of a version whose tag is missing or elsewhere.

        Raises:
            NotAdapter: It is one.
        """
        held = self._read_manifest_at(commit)
        if held is not None:
            raise NotAdapter(
                f"{self.name}: commit {commit} is not a published version: it holds the manifest of {held.version} "
                f"without the tag {tag_of(Version(held.version))}. Releases are {self._list_known()}"
            )

    def _find_head(self, branch: str) -> str:
        """Return the commit of a branch, a tag that is not a version's, or a change request."""
        if self.manifests is None:
            raise VersionNotFound(f"{self.name}@{branch} is found by asking the registry; name a version or a commit")
        if branch.startswith("refs/"):
            try:
                return self.manifests.find_request(branch)
            except CommitNotFound as error:
                raise VersionNotFound(f"{self.name} has no {branch}: {error}") from None
        if branch not in self._named:
            known = ", ".join(sorted(name for name in self.branches if name != STATE_BRANCH)) or "none"
            raise VersionNotFound(f"{self.name} has no branch {branch}; its branches are {known}")
        return self._named[branch]

    @property
    def _named(self) -> dict[str, str]:
        return {**self.tags, **{name: head for name, head in self.branches.items() if name != STATE_BRANCH}}

    def _find_by_name(self, reference: Reference) -> tuple[Version | None, str | None]:
        """Return the version of an alias, or the commit of a branch with that name."""
        alias = reference.alias or ""
        version, head = self.state.version_of(alias), None if reference.exact else self._named.get(alias)
        if version is not None and head is not None:
            raise ReferenceConflict(
                f"{self.name}@{alias} is an alias of version {version} and a branch or tag at {head}: say "
                f"{self.name}@alias:{alias} or {self.name}@branch:{alias}"
            )
        if version is None and head is None:
            aliases = sorted(known for known in self.state.aliases if self.state.version_of(known))
            known = f"the aliases are {', '.join(aliases)}" if aliases else "it has no aliases"
            raise AliasNotFound(
                f"{self.name} has no alias {alias}; {known}{'' if reference.exact else ', and no branch of that name'}"
            )
        return (None, head) if version is None else (Version(version), None)

    def _explain_plain(self, reference: Reference) -> NotAdapter | None:
        """Return the error for a repository without releases that holds unversioned adapters, with the ways on."""
        if self.manifests is None:
            return None
        for branch, head in self._list_heads():
            with contextlib.suppress(RegistryError):
                found = [a for a in self.manifests.list_plain(head) or () if reference.folder in ("", a.folder)]
                if found:
                    return NotAdapter(explain_found(found, branch, self.manifests.describe_plain))
        return None

    def _explain_folder(self, reference: Reference) -> VersionNotFound:
        """Return the error for a folder that holds no adapter on any branch; it names those that do on main."""
        try:
            self._find_by_commit(self.branches.get(MAIN, ""), reference.folder)
        except NotAdapter as error:
            return error
        return self._explain_none(reference)

    def _list_heads(self) -> list[tuple[str, str]]:
        """Return the branches in which unversioned adapters are looked for, main first."""
        others = sorted(name for name in self.branches if name not in (MAIN, STATE_BRANCH))
        return [(name, self.branches[name]) for name in (MAIN, *others[:_SHOWN]) if name in self.branches]

    def _explain_none(self, reference: Reference) -> VersionNotFound:
        asked = f"no version in {reference.range}" if reference.range is not None else "no stable version"
        known = [parse_version(release.version) for release in self.releases()]
        if not known:
            plain = self._explain_plain(reference) if reference.range is None else None
            if plain is not None:
                return plain
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
    tags = {tag: commit for tag, commit in refs.tags.items() if tag not in versions_in([tag]).values()}
    return Index(name, versions, state, manifests, refs.branches, tags)


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
    if release.unversioned:
        return (manifests or Manifests(hub, release.name)).read_plain(release)
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

"""Publish a release: one commit, then its tag, despite concurrent pushes.

The tag decides: a commit without its tag is not a release. The next push of that version takes such a commit over if it
holds the same content, and otherwise overwrites it if its author does not set the tag in time.
"""

from __future__ import annotations

import random
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from packaging.version import Version

from registry.catalog.index import Index, Manifests, index_of, line_of
from registry.catalog.state import State
from registry.errors import PublishConflict, RepositoryNotFound, VersionExists
from registry.formats.manifest import MANIFEST_FILE, Manifest
from registry.formats.paths import SIGNATURE_FILE
from registry.formats.references import bumped, is_in, tag_of, version_text
from registry.hubs.protocol import MAIN, Conflict, Hub, Refs, TagExists
from registry.publishing.changes import (
    Changes,
    Draft,
    Head,
    Published,
    check_repository,
    manifest_at,
    plan_changes,
    read_head,
)
from registry.signing.signatures import read_signature

__all__ = ["Draft", "Published", "manifest_at", "publish"]

#: Seconds between another push's commit and its tag after which that push counts as dead.
PATIENCE = 10.0
#: Attempts to publish while others publish.
_ATTEMPTS = 30


@dataclass(frozen=True)
class _Task:
    """The publication of one release on one hub."""

    hub: Hub
    name: str
    message: str
    manifests: Manifests
    force: bool = False

    def attempt(self, refs: Refs, version: Version, draft: Draft) -> Published | None:
        """Try to publish given the current refs; ``None`` if another push interfered."""
        line = self._choose_line(refs, version)
        if line is None:
            return None
        self._check_first(refs)
        if line not in refs.branches:
            self.hub.create_branch(self.name, line, refs.branches[MAIN])
            refs = self.hub.refs(self.name)
        head = refs.branches[line]
        held = manifest_at(self.hub, self.name, head)
        if held is not None and Version(held.version) == version:
            if held.content_digest == draft.manifest.content_digest:
                return self._tag(version, head, held)
            if not self._is_abandoned(version, line, head):
                return None
        placed, changes = self.plan(refs, head, draft)
        try:
            commit = self.hub.commit(
                self.name, line, placed.all_files(), parent=head, message=self.message, delete=changes.deleted
            )
        except Conflict:
            return None
        return replace(self._tag(version, commit, placed.manifest), changes=changes)

    def plan(self, refs: Refs, head: str, draft: Draft) -> tuple[Draft, Changes]:
        """Return the release as placed in a commit, and the changes to the files there.

        Raises:
            RepositoryConflict: Foreign files have the names of its files.
        """
        return plan_changes(self.hub, self.name, draft, self._read_head(refs, head), force=self.force)

    def look(self, refs: Refs, version: Version, draft: Draft) -> Published:
        """Return the result that `attempt` would have, without changing anything.

        Raises:
            RepositoryConflict: `attempt` would raise it.
        """
        self._check_first(refs)
        own = line_of(version)
        line = own if own in refs.branches and self.newer_exists(refs, version) else MAIN
        placed, changes = self.plan(refs, refs.branches[line], draft)
        commit = refs.branches[line]
        return Published(self.name, version_text(version), commit, placed.manifest, False, None, changes, dry_run=True)

    def propose(self, refs: Refs, version: Version, draft: Draft) -> Published:
        """Open a change request with the files of the release.

        Raises:
            RepositoryConflict: Accepting it would replace foreign files.
        """
        self._check_first(refs)
        head = refs.branches[MAIN]
        placed, changes = self.plan(refs, head, draft)
        url = self.hub.propose(self.name, placed.all_files(), parent=head, message=self.message)
        return Published(self.name, version_text(version), head, placed.manifest, url=url, changes=changes)

    def index(self, refs: Refs) -> Index:
        """Return the index of the releases that the tags publish."""
        return index_of(self.name, refs, State(), self.manifests)

    def newer_exists(self, refs: Refs, version: Version) -> bool:
        """Whether a version is a pre-release, or a newer stable release exists."""
        index = self.index(refs)
        newer = [v for v in index.versions if v > version and not v.is_prerelease]
        return version.is_prerelease or index.newest_of(newer) is not None

    def _read_head(self, refs: Refs, commit: str) -> Head:
        return read_head(self.hub, self.name, commit, frozenset(refs.tags.values()))

    def _check_first(self, refs: Refs) -> None:
        """Refuse to publish a first release into the repository of a base model."""
        index = self.index(refs)
        if not self.force and index.newest_of(index.versions) is None:
            check_repository(self.hub, self.name, self._read_head(refs, refs.branches[MAIN]))

    def existing(self, version: Version, commit: str, content_digest: str) -> Published:
        """Return the existing release of a version, if it has the same content.

        Raises:
            VersionExists: It has other content.
        """
        held = manifest_at(self.hub, self.name, commit)
        if held is None:
            raise VersionExists(
                f"{self.name} has a tag {tag_of(version)} at {commit}, which holds no release; it was made by somebody "
                "else, and a version is never published twice"
            )
        if held.content_digest != content_digest:
            raise VersionExists(
                f"{self.name}@{version_text(version)} is published with other content, and stays as it is. Give this "
                'one another version, for example version="patch"'
            )
        return Published(self.name, version_text(version), commit, held, created=False)

    def _choose_line(self, refs: Refs, version: Version) -> str | None:
        """Return the branch to publish on: ``main`` for the newest stable version, else a branch of its own.

        ``None`` if main moved during the wait for another push.
        """
        if self.newer_exists(refs, version):
            return line_of(version)
        head = refs.branches[MAIN]
        held = manifest_at(self.hub, self.name, head)
        if held is None or Version(held.version) <= version or tag_of(Version(held.version)) in refs.tags:
            return MAIN
        # Another push is publishing a newer version, or died before its tag.
        return MAIN if self._is_abandoned(Version(held.version), MAIN, head) else None

    def _is_abandoned(self, version: Version, line: str, head: str) -> bool:
        """Wait for a commit's tag; ``True`` if none is set in time, ``False`` as soon as the refs change."""
        end, delay = time.monotonic() + PATIENCE, 0.02
        while time.monotonic() < end:
            time.sleep(delay)
            delay = min(2 * delay, 1.0)
            refs = self.hub.refs(self.name)
            if tag_of(version) in refs.tags or refs.branches.get(line) != head:
                return False
        return True

    def _tag(self, version: Version, commit: str, manifest: Manifest) -> Published:
        """Set the tag, which publishes the release, then verify the result."""
        tag = tag_of(version)
        try:
            self.hub.create_tag(self.name, tag, commit)
        except TagExists:
            self._settle()
        refs = self.hub.refs(self.name)
        standing = refs.tags.get(tag)
        if standing is None:
            raise PublishConflict(f"{self.name}: the tag {tag} was set and is not there; somebody removes it")
        if standing != commit:
            return self.existing(version, standing, manifest.content_digest)
        if refs.branches.get(MAIN) != commit:
            self._settle()
        return Published(self.name, version_text(version), commit, manifest)

    def _settle(self) -> None:
        """Restore the newest stable release on main if a losing or older push has overwritten it.

        That happens only if a hub does not compare a commit's parent, or if a live push was taken for dead.
        """
        refs = self.hub.refs(self.name)
        index = self.index(refs)
        newest = index.newest_of(v for v in index.versions if is_in(None, v))
        held = manifest_at(self.hub, self.name, refs.branches[MAIN])
        if newest is None or held is None:
            return
        tagged_at = refs.tags.get(tag_of(Version(held.version)))
        if tagged_at is None:
            return  # another push is publishing it
        tagged = manifest_at(self.hub, self.name, tagged_at)
        if tagged is not None and tagged.digest == held.digest and Version(held.version) >= newest:
            return
        self._copy_to_main(refs, index.versions[newest])

    def _copy_to_main(self, refs: Refs, commit: str) -> None:
        manifest = manifest_at(self.hub, self.name, commit)
        if manifest is None:
            return
        head = self._read_head(refs, refs.branches[MAIN])
        with tempfile.TemporaryDirectory() as folder:
            files: dict[str, Path | bytes] = {MANIFEST_FILE: manifest.to_bytes()}
            signature = read_signature(self.hub, self.name, commit)
            if signature is not None and SIGNATURE_FILE not in head.foreign:
                files[SIGNATURE_FILE] = signature
            for name, record in manifest.files.items():
                if name in head.foreign:
                    continue  # a foreign file; pulls read from the release's own commit
                files[name] = Path(folder, name)
                with open(Path(folder, name), "xb") as sink:
                    self.hub.download(self.name, commit, name, sink, record.size)
            try:
                message = f"Version {manifest.version} again"
                gone = tuple(sorted(head.own - set(files)))
                self.hub.commit(self.name, MAIN, files, parent=head.commit, message=message, delete=gone)
            except Conflict:
                return  # another push is in progress, and will check main


def publish(
    hub: Hub,
    name: str,
    version: Version | str,
    draft: Callable[[Version, Version | None], Draft],
    *,
    message: str | None = None,
    private: bool | None = None,
    propose: bool = False,
    force: bool = False,
    dry_run: bool = False,
) -> Published:
    """Publish a release, unless the same content is published already.

    Foreign files in the repository are left unchanged.

    Args:
        hub: The hub.
        name: ``org/name``; the repository is created if it does not exist.
        version: The version, or ``"patch"``, ``"minor"`` or ``"major"`` to increment the newest one. With these,
            content equal to the newest version's is not published again.
        draft: Makes the release from its version and the newest one before it.
        message: Commit message; by default, it names the version.
        private: Whether a new repository is private; ``None`` is the owner's default.
        propose: Open a change request with the files of the release instead of publishing it.
        force: Publish into a repository that holds a base model, and replace foreign files with a release's names.
        dry_run: Change nothing; report what would change.

    Raises:
        RepositoryConflict: The repository holds a base model, or foreign files with the names of a release's files.
        VersionExists: Other content has been published under this version.
        PublishConflict: Others published concurrently during every attempt.
    """
    manifests = Manifests(hub, name)
    for attempt in range(_ATTEMPTS):
        refs = _read_refs(hub, name) if dry_run else _make_refs(hub, name, private)
        index = index_of(name, refs, State(), manifests)
        chosen, before = _choose(version, index)
        made = draft(chosen, before)
        task = _Task(hub, name, message or f"Version {version_text(chosen)}", manifests, force)
        if chosen in index.versions:
            return task.existing(chosen, index.versions[chosen], made.manifest.content_digest)
        if before is not None and isinstance(version, str):
            newest = index.versions[before]
            held = manifests.read(newest)
            if held is not None and held.content_digest == made.manifest.content_digest:
                return Published(name, version_text(before), newest, held, created=False, dry_run=dry_run)
        if MAIN not in refs.branches:
            changes = Changes(written=tuple(sorted(made.all_files())))
            return Published(name, version_text(chosen), "", made.manifest, False, None, changes, dry_run=True)
        if dry_run:
            return task.look(refs, chosen, made)
        done = task.propose(refs, chosen, made) if propose else task.attempt(refs, chosen, made)
        if done is not None:
            return done
        time.sleep(random.uniform(0, 0.03 * (attempt + 1)))  # noqa: S311 - spreads attempts, protects nothing
    raise PublishConflict(f"{name}: others published at the same time, {_ATTEMPTS} times; try again")


def _read_refs(hub: Hub, name: str) -> Refs:
    try:
        return hub.refs(name)
    except RepositoryNotFound:
        return Refs()


def _make_refs(hub: Hub, name: str, private: bool | None) -> Refs:
    if hub.local:
        hub.create(name, private=private)  # removes what a killed push has left, too
    refs = _read_refs(hub, name)
    if MAIN in refs.branches:
        return refs
    hub.create(name, private=private)
    return hub.refs(name)


def _choose(version: Version | str, index: Index) -> tuple[Version, Version | None]:
    """Return the version to publish, and the newest release before it."""
    if isinstance(version, str):
        newest = index.newest_of(v for v in index.versions if is_in(None, v)) or index.newest_of(index.versions)
        chosen = bumped(newest, version)
        while chosen in index.versions:
            chosen = bumped(chosen, version)  # a foreign tag
        return chosen, newest
    earlier = [v for v in index.versions if v < version]
    return version, index.newest_of(v for v in earlier if not v.is_prerelease) or index.newest_of(earlier)

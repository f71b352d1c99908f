"""Publishing a release: one commit, then its tag, whoever else does the same at the same time.

The tag decides. A commit without its tag is no release: whoever is asked for that version next takes it over, if it
holds the same content, or writes another one over it, if whoever wrote it doesn't set the tag in time.
"""

from __future__ import annotations

import random
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from packaging.version import Version

from registry.errors import HubFileNotFound, InvalidManifest, PublishConflict, RepositoryNotFound, VersionExists
from registry.formats.manifest import MANIFEST_FILE, MAX_MANIFEST, Manifest
from registry.formats.paths import GIT_ATTRIBUTES
from registry.formats.references import bumped, newest_in, tag_of, version_text, versions_in
from registry.hubs.protocol import MAIN, Conflict, Hub, Refs, TagExists

__all__ = ["Draft", "Published", "manifest_at", "publish"]

#: Seconds that another pusher gets between its commit and its tag before it counts as dead.
PATIENCE = 10.0
#: Attempts to publish while others publish, too.
_ATTEMPTS = 30


@dataclass(frozen=True)
class Draft:
    """A release that is not published yet: its manifest, and its other files with their content."""

    manifest: Manifest
    files: Mapping[str, Path | bytes]

    def all_files(self) -> dict[str, Path | bytes]:
        """The files with the manifest."""
        return {**self.files, MANIFEST_FILE: self.manifest.to_bytes()}


@dataclass(frozen=True)
class Published:
    """What came of a push.

    Attributes:
        name: ``org/name``.
        version: The version.
        commit: That holds it; for a change request the commit that it starts from.
        manifest: Of the release.
        created: Whether it was published now; otherwise the same content had been before.
        url: The change request, if that is what was made.
    """

    name: str
    version: str
    commit: str
    manifest: Manifest
    created: bool = True
    url: str | None = None

    def __str__(self) -> str:
        return f"{self.name}@{self.version}"


@dataclass(frozen=True)
class _Task:
    """One release on its way to one hub."""

    hub: Hub
    name: str
    message: str

    def attempt(self, refs: Refs, version: Version, draft: Draft) -> Published | None:
        """Publish, as things stand; ``None`` when somebody else has changed them."""
        line = self._line(refs, version)
        if line is None:
            return None
        if line not in refs.branches:
            self.hub.create_branch(self.name, line, refs.branches[MAIN])
            refs = self.hub.refs(self.name)
        head = refs.branches[line]
        held = manifest_at(self.hub, self.name, head)
        if held is not None and Version(held.version) == version:
            if held.content_digest == draft.manifest.content_digest:
                return self._tag(version, head, held)
            if not self._abandoned(version, line, head):
                return None
        others = {path for path in self.hub.files(self.name, head) if path != GIT_ATTRIBUTES}
        files = draft.all_files()
        try:
            commit = self.hub.commit(
                self.name, line, files, parent=head, message=self.message, delete=tuple(sorted(others - set(files)))
            )
        except Conflict:
            return None
        return self._tag(version, commit, draft.manifest)

    def existing(self, version: Version, commit: str, content_digest: str) -> Published:
        """The release that stands already, if it has the same content.

        Raises:
            VersionExists: It hasn't.
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

    def _line(self, refs: Refs, version: Version) -> str | None:
        """The branch to publish on: ``main`` for the newest stable version, else one of its own.

        ``None`` when main has moved while it was waited for.
        """
        own = f"release-{version_text(version)}"
        published = versions_in(refs.tags)
        if version.is_prerelease or any(v > version for v in published if not v.is_prerelease):
            return own
        head = refs.branches[MAIN]
        held = manifest_at(self.hub, self.name, head)
        if held is None or Version(held.version) <= version or Version(held.version) in published:
            return MAIN
        # Somebody is publishing a newer one, or has died over it.
        return MAIN if self._abandoned(Version(held.version), MAIN, head) else None

    def _abandoned(self, version: Version, line: str, head: str) -> bool:
        """Whether a commit has no tag, and gets none in time; ``False`` as soon as anything happens."""
        end, delay = time.monotonic() + PATIENCE, 0.02
        while time.monotonic() < end:
            time.sleep(delay)
            delay = min(2 * delay, 1.0)
            refs = self.hub.refs(self.name)
            if tag_of(version) in refs.tags or refs.branches.get(line) != head:
                return False
        return True

    def _tag(self, version: Version, commit: str, manifest: Manifest) -> Published:
        """Set the tag, the moment at which a release is published; then look at what came of it."""
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
        """Let main hold the newest stable release again, where a loser or an older one has been written over it.

        That happens only where a hub doesn't compare the parent of a commit, or somebody was taken for dead.
        """
        refs = self.hub.refs(self.name)
        published = versions_in(refs.tags)
        newest = newest_in(None, published)
        held = manifest_at(self.hub, self.name, refs.branches[MAIN])
        if newest is None or held is None:
            return
        tag = published.get(Version(held.version))
        if tag is None:
            return  # somebody is publishing it at this moment
        tagged = manifest_at(self.hub, self.name, refs.tags[tag])
        if tagged is not None and tagged.digest == held.digest and Version(held.version) >= newest:
            return
        self._copy_to_main(refs, refs.tags[published[newest]])

    def _copy_to_main(self, refs: Refs, commit: str) -> None:
        manifest = manifest_at(self.hub, self.name, commit)
        if manifest is None:
            return
        head = refs.branches[MAIN]
        with tempfile.TemporaryDirectory() as folder:
            files: dict[str, Path | bytes] = {MANIFEST_FILE: manifest.to_bytes()}
            for name, record in manifest.files.items():
                files[name] = Path(folder, name)
                with open(Path(folder, name), "xb") as sink:
                    self.hub.download(self.name, commit, name, sink, record.size)
            others = {path for path in self.hub.files(self.name, head) if path != GIT_ATTRIBUTES} - set(files)
            try:
                message = f"Version {manifest.version} again"
                self.hub.commit(self.name, MAIN, files, parent=head, message=message, delete=tuple(sorted(others)))
            except Conflict:
                return  # somebody else is publishing, and will look at it


def publish(
    hub: Hub,
    name: str,
    version: Version | str,
    draft: Callable[[Version, Version | None], Draft],
    *,
    message: str | None = None,
    private: bool | None = None,
    propose: bool = False,
) -> Published:
    """Publish a release, or find that it is.

    Args:
        hub: Where to.
        name: ``org/name``; the repository is made if there is none.
        version: The version, or ``"patch"``, ``"minor"`` or ``"major"`` for the next one after the newest. With these,
            content that the newest version has already is not published again.
        draft: Makes the release of its version and the newest one before it.
        message: Of the commit; the version, if there is none.
        private: Whether a new repository is private; ``None`` is what the owner has set.
        propose: Open a change request with the files of the release, instead of publishing it.

    Raises:
        VersionExists: Other content has been published under this version.
        PublishConflict: Others publish at the same time, again and again.
    """
    for attempt in range(_ATTEMPTS):
        refs = _refs(hub, name, private)
        published = versions_in(refs.tags)
        chosen, before = _choose(version, list(published))
        made = draft(chosen, before)
        task = _Task(hub, name, message or f"Version {version_text(chosen)}")
        if chosen in published:
            return task.existing(chosen, refs.tags[published[chosen]], made.manifest.content_digest)
        if before is not None and isinstance(version, str):
            newest = refs.tags[published[before]]
            held = manifest_at(hub, name, newest)
            if held is not None and held.content_digest == made.manifest.content_digest:
                return Published(name, version_text(before), newest, held, created=False)
        if propose:
            head = refs.branches[MAIN]
            url = hub.propose(name, made.all_files(), parent=head, message=task.message)
            return Published(name, version_text(chosen), head, made.manifest, url=url)
        done = task.attempt(refs, chosen, made)
        if done is not None:
            return done
        time.sleep(random.uniform(0, 0.03 * (attempt + 1)))
    raise PublishConflict(f"{name}: others published at the same time, {_ATTEMPTS} times; try again")


def manifest_at(hub: Hub, name: str, commit: str) -> Manifest | None:
    """The manifest in a commit; ``None`` if there is none that can be read."""
    try:
        return Manifest.parse(hub.read(name, commit, MANIFEST_FILE, MAX_MANIFEST))
    except (HubFileNotFound, InvalidManifest):
        return None


def _refs(hub: Hub, name: str, private: bool | None) -> Refs:
    try:
        refs = hub.refs(name)
        if MAIN in refs.branches:
            return refs
    except RepositoryNotFound:
        pass
    hub.create(name, private=private)
    return hub.refs(name)


def _choose(version: Version | str, published: list[Version]) -> tuple[Version, Version | None]:
    """The version to publish, and the newest one before it."""
    if isinstance(version, str):
        newest = newest_in(None, published) or max(published, default=None)
        return bumped(newest, version), newest
    earlier = [v for v in published if v < version]
    stable = [v for v in earlier if not v.is_prerelease]
    return version, max(stable or earlier, default=None)

"""Copy an unversioned adapter to a branch of another registry."""

from __future__ import annotations

from pathlib import Path

from registry.catalog.index import Manifests, Release
from registry.errors import NotAdapter, PublishConflict, RepositoryNotFound
from registry.formats.references import version_of_commit
from registry.hubs.protocol import MAIN, Conflict, Hub, Refs
from registry.publishing.publish import Published
from registry.pulling.fetch import Fetched

__all__ = ["copy_plain"]

_ATTEMPTS = 5


def copy_plain(fetched: Fetched, target: Hub, private: bool | None) -> Published:
    """Copy the files of a pulled unversioned adapter to the branch ``copy-<commit>`` of a target.

    A commit of one registry cannot be made in another, so the copy has a commit of its own; the bytes are the same. If
    the branch holds them already, nothing is changed.

    Raises:
        PublishConflict: Others changed the branch at the same time, during every attempt.
        HubError: The target failed.
    """
    release, branch = fetched.release, f"copy-{fetched.release.commit[:40]}"
    files: dict[str, Path | bytes] = {release.path(name): fetched.path / name for name in fetched.manifest.files}
    for _ in range(_ATTEMPTS):
        refs = _make_branch(target, release.name, branch, private)
        there = _read(target, release, refs.branches[branch])
        if there is not None and there.manifest.content_digest == fetched.manifest.content_digest:
            return there
        try:
            commit = target.commit(
                release.name, branch, files, parent=refs.branches[branch], message=f"Copy of {release}"
            )
        except Conflict:
            continue
        made = _read(target, release, commit)
        if made is not None:
            return Published(release.name, version_of_commit(commit), commit, made.manifest)
    raise PublishConflict(f"{release.name}: others changed the branch {branch}, {_ATTEMPTS} times; try again")


def _make_branch(target: Hub, name: str, branch: str, private: bool | None) -> Refs:
    try:
        refs = target.refs(name)
    except RepositoryNotFound:
        refs = Refs()
    if MAIN not in refs.branches:
        target.create(name, private=private)
        refs = target.refs(name)
    if branch not in refs.branches:
        target.create_branch(name, branch, refs.branches[MAIN])
        refs = target.refs(name)
    return refs


def _read(target: Hub, release: Release, commit: str) -> Published | None:
    copied = Release.at_commit(release.name, commit, release.folder)
    try:
        manifest = Manifests(target, release.name).read_plain(copied)
    except NotAdapter:
        return None
    return Published(release.name, copied.version, commit, manifest, created=False)

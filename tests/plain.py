"""Repositories that hold adapters and no release, on either kind of hub."""

from __future__ import annotations

from collections.abc import Mapping

from hubs import Place

from registry.hubs.protocol import MAIN

__all__ = ["put", "put_request"]


def put(
    place: Place,
    files: Mapping[str, bytes],
    *,
    name: str = "org/plain",
    branch: str = MAIN,
    delete: tuple[str, ...] = (),
) -> str:
    """Commit files to a branch of a repository as anybody's tool does, and return the commit."""
    place.hub.create(name)
    refs = place.hub.refs(name)
    if branch not in refs.branches:
        place.hub.create_branch(name, branch, refs.branches[MAIN])
        refs = place.hub.refs(name)
    return place.hub.commit(name, branch, files, parent=refs.branches[branch], message="files", delete=delete)


def put_request(place: Place, files: Mapping[str, bytes], *, name: str = "org/plain") -> str:
    """Open a change request with files, and return its ref."""
    place.hub.create(name)
    url = place.hub.propose(name, files, parent=place.hub.refs(name).branches[MAIN], message="files")
    return f"refs/pr/{url.rpartition('/')[2]}"

"""Names, paths and commit ids in hubs that this package lays out itself."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import PurePosixPath

from registry.errors import InvalidReference
from registry.formats.fields import COMMIT
from registry.hubs.protocol import Refs

__all__ = ["REFS_LIMIT", "Copy", "are_commits", "check_path", "check_ref", "encode", "encode_refs", "make_commit_id"]

#: A hundred thousand tags are about 10 MB.
REFS_LIMIT = 64 * 1024 * 1024


@dataclass(frozen=True)
class Copy:
    """Size and hash of a file in a commit."""

    size: int
    sha256: str


def make_commit_id(written: Mapping[str, Copy], context: str) -> str:
    """Return the id of a commit with these files that has no manifest, or none of its own."""
    listing = [[path, copy.size, copy.sha256] for path, copy in sorted(written.items())]
    return hashlib.sha256(json.dumps([context, listing]).encode()).hexdigest()


def check_path(path: str) -> None:
    """Raise `InvalidReference` if a text is not the path of a file in a repository."""
    parts = path.split("/")
    if any(part in ("", ".", "..") for part in parts) or "\\" in path or ":" in path or not path.isprintable():
        raise InvalidReference(f"{path[:200]!r} is not the path of a file in a repository")
    if PurePosixPath(path).is_absolute() or any(len(part.encode()) > 255 for part in parts):
        raise InvalidReference(f"{path[:200]!r} is not the path of a file in a repository")


def check_ref(ref: str) -> None:
    """Raise `InvalidReference` if a text cannot name a branch or tag."""
    if not 0 < len(ref) <= 255 or not ref.isprintable() or " " in ref:
        raise InvalidReference(f"{ref[:200]!r} is not the name of a branch or tag")


def encode_refs(refs: Refs) -> bytes:
    """Return the file of all branches and tags."""
    return encode({"format": 1, "branches": dict(refs.branches), "tags": dict(refs.tags)})


def encode(value: object) -> bytes:
    """Return a JSON document, the same for equal values."""
    return (json.dumps(value, indent=1, sort_keys=True) + "\n").encode()


def are_commits(value: object) -> bool:
    """Whether a value is an object of commit ids by name."""
    return isinstance(value, dict) and all(
        isinstance(commit, str) and COMMIT.fullmatch(commit) is not None for commit in value.values()
    )

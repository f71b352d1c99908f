"""Read huggingface_hub's cache, where a commit's files are links to blobs."""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass
from pathlib import Path

from registry.errors import IntegrityError, TooLarge, UnsafeFile
from registry.formats.fields import COMMIT, SHA256
from registry.formats.paths import max_size

__all__ = ["Cached", "copy_blob", "find_cached"]

_SNAPSHOTS, _BLOBS = "snapshots", "blobs"
_CHUNK = 4 * 1024 * 1024


@dataclass(frozen=True)
class Cached:
    """A commit of a repository in the cache.

    Attributes:
        root: The folder of the commit, or a folder in it.
        repository: ``org/name``.
        commit: The commit.
        blobs: The folder that its links lead to.
        folder: Path of ``root`` in the repository.
    """

    root: Path
    repository: str
    commit: str
    blobs: Path
    folder: str = ""

    def origin(self, folder: str) -> dict[str, str]:
        """Return where an adapter is from."""
        inner = "/".join(part for part in (self.folder, folder) if part)
        return {"repository": self.repository, "commit": self.commit, **({"folder": inner} if inner else {})}


def find_cached(given: Path) -> Cached | None:
    """Return the cached commit that a folder is or is in: ``models--org--name``, or one below its ``snapshots``.

    Raises:
        UnsafeFile: The repository's folder has no commit for ``main``.
    """
    path = given.resolve()
    for place in (path, *path.parents):
        if place.parent.name == _SNAPSHOTS and COMMIT.fullmatch(place.name):
            return _describe(place.parent.parent, place.name, path.relative_to(place).as_posix())
    if _read_name(path) is not None and (path / _SNAPSHOTS).is_dir():
        try:
            commit = (path / "refs" / "main").read_text("ascii").strip()
        except (OSError, ValueError):
            commit = ""
        if COMMIT.fullmatch(commit) is None or not (path / _SNAPSHOTS / commit).is_dir():
            raise UnsafeFile(f"{given} does not say which commit main is: name one of the folders in {_SNAPSHOTS}")
        return _describe(path, commit, ".")
    return None


def _read_name(folder: Path) -> str | None:
    kind, _, name = folder.name.partition("--")
    return name.replace("--", "/") if kind == "models" and "--" in name else None


def _describe(repository: Path, commit: str, inner: str) -> Cached | None:
    name = _read_name(repository)
    if name is None:
        return None
    folder = "" if inner == "." else inner
    return Cached(repository / _SNAPSHOTS / commit / folder, name, commit, repository / _BLOBS, folder)


def copy_blob(cached: Cached, link: Path, target: Path) -> None:
    """Copy the blob that a link of a cached commit leads to, and compare it with the hash that it is named by.

    Raises:
        UnsafeFile: The link leads out of the blobs of its repository.
        IntegrityError: The blob is damaged.
        TooLarge: It is larger than allowed.
    """
    blob = Path(os.path.realpath(link))
    if blob.parent != cached.blobs.resolve() or not blob.is_file():
        raise UnsafeFile(f"{link} leads to {blob}, which is not one of the files of its repository in the cache")
    size, limit = blob.stat().st_size, max_size(link.name)
    if size > limit:
        raise TooLarge(f"{link} has {size:,} bytes; a file of a release may have {limit:,}")
    sha256, git = hashlib.sha256(), hashlib.sha1(b"blob %d\0" % size, usedforsecurity=False)
    with open(blob, "rb") as source, open(target, "xb") as sink:
        while chunk := source.read(_CHUNK):
            sha256.update(chunk)
            git.update(chunk)
            sink.write(chunk)
    found = {SHA256: sha256.hexdigest(), COMMIT: git.hexdigest()}
    wrong = [digest for kind, digest in found.items() if kind.fullmatch(blob.name) and digest != blob.name]
    if blob.name not in found.values() and wrong:
        raise IntegrityError(f"{link} has the hash {wrong[0]}, and the cache names it {blob.name}: download it again")

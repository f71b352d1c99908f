"""A registry in a plain folder, on a local or shared file system.

::

    <root>/<org>/<name>/repository.json      the identity of the repository; written once
                        refs.json            all branches and tags; replaced as a whole, under the lock
                        commits/<id>/…       the files of a commit; renamed into place when complete

A commit exists once it is renamed into place, and is visible once ``refs.json`` names it. A process that dies before
that leaves only invisible files. The id of a commit with a manifest is the digest of the manifest, so a release has
the same id in every folder.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import secrets
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import BinaryIO
from urllib.parse import unquote, urlsplit
from urllib.request import url2pathname

from registry.disk import files as folder_files
from registry.disk.machine import READ_ONLY
from registry.disk.mutex import LockTimeout, clear, folder_lock
from registry.disk.owners import delete, find_leftovers, is_old, new_name, sweep
from registry.errors import (
    CommitNotFound,
    HostileAnswer,
    HubFileNotFound,
    HubRefused,
    HubUnavailable,
    InvalidReference,
    RegistryError,
    RepositoryNotFound,
)
from registry.formats.references import check_name, expand_path
from registry.formats.strict_json import JsonRefused, parse
from registry.hubs.layout import (
    REFS_LIMIT,
    Copy,
    are_commits,
    check_path,
    check_ref,
    encode,
    encode_refs,
    make_commit_id,
)
from registry.hubs.protocol import MAIN, Conflict, Refs, TagExists

__all__ = ["FolderHub"]

_IDENTITY = "repository.json"
_REFS = "refs.json"
_COMMITS = "commits"
_MANIFEST = "adapter_manifest.json"
_CHUNK = 1024 * 1024


class FolderHub:
    """A hub in a folder, which is created on the first publish.

    Args:
        root: A path, or a ``file://`` address.

    Raises:
        InvalidReference: The address does not name a folder on this machine.
    """

    local = True

    def __init__(self, root: str | os.PathLike[str]) -> None:
        self.root = _parse_root(root)

    def __repr__(self) -> str:
        return f"FolderHub({str(self.root)!r})"

    @property
    def location(self) -> str:
        """The folder as a ``file://`` address."""
        return self.root.as_uri()

    # -- reading -------------------------------------------------------------------------------------------------

    def refs(self, name: str) -> Refs:
        """Return all branches and tags at one moment."""
        with _translate_errors(name):
            return self._read_refs(name)

    def change_request(self, name: str, ref: str) -> str:
        """Refuse: a folder has no change requests.

        Raises:
            CommitNotFound: Always.
        """
        with _translate_errors(name):
            self._find_repository(name)
        raise CommitNotFound(f"{name} in {self.location} has no {ref[:80]!r}: a folder has no change requests")

    def identity(self, name: str) -> str:
        """Return the id that the repository got when it was created."""
        with _translate_errors(name):
            path = self._find_repository(name) / _IDENTITY
            identity = _parse_object(path, folder_files.read_small(path)).get("id")
            if not isinstance(identity, str) or not 0 < len(identity) <= 100 or not identity.isprintable():
                raise _explain_damage(path, "it does not say which repository this is")
            return identity

    def files(self, name: str, commit: str) -> Mapping[str, int]:
        """Return the files of a commit with their sizes."""
        with _translate_errors(name):
            return dict(sorted(folder_files.entries(self._find_commit(name, commit))))

    def hashes(self, name: str, commit: str) -> Mapping[str, str]:
        """Return the files of a commit with their sha256."""
        found = {}
        for path in self.files(name, commit):
            digest = hashlib.sha256()
            with _translate_errors(name), self._open_file(name, commit, path) as file:
                while chunk := file.read(_CHUNK):
                    digest.update(chunk)
            found[path] = digest.hexdigest()
        return found

    def read(self, name: str, commit: str, path: str, limit: int) -> bytes:
        """Return the content of a file of at most ``limit`` bytes."""
        with _translate_errors(name), self._open_file(name, commit, path) as file:
            content = file.read(limit + 1)
            if len(content) > limit:
                raise HostileAnswer(f"{name}: {path} has more than the {limit} bytes that it may have")
            return content

    def download(self, name: str, commit: str, path: str, sink: BinaryIO, limit: int) -> None:
        """Copy a file of at most ``limit`` bytes."""
        with _translate_errors(name), self._open_file(name, commit, path) as file:
            copied = 0
            while chunk := file.read(_CHUNK):
                copied += len(chunk)
                if copied > limit:
                    raise HostileAnswer(f"{name}: {path} has more than the {limit} bytes that it may have")
                sink.write(chunk)

    def read_range(self, name: str, commit: str, path: str, start: int, length: int) -> bytes:
        """Return at most ``length`` bytes of a file from ``start`` on."""
        with _translate_errors(name), self._open_file(name, commit, path) as file:
            file.seek(start)
            return file.read(length)

    def names(self, base: str | None = None) -> Iterator[str]:
        """Yield all repositories; a folder keeps no index of their bases."""
        with _translate_errors("this registry"):
            found = [
                f"{repository.parent.parent.name}/{repository.parent.name}"
                for repository in sorted(self.root.glob(f"*/*/{_IDENTITY}"))
            ]
        for name in found:
            with contextlib.suppress(InvalidReference):
                yield check_name(name)

    # -- writing -------------------------------------------------------------------------------------------------

    def create(self, name: str, *, private: bool | None = None) -> None:
        """Create a repository if it does not exist. Its privacy is that of the file system."""
        with _translate_errors(name):
            folder = self._find_folder(check_name(name))
            if (folder / _IDENTITY).exists():
                clear(folder)  # what pushes that were killed have left
                return
            self._refuse_twin(folder)
            folder.parent.mkdir(parents=True, exist_ok=True)
            with _stage(folder.parent) as stage:
                first = make_commit_id({}, f"{secrets.token_hex(16)}")
                (stage / _COMMITS / first).mkdir(parents=True)
                identity = {"format": 1, "id": secrets.token_hex(16), "name": name}
                folder_files.write_file(stage / _IDENTITY, encode(identity))
                folder_files.write_file(stage / _REFS, encode_refs(Refs({MAIN: first}, {})))
                folder_files.fsync_folder(stage)
                try:
                    os.rename(stage, folder)
                except OSError:
                    if not (folder / _IDENTITY).exists():
                        raise
                    return  # another process was faster
            folder_files.fsync_folder(folder.parent)

    def commit(
        self,
        name: str,
        branch: str,
        files: Mapping[str, Path | bytes],
        *,
        parent: str,
        message: str,
        delete: tuple[str, ...] = (),
    ) -> str:
        """Write the files of a commit, then move the branch to it; ``message`` is not stored."""
        for path in files:
            check_path(path)
        with _translate_errors(name):
            repository = self._find_repository(name)
            if (head := self._read_refs(name).branches.get(branch)) != parent:
                raise Conflict(branch, head)
            with _stage(repository) as stage:
                written = {path: _write(stage / path, content) for path, content in files.items()}
                for path, _ in folder_files.entries(self._find_commit(name, parent)):
                    if path not in written and path not in delete:
                        written[path] = _write(stage / path, self._find_commit(name, parent) / path)
                _fsync_tree(stage)
                return self._land(name, branch, parent, stage, written)

    def propose(self, name: str, files: Mapping[str, Path | bytes], *, parent: str, message: str) -> str:
        """Refuse: a folder has no change requests.

        Raises:
            HubRefused: Always.
        """
        raise HubRefused(f"{name}: a folder registry has no change requests; push without create_pr")

    def create_branch(self, name: str, branch: str, commit: str) -> None:
        """Create a branch, unless it exists."""

        def add(refs: Refs) -> Refs:
            return refs if branch in refs.branches else replace(refs, branches={**refs.branches, branch: commit})

        check_ref(branch)
        with _translate_errors(name):
            self._find_commit(name, commit)
            self._change(name, add)

    def create_tag(self, name: str, tag: str, commit: str) -> None:
        """Create a tag at a commit."""

        def add(refs: Refs) -> Refs:
            standing = refs.tags.get(tag, commit)
            if standing != commit:
                raise TagExists(tag, standing)
            return replace(refs, tags={**refs.tags, tag: commit})

        check_ref(tag)
        with _translate_errors(name):
            self._find_commit(name, commit)
            self._change(name, add)

    def unreachable(self, name: str) -> list[Path]:
        """Return commits that no branch or tag points to, and abandoned partial ones.

        Files that are being written are not included.
        """
        with _translate_errors(name):
            repository, refs = self._find_repository(name), self._read_refs(name)
            kept = {*refs.branches.values(), *refs.tags.values()}
            commits = folder_files.inside(self.root, repository / _COMMITS)
            found = [path for path in commits.iterdir() if path.name not in kept]
            return sorted([path for path in found if is_old(path)] + find_leftovers(repository))

    def remove(self, name: str, paths: list[Path]) -> None:
        """Delete paths that ``unreachable`` returned, except those that have become reachable since."""
        with _translate_errors(name), folder_lock(self._find_repository(name)):
            still = set(self.unreachable(name))
            for path in paths:
                if path in still:
                    delete(path)

    # -- how -----------------------------------------------------------------------------------------------------

    def _find_folder(self, name: str) -> Path:
        return folder_files.inside(self.root, self.root.joinpath(*check_name(name).split("/")))

    def _find_repository(self, name: str) -> Path:
        try:
            folder = self._find_folder(name)
        except InvalidReference as error:
            raise RepositoryNotFound(str(error)) from None
        # Names are case-sensitive even on a case-insensitive file system.
        if not os.path.lexists(folder / _IDENTITY) or folder.name not in os.listdir(folder.parent):
            raise RepositoryNotFound(f"The adapter {name} does not exist in {self.location}")
        folder_files.inside(self.root, folder / _IDENTITY)
        return folder

    def _refuse_twin(self, folder: Path) -> None:
        """Refuse a repository whose name differs from an existing one only in case."""
        for path in (folder.parent, folder):
            beside = os.listdir(path.parent) if path.parent.is_dir() else []
            twins = [name for name in beside if name != path.name and name.lower() == path.name.lower()]
            if twins:
                raise HubRefused(
                    f"{path.name} cannot be created in {self.location}: {twins[0]} is there, and on many systems "
                    "both are one"
                )

    def _read_refs(self, name: str) -> Refs:
        path = self._find_repository(name) / _REFS
        found = _parse_object(path, folder_files.read_small(path, REFS_LIMIT))
        branches, tags = found.get("branches"), found.get("tags")
        if not are_commits(branches) or not are_commits(tags) or MAIN not in branches:  # type: ignore[operator]
            raise _explain_damage(path, f"it does not list branches, {MAIN} among them, and tags")
        return Refs(branches, tags)  # type: ignore[arg-type]

    def _find_commit(self, name: str, commit: str) -> Path:
        folder = self._find_repository(name) / _COMMITS / commit
        if commit.isalnum():
            if folder_files.inside(self.root, folder).is_dir():
                return folder
            self._restore_empty(name, folder)
            if folder_files.inside(self.root, folder).is_dir():
                return folder
        raise CommitNotFound(f"{name} in {self.location} has no commit {commit[:80]!r}")

    def _restore_empty(self, name: str, folder: Path) -> None:
        """Recreate the folder of a repository's first commit: it is empty, so git and some archives drop it."""
        refs = self._read_refs(name)
        if folder.name in refs.branches.values() and folder.name not in refs.tags.values():
            with contextlib.suppress(OSError):
                folder.mkdir(parents=True)

    @contextmanager
    def _open_file(self, name: str, commit: str, path: str) -> Iterator[BinaryIO]:
        folder = self._find_commit(name, commit)
        try:
            check_path(path)
            descriptor = folder_files.open_regular(folder_files.inside(self.root, folder / path))
        except (FileNotFoundError, NotADirectoryError, InvalidReference):
            raise HubFileNotFound(f"{name}: commit {commit} has no file {path[:200]!r}") from None
        with os.fdopen(descriptor, "rb") as file:
            yield file

    def _change(self, name: str, change: Callable[[Refs], Refs]) -> None:
        """Replace the refs under the lock."""
        repository = self._find_repository(name)
        with folder_lock(repository):
            before = self._read_refs(name)
            after = change(before)
            if after != before:
                folder_files.replace_file(repository / _REFS, encode_refs(after))

    def _land(self, name: str, branch: str, parent: str, stage: Path, written: Mapping[str, Copy]) -> str:
        """Rename the complete commit into place and move the branch to it, if the branch is still at ``parent``."""
        commits = self._find_repository(name) / _COMMITS
        commit = written[_MANIFEST].sha256 if _MANIFEST in written else make_commit_id(written, branch + parent)
        if (commits / commit).exists() and _hash_files(commits / commit) != written:
            commit = make_commit_id(written, branch + parent)

        def advance(refs: Refs) -> Refs:
            if refs.branches.get(branch) != parent:
                raise Conflict(branch, refs.branches.get(branch))
            if not (commits / commit).exists():
                os.rename(stage, commits / commit)
                folder_files.fsync_folder(commits)
            return replace(refs, branches={**refs.branches, branch: commit})

        self._change(name, advance)
        return commit


def _parse_root(root: str | os.PathLike[str]) -> Path:
    if not isinstance(root, str):
        return expand_path(root).absolute()
    parts = urlsplit(root)
    if parts.scheme != "file" or parts.netloc not in ("", "localhost") or parts.query or parts.fragment:
        raise InvalidReference(f"{root[:200]!r} is not a folder of this machine: give it as file:///srv/adapters")
    path = Path(url2pathname(parts.path) if os.name == "nt" else unquote(parts.path))
    if not path.is_absolute() or "\0" in str(path):
        raise InvalidReference(f"{root[:200]!r} is not the whole path of a folder: give it as file:///srv/adapters")
    return Path(os.path.normpath(path))


@contextmanager
def _translate_errors(name: str) -> Iterator[None]:
    """Raise errors of the file system as errors of a hub."""
    try:
        yield
    except folder_files.PlantedLink as error:
        raise HostileAnswer(
            f"{name}: {error}; a registry makes none, so somebody else has put it there. Find out who, and delete it"
        ) from None
    except LockTimeout as error:
        raise HubUnavailable(f"{name}: {error}") from None
    except RegistryError:
        raise  # some of them are OSErrors, too
    except OSError as error:
        kind = HubRefused if error.errno in READ_ONLY else HubUnavailable
        raise kind(f"{name}: {error.strerror or error}: {error.filename or ''}") from error


@contextmanager
def _stage(parent: Path) -> Iterator[Path]:
    """Create a folder beside its final place; it is deleted afterwards if it was not renamed."""
    sweep(parent)
    stage = parent / new_name()
    stage.mkdir()
    try:
        yield stage
    finally:
        delete(stage)


def _write(path: Path, content: Path | bytes) -> Copy:
    """Write a file, wait until it is on disk, and return size and hash of what was written."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if isinstance(content, bytes):
        folder_files.write_file(path, content)
        return Copy(len(content), hashlib.sha256(content).hexdigest())
    with os.fdopen(folder_files.open_regular(content), "rb") as source, open(path, "xb") as sink:
        copy = _copy_and_hash(source, sink)
        sink.flush()
        os.fsync(sink.fileno())
    return copy


def _copy_and_hash(source: BinaryIO, sink: BinaryIO | None = None) -> Copy:
    digest, size = hashlib.sha256(), 0
    while chunk := source.read(_CHUNK):
        digest.update(chunk)
        size += len(chunk)
        if sink is not None:
            sink.write(chunk)
    return Copy(size, digest.hexdigest())


def _hash_files(commit: Path) -> dict[str, Copy]:
    """Return sizes and hashes of the files of an existing commit."""
    found = {}
    for path, _ in folder_files.entries(commit):
        with os.fdopen(folder_files.open_regular(commit / path), "rb") as file:
            found[path] = _copy_and_hash(file)
    return found


def _fsync_tree(folder: Path) -> None:
    for parent, _, _ in os.walk(folder):
        folder_files.fsync_folder(Path(parent))


def _parse_object(path: Path, content: bytes) -> dict[str, object]:
    try:
        found = parse(content, REFS_LIMIT)
    except JsonRefused as reason:
        raise _explain_damage(path, str(reason)) from None
    if not isinstance(found, dict):
        raise _explain_damage(path, "it is not a JSON object")
    return found


def _explain_damage(path: Path, reason: str) -> HostileAnswer:
    return HostileAnswer(
        f"{path} is damaged: {reason}. Restore it, and the folder beside it, from a backup or a mirror of this registry"
    )

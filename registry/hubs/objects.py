"""A registry in an object store that speaks S3.

::

    <prefix>/<org>/<name>/repository.json     the identity of the repository; written once (If-None-Match)
                          refs.json           all branches and tags; replaced as a whole (If-Match)
                          commits/<id>.json   paths of a commit with size and sha256; written once (If-None-Match)
                          files/<sha256>      a file, under the hash of its content

Nothing but ``refs.json`` ever changes, and what it names is there before. A process that dies leaves only objects that
nothing refers to. The id of a commit with a manifest is the digest of the manifest, as in a folder.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import random
import secrets
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any, BinaryIO

from registry.errors import (
    CommitNotFound,
    HostileAnswer,
    HubFileNotFound,
    HubRefused,
    HubUnavailable,
    InvalidReference,
    RepositoryNotFound,
)
from registry.formats.fields import COMMIT, SHA256
from registry.formats.references import check_name
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
from registry.hubs.object_store import Store
from registry.hubs.protocol import MAIN, Conflict, Refs, TagExists

__all__ = ["ObjectHub"]

_IDENTITY, _REFS = "repository.json", "refs.json"
_MANIFEST = "adapter_manifest.json"
_LIMIT = 16 * 1024 * 1024
_CHUNK = 16 * 1024 * 1024
#: How often a change of the refs is tried against others who change them meanwhile.
_TRIES = 200
#: Objects that nothing refers to are kept so long: a push may be about to refer to them.
_AGE = timedelta(days=1)
#: Seconds for which a file that this process has uploaded is not uploaded again.
_RECENT = 3600.0


class ObjectHub:
    """A hub in an object store that speaks S3, with conditional writes.

    Credentials, region and endpoint are the AWS variables (``AWS_ACCESS_KEY_ID``, ``AWS_SECRET_ACCESS_KEY``,
    ``AWS_SESSION_TOKEN``, ``AWS_REGION``, ``AWS_ENDPOINT_URL``), or the role of the machine.

    Args:
        address: ``s3://bucket`` or ``s3://bucket/prefix``. The bucket must exist.

    Raises:
        InvalidReference: The address is malformed.
        ObjectStoreNotInstalled: The package for object stores is not installed.
    """

    local = False

    def __init__(self, address: str) -> None:
        self._store = Store(address)
        self._uploaded: dict[str, float] = {}

    def __repr__(self) -> str:
        return f"ObjectHub({self.location!r})"

    @property
    def location(self) -> str:
        """The address, without the endpoint."""
        return self._store.address

    # -- reading -------------------------------------------------------------------------------------------------

    def refs(self, name: str) -> Refs:
        """Return all branches and tags at one moment."""
        self.identity(name)
        return self._read_refs(name)[0]

    def identity(self, name: str) -> str:
        """Return the id that the repository got when it was created."""
        content = self._store.find(f"{_check_name(name)}/{_IDENTITY}", _LIMIT)
        if content is None:
            raise RepositoryNotFound(f"The adapter {name} does not exist in {self.location}")
        found = self._parse(f"{name}/{_IDENTITY}", content).get("id")
        if not isinstance(found, str) or not 0 < len(found) <= 100 or not found.isprintable():
            raise self._explain_damage(f"{name}/{_IDENTITY}", "it does not say which repository this is")
        return found

    def change_request(self, name: str, ref: str) -> str:
        """Refuse: an object store has no change requests.

        Raises:
            CommitNotFound: Always.
        """
        self.identity(name)
        raise CommitNotFound(f"{name} in {self.location} has no {ref[:80]!r}: an object store has no change requests")

    def files(self, name: str, commit: str) -> Mapping[str, int]:
        """Return the files of a commit with their sizes."""
        return {path: copy.size for path, copy in self._read_listing(name, commit).items()}

    def hashes(self, name: str, commit: str) -> Mapping[str, str]:
        """Return the files of a commit with their sha256."""
        return {path: copy.sha256 for path, copy in self._read_listing(name, commit).items()}

    def read(self, name: str, commit: str, path: str, limit: int) -> bytes:
        """Return the content of a file of at most ``limit`` bytes."""
        sink = io.BytesIO()
        self.download(name, commit, path, sink, limit)
        return sink.getvalue()

    def download(self, name: str, commit: str, path: str, sink: BinaryIO, limit: int) -> None:
        """Write a file of at most ``limit`` bytes, 16 MB at a time."""
        copy = self._find_file(name, commit, path)
        if copy.size > limit:
            raise HostileAnswer(f"{name}: {path} has more than the {limit} bytes that it may have")
        for start in range(0, copy.size, _CHUNK):
            sink.write(self._read_part(name, path, copy, start, min(_CHUNK, copy.size - start)))

    def read_range(self, name: str, commit: str, path: str, start: int, length: int) -> bytes:
        """Return at most ``length`` bytes of a file from ``start`` on."""
        copy = self._find_file(name, commit, path)
        length = min(length, copy.size - start)
        return self._read_part(name, path, copy, start, length) if length > 0 else b""

    def names(self, base: str | None = None) -> Iterator[str]:
        """Yield all repositories; an object store keeps no index of their bases."""
        for org in self._store.folders(""):
            for name in self._store.folders(org):
                with contextlib.suppress(InvalidReference):
                    if self._store.find(f"{check_name(name)}/{_IDENTITY}", _LIMIT) is not None:
                        yield name

    # -- writing -------------------------------------------------------------------------------------------------

    def create(self, name: str, *, private: bool | None = None) -> None:
        """Create a repository if it does not exist. Its privacy is that of the bucket."""
        if self._store.find(f"{check_name(name)}/{_IDENTITY}", _LIMIT) is not None:
            return
        first = make_commit_id({}, secrets.token_hex(16))
        self._write_listing(name, first, {})
        # Whoever is faster decides; the repository exists when its identity does.
        self._store.create(f"{name}/{_REFS}", encode_refs(Refs({MAIN: first}, {})))
        self._store.create(f"{name}/{_IDENTITY}", encode({"format": 1, "id": secrets.token_hex(16), "name": name}))

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
        """Write the files of a commit, then its listing, then move the branch to it; ``message`` is not stored."""
        for path in files:
            check_path(path)
        identity = self.identity(name)
        if (head := self._read_refs(name)[0].branches.get(branch)) != parent:
            raise Conflict(branch, head)
        kept = {path: copy for path, copy in self._read_listing(name, parent).items() if path not in delete}
        new = {path: self._upload(name, content, identity) for path, content in files.items()}
        written = {**kept, **new}
        return self._land(name, branch, parent, written, manifest=new.get(_MANIFEST))

    def propose(self, name: str, files: Mapping[str, Path | bytes], *, parent: str, message: str) -> str:
        """Refuse: an object store has no change requests.

        Raises:
            HubRefused: Always.
        """
        raise HubRefused(f"{name}: an object store has no change requests; push without create_pr")

    def create_branch(self, name: str, branch: str, commit: str) -> None:
        """Create a branch, unless it exists."""

        def add(refs: Refs, again: bool) -> Refs:
            return refs if branch in refs.branches else replace(refs, branches={**refs.branches, branch: commit})

        check_ref(branch)
        self._read_listing(name, commit)
        self._change(name, add)

    def create_tag(self, name: str, tag: str, commit: str) -> None:
        """Create a tag at a commit."""

        def add(refs: Refs, again: bool) -> Refs:
            standing = refs.tags.get(tag, commit)
            if standing != commit:
                raise TagExists(tag, standing)
            return replace(refs, tags={**refs.tags, tag: commit})

        check_ref(tag)
        self._read_listing(name, commit)
        self._change(name, add)

    def unreachable(self, name: str) -> dict[str, int]:
        """Return objects older than a day that no branch or tag leads to, with their sizes."""
        refs = self.refs(name)
        commits = {*refs.branches.values(), *refs.tags.values()}
        needed = {f"{name}/commits/{commit}.json" for commit in commits}
        for commit in commits:
            needed |= {f"{name}/files/{copy.sha256}" for copy in self._read_listing(name, commit).values()}
        objects = [item for part in ("commits", "files") for item in self._store.list(f"{name}/{part}")]
        return {path: size for path, size, age in objects if path not in needed and age > _AGE}

    def remove(self, name: str, paths: Mapping[str, int]) -> None:
        """Delete what ``unreachable`` returned, except what has become reachable since."""
        for path in self.unreachable(name):
            if path in paths:
                self._store.delete(path)

    # -- how -----------------------------------------------------------------------------------------------------

    def _read_refs(self, name: str) -> tuple[Refs, str]:
        content, mark = self._store.read(f"{_check_name(name)}/{_REFS}", REFS_LIMIT)
        if content is None:
            raise RepositoryNotFound(f"The adapter {name} does not exist in {self.location}")
        found = self._parse(f"{name}/{_REFS}", content)
        branches: Any = found.get("branches")
        tags: Any = found.get("tags")
        if not are_commits(branches) or not are_commits(tags) or MAIN not in branches:
            raise self._explain_damage(f"{name}/{_REFS}", f"it does not list branches, {MAIN} among them, and tags")
        return Refs(branches, tags), mark

    def _change(self, name: str, change: Callable[[Refs, bool], Refs]) -> None:
        """Replace the refs if nobody else has meanwhile; else read them again, and change those."""
        for attempt in range(_TRIES):
            before, mark = self._read_refs(name)
            after = change(before, attempt > 0)
            if after == before or self._store.swap(f"{name}/{_REFS}", encode_refs(after), mark):
                return
            # Not a secret: it keeps those who write at once from meeting again.
            time.sleep(random.uniform(0, min(1.0, 0.01 * 2**attempt)))  # noqa: S311
        raise HubUnavailable(f"{name}: others changed its branches and tags during {_TRIES} attempts; try again")

    def _land(self, name: str, branch: str, parent: str, written: Mapping[str, Copy], *, manifest: Copy | None) -> str:
        """Write the listing of a commit, and move the branch to it if the branch is still at ``parent``."""
        commit = manifest.sha256 if manifest is not None else make_commit_id(written, branch + parent)
        if not self._write_listing(name, commit, written):
            commit = make_commit_id(written, branch + parent)
            self._write_listing(name, commit, written)

        def advance(refs: Refs, again: bool) -> Refs:
            standing = refs.branches.get(branch)
            if again and standing == commit:
                return refs  # an attempt succeeded and its answer was lost
            if standing != parent:
                raise Conflict(branch, standing)
            return replace(refs, branches={**refs.branches, branch: commit})

        self._change(name, advance)
        return commit

    def _write_listing(self, name: str, commit: str, written: Mapping[str, Copy]) -> bool:
        """Write the listing of a commit; return whether the commit has these files."""
        content = encode({path: [copy.size, copy.sha256] for path, copy in written.items()})
        path = f"{name}/commits/{commit}.json"
        return self._store.create(path, content) or self._store.find(path, _LIMIT) == content

    def _read_listing(self, name: str, commit: str) -> dict[str, Copy]:
        path = f"{_check_name(name)}/commits/{commit}.json"
        content = self._store.find(path, _LIMIT) if COMMIT.fullmatch(commit) else None
        if content is None:
            self.identity(name)
            raise CommitNotFound(f"{name} in {self.location} has no commit {commit[:80]!r}")
        found = {}
        for file, entry in sorted(self._parse(path, content).items()):
            if not _is_entry(entry):
                raise self._explain_damage(path, "it does not list files with size and hash")
            found[file] = Copy(*entry)
        return found

    def _find_file(self, name: str, commit: str, path: str) -> Copy:
        copy = self._read_listing(name, commit).get(path)
        if copy is None:
            raise HubFileNotFound(f"{name}: commit {commit} has no file {path[:200]!r}")
        return copy

    def _read_part(self, name: str, path: str, copy: Copy, start: int, length: int) -> bytes:
        data = self._store.read_range(f"{name}/files/{copy.sha256}", start, length)
        if data is None or len(data) != length:
            raise HostileAnswer(f"{name}: {path} is not whole in {self.location}: restore it from a mirror")
        return data

    def _upload(self, name: str, content: Path | bytes, identity: str) -> Copy:
        with _open(content) as file:
            digest, size = hashlib.sha256(), 0
            while chunk := file.read(_CHUNK):
                digest.update(chunk)
                size += len(chunk)
            file.seek(0)
            path = f"{name}/files/{digest.hexdigest()}"
            known = f"{identity} {path}"
            # Written even if it is there, unless by an attempt just before: garbage collection keeps what is young.
            if time.monotonic() - self._uploaded.get(known, -_RECENT) >= _RECENT:
                self._store.put(path, file)
                self._uploaded[known] = time.monotonic()
        return Copy(size, digest.hexdigest())

    def _parse(self, path: str, content: bytes) -> dict[str, Any]:
        try:
            found = parse(content, REFS_LIMIT)
        except JsonRefused as reason:
            raise self._explain_damage(path, str(reason)) from None
        if not isinstance(found, dict):
            raise self._explain_damage(path, "it is not a JSON object")
        return found

    def _explain_damage(self, path: str, reason: str) -> HostileAnswer:
        return HostileAnswer(
            f"{self.location}/{path} is damaged: {reason}. Restore it from a backup or a mirror of this registry"
        )


def _check_name(name: str) -> str:
    try:
        return check_name(name)
    except InvalidReference as error:
        raise RepositoryNotFound(str(error)) from None


def _is_entry(value: object) -> bool:
    if not isinstance(value, list) or len(value) != 2:
        return False
    size, digest = value
    return type(size) is int and size >= 0 and isinstance(digest, str) and SHA256.fullmatch(digest) is not None


@contextmanager
def _open(content: Path | bytes) -> Iterator[BinaryIO]:
    if isinstance(content, bytes):
        yield io.BytesIO(content)
        return
    with open(content, "rb") as file:
        yield file

"""The loopback Hub's content, in memory."""

from __future__ import annotations

import hashlib
import json
import re
import secrets
import threading
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from fnmatch import fnmatch

from registry.testing.wire import HubFailure, User

__all__ = ["Commit", "Entry", "HubFailure", "Repo", "Store", "User"]

#: What huggingface.co puts into the first commit of every model repository, limited to common file types.
GITATTRIBUTES = "".join(
    f"*.{ending} filter=lfs diff=lfs merge=lfs -text\n"
    for ending in ("bin", "gguf", "h5", "onnx", "pickle", "pkl", "pt", "pth", "safetensors", "tar", "zip")
).encode()

_LFS_FROM_BYTES = 10 * 1024 * 1024
_COMMIT_PATTERN = re.compile(r"[0-9a-f]{40}")
_SHORT_COMMIT_PATTERN = re.compile(r"[0-9a-f]{7,40}")
_REPO_PATTERN = re.compile(r"[\w-][\w.-]{0,95}/[\w-][\w.-]{0,95}", re.ASCII)
# A ref may contain slashes; what git itself forbids is forbidden here too.
_REF_PATTERN = re.compile(r"(?!.*(?:\.\.|//|@\{))[^\s~^:?*\[\\\x00-\x1f/][^\s~^:?*\[\\\x00-\x1f]*(?<![/.])")


@dataclass(frozen=True)
class Entry:
    """One file of a commit: sha256 and size of its content, and whether git holds only a pointer to it."""

    sha256: str
    size: int
    blob_id: str
    lfs: bool

    @property
    def pointer_size(self) -> int:
        """Bytes of the git-lfs pointer that stands for the content."""
        return len(_make_pointer(self.sha256, self.size))

    @property
    def unchanged_oid(self) -> str:
        """The id that a client compares with its local file to drop unchanged ones from a commit."""
        return self.sha256 if self.lfs else self.blob_id


@dataclass(frozen=True)
class Commit:
    """A snapshot of a repository; its id is a hash of everything else in it."""

    oid: str
    parent: str | None
    title: str
    message: str
    author: str
    date: str
    files: Mapping[str, Entry] = field(repr=False)


@dataclass
class Repo:
    """A model repository: commits by id, and the refs that point at them."""

    id: str
    private: bool
    created: str
    key: str
    gated: bool = False
    commits: dict[str, Commit] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)
    tags: dict[str, str] = field(default_factory=dict)
    pull_requests: dict[str, str] = field(default_factory=dict)
    readers: set[str] = field(default_factory=set)

    @property
    def namespace(self) -> str:
        """The user or organization that owns the repository."""
        return self.id.partition("/")[0]

    def resolve(self, revision: str, *, tags: bool = True) -> Commit:
        """Return the commit that a branch, tag, pull-request ref, commit id (7 digits or more) or ``HEAD`` names."""
        name = "main" if revision == "HEAD" else revision
        oid = self.branches.get(name.removeprefix("refs/heads/")) or self.pull_requests.get(name)
        if oid is None and tags:
            oid = self.tags.get(name.removeprefix("refs/tags/"))
        if oid is None and name in self.commits:
            oid = name
        if oid is None and _SHORT_COMMIT_PATTERN.fullmatch(name):
            # A copy, because other requests add commits meanwhile.
            matches = [each for each in list(self.commits) if each.startswith(name)]
            oid = matches[0] if len(matches) == 1 else None
        if oid is None:
            raise HubFailure(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return self.commits[oid]

    def history(self, commit: Commit) -> list[Commit]:
        """Return ``commit`` and its ancestors, newest first."""
        line = [commit]
        while line[-1].parent is not None:
            line.append(self.commits[line[-1].parent])
        return line


class Store:
    """All users, repositories and blobs of one loopback Hub. Methods that change it hold ``lock``."""

    def __init__(self) -> None:
        self.lock = threading.RLock()
        self.users: dict[str, User] = {}
        self.repos: dict[str, Repo] = {}
        self.blobs: dict[str, bytes] = {}
        #: Former names of repositories, with their present ones.
        self.renamed: dict[str, str] = {}
        self._parts: dict[tuple[str, int], bytes] = {}

    # -- users ---------------------------------------------------------------------------------------------------

    def add_user(self, name: str, *, orgs: Iterable[str] = (), role: str = "write") -> User:
        """Create an account with a token of its own; ``role`` is ``"write"`` or ``"read"``."""
        if role not in ("read", "write"):
            raise ValueError(f"role must be 'read' or 'write', not {role!r}")
        user = User(name, f"hf_loopback{secrets.token_hex(16)}", tuple(orgs), role)
        with self.lock:
            self.users[user.token] = user
        return user

    def user_of(self, authorization: str | None) -> User | None:
        """Return the sender of an ``Authorization`` header; ``None`` without one."""
        if not authorization:
            return None
        user = self.users.get(authorization.removeprefix("Bearer "))
        if user is None:
            raise HubFailure(401, "Invalid credentials in Authorization header")
        return user

    # -- repositories --------------------------------------------------------------------------------------------

    def create_repo(self, repo_id: str, *, private: bool = False) -> Repo:
        """Create a repository with the first commit that huggingface.co gives it (``.gitattributes``)."""
        if not _REPO_PATTERN.fullmatch(repo_id) or ".." in repo_id:
            raise HubFailure(400, f"Invalid repository name: {repo_id!r}")
        with self.lock:
            if repo_id in self.repos:
                raise HubFailure(409, "You already created this model repo", extra={"name": repo_id})
            repo = Repo(repo_id, private, _format_now(), secrets.token_hex(12))
            self.repos[repo_id] = repo
            files = {".gitattributes": self.entry(GITATTRIBUTES, lfs=False)}
            self.write_commit(repo, "main", files, title="initial commit", author="system")
            return repo

    def repo_for(self, repo_id: str, user: User | None, *, write: bool = False, content: bool = False) -> Repo:
        """Return the repository if ``user`` may see it (and ``write`` to it, or read ``content`` of a gated one)."""
        repo = self.repos.get(repo_id)
        member = repo is not None and user is not None and user.belongs_to(repo.namespace)
        if repo is None or (repo.private and not member and (user is None or user.name not in repo.readers)):
            # Like the real Hub: repositories that you may not see "do not exist"; without a token, you must log in.
            raise HubFailure(401 if user is None else 404, "Repository not found", "RepoNotFound")
        if write and user is None:
            raise HubFailure(401, "Invalid username or password.")
        if write and user is not None and not user.may_write(repo.namespace):
            raise HubFailure(403, f"{user.name} has no write access to {repo_id}")
        if content and repo.gated and not member and (user is None or user.name not in repo.readers):
            raise HubFailure(401 if user is None else 403, f"Access to model {repo_id} is restricted.", "GatedRepo")
        return repo

    # -- content -------------------------------------------------------------------------------------------------

    def entry(self, content: bytes, *, lfs: bool) -> Entry:
        """Store ``content`` and describe it as a file of a commit."""
        sha256 = hashlib.sha256(content).hexdigest()
        self.blobs[sha256] = content
        in_git = _make_pointer(sha256, len(content)) if lfs else content
        return Entry(sha256, len(content), _hash_git_blob(in_git), lfs)

    def lfs_entry(self, sha256: str) -> Entry:
        """Describe an uploaded LFS object as a file of a commit."""
        if sha256 not in self.blobs:
            raise HubFailure(400, f"LFS pointer pointed to a file that does not exist: {sha256}")
        return self.entry(self.blobs[sha256], lfs=True)

    def add_blob(self, sha256: str, content: bytes) -> None:
        """Take an uploaded LFS object; its bytes must have the announced sha256."""
        if hashlib.sha256(content).hexdigest() != sha256:
            raise HubFailure(400, f"The content does not have the announced sha256 {sha256}")
        with self.lock:
            self.blobs[sha256] = content

    def add_part(self, sha256: str, number: int, content: bytes) -> str:
        """Take one part of a multipart upload and return its ETag."""
        with self.lock:
            self._parts[sha256, number] = content
        return hashlib.sha256(content).hexdigest()[:32]

    def join_parts(self, sha256: str, numbers: Iterable[int]) -> None:
        """Finish a multipart upload."""
        with self.lock:
            self.add_blob(sha256, b"".join(self._parts.pop((sha256, number)) for number in sorted(numbers)))

    def wants_lfs(self, repo: Repo, revision: str, path: str, size: int, sample: bytes) -> bool:
        """Whether the real Hub would keep this file outside git: by ``.gitattributes``, size or binary content."""
        if size == 0:
            return False
        attributes = GITATTRIBUTES
        if revision in repo.branches and ".gitattributes" in (files := repo.resolve(revision).files):
            attributes = self.blobs[files[".gitattributes"].sha256]
        patterns = [line.split()[0] for line in attributes.decode().splitlines() if "filter=lfs" in line]
        name = path.rpartition("/")[2]
        return size >= _LFS_FROM_BYTES or b"\0" in sample or any(fnmatch(name, pattern) for pattern in patterns)

    def write_commit(
        self,
        repo: Repo,
        branch: str,
        files: Mapping[str, Entry],
        *,
        title: str,
        author: str,
        message: str = "",
        orphan: bool = False,
    ) -> Commit:
        """Add a commit with exactly ``files`` on top of ``branch`` (or without a parent) and move the branch to it."""
        with self.lock:
            refs = repo.pull_requests if branch.startswith("refs/pr/") else repo.branches
            parent = None if orphan else refs.get(branch)
            date = _format_now()
            content = {path: [entry.sha256, entry.lfs] for path, entry in sorted(files.items())}
            identity = [repo.key, parent, title, message, author, date, len(repo.commits), content]
            oid = hashlib.sha1(json.dumps(identity).encode(), usedforsecurity=False).hexdigest()
            commit = Commit(oid, parent, title, message, author, date, dict(files))
            repo.commits[oid] = commit
            refs[branch] = oid
            return commit

    def create_ref(self, repo: Repo, kind: str, name: str, revision: str) -> str:
        """Create a branch or a tag (``kind``) at ``revision`` and return the commit id it points to."""
        refs = repo.branches if kind == "branch" else repo.tags
        if not _REF_PATTERN.fullmatch(name) or _COMMIT_PATTERN.fullmatch(name):
            raise HubFailure(400, f"Invalid {kind} name: {name!r}")
        with self.lock:
            target = repo.resolve(revision).oid
            if name in refs:
                raise HubFailure(409, f"{kind.capitalize()} already exists: {name}")
            refs[name] = target
            return target

    def delete_ref(self, repo: Repo, kind: str, name: str) -> None:
        """Delete a branch or a tag (``kind``)."""
        refs = repo.branches if kind == "branch" else repo.tags
        with self.lock:
            if name == "main" and kind == "branch":
                raise HubFailure(403, "The default branch cannot be deleted")
            if refs.pop(name, None) is None:
                raise HubFailure(404, f"{kind.capitalize()} not found: {name}", "RevisionNotFound")


def _make_pointer(sha256: str, size: int) -> bytes:
    return f"version https://git-lfs.github.com/spec/v1\noid sha256:{sha256}\nsize {size}\n".encode()


def _hash_git_blob(content: bytes) -> str:
    return hashlib.sha1(f"blob {len(content)}\0".encode() + content, usedforsecurity=False).hexdigest()


def _format_now() -> str:
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%S.%f")[:-3] + "Z"

"""The interface of a hub: a git-like store with compare-and-swap.

The registry depends on this protocol only. A folder, the Hugging Face Hub and hubs with its HTTP interface implement
it; one test suite runs on all of them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO, Protocol

__all__ = ["MAIN", "Conflict", "Hub", "Refs", "TagExists"]

#: The branch that every repository has.
MAIN = "main"


class Conflict(Exception):
    """A branch is not at the expected commit; nothing was written. ``head`` is its actual commit, if known."""

    def __init__(self, branch: str, head: str | None = None) -> None:
        super().__init__(f"branch {branch} has moved" + (f" to {head}" if head else ""))
        self.branch = branch
        self.head = head


class TagExists(Exception):
    """The tag exists at another commit; ``commit`` is that one, if known."""

    def __init__(self, tag: str, commit: str | None = None) -> None:
        super().__init__(f"tag {tag} exists" + (f" at {commit}" if commit else ""))
        self.tag = tag
        self.commit = commit


@dataclass(frozen=True)
class Refs:
    """The branches and tags of a repository at one moment, each with the commit it points to."""

    branches: Mapping[str, str] = field(default_factory=dict)
    tags: Mapping[str, str] = field(default_factory=dict)


class Hub(Protocol):
    """A store of repositories, named ``org/name``.

    Commits are immutable and have an id; branches move, tags do not. A hub's answers are not trusted: callers check
    paths, sizes and hashes themselves, and detect moved tags by comparing with what they saw before.

    Every method may raise ``registry.errors.HubError`` or one of its subclasses: ``HubUnavailable`` if the hub does not
    answer in time, ``RepositoryNotFound`` if the repository does not exist or the token may not see it, ``HubRefused``
    if it may not be read or written. The exceptions of this module are raised only where they are named.

    Lost answers: if ``commit``, ``create_branch`` or ``create_tag`` raises ``HubUnavailable``, the change may have
    happened, may not have, or may still happen. The caller reads ``refs`` again and decides by the result.
    """

    @property
    def location(self) -> str:
        """The address of this hub in messages, caches and lock files; never contains a secret."""

    @property
    def local(self) -> bool:
        """Whether it works without the network, so that it can be read offline."""

    def refs(self, name: str) -> Refs:
        """Return all branches and tags at one moment; a release whose tag is missing here is not published.

        Raises:
            RepositoryNotFound: The repository does not exist.
        """

    def change_request(self, name: str, ref: str) -> str:
        """Return the commit at the head of a change request, such as ``refs/pr/3``.

        Raises:
            CommitNotFound: There is no such change request.
        """

    def identity(self, name: str) -> str:
        """Return a repository's permanent id, which another repository of the same name does not have.

        Raises:
            RepositoryNotFound: The repository does not exist.
        """

    def files(self, name: str, commit: str) -> Mapping[str, int]:
        """Return the paths in a commit with their sizes, unchecked.

        Raises:
            CommitNotFound: The commit does not exist.
        """

    def hashes(self, name: str, commit: str) -> Mapping[str, str]:
        """Return the paths in a commit with a hash of each file's content, unchecked: equal hashes mean equal files.

        Raises:
            CommitNotFound: The commit does not exist.
        """

    def read(self, name: str, commit: str, path: str, limit: int) -> bytes:
        """Return the content of a file of at most ``limit`` bytes; a larger file is not read to its end.

        Raises:
            HubFileNotFound: The commit has no such file.
            CommitNotFound: There is no such commit.
        """

    def download(self, name: str, commit: str, path: str, sink: BinaryIO, limit: int) -> None:
        """Write the content of a file to the seekable ``sink`` in chunks, never more than ``limit`` bytes.

        Raises:
            HubFileNotFound: The commit has no such file.
            CommitNotFound: There is no such commit.
        """

    def read_range(self, name: str, commit: str, path: str, start: int, length: int) -> bytes:
        """Return at most ``length`` bytes from ``start`` on; fewer only at the end of the file.

        Raises:
            HubFileNotFound: The commit has no such file.
            CommitNotFound: There is no such commit.
        """

    def create(self, name: str, *, private: bool | None = None) -> None:
        """Create a repository with a branch ``main``; an existing one, and its visibility, is left unchanged."""

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
        """Add or replace ``files`` and remove ``delete`` in one commit on top of ``parent``, and return its id.

        The commit is atomic: readers of the branch see either ``parent`` or the whole commit at any time, even if the
        writing process dies. If the branch is not at ``parent``, nothing is written and ``Conflict`` is raised; of
        several callers with the same parent, one succeeds.

        Some hubs do not compare ``parent``. Callers that depend on it read ``refs`` again afterwards.

        Raises:
            Conflict: The branch is at another commit, or does not exist.
        """

    def propose(self, name: str, files: Mapping[str, Path | bytes], *, parent: str, message: str) -> str:
        """Open a change request against ``main`` with ``files``, and return its address.

        Raises:
            HubRefused: This kind of hub has no change requests.
        """

    def create_branch(self, name: str, branch: str, commit: str) -> None:
        """Create a branch at a commit; an existing one is not moved."""

    def create_tag(self, name: str, tag: str, commit: str) -> None:
        """Create a tag at a commit; an equal tag is accepted. Of several callers with different commits, one succeeds.

        Raises:
            TagExists: The tag exists at another commit.
        """

    def names(self, base: str | None = None) -> Iterator[str]:
        """Yield repositories that may hold adapters (those for ``base``, if the hub can tell), in any order."""

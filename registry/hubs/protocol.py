"""The interface of a hub: a git-like store with compare-and-swap.

The registry is written against this protocol only. A folder, the Hugging Face Hub and hubs that speak its language
implement it; one suite of tests runs on all of them.
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
    """A branch does not stand where the caller thought; nothing was written. ``head`` is where it is, if known."""

    def __init__(self, branch: str, head: str | None = None) -> None:
        super().__init__(f"branch {branch} has moved" + (f" to {head}" if head else ""))
        self.branch = branch
        self.head = head


class TagExists(Exception):
    """The tag stands already, and at another commit; ``commit`` is that one, if known."""

    def __init__(self, tag: str, commit: str | None = None) -> None:
        super().__init__(f"tag {tag} exists" + (f" at {commit}" if commit else ""))
        self.tag = tag
        self.commit = commit


@dataclass(frozen=True)
class Refs:
    """The branches and tags of a repository at one moment, each with the commit it stands for."""

    branches: Mapping[str, str] = field(default_factory=dict)
    tags: Mapping[str, str] = field(default_factory=dict)


class Hub(Protocol):
    """A place that keeps repositories, named ``org/name``.

    Commits are immutable and have an id; branches move, tags don't. What a hub *says* is not trusted: callers check
    paths, sizes and hashes themselves, and a tag that stands elsewhere than before is found by comparing.

    Every method may raise ``registry.errors.HubError`` or one of its subclasses: ``HubUnavailable`` when the hub did
    not answer in time, ``RepositoryNotFound`` when there is no such repository or the token may not see it,
    ``HubRefused`` when it may not be read or written. The subclasses of this module are raised where they are named.

    Lost answers: when ``commit``, ``create_branch`` or ``create_tag`` raises ``HubUnavailable``, what was asked for may
    have happened, may not have, or may still happen. The caller reads ``refs`` again and decides by what is there.
    """

    @property
    def location(self) -> str:
        """The address that stands for this hub in messages, caches and lock files; never holds a secret."""

    @property
    def local(self) -> bool:
        """Whether it is used without the network, so that it can be read offline."""

    def refs(self, name: str) -> Refs:
        """All branches and tags, as they stood at one moment: a release whose tag is missing here is not published.

        Raises:
            RepositoryNotFound: There is no such repository.
        """

    def identity(self, name: str) -> str:
        """An id that a repository keeps for life, and that another repository of the same name doesn't have.

        Raises:
            RepositoryNotFound: There is no such repository.
        """

    def files(self, name: str, commit: str) -> Mapping[str, int]:
        """The paths in a commit with their sizes, unchecked.

        Raises:
            CommitNotFound: There is no such commit.
        """

    def hashes(self, name: str, commit: str) -> Mapping[str, str]:
        """The paths in a commit with a hash of each file's content, unchecked: equal hashes are equal files.

        Raises:
            CommitNotFound: There is no such commit.
        """

    def read(self, name: str, commit: str, path: str, limit: int) -> bytes:
        """The content of a file that has no more than ``limit`` bytes; one that has more is not read to its end.

        Raises:
            HubFileNotFound: The commit has no such file.
            CommitNotFound: There is no such commit.
        """

    def download(self, name: str, commit: str, path: str, sink: BinaryIO, limit: int) -> None:
        """Write the content of a file to ``sink``, which can seek, piece by piece and never more than ``limit`` bytes.

        Raises:
            HubFileNotFound: The commit has no such file.
            CommitNotFound: There is no such commit.
        """

    def read_range(self, name: str, commit: str, path: str, start: int, length: int) -> bytes:
        """At most ``length`` bytes from ``start`` on; fewer only at the end of the file.

        Raises:
            HubFileNotFound: The commit has no such file.
            CommitNotFound: There is no such commit.
        """

    def create(self, name: str, *, private: bool | None = None) -> None:
        """Create a repository with a branch ``main``; one that exists is left as it is, with its visibility."""

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
        """Add or replace ``files`` and remove ``delete`` in one commit on top of ``parent``; the id of that commit.

        All or nothing: at every moment, whoever reads the branch finds either ``parent`` or the whole commit, and a
        process that dies here leaves one of the two. When the branch doesn't stand at ``parent``, nothing is written
        and ``Conflict`` is raised; of several callers with the same parent, one succeeds.

        Hubs exist that don't compare ``parent``. A caller to whom that matters reads ``refs`` again afterwards.

        Raises:
            Conflict: The branch is elsewhere, or doesn't exist.
        """

    def propose(self, name: str, files: Mapping[str, Path | bytes], *, parent: str, message: str) -> str:
        """Open a change request against ``main`` with ``files``; the address at which people find it.

        Raises:
            HubRefused: This kind of hub has no change requests.
        """

    def create_branch(self, name: str, branch: str, commit: str) -> None:
        """Start a branch at a commit; one that exists is left where it is."""

    def create_tag(self, name: str, tag: str, commit: str) -> None:
        """Let a new tag stand at a commit; one that stands there already is fine. Of several callers, one succeeds.

        Raises:
            TagExists: It stands at another commit.
        """

    def names(self, base: str | None = None) -> Iterator[str]:
        """The repositories that may hold adapters (those for ``base``, where the hub can tell), in no order."""

"""A release, or an unversioned adapter, of a repository."""

from __future__ import annotations

from dataclasses import dataclass

from packaging.version import Version

from registry.formats.references import Reference, version_of_commit
from registry.text import html_table

__all__ = ["Release"]


@dataclass(frozen=True, repr=False)
class Release:
    """One published version of an adapter, or an unversioned adapter in a commit.

    Attributes:
        name: ``org/name``.
        version: Version of the adapter; ``0+g<commit>`` for an unversioned one.
        commit: Commit holding the release.
        yanked: Reason for its withdrawal; ``None`` if it was not withdrawn.
        aliases: Aliases that point to it.
        note: What somebody says of it, one line.
        tags: Its tags.
        folder: Folder of an unversioned adapter; empty at the top of the repository, where every release is.
    """

    name: str
    version: str
    commit: str
    yanked: str | None = None
    aliases: tuple[str, ...] = ()
    folder: str = ""
    note: str | None = None
    tags: tuple[str, ...] = ()

    @classmethod
    def at_commit(cls, name: str, commit: str, folder: str = "") -> Release:
        """Return the unversioned adapter of a commit."""
        return cls(name, version_of_commit(commit), commit, folder=folder)

    @property
    def unversioned(self) -> bool:
        """Whether nobody published it as a version."""
        return Version(self.version).local is not None

    @property
    def path_at_commit(self) -> str:
        """The commit, with the folder if there is one: ``<commit>/folder``."""
        return f"{self.commit}/{self.folder}" if self.folder else self.commit

    @property
    def key(self) -> str:
        """The name, with the folder if there is one: its key in lock files."""
        return f"{self.name}/{self.folder}" if self.folder else self.name

    def path(self, file: str) -> str:
        """Return the path of one of its files in the repository."""
        return f"{self.folder}/{file}" if self.folder else file

    @property
    def prerelease(self) -> bool:
        """Whether it is a pre-release, which is chosen only on request."""
        return Version(self.version).is_prerelease

    def __str__(self) -> str:
        if self.unversioned:
            return str(Reference(self.name, commit=self.commit, folder=self.folder))
        return f"{self.name}@{self.version}"

    def __repr__(self) -> str:
        return f"<Release {self}>" if self.yanked is None else f"<Release {self}, withdrawn>"

    def _repr_html_(self) -> str:
        return html_table(
            str(self),
            (
                ("commit", self.commit),
                ("aliases", ", ".join(self.aliases)),
                ("tags", ", ".join(self.tags)),
                ("note", self.note),
                ("withdrawn", self.yanked),
            ),
        )

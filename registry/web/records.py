"""What the pages of a registry show, as plain records."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from registry.catalog.state import Move

__all__ = ["AdapterPage", "AdapterRow", "Metric", "RegistryPage", "Summary", "VersionRow"]

#: Characters of the text that a row is found by.
_MOST_SEARCH = 3000


@dataclass(frozen=True)
class Summary:
    """What is kept of a manifest for lists.

    Attributes:
        version: The version that the manifest is of.
        created: Time of creation.
        base: Id of the base model; empty if it is not named.
        task: PEFT's task type; empty if it is not stated.
        metrics: Results by name, those that are first by name where there are very many.
        left_out: Number of results that were left out.
    """

    version: str
    created: str
    base: str
    task: str
    metrics: Mapping[str, float]
    left_out: int = 0


@dataclass(frozen=True)
class AdapterRow:
    """An adapter in the list of a registry.

    Attributes:
        name: ``org/name``.
        newest: Newest stable version that is not withdrawn; empty if there is none.
        versions: Number of version tags.
        withdrawn: Number of withdrawn versions.
        aliases: Aliases with their versions.
        summary: Of the newest version.
        texts: Notes, tags and reasons by which it is found, too.
        problem: Why it cannot be read; empty if it can.
    """

    name: str
    newest: str = ""
    versions: int = 0
    withdrawn: int = 0
    aliases: Sequence[tuple[str, str]] = ()
    summary: Summary | None = None
    texts: Sequence[str] = ()
    problem: str = ""

    @property
    def search(self) -> str:
        """The text that it is found by."""
        found = [self.summary.base, self.summary.task] if self.summary else []
        aliases = [alias for alias, _ in self.aliases]
        return " ".join([self.name, self.newest, *found, *aliases, *self.texts, self.problem])[:_MOST_SEARCH].lower()


@dataclass(frozen=True)
class RegistryPage:
    """One page of the list of adapters.

    Attributes:
        rows: The adapters of this page.
        page: Number of this page, from 1.
        pages: Number of pages.
        total: Number of adapters on all pages.
        cut: Whether the registry holds more names than a list can show.
        whole: Whether a page can hold the registry, so that a search looks at more than names.
    """

    rows: Sequence[AdapterRow]
    page: int
    pages: int
    total: int
    cut: bool = False
    whole: bool = True


@dataclass(frozen=True)
class VersionRow:
    """A version in the list of an adapter.

    Attributes:
        version: The version.
        commit: Commit of its tag.
        summary: Of its manifest.
        problem: Why it is not a release; empty if it is one.
        withdrawn: Reason and time; empty if it is not withdrawn.
        aliases: Aliases that stand for it.
        note: What somebody says of it.
        tags: Its tags.
        prerelease: Whether it is a pre-release.
    """

    version: str
    commit: str
    summary: Summary | None = None
    problem: str = ""
    withdrawn: tuple[str, str] | None = None
    aliases: Sequence[str] = ()
    note: str = ""
    tags: Sequence[str] = ()
    prerelease: bool = False

    @property
    def search(self) -> str:
        """The text that it is found by."""
        reason = self.withdrawn[0] if self.withdrawn else ""
        parts = [self.version, self.commit, *self.aliases, self.note, *self.tags, reason, self.problem]
        return " ".join(parts)[:_MOST_SEARCH].lower()


@dataclass(frozen=True)
class Metric:
    """A result of several versions, oldest first: version, value."""

    name: str
    better: str
    values: Sequence[tuple[str, float]]


@dataclass(frozen=True)
class AdapterPage:
    """One page of the versions of an adapter, newest first.

    Attributes:
        name: ``org/name``.
        newest: Newest stable version that is not withdrawn; empty if there is none.
        summary: Of the newest version.
        rows: The versions of this page.
        page: Number of this page, from 1.
        pages: Number of pages.
        total: Number of version tags.
        withdrawn: Number of withdrawn versions.
        aliases: Aliases with their moves, newest move first.
        metrics: Results of the versions of this page, those of most versions first.
        metric_count: Number of results by name, those that are not in ``metrics`` among them.
        versions: The newest versions, for choosing two.
        card: Content of its card; ``None`` if it has none.
        card_of: Version whose card it is.
        card_problem: Why the card cannot be shown; empty if it can, or if there is none.
    """

    name: str
    newest: str
    summary: Summary | None
    rows: Sequence[VersionRow]
    page: int
    pages: int
    total: int
    withdrawn: int
    aliases: Sequence[tuple[str, Sequence[Move]]]
    metrics: Sequence[Metric]
    metric_count: int = 0
    versions: Sequence[str] = ()
    card: bytes | None = None
    card_of: str = ""
    card_problem: str = ""

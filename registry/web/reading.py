"""Read a registry for pages: each page costs a bounded number of calls."""

from __future__ import annotations

import contextvars
import hashlib
import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from typing import TypeVar

from packaging.version import Version

from registry.catalog.metrics import find_direction
from registry.catalog.state import State, read_state
from registry.errors import (
    CommitNotFound,
    HostileAnswer,
    HubFileNotFound,
    HubRefused,
    HubUnavailable,
    InvalidManifest,
    InvalidReference,
    PageNotFound,
)
from registry.formats.manifest import MANIFEST_FILE, MAX_MANIFEST, Manifest
from registry.formats.paths import CARD, CARD_BESIDE
from registry.formats.references import parse_version, version_text, versions_in
from registry.hubs.protocol import MAIN, Hub, Refs
from registry.pages.cards import MOST_CARD
from registry.web.records import AdapterPage, AdapterRow, Metric, RegistryPage, Summary, VersionRow

__all__ = ["Reader", "Repository"]

_Item = TypeVar("_Item")
_Result = TypeVar("_Result")

#: Names of a registry that are listed at all.
_MOST_NAMES = 100_000
_MOST_VERSIONS = 100
#: Manifests that are read to find the newest release among foreign tags.
_MOST_TRIES = 20
_MOST_ALIASES, _MOST_MOVES, _MOST_METRICS = 200, 50, 12
#: Metrics that are kept of a release, and characters of a name; the page's are chosen from those of all its releases.
_MOST_KEPT, _LONGEST_METRIC = 1000, 500
#: Bytes that the remembered manifests take, about.
_MOST_REMEMBERED = 200_000_000
#: Texts of an adapter by which it is found, and versions that can be chosen for a comparison.
_MOST_TEXTS, _MOST_CHOICES = 200, 200
_READERS = 8


class Cache:
    """The last results of a function, by key; several threads may use it.

    Args:
        most: What the results may weigh together; the newest is kept even if it weighs more.
        weigh: Returns what a result weighs; by default each weighs one.
    """

    def __init__(self, most: int, weigh: Callable[[object], int] = lambda _: 1) -> None:
        self._most, self._weigh, self._weight, self._lock = most, weigh, 0, threading.Lock()
        self._found: OrderedDict[Hashable, object] = OrderedDict()

    def get(self, key: Hashable, make: Callable[[], _Result]) -> _Result:
        """Return the result for a key, which is made at the first call."""
        with self._lock:
            if key in self._found:
                self._found.move_to_end(key)
                return self._found[key]  # type: ignore[return-value]
        made = make()
        with self._lock:
            if key in self._found:  # another thread was faster
                self._weight -= self._weigh(self._found.pop(key))
            self._found[key] = made
            self._weight += self._weigh(made)
            while self._weight > self._most and len(self._found) > 1:
                self._weight -= self._weigh(self._found.popitem(last=False)[1])
        return made


@dataclass(frozen=True)
class Repository:
    """A repository at one moment: its branches and tags, its state, its versions newest first."""

    name: str
    refs: Refs
    state: State
    versions: Sequence[Version]

    @property
    def pages(self) -> int:
        """Number of pages that list its versions."""
        return max(1, -(-len(self.versions) // _MOST_VERSIONS))

    @cached_property
    def aliases(self) -> dict[str, list[str]]:
        """The aliases of each version."""
        found: dict[str, list[str]] = {}
        for alias in sorted(self.state.aliases):
            version = self.state.version_of(alias)
            if version is not None:
                found.setdefault(version, []).append(alias)
        return found

    def commit_of(self, version: str) -> str | None:
        """Return the commit of a version's tag."""
        return self.refs.tags.get(f"v{version}")

    def find_before(self, version: str) -> str | None:
        """Return the version before one, by number."""
        wanted = parse_version(version)
        return next((version_text(each) for each in self.versions if each < wanted), None)


class Reader:
    """Reads a registry page by page. What a commit holds is remembered; branches, tags and the state are read anew.

    Args:
        hub: The registry.
        size: Adapters on a page.
        explain: Returns what a page says of an error.
    """

    def __init__(self, hub: Hub, size: int, explain: Callable[[Exception], str]) -> None:
        self.hub, self.size, self.explain = hub, size, explain
        self._summaries = Cache(_MOST_REMEMBERED, _weigh)
        self._sorted = Cache(32)

    # -- the registry ----------------------------------------------------------------------------

    def read_names(self) -> list[str]:
        """Return the names of all adapters, sorted; at most as many as a page can lead to."""
        return sorted(islice(self.hub.names(), _MOST_NAMES))

    def read_registry(self, page: int, words: Sequence[str] = (), names: Sequence[str] | None = None) -> RegistryPage:
        """Return one page of the list of adapters.

        Args:
            page: Its number, from 1.
            words: Words that all must be in what an adapter is found by; where the registry has more than one page, in
                its name.
            names: The names, if they were read before.

        Raises:
            PageNotFound: There is no such page.
            HubUnavailable: The registry as a whole does not answer; what fails of one adapter is a row that says so.
        """
        found = self.read_names() if names is None else list(names)
        cut = len(found) >= _MOST_NAMES
        small = len(found) <= self.size
        if words and not small:
            found = [name for name in found if all(word in name.lower() for word in words)]
        pages = max(1, -(-len(found) // self.size))
        if not 1 <= page <= pages:
            raise PageNotFound(f"Page {page} does not exist: the list has {pages}")
        rows = self._read_rows(found[(page - 1) * self.size : page * self.size])
        if words and small:
            rows = [row for row in rows if all(word in row.search for word in words)]
        return RegistryPage(rows, page, pages, len(rows) if small else len(found), cut, small)

    def check_hub(self, *errors: Exception) -> None:
        """Check that the registry as a whole answers, where parts of it did not.

        Raises:
            HubUnavailable: It does not.
        """
        if any(isinstance(error, HubUnavailable) for error in errors):
            next(iter(self.hub.names()), None)

    def _read_rows(self, names: Sequence[str]) -> list[AdapterRow]:
        found = self._map(self._try_row, names)
        errors = [row for row in found if isinstance(row, Exception)]
        self.check_hub(*errors)
        if not self.hub.local and len(errors) == len(found) > 1 and all(isinstance(e, HubUnavailable) for e in errors):
            raise errors[0]  # its list answers, and nothing else does
        return [
            AdapterRow(name, problem=self.explain(row)) if isinstance(row, Exception) else row
            for name, row in zip(names, found, strict=True)
        ]

    def _try_row(self, name: str) -> AdapterRow | Exception:
        try:
            return self._read_row(name)
        except Exception as error:  # One adapter of others must not hide the rest.
            return error

    def _read_row(self, name: str) -> AdapterRow:
        opened = self.open(name)
        version, summary = self._find_newest(opened) or ("", None)
        state = opened.state
        aliases = [(alias, text) for alias in sorted(state.aliases) if (text := state.version_of(alias))]
        texts = [note.text for note in state.notes.values()] + [tag for tags in state.tags.values() for tag in tags]
        texts += [yank.reason for yank in state.yanked.values()]
        return AdapterRow(
            name,
            version,
            len(opened.versions),
            len(state.yanked),
            aliases[:_MOST_ALIASES],
            summary,
            texts[:_MOST_TEXTS],
        )

    # -- an adapter --------------------------------------------------------------------------------

    def open(self, name: str) -> Repository:
        """Read branches, tags and state of an adapter.

        Raises:
            RepositoryNotFound: There is no such adapter.
        """
        refs = self.hub.refs(name)
        return Repository(name, refs, read_state(self.hub, name, refs), self._sort(refs))

    def read_adapter(self, opened: Repository, page: int) -> AdapterPage:
        """Return one page of an adapter's versions.

        Raises:
            PageNotFound: There is no such page.
        """
        name, versions, state = opened.name, opened.versions, opened.state
        pages = opened.pages
        if not 1 <= page <= pages:
            raise PageNotFound(f"{name} has no page {page} of versions: it has {pages}")
        newest, summary = self._find_newest(opened) or ("", None)
        chosen = versions[(page - 1) * _MOST_VERSIONS : page * _MOST_VERSIONS]
        rows = self._map(lambda version: self._read_version_row(opened, version), chosen)
        card, problem = self.read_card(name, opened.commit_of(newest) if newest else opened.refs.branches.get(MAIN))
        metrics, count = _collect_metrics(rows)
        moves = sorted(state.aliases.items())[:_MOST_ALIASES]
        return AdapterPage(
            name, newest, summary, rows, page, pages, len(versions), len(state.yanked),
            [(alias, list(reversed(found[-_MOST_MOVES:]))) for alias, found in moves],
            metrics, count, [version_text(version) for version in versions[:_MOST_CHOICES]],
            card, newest, problem,
        )  # fmt: skip

    def read_version(self, opened: Repository, version: str) -> tuple[VersionRow, Manifest]:
        """Return a version and its manifest.

        Raises:
            PageNotFound: The adapter has no such version, or the version's tag is not a release.
        """
        commit = opened.commit_of(version)
        if commit is None:
            raise PageNotFound(f"{opened.name} has no version {version}")
        row = self._read_version_row(opened, parse_version(version))
        if row.problem:
            raise PageNotFound(f"{opened.name} has no release {row.version}: {row.problem}")
        return row, Manifest.parse(self.hub.read(opened.name, commit, MANIFEST_FILE, MAX_MANIFEST))

    def read_card(self, name: str, commit: str | None) -> tuple[bytes | None, str]:
        """Return the card in a commit, ``None`` if it has none; and why it cannot be shown."""
        for file in (CARD_BESIDE, CARD) if commit is not None else ():
            try:
                return self.hub.read(name, str(commit), file, MOST_CARD), ""
            except (HubFileNotFound, CommitNotFound):
                continue
            except (HostileAnswer, HubRefused) as error:
                return None, f"The card cannot be shown: {self.explain(error)}"
        return None, ""

    # -- how ---------------------------------------------------------------------------------------

    def _read_version_row(self, opened: Repository, version: Version) -> VersionRow:
        text, state = version_text(version), opened.state
        commit = opened.refs.tags[f"v{text}"]
        found = self._summarize(opened.name, commit)
        problem = ""
        if found is None:
            problem = "foreign tag, not a release"
        elif isinstance(found, str):
            problem = found
        elif parse_version(found.version) != version:
            problem = f"the tag is at the manifest of {found.version}; pull refuses it"
        yank, note = state.yanked.get(text), state.notes.get(text)
        return VersionRow(
            text,
            commit,
            None if problem or not isinstance(found, Summary) else found,
            problem,
            (yank.reason, yank.time) if yank else None,
            opened.aliases.get(text, ()),
            note.text if note else "",
            state.tags.get(text, ()),
            version.is_prerelease,
        )

    def _find_newest(self, opened: Repository) -> tuple[str, Summary] | None:
        """Return the newest stable release that is not withdrawn, looking at some of the newest tags only."""
        yanked = opened.state.yanked
        offered = (v for v in opened.versions if not v.is_prerelease and version_text(v) not in yanked)
        for version in islice(offered, _MOST_TRIES):
            text = version_text(version)
            found = self._summarize(opened.name, opened.refs.tags[f"v{text}"])
            if isinstance(found, Summary) and parse_version(found.version) == version:
                return text, found
        return None

    def _sort(self, refs: Refs) -> list[Version]:
        """Return the versions that tags name, newest first."""
        key = hashlib.sha256("\n".join(refs.tags).encode("utf-8", "surrogatepass")).digest()
        return self._sorted.get(key, lambda: sorted(versions_in(refs.tags), reverse=True))

    def _summarize(self, name: str, commit: str) -> Summary | str | None:
        """Return what is kept of a commit's manifest; why it is malformed; ``None`` if there is none."""
        try:
            return self._summaries.get((name, commit), lambda: self._read_summary(name, commit))
        except (HostileAnswer, HubRefused) as error:
            return self.explain(error)  # not remembered: the next answer may be sound

    def _read_summary(self, name: str, commit: str) -> Summary | str | None:
        try:
            manifest = Manifest.parse(self.hub.read(name, commit, MANIFEST_FILE, MAX_MANIFEST))
        except (HubFileNotFound, CommitNotFound):
            return None
        except InvalidManifest as error:
            return self.explain(error)
        task = manifest.config.get("task_type")
        names = sorted(name for name in manifest.metrics if len(name) <= _LONGEST_METRIC)[:_MOST_KEPT]
        metrics = {name: manifest.metrics[name] for name in names}
        left_out = len(manifest.metrics) - len(metrics)
        return Summary(manifest.version, manifest.created, manifest.base.id or "", str(task or ""), metrics, left_out)

    def _map(self, function: Callable[[_Item], _Result], items: Sequence[_Item]) -> list[_Result]:
        """Return the results for several items, read concurrently where the hub is on the network."""
        if self.hub.local or len(items) < 2:
            return [function(item) for item in items]
        # Each call has the deadline of this request.
        contexts = [contextvars.copy_context() for _ in items]
        with ThreadPoolExecutor(_READERS) as readers:
            return list(readers.map(lambda context, item: context.run(function, item), contexts, items))


def _weigh(found: object) -> int:
    """Return about how many bytes is what is kept of a manifest."""
    if not isinstance(found, Summary):
        return 100 + len(str(found))
    return 1000 + len(found.base) + len(found.task) + sum(100 + len(name) for name in found.metrics)


def _collect_metrics(rows: Sequence[VersionRow]) -> tuple[list[Metric], int]:
    """Return the results that most versions have, oldest version first, and the number of all."""
    found: dict[str, list[tuple[str, float]]] = {}
    for row in reversed(rows):
        for name, value in row.summary.metrics.items() if row.summary else ():
            found.setdefault(name, []).append((row.version, value))
    names = sorted(found, key=lambda name: (-len(found[name]), name))[:_MOST_METRICS]
    left_out = max((row.summary.left_out for row in rows if row.summary), default=0)
    return [Metric(name, _find_better(name), found[name]) for name in names], len(found) + left_out


def _find_better(metric: str) -> str:
    try:
        return find_direction(metric)
    except InvalidReference:
        return ""

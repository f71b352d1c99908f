"""The pages of a registry by address, for a server and for exported files."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from importlib import resources
from typing import Any

from registry.catalog.comparison import compare_manifests
from registry.checks.lineage import list_lineage
from registry.errors import InvalidReference, PageNotFound, RegistryError
from registry.formats.manifest import Manifest
from registry.formats.references import check_name, parse_version, version_text
from registry.hubs.protocol import Hub
from registry.pages.cards import render_card
from registry.pages.charts import LineChart, make_line_chart
from registry.pages.environment import load_template
from registry.web.difference import describe_difference
from registry.web.hiding import hide_folder
from registry.web.reading import Reader, Repository
from registry.web.records import AdapterPage, Metric, VersionRow

__all__ = ["MARK", "MadePage", "Moved", "Site"]

#: What an exported page is recognized by, in its first kilobyte.
MARK = '<meta name="generator" content="lora-plugins registry">'
#: Adapters on a page of a server, which reads them at each request, and on an exported one.
_SERVED, _EXPORTED = 500, 5000
_LONGEST_QUERY = 200
_MOST_WORDS = 10
_LIST = re.compile(r"(?:index\.html|page-([1-9]\d{0,5})\.html)?", re.ASCII)
_ADAPTER = re.compile(r"a/([^/]+/[^/]+)/(.*)")
_VERSION = re.compile(r"v/([^/]+)\.html")
_DIFFERENCE = re.compile(r"diff/([^/]+?)\.\.\.([^/]+)\.html")
#: Nested values of a configuration that are shown, and characters of each.
_MOST_FACTS = 400

_log = logging.getLogger(__name__)


class Moved(Exception):
    """The page is at another address, relative to the one that was asked for."""

    def __init__(self, address: str) -> None:
        super().__init__(address)
        self.address = address


@dataclass(frozen=True)
class MadePage:
    """A page for a file.

    Attributes:
        path: Its address.
        content: HTML.
        unread: Adapter or version that could not be read, which the page says instead; empty if it could.
        problem: Why not, with paths of this machine.
    """

    path: str
    content: str
    unread: str = ""
    problem: str = ""


@dataclass(frozen=True)
class _Place:
    """Where a page is: its folders up to the first page, and whether a server answers."""

    root: str
    served: bool


class Site:
    """Makes the pages of one registry.

    Args:
        hub: The registry.
        title: Heading of the first page.
        served: Whether a server makes them, so that a page can be asked for with words or two versions.
        private: Whether only this machine reads them, so that they may show where a registry's folder is.
    """

    def __init__(self, hub: Hub, title: str, *, served: bool, private: bool = False) -> None:
        self.title, self.served, self._private, self._hub_location = title, served, private, hub.location
        self._reader = Reader(hub, _SERVED if served else _EXPORTED, self.explain)
        self._script = resources.files("registry.web").joinpath("templates/search.js").read_text(encoding="utf-8")

    def render(self, path: str, query: Mapping[str, str] | None = None) -> str:
        """Return a page as HTML.

        Args:
            path: Its address without the leading ``/``.
            query: What was asked for with it.

        Raises:
            PageNotFound: There is no such page.
            RepositoryNotFound: There is no such adapter.
            RegistryError: The registry cannot be read.
            Moved: It is at another address.
        """
        found = _LIST.fullmatch(path)
        if found:
            return self._render_list(int(found[1] or 1), query or {})
        adapter = _ADAPTER.fullmatch(path)
        if adapter is None:
            raise PageNotFound(f"The page {path[:200]!r} does not exist")
        return self._render_part(_check(adapter[1], check_name), adapter[2], query or {})

    def render_message(self, title: str, text: str) -> str:
        """Return a page that says one thing, such as why another cannot be shown."""
        return self._fill("message.html", "/", heading=title, text=text)

    def explain(self, error: Exception) -> str:
        """Return what a page says of an error."""
        if not isinstance(error, RegistryError):
            _log.error("a part of a page could not be made", exc_info=error)
            return "It cannot be shown; the log of the program says why."
        return self._hide(str(error))

    def read_names(self) -> list[str]:
        """Return the names of all adapters, sorted.

        Raises:
            RegistryError: The registry as a whole cannot be read.
        """
        return self._reader.read_names()

    def list_pages(self, names: list[str]) -> Iterator[MadePage]:
        """Yield every page of the registry; of comparisons, those of versions that follow each other.

        An adapter, a version or a comparison that cannot be read is a page that says so.

        Args:
            names: The adapters, as `read_names` returns them.

        Raises:
            RegistryError: The registry as a whole cannot be read.
        """
        pages = max(1, -(-len(names) // self._reader.size))
        for page in range(1, pages + 1):
            yield MadePage(_page_name(page), self._render_list(page, {}, names))
        for name in names:
            yield from self._list_adapter(name)

    # -- pages -----------------------------------------------------------------------------------

    def _list_adapter(self, name: str) -> Iterator[MadePage]:
        try:
            opened = self._reader.open(name)
        except Exception as error:
            yield self._excuse(f"a/{name}/index.html", name, error)
            return
        for page in range(1, opened.pages + 1):
            path = f"a/{name}/{_page_name(page)}"
            yield self._try(path, name, self._render_versions, opened, page)
        before: tuple[VersionRow, Manifest] | None = None
        for version in map(version_text, reversed(opened.versions)):
            path, subject = f"a/{name}/v/{version}.html", f"{name}@{version}"
            try:
                found = self._reader.read_version(opened, version)
            except PageNotFound:
                continue
            except Exception as error:
                yield self._excuse(path, subject, error)
                continue
            yield self._try(path, subject, self._render_version, name, *found, before and before[0].version)
            if before is not None:
                path = f"a/{name}/diff/{before[0].version}...{version}.html"
                yield self._try(path, subject, self._render_difference, name, before, found)
            before = found

    def _try(self, path: str, subject: str, make: Callable[..., str], *values: Any) -> MadePage:
        try:
            return MadePage(path, make(*values))
        except Exception as error:  # Whatever it is, the other pages can be made.
            return self._excuse(path, subject, error)

    def _excuse(self, path: str, subject: str, error: Exception) -> MadePage:
        """Return the page that says why another cannot be made.

        Raises:
            HubUnavailable: The registry as a whole does not answer.
        """
        self._reader.check_hub(error)
        problem = str(error) if isinstance(error, RegistryError) else f"{type(error).__name__}: {error}"
        heading, root = f"{subject} cannot be read", "../" * path.count("/")
        content = self._fill("message.html", root, heading=heading, text=self.explain(error))
        return MadePage(path, content, subject, problem)

    def _hide(self, text: str) -> str:
        return text if self._private else hide_folder(text, self._hub_location)

    def _render_list(self, page: int, query: Mapping[str, str], names: list[str] | None = None) -> str:
        asked = query.get("q", "")[:_LONGEST_QUERY] if self.served else ""
        found = self._reader.read_registry(page, asked.lower().split()[:_MOST_WORDS], names)
        pages = _list_near(found.page, found.pages)
        location = self._hide(self._hub_location)
        return self._fill("registry.html", "", found=found, asked=asked, pages=pages, location=location)

    def _render_part(self, name: str, rest: str, query: Mapping[str, str]) -> str:
        listed, version, difference = (kind.fullmatch(rest) for kind in (_LIST, _VERSION, _DIFFERENCE))
        if listed:
            return self._render_versions(self._reader.open(name), int(listed[1] or 1))
        if version:
            text, opened = _check_version(version[1]), self._reader.open(name)
            return self._render_version(name, *self._reader.read_version(opened, text), opened.find_before(text))
        if difference:
            texts, opened = [_check_version(text) for text in difference.groups()], self._reader.open(name)
            one, two = (self._reader.read_version(opened, text) for text in texts)
            return self._render_difference(name, one, two)
        if rest == "compare" and self.served:
            one_text, two_text = (_check_version(query.get(key, "")) for key in ("one", "two"))
            raise Moved(f"diff/{one_text}...{two_text}.html")
        raise PageNotFound(f"The page {rest[:200]!r} of {name} does not exist")

    def _render_versions(self, opened: Repository, page: int) -> str:
        return self._render_adapter(self._reader.read_adapter(opened, page))

    def _render_adapter(self, found: AdapterPage) -> str:
        drawn = {metric.name: _draw(metric) for metric in found.metrics[:6] if len(metric.values) > 1}
        return self._fill(
            "adapter.html",
            "../../../",
            found=found,
            charts=[chart for chart in drawn.values() if chart is not None],
            without_chart=[name for name, chart in drawn.items() if chart is None],
            columns=[metric.name for metric in found.metrics[:4]],
            pages=_list_near(found.page, found.pages),
            card=None if found.card is None else render_card(found.card),
        )

    def _render_version(self, name: str, row: VersionRow, manifest: Manifest, before: str | None) -> str:
        card, problem = self._reader.read_card(name, row.commit)
        return self._fill(
            "version.html",
            "../../../../",
            name=name,
            row=row,
            before=before,
            facts=_list_facts(manifest),
            metrics=sorted(manifest.metrics.items())[:_MOST_FACTS],
            files=list(manifest.files.items()),
            config=_flatten(manifest.config),
            training=_flatten(manifest.training),
            lineage=list_lineage(manifest.lineage)[:_MOST_FACTS],
            card=None if card is None else render_card(card),
            card_problem=problem,
        )

    def _render_difference(self, name: str, one: tuple[VersionRow, Manifest], two: tuple[VersionRow, Manifest]) -> str:
        found = compare_manifests((f"{name}@{one[0].version}", one[1]), (f"{name}@{two[0].version}", two[1]))
        more = {"name": name, "one": one[0], "two": two[0]}
        return self._fill("comparison.html", "../../../../", **describe_difference(found), **more)

    def _fill(self, template: str, root: str, **values: Any) -> str:
        page = load_template("registry.web", template, self._script, self.served)
        return page.render(place=_Place(root, self.served), title=self.title, mark=MARK, **values)


def _draw(metric: Metric) -> LineChart | None:
    """Return the chart of a metric; ``None`` if it cannot be drawn, which stops no page."""
    try:
        return make_line_chart(
            f"{metric.name} ({metric.better} is better)" if metric.better else metric.name,
            {metric.name: [(float(index), value) for index, (_, value) in enumerate(metric.values)]},
            axis="version",
            names=[version for version, _ in metric.values],
        )
    except Exception:
        _log.exception("a chart could not be made")
        return None


def _page_name(page: int) -> str:
    return "index.html" if page == 1 else f"page-{page}.html"


def _list_near(page: int, pages: int) -> list[tuple[int, str]]:
    """Return number and address of the pages that are linked: the first, the last, and those near this one."""
    near = {1, pages, *range(max(1, page - 2), min(pages, page + 2) + 1)}
    return [(number, _page_name(number)) for number in sorted(near)] if pages > 1 else []


def _check(text: str, check: Any) -> str:
    try:
        return str(check(text))
    except InvalidReference as error:
        raise PageNotFound(str(error)) from None


def _check_version(text: str) -> str:
    return _check(text, lambda version: version_text(parse_version(version)))


def _list_facts(manifest: Manifest) -> list[tuple[str, str]]:
    base, kind = manifest.base, manifest.architecture
    at = f" at {base.commit}" if base.commit else ""
    rows = [
        ("base model", f"{base.id}{at}" if base.id else "not recorded: it is known by its fingerprint only"),
        ("kind of model", kind.class_name or kind.model_type or ""),
        ("created", manifest.created),
        ("manifest", f"sha256 {manifest.digest}"),
        ("version before", manifest.parent_version or ""),
        ("PEFT", manifest.peft_version or ""),
        ("tensors", f"{len(manifest.tensors):,}"),
        ("bytes", f"{sum(file.size for file in manifest.files.values()):,}"),
    ]
    return [row for row in rows if row[1]]


def _flatten(values: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Return nested values as rows: dotted name and text."""
    found: list[tuple[str, str]] = []
    left: list[tuple[str, Any]] = list(values.items())[::-1]
    while left and len(found) < _MOST_FACTS:
        name, value = left.pop()
        if isinstance(value, Mapping) and value:
            left += [(f"{name}.{key}", item) for key, item in list(value.items())[::-1]]
        else:
            found.append((name, ", ".join(map(str, value)) if isinstance(value, list) else str(value)))
    return found

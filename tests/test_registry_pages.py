"""What pages are made with: pictures, templates, rendered cards, files."""

from __future__ import annotations

import html
import math
import os
import re
import sys
import tracemalloc
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from page_registries import CARD, HOSTILE

from registry import PageError, load_template, make_bar, make_heat_map, make_line_chart, write_page
from registry.pages import cards
from registry.pages.cards import MOST_CARD, render_card, render_markdown
from registry.pages.environment import make_policy


def test_charts_leave_out_what_is_not_finite_and_thin_what_is_long() -> None:
    assert make_line_chart("x", {"a": [(1, math.nan)], "b": []}) is None
    chart = make_line_chart("x", {"a": [(float(i), 1 / (i + 1)) for i in range(50_000)]})
    assert chart is not None
    assert len(chart.curves[0].points.split()) <= 801
    assert "50,000" in chart.description or "49,999" in chart.description
    numbers = [float(n) for pair in chart.curves[0].points.split() for n in pair.split(",")]
    assert all(0 <= number <= 480 for number in numbers)
    for values in ([(1, 5.0)], [(1, 0.0), (2, 0.0)], [(1, -3e9), (2, 4e-9)], [(0, 1e-30), (1, 2e-30)]):
        assert make_line_chart("x", {"a": values}) is not None


LARGEST = sys.float_info.max
ODD_VALUES = [
    (0.48592769656281265, 0.4859276965628127),
    (1e308, -1e308),
    (1.797e308, 1.797e308),
    (LARGEST, LARGEST),
    (-LARGEST, LARGEST),
    (-LARGEST, -LARGEST),
    (0.0, 5e-324),
    (5e-324, 1e-323),
    (-5e-324, 5e-324),
    (1e17, 1e17 + 16),
    (1e-308, 2e-308),
    (-1e16, math.nextafter(-1e16, 0)),
    (math.inf, 1.0),
]


def check_chart(points: list[tuple[float, float]]) -> None:
    """Whether a chart of points with a finite one is made, with all that it draws inside of its frame."""
    chart = make_line_chart("x", {"a": points})
    if not [point for point in points if all(map(math.isfinite, point))]:
        assert chart is None
        return
    assert chart is not None
    assert 2 <= len(chart.up) <= 9
    places = [tuple(map(float, pair.split(","))) for pair in chart.curves[0].points.split()]
    places += [(x, chart.top) for x, _ in chart.across] + [(chart.left, y) for y, _ in chart.up]
    for x, y in places:
        assert chart.left <= x <= chart.right
        assert chart.top <= y <= chart.bottom
    assert not re.search("inf|nan", chart.description + " ".join(text for _, text in chart.up + chart.across))


@pytest.mark.parametrize("values", ODD_VALUES, ids=str)
def test_a_chart_is_made_of_values_as_they_may_come(values: tuple[float, float]) -> None:
    check_chart([(float(step), value) for step, value in enumerate(values)])
    check_chart([(value, float(step)) for step, value in enumerate(sorted(values))])


@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(st.floats(), st.floats()), max_size=4))
def test_a_chart_is_made_of_any_points(points: list[tuple[float, float]]) -> None:
    check_chart(points)


@pytest.mark.parametrize("norms", [(1.797e308, 1e308), (5e-324, 0.0), (-1.0, -2.0), (-LARGEST, 1e-308), (1.0, -3.0)])
def test_a_heat_map_is_made_of_any_norms(norms: tuple[float, float]) -> None:
    heat = make_heat_map([(f"h.{row}.q", norm) for row, norm in enumerate(norms)])
    assert (heat is None) == (max(norms) <= 0)
    for _, cells in heat.rows if heat else ():
        assert all(0 <= int(cell[1].split()[0][1:]) <= 20 for cell in cells if cell)


def test_bars_and_heat_maps_of_nothing_are_not_drawn() -> None:
    assert make_bar("x", {"a": 0}, "bytes") is None
    assert make_heat_map([]) is None
    assert make_heat_map([("a.0.b", 0.0)]) is None
    heat = make_heat_map([("h.0.q", 1.0), ("h.1.q", 2.0), ("h.1.v", math.nan), ("score", 0.5)])
    assert heat is not None
    assert heat.columns == ("q", "v", "score")
    assert [name for name, _ in heat.rows] == ["h.0", "h.1", "-"]
    assert heat.rows[1][1][:2] == (("2", "s20 l d"), None)
    many = make_heat_map([(f"h.{i}.q", 1.0) for i in range(1000)])
    assert many is not None
    assert (len(many.rows), many.left_out) == (200, 800)


def test_a_chart_over_versions_says_which() -> None:
    names = [f"1.{number}.0" for number in range(30)]
    chart = make_line_chart("loss", {"loss": [(float(n), 30.0 - n) for n in range(30)]}, axis="version", names=names)
    assert chart is not None
    assert [text for _, text in chart.across] == ["1.0.0", "1.7.0", "1.14.0", "1.22.0", "1.29.0"]
    assert chart.description == "loss: 30 at version 1.0.0, 1 at version 1.29.0"
    assert chart.curves[0].dots[3][2] == "version 1.3.0: 27"
    long = make_line_chart("x", {"x": [(0.0, 1.0), (1.0, 2.0)]}, axis="version", names=["1" * 40, "2"])
    assert long is not None
    assert long.across[0][1] == "1" * 11 + "…"


class Tags(HTMLParser):
    """The tags and attributes that a browser would make of markup."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(str(text))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text += data


def test_nothing_in_a_card_of_others_runs_loads_or_covers_the_page() -> None:
    page = Tags(render_card(CARD.encode()))
    assert {tag for tag, _ in page.tags} == {
        "a", "code", "h3", "p", "pre", "table", "tbody", "td", "th", "thead", "tr",
    }  # fmt: skip
    for _, attributes in page.tags:
        assert set(attributes) <= {"href", "rel", "title"}
    links = [str(attributes["href"]) for tag, attributes in page.tags if tag == "a"]
    assert all(link.startswith("https://") for link in links)
    assert "https://example.org/ok" in links
    for number in range(1, 15):
        assert f"alert({number})" in page.text or number == 12, number
    for shown in ("{{ 7 * 7 }}", "<iframe srcdoc=", "<form action=", "position:fixed", "</code></pre><script>"):
        assert shown in page.text
    assert not re.search("[\u202e\u200b]", page.text)
    assert "tags:" not in page.text


@pytest.mark.parametrize("text", HOSTILE)
def test_hostile_text_in_a_card_is_shown_as_text(text: str) -> None:
    page = Tags(render_markdown(text))
    assert {tag for tag, _ in page.tags} <= {"p", "em"}
    assert page.text.strip().replace("*", "") == html.unescape(text).replace("*", "")


@pytest.mark.parametrize(
    "data",
    [
        b"> " * 20_000 + b"x",
        b"[" * 50_000,
        b"*a_" * 30_000,
        b"![" * 30_000,
        b"`" * 100_001 + b" " + b"`" * 100_000,
        b"<" * 100_000,
        b"a\n" * 100_000,
        b"\xff\xfe\x00" * 1000,
        b"---\n" + b"a: [" * 5000,
        b"| a " * 20_000 + b"\n" + b"|---" * 20_000,
    ],
    ids=["quotes", "brackets", "emphasis", "pictures", "ticks", "angles", "lines", "no text", "front matter", "table"],
)
@pytest.mark.timeout(60)
def test_a_card_made_to_take_long_is_rendered_in_seconds(data: bytes) -> None:
    assert len(render_card(data)) < 40 * MOST_CARD


ADDRESS = "https://example.org/"


@pytest.mark.parametrize(
    "text",
    [
        f"[a]: {ADDRESS}{'x' * 3000}\n\n" + "[a] " * 600,
        f"[a]: {ADDRESS}{'x' * 1500}\n\n" + "[a] " * 1000,
        f"[a]: {ADDRESS}{'é' * 1500}\n\n" + "[a] " * 200,
        f'[a]: {ADDRESS} "{"t" * 3000}"\n\n' + "[a] " * 600,
        f"[a]: {ADDRESS}{'x' * 1500}\n\n" + "> - [a]\n\n" * 1000,
        f"[a]: {ADDRESS}{'x' * 1500}\n\n|{'a|' * 900}\n|{'-|' * 900}\n|{'[a]|' * 900}\n",
        f"[a]: {ADDRESS}{'&' * 1000}\n\n" + "[*a*][a]" * 900,
    ],
    ids=["long address", "many links", "escaped", "title", "lists", "table", "emphasis"],
)
def test_a_card_that_grows_by_its_references_is_shown_as_it_is_written(
    text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    rendered: list[int] = []
    clean = cards.nh3.clean

    def watch(html: str, **options: Any) -> str:
        rendered.append(len(html))
        return clean(html, **options)

    monkeypatch.setattr(cards.nh3, "clean", watch)
    shown = render_markdown(text)
    assert len(shown) <= cards.MOST_HTML
    assert sum(rendered) <= 2 * cards.MOST_HTML  # not made first, and thrown away then
    page = Tags(shown)
    assert {tag for tag, _ in page.tags} <= {"p", "pre", "em"}
    assert page.text.count("[a]") >= 200


def test_a_card_is_measured_before_it_has_grown() -> None:
    tracemalloc.start()
    try:
        shown = render_markdown(f"[a]: {ADDRESS}{'x' * 1900}\n\n" + "[a] " * 6000)
        most = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert "would be far longer than it is written" in shown
    assert most < 20_000_000


def test_references_of_a_card_are_links() -> None:
    shown = render_markdown(f'[a]: {ADDRESS}{"x" * 1900} "title"\n\n' + "[a] " * 50)
    assert shown.count('<a href="https://example.org/x') == 50


def test_a_table_of_rows_that_lack_cells_stays_bounded() -> None:
    """From markdown-it-py 4.0 on; before, each row was filled up to the width of the first, without limit."""
    text = f"|{'a|' * 300}\n|{'-|' * 300}\n" + "|a|\n" * 300
    tokens = cards._make_parser().parse(text)
    assert sum(token.type == "td_open" for token in tokens) <= 70_000


def test_a_card_of_a_release_is_rendered_without_its_marks() -> None:
    text = (
        "# Own\n<!-- lora-plugins: begin. This part is written anew by every release; edit outside of it. -->\n\n"
        "**made** here\n\n<!-- lora-plugins: end -->\n"
    )
    shown = render_card(text.encode())
    assert "<strong>made</strong>" in shown
    assert "lora-plugins:" not in shown


def test_the_policy_allows_the_page_itself_only() -> None:
    policy = make_policy("a{}", "x()")
    assert policy.startswith("default-src 'none'; style-src 'sha256-")
    assert "unsafe" not in policy
    assert "form-action 'none'" in policy
    assert "script-src" not in make_policy("a{}")
    assert load_template("registry.web", "message.html") is load_template("registry.web", "message.html")


def test_a_page_is_whole_or_not_there(tmp_path: Path) -> None:
    assert write_page("a", tmp_path / "new" / "page.html").read_text() == "a"
    with pytest.raises(PageError, match=r"is a folder: give the page's file, such as .*diff\.html"):
        write_page("a", tmp_path, "diff.html")
    with pytest.raises(PageError, match="cannot be written"):
        write_page("a", Path(os.devnull) / "page.html")

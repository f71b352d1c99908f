"""Render cards of others: Markdown without HTML, then only harmless tags."""

from __future__ import annotations

import re
from functools import lru_cache
from urllib.parse import urlsplit

import nh3
from markdown_it import MarkdownIt
from markupsafe import Markup

from registry.formats.readme import split_readme
from registry.text import visible_lines

__all__ = ["MOST_CARD", "render_card", "render_markdown"]

#: Bytes of a card that are rendered.
MOST_CARD = 100_000
#: Levels of lists and quotes in one another.
_DEEPEST = 20
#: Marks of the generated part, which would be shown as text.
_MARKS = re.compile(r"<!-- lora-plugins: (?:begin|end)\b[^>]*-->")
_TAGS = {
    "a", "blockquote", "br", "code", "del", "em", "h3", "h4", "h5", "h6", "hr", "li", "ol", "p", "pre", "s", "strong",
    "table", "tbody", "td", "th", "thead", "tr", "ul",
}  # fmt: skip


def render_card(data: bytes) -> Markup:
    """Return a repository's card as markup, without its front matter.

    Args:
        data: ``README.md``; what is longer than `MOST_CARD` bytes is left out.
    """
    return render_markdown(_MARKS.sub("", split_readme(data[:MOST_CARD])[1]))


def render_markdown(text: str) -> Markup:
    """Return Markdown of others as markup: HTML in it is shown as text, pictures as links, links lead to the web only.

    Headings are two levels lower, because the page has headings of its own.
    """
    html = _make_parser().render(visible_lines(text, MOST_CARD))
    kept = nh3.clean(
        html,
        tags=_TAGS,
        attributes={"a": {"href"}},
        url_schemes={"http", "https"},
        link_rel="noopener noreferrer nofollow",
    )
    return Markup(kept)  # noqa: S704 - cleaned in the line before


@lru_cache(maxsize=1)
def _make_parser() -> MarkdownIt:
    parser = _Parser("commonmark", {"html": False, "maxNesting": _DEEPEST}).enable(["table", "strikethrough"])
    parser.disable("image")
    parser.core.ruler.push("lower_headings", _lower_headings)
    return parser


class _Parser(MarkdownIt):
    """A parser that makes links of addresses on the web only."""

    def validateLink(self, url: str) -> bool:
        """Whether a link may lead to an address; what may not stays text."""
        try:
            parts = urlsplit(url.strip())
        except ValueError:
            return False
        return parts.scheme in ("http", "https") and bool(parts.hostname)


def _lower_headings(state: object) -> None:
    for token in state.tokens:  # type: ignore[attr-defined]
        if token.type in ("heading_open", "heading_close"):
            token.tag = f"h{min(6, int(token.tag[1]) + 2)}"

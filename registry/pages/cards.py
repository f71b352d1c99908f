"""Render cards of others: Markdown without HTML, then only harmless tags."""

from __future__ import annotations

import re
from collections.abc import Iterable
from functools import lru_cache
from urllib.parse import urlsplit

import nh3
from markdown_it import MarkdownIt
from markdown_it.common.utils import escapeHtml
from markdown_it.token import Token
from markupsafe import Markup

from registry.formats.readme import split_readme
from registry.text import visible_lines

__all__ = ["MOST_CARD", "MOST_HTML", "render_card", "render_markdown"]

#: Bytes of a card that are rendered.
MOST_CARD = 100_000
#: Characters that a card becomes at most; one that would be longer is shown as it is written.
MOST_HTML = 1_000_000
#: Characters of an address that a link may lead to; a card can repeat one by a reference of three characters.
_LONGEST_ADDRESS = 2000
_GROWN = "As a page, this card would be far longer than it is written; here it is as it is written."
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

    Headings are two levels lower, because the page has headings of its own. What would be longer than `MOST_HTML` is
    shown as it is written.
    """
    source = visible_lines(text, MOST_CARD)
    parser = _make_parser()
    tokens = parser.parse(source)
    # References and tables can make a thousand times what is written, so it is measured before it is made.
    if _measure(tokens) <= MOST_HTML:
        kept = nh3.clean(
            parser.renderer.render(tokens, parser.options, {}),
            tags=_TAGS,
            attributes={"a": {"href"}},
            url_schemes={"http", "https"},
            link_rel="noopener noreferrer nofollow",
        )
        if len(kept) <= MOST_HTML:
            return Markup(kept)  # noqa: S704 - cleaned in the lines before
    return Markup("<p>{}</p>\n<pre>{}</pre>").format(_GROWN, source)


def _measure(tokens: Iterable[Token]) -> int:
    """Return how many characters tokens become: texts, tags and attributes; counting ends above `MOST_HTML`."""
    size = 0
    for token in tokens:
        texts = [token.tag, *map(str, token.attrs.values())] + ([] if token.children else [token.content])
        size += _measure(token.children or ()) + sum(len(escapeHtml(text)) for text in texts)
        if size > MOST_HTML:
            break
    return size


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
        if len(url) > _LONGEST_ADDRESS:
            return False
        try:
            parts = urlsplit(url.strip())
        except ValueError:
            return False
        return parts.scheme in ("http", "https") and bool(parts.hostname)


def _lower_headings(state: object) -> None:
    for token in state.tokens:  # type: ignore[attr-defined]
        if token.type in ("heading_open", "heading_close"):
            token.tag = f"h{min(6, int(token.tag[1]) + 2)}"

"""Carry licence and card of an adapter over, as text of others."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from registry.formats.manifest import BASE_ID
from registry.formats.readme import split_readme
from registry.publishing.card import CardFields
from registry.text import visible

__all__ = ["LICENCES", "MAX_CARD", "Original", "read_original"]

#: Files with the text of a licence, as repositories name them.
LICENCES = ("LICENSE", "LICENSE.md", "LICENSE.txt", "LICENCE", "LICENCE.md", "LICENCE.txt", "USE_POLICY.md", "NOTICE")
#: Bytes of a card or a licence that are read, and characters of each that are carried over.
MAX_CARD = 1024 * 1024
_MOST = 60_000
_ID = re.compile(r"[A-Za-z0-9][\w.+-]{0,95}", re.ASCII)
_MOST_IDS = 50


@dataclass(frozen=True)
class Original:
    """What the original says about itself.

    Attributes:
        license: Id of its licence, from its card; ``None`` if it states none.
        datasets: Ids of its datasets.
        language: Codes of its languages.
        pipeline_tag: The Hub's task.
        text: The text of its card, without front matter.
        licences: Texts of its licence files, by name.
    """

    license: str | None = None
    datasets: tuple[str, ...] = ()
    language: tuple[str, ...] = ()
    pipeline_tag: str | None = None
    text: str = ""
    licences: Mapping[str, str] = field(default_factory=dict)

    def fields(self, license_: str | None, origin: Mapping[str, str], changes: Iterable[str]) -> CardFields:
        """Return what the new card says.

        Args:
            license_: The licence, if the publisher names one.
            origin: Where the adapter is from.
            changes: What was changed, one clause each.
        """
        return CardFields(
            license=license_ or self.license,
            datasets=self.datasets,
            language=self.language or None,
            pipeline_tag=self.pipeline_tag,
            appendix="\n\n".join([*self._write_origin(license_, origin, changes), *self._write_texts()]),
        )

    def _write_origin(self, license_: str | None, origin: Mapping[str, str], changes: Iterable[str]) -> list[str]:
        where = ", ".join(f"{key} `{_escape(value)}`" for key, value in origin.items()) or "a folder"
        stated = f"`{_escape(self.license)}`, as its card states" if self.license else "not stated by its card"
        named = f"; the publisher of this version names `{_escape(license_)}`" if license_ else ""
        lines = [f"- From: {where}", f"- Licence of the original: {stated}{named}"]
        lines += [f"- Changed: {_escape(change)}" for change in changes]
        return ["## Origin", "\n".join(lines)]

    def _write_texts(self) -> list[str]:
        texts = {"card": self.text, **self.licences}
        return [f"### The original's {title}\n\n{_quote(text)}" for title, text in texts.items() if text.strip()]


def read_original(card: bytes | None, licences: Mapping[str, bytes]) -> Original:
    """Read the card and the licence files of an adapter. Values of unexpected form are left out."""
    values, text = split_readme(card or b"")
    license_ = values.get("license")
    pipeline = values.get("pipeline_tag")
    return Original(
        license=license_ if isinstance(license_, str) and _ID.fullmatch(license_) else None,
        datasets=_read_ids(values, "datasets", BASE_ID),
        language=_read_ids(values, "language", _ID),
        pipeline_tag=pipeline if isinstance(pipeline, str) and _ID.fullmatch(pipeline) else None,
        text=text,
        licences={name: data.decode("utf-8", "replace") for name, data in licences.items()},
    )


def _read_ids(values: Mapping[str, Any], key: str, form: re.Pattern[str]) -> tuple[str, ...]:
    found = values.get(key)
    listed = [found] if isinstance(found, str) else found if isinstance(found, list) else []
    return tuple(dict.fromkeys(i for i in listed[:_MOST_IDS] if isinstance(i, str) and form.fullmatch(i)))


def _escape(text: str) -> str:
    return visible(text, 500).replace("`", "'").replace("<", "(").replace(">", ")")


def _show_line(line: str) -> str:
    spaces = len(line) - len(line.lstrip(" "))
    return " " * min(spaces, 40) + visible(line)


def _quote(text: str) -> str:
    """Return text of others as a block of code: nothing in it is Markdown, HTML, or one of our own marks."""
    cut = text[:_MOST] + ("\n[cut]" if len(text) > _MOST else "")
    plain = "\n".join(map(_show_line, cut.splitlines())).replace("<!--", "<! --").strip("\n")
    fence = "`" * max(3, *(len(run) + 1 for run in re.findall("`+", plain) or [""]))
    return f"{fence}text\n{plain}\n{fence}"

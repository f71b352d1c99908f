"""Merge the generated card into a README that people may edit.

The card is placed between two markers. Text outside them is kept, and so are front matter keys that the generated
front matter does not have.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import yaml

__all__ = ["BEGIN", "END", "dump_front_matter", "merge_readme", "split_readme", "write_readme"]

BEGIN = "<!-- lora-plugins: begin. This part is written anew by every release; edit outside of it. -->"
END = "<!-- lora-plugins: end -->"
_PART = re.compile(r"<!-- lora-plugins: begin\b[^>]*-->.*?<!-- lora-plugins: end -->", re.DOTALL)
#: Front matter as the Hub recognizes it.
_FRONT = re.compile(r"\A\s*---(?:\r\n|\r|\n)([\S\s]*?)(?:\r\n|\r|\n)?---[ \t]*(?:\r\n|\n|\Z)")
#: Keys about one release; they are dropped if the new release does not have them.
_OF_ONE_RELEASE = ("base_model", "base_model_relation", "library_name", "model-index")
_BASE_TAG = "base_model:adapter:"


def write_readme(values: Mapping[str, Any], body: str) -> str:
    """Return a README with only the generated card: front matter, and the body between markers."""
    return f"---\n{dump_front_matter(values)}---\n\n{BEGIN}\n\n{body.strip()}\n\n{END}\n"


def merge_readme(existing: bytes, generated: bytes) -> bytes | None:
    """Merge a generated README into an existing one.

    Returns:
        The merged README with all foreign text; ``None`` if it has no place for a card (it has text but no markers), or
        cannot be read.
    """
    try:
        old, new = existing.decode("utf-8"), generated.decode("utf-8")
        front, body = _split(old)
        ours, card = _split(new)
    except (UnicodeDecodeError, yaml.YAMLError, RecursionError, ValueError):
        return None
    part = _PART.search(card)
    inner = part[0] if part else card.strip()
    if not body.strip():
        body = f"\n{inner}\n"
    elif _PART.search(body):
        body = _PART.sub(lambda _: inner, body, count=1)
    else:
        return None
    return f"---\n{dump_front_matter(_merge(front, ours))}---\n{body}".encode()


def split_readme(data: bytes) -> tuple[dict[str, Any], str]:
    """Return the values of the front matter of somebody's README, and the text after it.

    Values that cannot be read are left out; the text is not escaped.
    """
    text = data.decode("utf-8", "replace")
    try:
        return _split(text)
    except (yaml.YAMLError, RecursionError, ValueError):
        return {}, _FRONT.sub("", text, count=1)


def dump_front_matter(values: Mapping[str, Any]) -> str:
    """Return values as YAML, each on one line in ASCII, so that no text can end the block or add a key."""
    return yaml.dump(dict(values), Dumper=_Dumper, sort_keys=False, allow_unicode=False, width=float("inf"))


class _Dumper(yaml.SafeDumper):
    """A dumper that writes multi-line strings, which YAML would fold, in double quotes."""


def _write_text(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    style = '"' if any(not char.isprintable() for char in text) else None
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=style)


_Dumper.add_representer(str, _write_text)


def _split(text: str) -> tuple[dict[str, Any], str]:
    """Return the values of the front matter and the text after it.

    Raises:
        ValueError: The front matter is not an object.
    """
    found = _FRONT.match(text)
    if found is None:
        return {}, text
    values = yaml.safe_load(found[1]) or {}
    if not isinstance(values, dict):
        raise ValueError("the front matter is not an object")
    return values, text[found.end() :]


def _merge(old: Mapping[str, Any], new: Mapping[str, Any]) -> dict[str, Any]:
    kept = {key: value for key, value in old.items() if key not in _OF_ONE_RELEASE}
    tags = old.get("tags")
    before = [tags] if isinstance(tags, str) else tags if isinstance(tags, list) else []
    others = [tag for tag in before if not str(tag).startswith(_BASE_TAG)]
    return {**kept, **new, "tags": list(dict.fromkeys([*others, *new.get("tags", [])]))}

"""Templates of pages: one layout, one policy, every text escaped."""

from __future__ import annotations

import base64
import hashlib
from functools import lru_cache
from importlib import resources
from typing import Any

from jinja2 import ChoiceLoader, Environment, PackageLoader, StrictUndefined, Template
from markupsafe import Markup

from registry.pages.charts import SHADES
from registry.text import visible_lines

__all__ = ["load_template", "make_policy"]

_HERE = "registry.pages"
#: Characters of a text that are shown.
_MOST_TEXT = 4000


@lru_cache(maxsize=16)
def load_template(package: str, name: str, script: str = "", form: bool = False) -> Template:
    """Load a template that can extend ``layout.html`` and import ``figures.html``.

    Texts are escaped, without characters that hide or reverse what is read; the policy in the page allows the layout's
    style and ``script``, both by their hashes, and nothing else.

    Args:
        package: Package with the folder ``templates`` that holds it.
        name: Name of the template's file.
        script: JavaScript of the page; by default it has none.
        form: Whether the page has forms, which ask the server that it came from.
    """
    environment = _make_environment(package)
    style = _read_style()
    policy = make_policy(style, script, form=form)
    shared = {"style": Markup(style), "script": Markup(script), "policy": policy}  # noqa: S704 - files of this package
    return environment.get_template(name, globals=shared)


def make_policy(style: str, script: str = "", *, form: bool = False) -> str:
    """Return the Content-Security-Policy of a page with this style and script."""
    scripts = f"; script-src '{_hash(script)}'" if script else ""
    return (
        f"default-src 'none'; style-src '{_hash(style)}'{scripts}; img-src data:; base-uri 'none'; "
        f"form-action {chr(39)}{'self' if form else 'none'}{chr(39)}"
    )


@lru_cache(maxsize=16)
def _make_environment(package: str) -> Environment:
    environment = Environment(
        loader=ChoiceLoader([PackageLoader(package, "templates"), PackageLoader(_HERE, "templates")]),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=_show,
    )
    environment.filters |= {"number": _format_number, "figure": _format_figure}
    return environment


@lru_cache(maxsize=1)
def _read_style() -> str:
    """Return the style of all pages, with a rule for each shade of a heat map."""
    style = resources.files(_HERE).joinpath("templates/style.css").read_text(encoding="utf-8")
    shades = "".join(f".s{shade}{{--v:{100 * shade / SHADES:g}%}}" for shade in range(SHADES + 1))
    return style + shades + "\n"


def _hash(text: str) -> str:
    return f"sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}"


def _show(value: Any) -> Any:
    """Return a text without characters that hide or reverse what is read; markup of the template stays as it is."""
    return visible_lines(value, _MOST_TEXT) if type(value) is str else value


def _format_number(value: Any) -> str:
    return f"{value:,}" if isinstance(value, int) else _format_figure(value)


def _format_figure(value: Any) -> str:
    return f"{value:.6g}" if isinstance(value, float) else "" if value is None else str(value)

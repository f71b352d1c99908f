"""Write docs/hooks.md from lora_plugins/plugins/hookspecs.py; with --check, fail when it is out of date."""

from __future__ import annotations

import inspect
import sys
from pathlib import Path

from lora_plugins.plugins import hookspecs

PAGE = Path(__file__).parent.parent / "docs" / "hooks.md"

HEAD = """\
# Hook reference

This page is generated from `lora_plugins/plugins/hookspecs.py` by `make docs`.

The entry-point group and pluggy project name is `{project}`. A plugin implements any of these hooks as functions marked
with `lora_plugins.hookimpl`, and may leave out arguments that it does not need. Each hook collects the results of all
plugins. The [API reference](reference.md) describes the records; [Writing a plugin](plugins.md) is a tutorial.
"""


def hooks() -> list[str]:
    """Names of all hooks, in the order of the file."""
    marker = hookspecs.PROJECT + "_spec"
    return [name for name, thing in vars(hookspecs).items() if callable(thing) and hasattr(thing, marker)]


def signature(name: str) -> str:
    """A hook's signature as it is written in the file."""
    return f"{name}{inspect.signature(getattr(hookspecs, name))}".replace("'", "")


def page() -> str:
    """The whole page."""
    parts = [HEAD.format(project=hookspecs.PROJECT)]
    for name in hooks():
        docstring = inspect.getdoc(getattr(hookspecs, name)) or ""
        text, _, arguments = docstring.partition("\nArgs:\n")
        parts.append(f"## `{signature(name)}` {{ #{name} }}\n\n{text.strip()}\n")
        for line in arguments.splitlines():
            argument, _, meaning = line.strip().partition(": ")
            parts.append(f"- `{argument}`: {meaning}\n")
    return "\n".join(parts)


def main() -> int:
    """Write or check the page; the exit code says whether it is up to date."""
    if "--check" not in sys.argv[1:]:
        PAGE.write_text(page(), encoding="utf-8")
    elif not PAGE.is_file() or PAGE.read_text(encoding="utf-8") != page():
        print(f"{PAGE.name} differs from the hook specifications; run `make docs`.", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())

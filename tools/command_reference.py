"""Write docs/commands.md from the program's own --help pages; with --check, fail when it is out of date."""

from __future__ import annotations

import contextlib
import io
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lora_plugins.commands.cli import app
from lora_plugins.plugins.host import DISTRIBUTION, PluginHost

PAGE = Path(__file__).parent.parent / "docs" / "commands.md"

HEAD = """\
# Command reference

This page is generated from the program's `--help` by `make docs`. Commands of other plugins are in
`lora-plugins --help`.

| variable | effect |
|---|---|
| `LORA_REGISTRY` | the registry that commands use without `--hub` |
| `LORA_REGISTRY_CACHE` | the cache folder |
| `LORA_PLUGINS_DEBUG=1` | shows the traceback of an error |
| `LORA_PLUGINS_BLOCK=a,b` | disables plugins, by their name or their distribution's |
| `LORA_PLUGINS_TRACE=1` | prints every hook call |
"""


def own_program() -> Any:
    """The program with the commands of lora-plugins only, whatever else is installed."""
    host = PluginHost(block=[info.distribution for info in PluginHost().plugins if not info.builtin])
    return host.build_program(app)


def help_pages(command: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], str]]:
    """Each command with its help text: the program, its commands, and theirs."""
    yield path, help_page(path)
    for name, inner in sorted(getattr(command, "commands", {}).items()):
        yield from help_pages(inner, (*path, name))


def help_page(path: tuple[str, ...]) -> str:
    """What a command prints for --help on a terminal of eighty columns."""
    output = io.StringIO()
    with contextlib.redirect_stdout(output):
        own_program().main([*path, "--help"], prog_name=DISTRIBUTION, standalone_mode=False)
    return output.getvalue().strip()


def page() -> str:
    """The whole page."""
    parts = [HEAD]
    for path, text in help_pages(own_program()):
        title = " ".join((DISTRIBUTION, *path))
        parts.append(f"{'#' * (2 + bool(path))} `{title}`\n\n```text\n{text}\n```\n")
    return "\n".join(parts)


def main() -> int:
    """Write or check the page; the exit code says whether it is up to date."""
    os.environ["COLUMNS"] = os.environ["TERMINAL_WIDTH"] = "80"
    if "--check" not in sys.argv[1:]:
        PAGE.write_text(page(), encoding="utf-8")
    elif not PAGE.is_file() or PAGE.read_text(encoding="utf-8") != page():
        print(f"{PAGE.name} differs from what --help prints; run `make docs`.", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())

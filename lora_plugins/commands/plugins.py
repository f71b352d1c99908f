"""``lora-plugins plugins``: who provides what, and why something is disabled."""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Iterator
from typing import Annotated

import typer

from lora_plugins.manager import BLOCK_VARIABLE, PluginHost, PluginInfo, plugin_host

#: How many names of one kind are written out before the rest is only counted.
SHOWN = 4


def plugins(
    as_json: Annotated[bool, typer.Option("--json", help="Print every name of everything, as JSON.")] = False,
) -> None:
    """List every plugin with what it provides, or why it is disabled."""
    host = plugin_host()
    if as_json:
        typer.echo(json.dumps([dataclasses.asdict(info) for info in host.plugins], indent=2))
    elif sys.stdout.isatty():
        _print_table(host)
    else:
        for info in host.plugins:
            typer.echo("\n    ".join([f"{info}: {'; '.join(_state(info))}", *info.notes]))
    for name in host.unknown_blocks():
        typer.echo(f"warning: {BLOCK_VARIABLE} names {name!r}, which is no plugin", err=True)


def _state(info: PluginInfo) -> Iterator[str]:
    """What a plugin provides, one phrase for each kind of thing, or why it is disabled."""
    if info.disabled is not None:
        yield f"disabled: {info.disabled}"
        return
    kinds = {"architecture": info.architectures, "quantization backend": info.quantizers, "command": info.commands}
    provided = [_summary(kind, names) for kind, names in kinds.items() if names]
    yield from provided or ["provides nothing"]


def _summary(kind: str, names: list[str]) -> str:
    plural = kind if len(names) == 1 else kind + "s"
    more = ", …" if len(names) > SHOWN else ""
    return f"{len(names)} {plural} ({', '.join(names[:SHOWN])}{more})"


def _print_table(host: PluginHost) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table("plugin", "distribution", "version", "provides")
    for info in host.plugins:
        lines = [*_state(info), *info.notes]
        style = "red" if info.disabled else ""
        table.add_row(info.name, info.distribution, info.version, Text("\n".join(lines), style=style))
    Console().print(table)

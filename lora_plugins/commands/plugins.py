"""``lora-plugins plugins``: list plugins and what they provide."""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Iterator
from typing import Annotated, Any

import typer

from lora_plugins.plugins.host import BLOCK_VARIABLE, PluginHost, PluginInfo, plugin_host
from lora_plugins.plugins.packages import installed_versions, missing_requirements

__all__ = ["SHOWN", "plugins"]


#: Most names of one kind that are written out; the rest is only counted.
SHOWN = 4


def plugins(
    as_json: Annotated[bool, typer.Option("--json", help="Print all names as JSON.")] = False,
) -> None:
    """List plugins with what they provide, or why they are disabled.

    For each quantization backend it shows which required packages are installed, and how to install the others.
    Whether a backend runs on this machine is checked by `lora-plugins plan`.

    \b
    Examples:
      lora-plugins plugins
      lora-plugins plugins --json
    """
    host = plugin_host()
    if as_json:
        typer.echo(json.dumps([_make_record(info) for info in host.plugins], indent=2))
    elif sys.stdout.isatty():
        _print_table(host)
    else:
        for info in host.plugins:
            typer.echo(
                "\n    ".join([f"{info}: {'; '.join(_describe_state(info))}", *_list_packages(info), *info.notes])
            )
    for name in host.unknown_blocks():
        typer.echo(f"warning: {BLOCK_VARIABLE} names {name!r}, which is not a plugin", err=True)


def _make_record(info: PluginInfo) -> dict[str, Any]:
    """Return all facts about a plugin, with the packages that each backend needs and how to install missing ones."""
    record = dataclasses.asdict(info)
    record["packages"] = {
        name: {"installed": installed_versions(requires), "missing": missing_requirements(requires)}
        for name, requires in info.requires.items()
    }
    return record


def _describe_state(info: PluginInfo) -> Iterator[str]:
    """Yield a phrase for each kind of thing that a plugin provides, or why it is disabled."""
    if info.disabled is not None:
        yield f"disabled: {info.disabled}"
        return
    kinds = {
        "architecture": info.architectures,
        "quantization backend": info.quantizers,
        "server": info.servers,
        "command": info.commands,
        "check": info.checks,
        "storage format": info.formats,
    }
    provided = [_summarize(kind, names) for kind, names in kinds.items() if names]
    yield from provided or ["provides nothing"]


def _summarize(kind: str, names: list[str]) -> str:
    plural = kind if len(names) == 1 else kind + "s"
    more = ", …" if len(names) > SHOWN else ""
    return f"{len(names)} {plural} ({', '.join(names[:SHOWN])}{more})"


def _list_packages(info: PluginInfo) -> Iterator[str]:
    """Yield a line for each group of backends with the same requirements: what is installed or missing."""
    alike: dict[tuple[str, ...], list[str]] = {}
    for name, requires in info.requires.items():
        if requires:
            alike.setdefault(tuple(requires), []).append(name)
    for requirements, names in alike.items():
        installed = " and ".join(f"{name} {version}" for name, version in installed_versions(requirements).items())
        yield f"{', '.join(names)}: {missing_requirements(requirements) or f'{installed} installed'}"


def _print_table(host: PluginHost) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table("plugin", "distribution", "version", "provides")
    for info in host.plugins:
        lines = [*_describe_state(info), *_list_packages(info), *info.notes]
        style = "red" if info.disabled else ""
        table.add_row(info.name, info.distribution, info.version, Text("\n".join(lines), style=style))
    Console().print(table)

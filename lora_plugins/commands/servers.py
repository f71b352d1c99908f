"""``lora-plugins servers``: say which servers take an adapter."""

from __future__ import annotations

import dataclasses
import json
from typing import Annotated

import typer

from lora_plugins.commands.hub import HubOption, find_adapter

__all__ = ["servers"]


def servers(
    adapter: Annotated[str, typer.Argument(help="Adapter: a folder (/… or ./…), or org/name@version in the registry.")],
    serve: Annotated[
        list[str] | None, typer.Option(help="Server that must accept the adapter, else the exit code is 1; repeatable.")
    ] = None,
    base: Annotated[str | None, typer.Option(help="Base model; default is the one the adapter names.")] = None,
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit of the base model.")] = None,
    hub: HubOption = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the verdicts as JSON.")] = False,
) -> None:
    """Show which servers accept an adapter, and why others do not. Reads the base's configuration only.

    \b
    Examples:
      lora-plugins servers org/name@1.2.0 --hub ./registry
      lora-plugins servers ./adapter --serve vllm
    """
    from lora_plugins.serving.check import check_serving

    verdicts = check_serving(find_adapter(adapter, hub), serve or None, base=base, revision=revision)
    if as_json:
        found = [{**dataclasses.asdict(verdict), "served": verdict.served} for verdict in verdicts]
        typer.echo(json.dumps(found, indent=2))
    else:
        taking = [f"{verdict.server} {verdict.version}" for verdict in verdicts if verdict.served]
        typer.echo(f"serves on: {', '.join(taking) or 'none of these'}")
        for verdict in verdicts:
            if verdict.reasons or verdict.not_known:
                typer.echo(str(verdict))
    if serve and not all(verdict.served for verdict in verdicts):
        raise typer.Exit(1)

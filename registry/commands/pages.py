"""``lora-plugins registry serve`` and ``registry export``."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

import registry
from registry.commands.terminal import HubOption, Json, print_json, say, visible, waiting

__all__ = ["GROUP", "export", "serve"]

#: The commands under ``lora-plugins registry``.
GROUP = typer.Typer(
    name="registry", help="Serve the web pages of a registry, or export them as files.", no_args_is_help=True
)


@GROUP.command()
def serve(
    hub: HubOption = None,
    host: Annotated[str, typer.Option(help="Address to listen on; by default this machine only.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port; 0 means any free one.")] = 8765,
    allowed_host: Annotated[
        list[str] | None,
        typer.Option(help="Host name that browsers may use, besides localhost; repeatable."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the address as JSON.")] = False,
) -> None:
    """Serve the web pages of a registry: adapters, versions, metrics, cards, comparisons.

    Read-only, and without a login.

    \b
    Examples:
      lora-plugins registry serve --hub ./registry
      lora-plugins registry serve --port 0
    """
    server = registry.open_server(hub, host=host, port=port, allowed_hosts=allowed_host or ())
    with server:
        if as_json:
            print_json({"address": server.address})
        else:
            say(f"The registry's pages are at {server.address} (Ctrl-C ends)")
        sys.stdout.flush()
        if not server.loopback:
            typer.echo("Everybody in the network can read them, and with them what your token may read.", err=True)
        try:
            server.serve_forever(poll_interval=0.2)
        except KeyboardInterrupt:
            typer.echo("Ended.", err=True)


@GROUP.command()
def export(
    folder: Annotated[Path, typer.Argument(help="Folder for the pages.")],
    hub: HubOption = None,
    title: Annotated[str, typer.Option(help="Heading of the first page.")] = "Registry",
    as_json: Json = False,
) -> None:
    """Export the web pages of a registry as files.

    They need neither server nor network. Pages of an earlier export are replaced, other files never. An adapter that
    cannot be read has a page that says why; the command writes the others and then exits with 1.

    \b
    Examples:
      lora-plugins registry export ./pages --hub ./registry
      lora-plugins registry export ./pages --title "Adapters of our team"
    """
    with waiting("Reading …"):
        done = registry.export_pages(hub, folder, title=title)
    if as_json:
        print_json(done)
    else:
        removed = f", {done.removed:,} stale ones removed" if done.removed else ""
        say(f"{done.pages:,} pages, first {visible(done.first)}{removed}")
    for name, problem in done.unread.items():
        typer.echo(f"{visible(name)} cannot be read: {visible(problem)}", err=True)
    if done.unread:
        raise typer.Exit(1)

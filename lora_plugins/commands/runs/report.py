"""``lora-plugins report``: a page of a run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from lora_plugins.commands.hub import HubOption, check_hub

__all__ = ["report"]


def report(
    source: Annotated[
        str, typer.Argument(help="Output folder of a run or folder of an adapter (/… or ./…), or org/name@version.")
    ],
    output: Annotated[Path, typer.Option("--output", "-o", help="The HTML file.")] = Path("report.html"),
    hub: HubOption = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the path as JSON.")] = False,
) -> None:
    """Write a page about a run: curves, parameters, targets, how much each layer changed, lineage.

    It is one HTML file without scripts, and needs no network.

    \b
    Examples:
      lora-plugins report ./lora-output
      lora-plugins report org/name@1.2.0 --output page.html
    """
    check_hub(source, hub)
    from lora_plugins.recipe.report import collect, page

    written = page.write_page(collect.collect_facts(source, hub), output)
    typer.echo(json.dumps({"report": str(written)}) if as_json else f"Report in {written}")

"""``lora-plugins new-plugin``: write a plugin package with a passing test."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

__all__ = ["new_plugin"]


def new_plugin(
    name: Annotated[str, typer.Argument(help="Name of the model type, such as mytype; the package is NAME-lora.")],
    folder: Annotated[
        Path | None, typer.Option(help="Where to write it; must not exist.", show_default="./NAME-lora")
    ] = None,
    targets: Annotated[
        list[str] | None,
        typer.Option(
            "--target", help="Module that gets an adapter by default; several times.", show_default="q_proj, v_proj"
        ),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the folder and its files as JSON.")] = False,
) -> None:
    """Write a plugin package for an architecture, with a test that passes.

    \b
    Examples:
      lora-plugins new-plugin mytype
      lora-plugins new-plugin mytype --target query --target value
    """
    from lora_plugins.commands.scaffold import write_package

    made = write_package(name, folder, tuple(targets or ("q_proj", "v_proj")))
    if as_json:
        files = sorted(str(path.relative_to(made)) for path in made.rglob("*") if path.is_file())
        typer.echo(json.dumps({"folder": str(made), "files": files}, indent=2))
        return
    typer.echo(f"{made} is ready. Try it:\n\n    cd {made}\n    pip install -e .\n    pytest\n    lora-plugins plugins")

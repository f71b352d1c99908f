"""``lora-plugins new-plugin``: write a plugin package with a passing test."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

__all__ = ["new_plugin"]


def new_plugin(
    name: Annotated[str, typer.Argument(help="Name of the model type or backend.")],
    folder: Annotated[
        Path | None,
        typer.Option(help="New folder for the package.", show_default="./NAME-lora, ./NAME-quantizer"),
    ] = None,
    targets: Annotated[
        list[str] | None,
        typer.Option(
            "--target", help="Module that gets an adapter by default; repeatable.", show_default="q_proj, v_proj"
        ),
    ] = None,
    backend: Annotated[
        bool, typer.Option("--backend", help="Write a quantization backend instead of an architecture.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the folder and its files as JSON.")] = False,
) -> None:
    """Write a plugin package for an architecture or a quantization backend, with a passing test.

    \b
    Examples:
      lora-plugins new-plugin mytype
      lora-plugins new-plugin mytype --target query --target value
      lora-plugins new-plugin int3 --backend
    """
    from lora_plugins.commands.scaffold import ARCHITECTURE, BACKEND, write_package

    if backend and targets:
        raise typer.BadParameter("a backend has no target modules; leave out --target or --backend")
    modules = () if backend else tuple(targets or ("q_proj", "v_proj"))
    made = write_package(name, folder, modules, BACKEND if backend else ARCHITECTURE)
    if as_json:
        files = sorted(str(path.relative_to(made)) for path in made.rglob("*") if path.is_file())
        typer.echo(json.dumps({"folder": str(made), "files": files}, indent=2))
        return
    typer.echo(
        f"{made} is ready. Try it:\n\n    cd {made}\n    pip install -e . pytest\n    pytest\n    lora-plugins plugins"
    )

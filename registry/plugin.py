"""The registry's commands, as a plugin of lora_plugins.

The only module here that imports that package.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from lora_plugins import hookimpl

if TYPE_CHECKING:
    import typer

__all__ = ["register_commands"]


@hookimpl
def register_commands(app: typer.Typer) -> None:
    """Add the registry's commands."""
    from registry.commands import fetching, inspecting, publishing

    for module in (publishing, fetching, inspecting):
        for command in module.COMMANDS:
            app.command()(command)

"""Build the command-line program from the commands of every plugin."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import typer

from lora_plugins.errors import PluginError
from lora_plugins.plugins.loading import Loaded, Rejected, explain
from lora_plugins.plugins.table import PluginInfo, Table

__all__ = ["build_program"]


def build_program(
    app: typer.Typer, plugins: Iterable[Loaded], disable: Callable[[PluginInfo, str, BaseException], None]
) -> Any:
    """Return the click group made from ``app`` and the commands of plugins.

    Args:
        app: The program.
        plugins: The plugins.
        disable: Called with a plugin whose commands cannot be built, the reason and the error.
    """
    table: Table[Any] = Table("command", PluginError)
    for loaded in plugins:
        if not loaded.implementations("register_commands"):
            continue
        try:
            commands = _collect_commands(loaded, app.rich_markup_mode)
        except KeyboardInterrupt:
            raise
        except BaseException as error:
            disable(loaded.info, f"register_commands: {explain(error)}", error)
            continue
        loaded.info.commands = sorted(commands)
        for name, command in commands.items():
            table.add(name, loaded.info, command)
    table.annotate()
    program = typer.main.get_command(app)
    for name in table.names():
        try:
            command = table.get(name)
        except PluginError as error:
            command = _make_conflict_command(error)
        program.add_command(command, name)  # type: ignore[attr-defined]
    return program


def _collect_commands(loaded: Loaded, markup: Any) -> dict[str, Any]:
    """Build one plugin's commands in an empty program, which contains its mistakes."""
    scratch = typer.Typer(add_completion=False, rich_markup_mode=markup)
    # Without a callback, Typer turns a program with a single command into that command.
    scratch.callback()(_accept_no_options)
    loaded.call("register_commands", app=scratch)
    if scratch.registered_callback is None or scratch.registered_callback.callback is not _accept_no_options:
        raise Rejected("it sets a callback on `app`, which would replace the program's own options")
    return dict(typer.main.get_command(scratch).commands)  # type: ignore[attr-defined]


def _accept_no_options() -> None:
    """Stand in for the program's options while a plugin's commands are built."""


def _make_conflict_command(error: PluginError) -> Any:
    app = typer.Typer(add_completion=False)

    @app.command(context_settings={"ignore_unknown_options": True, "allow_extra_args": True})
    def conflict() -> None:
        """(Claimed by two plugins; call it to see which.)"""
        raise error

    return typer.main.get_command(app)

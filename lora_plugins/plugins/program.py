"""Build the command-line program from the commands of all plugins."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import typer

from lora_plugins.errors import PluginError
from lora_plugins.plugins.rejection import Rejected, explain
from lora_plugins.plugins.table import DISTRIBUTION, PluginInfo, Table

__all__ = ["build_program"]


def build_program(
    app: typer.Typer,
    plugins: Iterable[tuple[PluginInfo, Callable[..., Any]]],
    disable: Callable[[PluginInfo, str, BaseException], None],
    called: str | None,
) -> Any:
    """Return the click group made from ``app`` and the commands of plugins.

    Args:
        app: The program's own options.
        plugins: Plugins that add commands, each with its hook, which takes ``app=``.
        disable: Called with a plugin whose commands cannot be built, the reason and the error.
        called: The command that is to run. If this distribution has it, its other commands are left out: to build them
            all takes a fifth of the time of a short command.
    """

    def attempt(info: PluginInfo, act: Callable[..., Any], *arguments: Any) -> Any:
        try:
            return act(*arguments)
        except KeyboardInterrupt:
            raise
        except BaseException as error:
            disable(info, f"register_commands: {explain(error)}", error)
            return None

    table: Table[Any] = Table("command", PluginError)
    apps = [(info, attempt(info, _collect_commands, hook, app.rich_markup_mode)) for info, hook in plugins]
    own = [made for info, made in apps if made is not None and info.distribution == DISTRIBUTION]
    only = called if any(called in _list_names(made) for made in own) else None
    for info, made in apps:
        commands = None if made is None else attempt(info, _build_commands, made, only if made in own else None)
        if commands is not None:
            info.commands = sorted(commands)
            for name, command in commands.items():
                table.add(name, info, command)
    table.annotate()
    program = typer.main.get_command(app)
    for name in table.names():
        try:
            command = table.get(name)
        except PluginError as error:
            command = _make_conflict_command(error)
        if command is not None:
            program.add_command(command, name)  # type: ignore[attr-defined]
    return program


def _collect_commands(hook: Callable[..., Any], markup: Any) -> typer.Typer:
    """Let one plugin add its commands to an empty program, which contains its mistakes."""
    scratch = typer.Typer(add_completion=False, rich_markup_mode=markup)
    # Without a callback, Typer turns a program with a single command into that command.
    scratch.callback()(_accept_no_options)
    hook(app=scratch)
    if scratch.registered_callback is None or scratch.registered_callback.callback is not _accept_no_options:
        raise Rejected("it sets a callback on `app`, which would replace the program's own options")
    return scratch


def _list_names(app: typer.Typer) -> list[str]:
    """Return the names of the commands and groups."""
    return [_name(command) for command in app.registered_commands] + [
        _name_group(group) for group in app.registered_groups
    ]


def _name(command: Any) -> str:
    return str(command.name or typer.main.get_command_name(command.callback.__name__))


def _name_group(group: Any) -> str:
    return str(typer.main.solve_typer_info_defaults(group).name)


def _build_commands(app: typer.Typer, only: str | None) -> dict[str, Any]:
    """Return the commands of a program by name; with ``only``, the others are ``None``."""
    names = _list_names(app) if only is not None else []
    if only is not None:
        app.registered_commands = [command for command in app.registered_commands if _name(command) == only]
        app.registered_groups = [group for group in app.registered_groups if _name_group(group) == only]
    built = typer.main.get_command(app).commands  # type: ignore[attr-defined]
    return {**dict.fromkeys(names), **built}


def _accept_no_options() -> None:
    """Stand in for the program's options while a plugin's commands are built."""


def _make_conflict_command(error: PluginError) -> Any:
    app = typer.Typer(add_completion=False)

    @app.command(context_settings={"ignore_unknown_options": True, "allow_extra_args": True})
    def conflict() -> None:
        """(Claimed by two plugins; call it to see which.)"""
        raise error

    return typer.main.get_command(app)

"""The list of commands in ``lora-plugins --help``."""

from __future__ import annotations

from inspect import cleandoc
from typing import Any

from typer.core import TyperGroup

__all__ = ["Program"]


class Program(TyperGroup):
    """The program. Its list of commands wraps long summaries, which would be cut otherwise."""

    def format_commands(self, ctx: Any, formatter: Any) -> None:
        """Write each command with the first paragraph of its help.

        Args:
            ctx: The click context; typer brings a click of its own in some releases, so its class has no one name.
            formatter: The click formatter that the list is written to.
        """
        commands = {name: self.get_command(ctx, name) for name in self.list_commands(ctx)}
        rows = [
            (name, command.short_help or cleandoc(command.help or "").partition("\n\n")[0])
            for name, command in commands.items()
            if command is not None and not command.hidden
        ]
        with formatter.section("Commands"):
            formatter.write_dl(rows)

"""The command line; its built-in commands are a plugin, as anybody else's."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lora_plugins import hookimpl

if TYPE_CHECKING:
    import typer

__all__ = ["register_commands"]


@hookimpl
def register_commands(app: typer.Typer) -> None:
    from lora_plugins.commands.demo.command import demo
    from lora_plugins.commands.merge import merge
    from lora_plugins.commands.new_plugin import new_plugin
    from lora_plugins.commands.plan import plan
    from lora_plugins.commands.plugins import plugins
    from lora_plugins.commands.train import CONTEXT, train

    app.command()(demo)
    app.command()(merge)
    app.command("new-plugin")(new_plugin)
    app.command()(plan)
    app.command()(plugins)
    app.command(context_settings=CONTEXT)(train)

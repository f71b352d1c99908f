"""The command line; its built-in commands are a plugin, as anybody else's."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lora_plugins import hookimpl

if TYPE_CHECKING:
    import typer

__all__ = ["register_commands"]


@hookimpl
def register_commands(app: typer.Typer) -> None:
    from lora_plugins.commands import export, merge, new_plugin, plan, plugins, servers, train, trial
    from lora_plugins.commands.demo import command as demo
    from lora_plugins.commands.runs import report, reproduce

    app.command()(demo.demo)
    app.command()(export.export)
    app.command()(merge.merge)
    app.command("new-plugin")(new_plugin.new_plugin)
    app.command()(plan.plan)
    app.command()(plugins.plugins)
    app.command()(report.report)
    app.command(context_settings=reproduce.CONTEXT)(reproduce.reproduce)
    app.command()(servers.servers)
    app.command(context_settings=train.CONTEXT)(train.train)
    app.command("try")(trial.try_)

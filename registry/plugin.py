"""The registry's commands, as a plugin of lora_plugins.

The only module here that imports that package.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from lora_plugins import hookimpl, plugin_checks
from registry.checks.record import Check, Finding

if TYPE_CHECKING:
    import typer

    from registry.checks.adapter_files import AdapterFiles

__all__ = ["find_checks", "register_commands"]


@hookimpl
def register_commands(app: typer.Typer) -> None:
    """Add the registry's commands."""
    from registry.commands import adopting, fetching, health, inspecting, publishing

    for module in (publishing, adopting, fetching, inspecting, health):
        for command in module.COMMANDS:
            app.command(command.__name__.rstrip("_"))(command)


def find_checks() -> list[Check]:
    """Return the checks that plugins add, named after their plugin; one that fails is a finding that says so."""
    return [_guard(check, info.name) for info, check in plugin_checks() if isinstance(check, Check)]


def _guard(check: Check, origin: str) -> Check:
    def find(files: AdapterFiles) -> list[Finding]:
        try:
            return check.examine(files)
        except Exception as error:
            text = " ".join(f"{type(error).__name__}: {error}".split())[:300]
            cure = f"Update the plugin, or switch it off: LORA_PLUGINS_BLOCK={origin}"
            return [Finding(f"The check {check.name!r} of the plugin {origin} failed: it raised {text}", cure)]

    return replace(check, name=f"{origin}/{check.name}", find=find)

"""The registry's commands, as a plugin of lora_plugins.

The only module here that imports that package.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from lora_plugins import check_servers, hookimpl, judge_adapter, plugin_checks
from registry.checks.configuration import changes_base
from registry.checks.record import Check, Finding

if TYPE_CHECKING:
    import typer

    from registry.checks.adapter_files import AdapterFiles
    from registry.checks.serving import Verdict

__all__ = ["check_servers", "find_checks", "judge_serving", "register_commands"]


@hookimpl
def register_commands(app: typer.Typer) -> None:
    """Add the registry's commands."""
    from registry.commands import adopting, fetching, health, inspecting, pages, publishing

    for module in (publishing, adopting, fetching, inspecting, health):
        for command in module.COMMANDS:
            app.command(command.__name__.rstrip("_"))(command)
    app.add_typer(pages.GROUP)


def find_checks() -> list[Check]:
    """Return the checks that plugins add, named after their plugin; one that fails is a finding that says so."""
    return [_guard(check, info.name) for info, check in plugin_checks() if isinstance(check, Check)]


def judge_serving(
    fields: Mapping[str, Any],
    names: Iterable[str],
    base: Mapping[str, Any] | None,
    servers: Collection[str] | None,
) -> Sequence[Verdict]:
    """Return each server's verdict on an adapter; see `registry.checks.serving`."""
    changed = changes_base(fields.get("init_lora_weights"))
    return judge_adapter(fields, names, base, servers, changes_base=changed)


def _guard(check: Check, origin: str) -> Check:
    def find(files: AdapterFiles) -> list[Finding]:
        try:
            return check.examine(files)
        except Exception as error:
            text = " ".join(f"{type(error).__name__}: {error}".split())[:300]
            cure = f"Update the plugin, or switch it off: LORA_PLUGINS_BLOCK={origin}"
            return [Finding(f"The check {check.name!r} of the plugin {origin} failed: it raised {text}", cure)]

    return replace(check, name=f"{origin}/{check.name}", find=find)

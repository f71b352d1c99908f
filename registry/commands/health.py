"""``lora-plugins doctor``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from registry.commands.terminal import HubOption, Json, print_json, print_rows, say, visible, waiting

if TYPE_CHECKING:
    from registry.health.doctor import Diagnosis

__all__ = ["COMMANDS", "doctor"]


def doctor(
    source: Annotated[str, typer.Argument(help="Folder, or a reference such as org/name@1.2.0.")],
    base: Annotated[
        str | None,
        typer.Option(help="Base model to compare with: org/base@<commit> or a folder.", show_default=False),
    ] = None,
    values: Annotated[
        bool | None,
        typer.Option("--values/--no-values", help="Read all values; default is up to 64 MB.", show_default=False),
    ] = None,
    fix: Annotated[str | None, typer.Option(help="New folder for a cured copy.", show_default=False)] = None,
    base_model: Annotated[
        str | None,
        typer.Option(help="Base that the cured copy names: org/base@<commit>.", show_default=False),
    ] = None,
    hub: HubOption = None,
    as_json: Json = False,
) -> None:
    """Examine any adapter: what is wrong, how serious it is, and how to fix it.

    Exit code: 0 for nothing or notes, 3 for warnings, 4 for errors.

    \b
    Examples:
      lora-plugins doctor ./outputs/adapter
      lora-plugins doctor org/name@1.2.0 --json
      lora-plugins doctor org/plain/best@main
      lora-plugins doctor ./adapter --base ./base --fix ./cured
    """
    from registry.formats.references import is_path
    from registry.health.doctor import diagnose

    if hub is not None and is_path(source):
        raise typer.BadParameter(f"{source} is a folder: leave --hub out, or write org/name", param_hint="--hub")
    with waiting(f"Reading {visible(source)} …"):
        found = diagnose(source, base=base, values=values, fix=fix, base_model=base_model, hub=hub)
    if as_json:
        print_json({"severity": found.severity, **vars(found)})
        raise typer.Exit(found.exit_code)
    rows = [(one.severity, one.check, one.message, _describe_cure(one.cure, one.curable)) for one in found.symptoms]
    if rows:
        print_rows(("severity", "check", "finding", "cure"), rows)
    else:
        say(f"{found.title}: nothing found")
    _say_servers(found)
    for part, reason in found.not_read.items():
        say(f"not read: {part} ({visible(reason)})")
    if found.cured is not None:
        say(f"cured copy: {visible(found.cured)}")
    raise typer.Exit(found.exit_code)


def _say_servers(found: Diagnosis) -> None:
    taking = [f"{one.server} {one.version}" for one in found.servers if one.served]
    if found.severity == "error":
        say("serves on: not judged before the errors are cured")
    if found.servers:
        say(f"serves on: {visible(', '.join(taking) or 'none of the servers whose rules are known')}")
    for verdict in found.servers:
        if not verdict.served:
            say(f"not on {visible(f'{verdict.server} {verdict.version}: ' + '; '.join(verdict.reasons))}")
    unknown = _find_unknown(found)
    if unknown:
        say(f"not known: {visible(', '.join(unknown))}, which some rules ask for; --base says which model to read")


def _find_unknown(found: Diagnosis) -> list[str]:
    """Return what the rules of every server leave open: it is the base that was not at hand."""
    first = found.servers[0].not_known if found.servers else ()
    return [phrase for phrase in first if all(phrase in verdict.not_known for verdict in found.servers)]


def _describe_cure(cure: str, curable: bool) -> str:
    return f"{cure} [--fix]".strip() if curable else cure


#: Commands that this module adds to the program.
COMMANDS = (doctor,)

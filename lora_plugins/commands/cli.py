"""The program ``lora-plugins``: its own options, the plugins' commands, errors turned into exit codes."""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Annotated, Any, TextIO

import typer

from lora_plugins.errors import LoraPluginsError, LoraPluginsWarning
from lora_plugins.plugins.host import DISTRIBUTION, plugin_host

__all__ = ["DEBUG_VARIABLE", "app", "is_expected", "main", "options", "program"]


DEBUG_VARIABLE = "LORA_PLUGINS_DEBUG"

app = typer.Typer(
    name=DISTRIBUTION,
    add_completion=False,
    no_args_is_help=True,
    # Without markup the help needs no rich, which would double the time until it is there.
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _print_version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import version

        typer.echo(f"{DISTRIBUTION} {version(DISTRIBUTION)}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    """Quantized LoRA runs from any Hugging Face Trainer, and a registry for the adapters."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the program and exit.

    An expected error becomes its message on stderr and exit code 1; ``LORA_PLUGINS_DEBUG=1`` shows where it
    came from. Warnings of ours take one line each.

    Args:
        arguments: The command line without the program's name; default is the process's own.
    """
    with _short_warnings():
        try:
            program(arguments)
        except Exception as error:
            if not is_expected(error) or os.environ.get(DEBUG_VARIABLE, "") not in ("", "0"):
                raise
            typer.echo(f"{DISTRIBUTION}: {str(error).strip()}", err=True)
            sys.exit(1)


def program(arguments: Sequence[str] | None = None) -> None:
    """Run the program and exit; expected errors come out as exceptions."""
    plugin_host().build_program(app).main(args=None if arguments is None else list(arguments), prog_name=DISTRIBUTION)


def is_expected(error: BaseException) -> bool:
    """Whether an error was raised on purpose, by lora_plugins or by the registry, and its message says it all."""
    if isinstance(error, LoraPluginsError):
        return True
    # Nobody can have raised an error of the registry's before its module was loaded.
    registry_errors = sys.modules.get("registry.errors")
    return registry_errors is not None and isinstance(error, registry_errors.RegistryError)


def _is_ours(category: type[Warning]) -> bool:
    registry_errors = sys.modules.get("registry.errors")
    ours = (LoraPluginsWarning,) if registry_errors is None else (LoraPluginsWarning, registry_errors.RegistryWarning)
    return issubclass(category, ours)


@contextmanager
def _short_warnings() -> Iterator[None]:
    """Show warnings of ours as one line, without the source line that Python adds."""
    with warnings.catch_warnings():
        usual = warnings.showwarning

        def show(
            message: Warning | str,
            category: type[Warning],
            filename: str,
            lineno: int,
            file: TextIO | None = None,
            line: str | None = None,
        ) -> Any:
            if _is_ours(category):
                typer.echo(f"warning: {' '.join(str(message).split())}", err=True)
            else:
                usual(message, category, filename, lineno, file, line)

        warnings.showwarning = show
        yield

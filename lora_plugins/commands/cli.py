"""The program ``lora-plugins``: options, commands, errors as exit codes."""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Annotated, Any, TextIO

import typer

from lora_plugins.commands.calm import calm
from lora_plugins.commands.listing import Program
from lora_plugins.commands.wording import find_options, use_option_names
from lora_plugins.plugins.host import DISTRIBUTION, plugin_host
from lora_plugins.text import one_line

__all__ = ["DEBUG_VARIABLE", "app", "is_expected", "main", "options", "program"]


DEBUG_VARIABLE = "LORA_PLUGINS_DEBUG"

app = typer.Typer(
    name=DISTRIBUTION,
    cls=Program,
    no_args_is_help=True,
    # Without markup the help needs no rich, whose import would double its start-up time.
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

    An expected error becomes its message on stderr and exit code 1, or 2 for an error of usage;
    ``LORA_PLUGINS_DEBUG=1`` shows its traceback. Expected warnings take one line each.

    Args:
        arguments: The command line without the program's name; default is the process's own.
    """
    words = sys.argv[1:] if arguments is None else list(arguments)
    options: dict[str, tuple[str, str | None]] = {}
    with _shorten_warnings(options):
        try:
            _run(words, options)
        except Exception as error:
            if not is_expected(error) or os.environ.get(DEBUG_VARIABLE, "") not in ("", "0"):
                raise
            typer.echo(f"{DISTRIBUTION}: {use_option_names(str(error).strip(), options)}", err=True)
            sys.exit(getattr(error, "exit_code", 1))


def program(arguments: Sequence[str] | None = None) -> None:
    """Run the program and exit; expected errors are raised as exceptions."""
    _run(sys.argv[1:] if arguments is None else list(arguments), {})


def _run(words: list[str], options: dict[str, tuple[str, str | None]]) -> None:
    """Run the program, having put the options of the command that is called into ``options``."""
    called = next((word for word in words if not word.startswith("-")), "")
    built = plugin_host().build_program(app, called)
    options.update(find_options(built.commands.get(called)))
    calm()
    built.main(args=words, prog_name=DISTRIBUTION)


def is_expected(error: BaseException | type[BaseException]) -> bool:
    """Whether an error or warning is expected, so that its message is shown without a traceback.

    Its class is marked with ``says_it_all = True``, as the roots of lora_plugins' and the registry's errors are. A
    plugin's own errors have the mark, or derive from ``lora_plugins.errors.LoraPluginsError``.
    """
    return getattr(error, "says_it_all", False) is True


@contextmanager
def _shorten_warnings(options: Mapping[str, tuple[str, str | None]]) -> Iterator[None]:
    """Show expected warnings as one line in the words of the command line, without the source line that Python adds."""
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
            if is_expected(category):
                typer.echo(f"warning: {use_option_names(one_line(message), options)}", err=True)
            else:
                usual(message, category, filename, lineno, file, line)

        warnings.showwarning = show
        yield

"""Options, tables and progress that the registry's commands share."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, is_dataclass
from typing import Annotated, Any

import typer

from registry.text import visible

__all__ = ["CacheDir", "HubOption", "Json", "print_json", "print_rows", "progress", "say", "visible", "waiting"]

HubOption = Annotated[
    str | None,
    typer.Option(
        "--hub",
        help="Registry: https://…, s3://bucket/prefix, or a folder (./… or file:///…); default is LORA_REGISTRY, "
        "else the Hugging Face Hub.",
        show_default=False,
    ),
]
Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]
CacheDir = Annotated[str | None, typer.Option(help="Cache folder; default is LORA_REGISTRY_CACHE.", show_default=False)]


def say(text: str) -> None:
    """Print a line."""
    typer.echo(text)


def print_json(value: Any) -> None:
    """Print a value, records as objects. JSON escapes control characters and non-ASCII, so none reach the terminal."""
    typer.echo(json.dumps(_make_plain(value), indent=2))


def _make_plain(value: Any) -> Any:
    if is_dataclass(value) and not isinstance(value, type):
        return _make_plain(asdict(value))
    if isinstance(value, dict):
        return {str(key): _make_plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_make_plain(item) for item in value]
    return value if isinstance(value, (str, int, float, bool, type(None))) else str(value)


def print_rows(head: Sequence[str], rows: Iterable[Sequence[object]], *, figures: Sequence[str] = ()) -> None:
    """Print a table: with borders on a terminal, with tabs elsewhere.

    Args:
        head: Titles of the columns.
        rows: The cells of each row.
        figures: Titles of the columns with numbers. On a narrow terminal other cells go on in the next line.
    """
    lines = [[visible(cell) for cell in row] for row in rows]
    if not sys.stdout.isatty():
        for line in lines:
            typer.echo("\t".join(line))
        return
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table()
    for title in head:
        number = title in figures
        table.add_column(title, overflow="fold", no_wrap=number, justify="right" if number else "left")
    for line in lines:
        table.add_row(*(Text(cell) for cell in line))
    Console().print(table)


@contextmanager
def progress() -> Iterator[Callable[[str, int, int], None] | None]:
    """Show progress bars of downloads on a terminal; yield ``None`` elsewhere."""
    if not sys.stderr.isatty():
        yield None
        return
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn

    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bars:
        tasks: dict[str, Any] = {}

        def advance(name: str, done: int, size: int) -> None:
            if name not in tasks:
                tasks[name] = bars.add_task(visible(name), total=size)
            bars.update(tasks[name], completed=done)

        yield advance


@contextmanager
def waiting(what: str) -> Iterator[None]:
    """Show a spinner on a terminal."""
    if not sys.stderr.isatty():
        yield
        return
    from rich.console import Console

    with Console(stderr=True).status(what):
        yield

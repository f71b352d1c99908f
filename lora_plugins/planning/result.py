"""A plan that can be printed, saved and drawn."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console, ConsoleOptions, RenderResult

from lora_plugins.planning.chart import draw
from lora_plugins.planning.records import PlanFigures
from lora_plugins.planning.tables import as_text, tables
from lora_plugins.text import write_json

__all__ = ["Plan"]


@dataclass(frozen=True)
class Plan(PlanFigures):
    """What a run would train and what it would take: `PlanFigures` that can be printed, saved and drawn."""

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the plan as JSON; the file is complete or not there.

        Raises:
            OSError: The folder can't be written.
        """
        write_json(path, self.to_dict())

    def chart(self, path: str | os.PathLike[str]) -> None:
        """Draw the memory of every row as stacked bars into a PNG file.

        Raises:
            OSError: The file can't be written.
        """
        draw(self, Path(path))

    def __str__(self) -> str:
        return as_text(self)

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        yield from tables(self)

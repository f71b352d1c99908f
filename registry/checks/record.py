"""The record of a check, and what it finds."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from registry.checks.adapter_files import AdapterFiles
from registry.errors import RegistryError

__all__ = ["SEVERITIES", "Changes", "Check", "Finding", "Part", "Severity", "Stage"]

#: ``error``: it cannot be used, or does not compute what was trained. ``warning``: it works, with a cost or a danger.
#: ``note``: worth knowing.
Severity = Literal["note", "warning", "error"]
#: All severities, the least severe first.
SEVERITIES: tuple[Severity, ...] = ("note", "warning", "error")
#: A part of an adapter that a check reads.
Part = Literal["files", "configuration", "header", "values", "manifest", "base"]
#: Where a check refuses an adapter: a folder that is to be published, a push, a pull, or loading onto a base.
Stage = Literal["folder", "push", "pull", "load"]


@dataclass(frozen=True)
class Changes:
    """How a copy of an adapter is cured.

    Attributes:
        renames: New names of tensors.
        drop: Tensors that are left out.
        single: Tensors that are converted to float32.
        fields: New values of fields of the configuration.
    """

    renames: Mapping[str, str] = field(default_factory=dict)
    drop: tuple[str, ...] = ()
    single: tuple[str, ...] = ()
    fields: Mapping[str, Any] = field(default_factory=dict)

    def __bool__(self) -> bool:
        return bool(self.renames or self.drop or self.single or self.fields)


@dataclass(frozen=True)
class Finding:
    """One thing that a check found.

    Attributes:
        message: What is wrong, naming the tensor, file or field.
        cure: What to do about it; by default, the check's own.
        changes: What ``doctor --fix`` does about it; empty if it cannot be cured so.
        severity: How bad it is; by default, the check's own.
    """

    message: str
    cure: str = ""
    changes: Changes = Changes()
    severity: Severity | None = None


@dataclass(frozen=True)
class Check:
    """Something to look for in an adapter.

    Attributes:
        name: Its name, of lower-case words joined by hyphens.
        severity: How bad it is if something is found.
        reads: The parts of the adapter that it needs. It is left out where one of them cannot be read, or is not to be.
        find: Returns what is wrong: findings, or messages alone.
        cure: What to do about it. Empty if the messages say so themselves.
        refused: Where an adapter with a finding is refused, and by which error.
        warned: Where the finding is a warning.
    """

    name: str
    severity: Severity
    reads: tuple[Part, ...]
    find: Callable[[AdapterFiles], Iterable[Finding | str]]
    cure: str = ""
    refused: Mapping[Stage, type[RegistryError]] = field(default_factory=dict)
    warned: tuple[Stage, ...] = ()

    def examine(self, files: AdapterFiles) -> list[Finding]:
        """Return the findings."""
        found = self.find(files)
        return [Finding(item) if isinstance(item, str) else item for item in found]

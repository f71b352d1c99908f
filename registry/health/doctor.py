"""Examine any adapter, and cure a copy of it."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from registry.checks.adapter_files import AdapterFiles
from registry.checks.record import SEVERITIES, Changes, Check, Finding, Part, Severity
from registry.checks.serving import Verdict, describe_base, judge_serving
from registry.checks.table import load_checks
from registry.disk.machine import temporary_folder
from registry.errors import InvalidAdapter, InvalidManifest, UnknownBase, UnsafeFile
from registry.formats.fields import COMMIT
from registry.formats.manifest import BASE_ID
from registry.formats.references import expand_path
from registry.health.base_checks import CHECKS as BASE_CHECKS
from registry.health.curing import join_changes, write_cured
from registry.health.source import open_files, read_base_config

__all__ = ["Diagnosis", "Symptom", "diagnose"]

#: Findings after which it cannot be compared with a base: there is no adapter to compare.
_FATAL = ("configuration", "weights", "no-adapter", "pickled-weights", "no-lora")


@dataclass(frozen=True)
class Symptom:
    """One finding, with the check that found it.

    Attributes:
        check: Name of the check.
        severity: ``"error"``, ``"warning"`` or ``"note"``.
        message: What is wrong.
        cure: What to do about it; empty if the message says so.
        curable: Whether a copy can be cured of it.
    """

    check: str
    severity: Severity
    message: str
    cure: str
    curable: bool


@dataclass(frozen=True)
class Diagnosis:
    """What is wrong with an adapter.

    Attributes:
        title: The adapter's name in messages.
        symptoms: What was found, the worst first.
        not_read: Parts of the adapter that were not read, with the reason.
        cured: Folder of the cured copy, if one was written.
        servers: Each server's verdict on the adapter as it is: ``lora_plugins.ServingVerdict``. Empty after an error,
            or if configuration or header cannot be read.
    """

    title: str
    symptoms: tuple[Symptom, ...]
    not_read: Mapping[str, str] = field(default_factory=dict)
    cured: str | None = None
    servers: tuple[Verdict, ...] = ()

    @property
    def severity(self) -> Severity | None:
        """The worst severity; ``None`` if nothing was found."""
        return max((found.severity for found in self.symptoms), key=SEVERITIES.index, default=None)

    @property
    def exit_code(self) -> int:
        """The exit code of the command: 0 for nothing or notes, 3 for warnings, 4 for errors."""
        return {"error": 4, "warning": 3}.get(self.severity or "", 0)


def diagnose(
    source: str | os.PathLike[str],
    *,
    base: Any = None,
    values: bool | None = None,
    fix: str | os.PathLike[str] | None = None,
    base_model: str | None = None,
    hub: Any = None,
    token: str | bool | None = None,
) -> Diagnosis:
    """Find what is wrong with an adapter, and how to cure it. Nothing is changed, and no code of the adapter is run.

    Configuration and header of the weights are read first, without torch; values if they are few or asked for.

    Args:
        source: An adapter folder, or a reference to an adapter on a hub. A string is a folder if one of that name
            exists, unless ``hub`` is given.
        base: A base model to compare with, in any form that `check_contract` takes; by default none.
        values: Whether to read the values; by default, if the weights have at most 64 MB.
        fix: A new folder for a copy that is cured of what can be cured.
        base_model: ``org/base`` or ``org/base@<commit>``, which the cured copy names as its base.
        hub: The registry of a reference.
        token: Token for the registry.

    Raises:
        InvalidReference: The source is neither a folder nor a reference.
        InvalidAdapter: ``fix`` is not an empty folder, or there is nothing that a copy could be made of.
        UnknownBase: ``base_model`` is not the id of a model.
        HubError: The hub cannot be asked.
    """
    named = _name_base(base_model)
    with open_files(source, hub=hub, token=token, values=values, whole=fix is not None or base is not None) as (
        files,
        read_values,
    ):
        left_out = "it was not asked for" if values is False else "the file is large; read them with --values"
        found = _Examination(replace(files, base=base), named, {} if read_values else {"values": left_out})
        found.run(load_checks())
        if base is not None:
            found.compare(base)
        if fix is not None:
            found.cure(expand_path(fix))
        return found.report(None if fix is None else str(fix))


def _name_base(base_model: str | None) -> Changes:
    if base_model is None:
        return Changes()
    name, _, revision = base_model.partition("@")
    if BASE_ID.fullmatch(name) is None or (revision and COMMIT.fullmatch(revision) is None):
        raise UnknownBase(f"base_model={base_model!r} must be the id of a model: org/base or org/base@<commit>")
    return Changes(fields={"base_model_name_or_path": name, "revision": revision or None})


class _Examination:
    """The state of one examination: what was found so far, and the changes that cure it."""

    def __init__(self, files: AdapterFiles, named: Changes, not_read: dict[str, str]) -> None:
        # Under the names that are in the file: servers read those.
        self.original = files
        self.files = files
        self.named = named
        self.changes: list[Changes] = []
        self.symptoms: list[Symptom] = []
        self.not_read = not_read
        self.parts: set[Part] = {"files"}

    def run(self, checks: Iterable[Check]) -> None:
        """Run all checks whose parts can be read."""
        checks = list(checks)
        for check in checks:
            if set(check.reads) == {"files"}:
                self._add(check, check.examine(self.files))
        self._find_readable()
        # Renames come first, so that the others see the names that PEFT would have written.
        for check in checks:
            if set(check.reads) != {"files"} and set(check.reads) <= self.parts:
                self._add(check, check.examine(self.files))

    def _find_readable(self) -> None:
        readers: dict[Part, str] = {"configuration": "config", "header": "header", "manifest": "manifest"}
        for part, attribute in readers.items():
            try:
                getattr(self.files, attribute)
            except (UnsafeFile, InvalidManifest) as error:
                self.not_read[part] = str(error)
            else:
                self.parts.add(part)
        if "header" not in self.parts:
            self.not_read["values"] = "the header cannot be read"
        elif "values" not in self.not_read:
            self.parts.add("values")

    def _add(self, check: Check, findings: Iterable[Finding]) -> None:
        for finding in findings:
            changes = finding.changes if self._is_possible(finding.changes) else Changes()
            if check.name in ("local-base", "no-base", "no-revision") and self.named:
                changes = self.named
            self.symptoms.append(
                Symptom(
                    check.name,
                    finding.severity or check.severity,
                    finding.message,
                    finding.cure or check.cure,
                    bool(changes),
                )
            )
            if changes:
                self.changes.append(changes)
            if changes.renames:
                self.files = self.files.rename(changes.renames)

    def _is_possible(self, changes: Changes) -> bool:
        """Whether renaming leaves every tensor a name of its own."""
        names = [changes.renames.get(name, name) for name in self.files.tensors] if changes.renames else []
        return len(set(names)) == len(names)

    def compare(self, base: Any) -> None:
        """Compare with a base model: a copy that is cured of everything else, so that one damage hides no other."""
        if any(symptom.check in _FATAL for symptom in self.symptoms):
            self.not_read["base"] = "there is no adapter that could be compared"
            return
        with self._copy() as folder:
            compared = AdapterFiles(folder, base=base)
            for check in BASE_CHECKS:
                self._add(check, check.examine(compared))

    @contextmanager
    def _copy(self) -> Iterator[Path]:
        changes = join_changes(self.changes)
        if not changes:
            yield self.files.folder
            return
        with temporary_folder() as folder:
            write_cured(self.files, changes, folder / "cured")
            yield folder / "cured"

    def cure(self, target: Path) -> None:
        """Write the cured copy.

        Raises:
            InvalidAdapter: Configuration or weights cannot be read.
        """
        if not {"configuration", "header"} <= self.parts:
            raise InvalidAdapter(f"{self.files.title} cannot be cured: {'; '.join(self.not_read.values())}")
        write_cured(self.files, join_changes([*self.changes, self.named]), target)

    def report(self, cured: str | None) -> Diagnosis:
        """Return what was found."""
        worst_first = sorted(self.symptoms, key=lambda symptom: -SEVERITIES.index(symptom.severity))
        # What is broken is served by nobody, whatever the servers' rules say about its configuration.
        broken = any(symptom.severity == "error" for symptom in self.symptoms)
        servers = () if broken else self._judge()
        return Diagnosis(self.files.title, tuple(worst_first), self.not_read, cured, servers)

    def _judge(self) -> tuple[Verdict, ...]:
        """Ask the rules of all servers, of the base what the manifest, or the base that was given, says."""
        if not {"configuration", "header"} <= self.parts:
            return ()
        manifest = self.files.manifest if "manifest" in self.parts else None
        known = None if manifest is None else describe_base(manifest.architecture, manifest.base)
        base = read_base_config(self.files.base) or known
        return tuple(judge_serving(self.files.config.fields, self.original.tensors, base))

"""All checks, and how the registry enforces them."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from registry.checks import configuration, folder, names, tensors
from registry.checks.adapter_files import AdapterFiles
from registry.checks.plugins import load_plugin
from registry.checks.record import Check, Part, Stage
from registry.formats.adapter_config import AdapterConfig
from registry.formats.weights import Header

__all__ = ["CHECKS", "PARTS", "CheckedWeights", "check_weights", "enforce", "load_checks"]

#: The checks that come with the registry, in the order in which they are enforced.
CHECKS: tuple[Check, ...] = (*folder.CHECKS, *configuration.CHECKS, *names.CHECKS, *tensors.CHECKS)
#: The parts that can be read without a base model.
PARTS: tuple[Part, ...] = ("files", "configuration", "manifest", "header", "values")


def load_checks() -> tuple[Check, ...]:
    """Return all checks: the registry's own, then those that plugins add with ``register_checks``."""
    found: list[Check] = []
    plugin = load_plugin()
    if plugin is not None:
        found += plugin.find_checks()
    return (*CHECKS, *found)


def enforce(
    files: AdapterFiles, stage: Stage, parts: Iterable[Part], *, checks: Iterable[Check] | None = None
) -> list[str]:
    """Run the checks of a stage, and return the messages of those that only warn there.

    Args:
        files: The adapter.
        stage: Where it is to be used.
        parts: The parts to read; a check that needs others is left out.
        checks: The checks; all by default.

    Raises:
        RegistryError: A check that refuses there found something; the error of the first finding.
    """
    warned, readable = [], set(parts)
    for check in load_checks() if checks is None else checks:
        if (stage in check.refused or stage in check.warned) and set(check.reads) <= readable:
            for finding in check.examine(files):
                if stage in check.refused:
                    raise check.refused[stage](finding.message)
                warned.append(finding.message)
    return warned


@dataclass(frozen=True)
class CheckedWeights:
    """Weights of which every value was checked.

    Attributes:
        header: Header of the file.
        warnings: Harmless but useless content, with the remedy: an adapter of zeros, float64. A push refuses it, a
            pull warns.
    """

    header: Header
    warnings: tuple[str, ...] = ()


def check_weights(path: Path, config: AdapterConfig) -> CheckedWeights:
    """Check an adapter's weight file: header, names, shapes, ranks and every value.

    Push, pull and `verify` share this check. It reads all values once, 16 MB at a time.

    Args:
        path: ``adapter_model.safetensors``.
        config: The configuration beside it.

    Raises:
        UnsafeFile: It is not a safetensors file, or a malicious one.
        InvalidAdapter: An A or B is missing, a shape or rank does not match the configuration, a dtype is not
            floating-point, or values are not finite or exceed float16's maximum.
    """
    files = AdapterFiles(path.parent, weights=path.name, given={"config": config})
    warned = enforce(files, "pull", ("header", "values", "configuration"))
    return CheckedWeights(files.header, tuple(warned))

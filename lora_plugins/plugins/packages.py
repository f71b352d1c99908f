"""Look up optional packages without importing them."""

from __future__ import annotations

import contextlib
import importlib.metadata
import importlib.util
from collections.abc import Iterable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from packaging.requirements import Requirement

__all__ = ["installed_version", "installed_versions", "missing_package", "missing_requirements"]


def missing_package(package: str, minimum: str, module: str | None = None) -> str | None:
    """Say how to install a package that is not there or too old; nothing is imported.

    For what a backend always needs, `Quantizer.requires` is enough. This is for an ``available`` that needs a
    package for some options only.

    Args:
        package: Name of the distribution, as ``pip install`` takes it.
        minimum: Lowest version that will do.
        module: What is imported from it, if that has another name.

    Returns:
        ``None`` when it can be used, else the reason and the command.
    """
    requirement = f"{package}>={minimum}"
    try:
        found = importlib.util.find_spec(module or package) is not None
    except (ImportError, ValueError):
        # A namespace package whose parent is not there can't even be looked for.
        found = False
    if not found:
        return f"{package} is not installed; {_command([requirement])}"
    return missing_requirements([requirement])


def missing_requirements(requirements: Iterable[str]) -> str | None:
    """Say which of some requirements are not met by what is installed, and how to install them.

    Only the metadata of installed packages is read, and nothing is raised.

    Args:
        requirements: Distributions with versions, as ``pip install`` takes them, such as ``"hqq>=0.2.8"``.

    Returns:
        ``None`` when all of them are met, else the reasons and one command.
    """
    reasons, wanted = [], []
    for text in requirements:
        try:
            requirement = _needed_here(text)
        except ValueError:
            return f"{text!r} in its `requires` is nothing that `pip install` could read"
        if requirement is None:
            continue
        version = installed_version(requirement.name)
        if version is None:
            reasons.append(f"{requirement.name} is not installed")
        elif not requirement.specifier.contains(version, prereleases=True):
            reasons.append(f"{requirement.name} {version} is installed and {requirement.specifier} is needed")
        else:
            continue
        wanted.append(text)
    return f"{' and '.join(reasons)}; {_command(wanted)}" if wanted else None


def installed_versions(requirements: Iterable[str]) -> dict[str, str | None]:
    """The installed version of each required distribution, ``None`` for one that is not there."""
    found = {}
    for text in requirements:
        with contextlib.suppress(ValueError):
            requirement = _needed_here(text)
            if requirement is not None:
                found[requirement.name] = installed_version(requirement.name)
    return found


def installed_version(package: str) -> str | None:
    """The version of an installed distribution, ``None`` where there is none."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _needed_here(text: str) -> Requirement | None:
    """Read a requirement; ``None`` where its marker says that this Python or system does not need it."""
    from packaging.requirements import Requirement

    requirement = Requirement(text)
    return requirement if requirement.marker is None or requirement.marker.evaluate() else None


def _command(requirements: Iterable[str]) -> str:
    return f"run `pip install {' '.join(map(repr, requirements))}`"

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
    """Return how to install a package that is missing or too old; nothing is imported.

    Use it in an ``available`` that needs a package for some options only. `Quantizer.requires` covers what a
    backend always needs.

    Args:
        package: Name of the distribution, as ``pip install`` takes it.
        minimum: Lowest accepted version.
        module: Name of the import package, if it differs.

    Returns:
        ``None`` if it can be used, else the reason and the install command.
    """
    requirement = f"{package}>={minimum}"
    try:
        found = importlib.util.find_spec(module or package) is not None
    except (ImportError, ValueError):
        # Looking up a submodule of a missing parent package raises.
        found = False
    if not found:
        return f"{package} is not installed; {_make_command([requirement])}"
    return missing_requirements([requirement])


def missing_requirements(requirements: Iterable[str]) -> str | None:
    """Return which requirements the installed packages do not meet, and how to install them.

    Reads only the metadata of installed packages, and never raises.

    Args:
        requirements: Distributions with versions, as ``pip install`` takes them, such as ``"hqq>=0.2.8"``.

    Returns:
        ``None`` if all are met, else the reasons and one install command.
    """
    reasons, wanted = [], []
    for text in requirements:
        try:
            requirement = _read_requirement(text)
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
    return f"{' and '.join(reasons)}; {_make_command(wanted)}" if wanted else None


def installed_versions(requirements: Iterable[str]) -> dict[str, str | None]:
    """Return the installed version of each required distribution, ``None`` for a missing one."""
    found = {}
    for text in requirements:
        with contextlib.suppress(ValueError):
            requirement = _read_requirement(text)
            if requirement is not None:
                found[requirement.name] = installed_version(requirement.name)
    return found


def installed_version(package: str) -> str | None:
    """Return the version of an installed distribution, ``None`` if it is missing."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _read_requirement(text: str) -> Requirement | None:
    """Read a requirement; ``None`` if its marker excludes this Python or system."""
    from packaging.requirements import Requirement

    requirement = Requirement(text)
    return requirement if requirement.marker is None or requirement.marker.evaluate() else None


def _make_command(requirements: Iterable[str]) -> str:
    return f"run `pip install {' '.join(map(repr, requirements))}`"

"""Whether an optional package is installed, and the line that installs it."""

from __future__ import annotations

import importlib.metadata
import importlib.util


def missing_package(package: str, minimum: str, module: str | None = None) -> str | None:
    """Say how to install a package that is not there or too old; nothing is imported.

    Args:
        package: Name of the distribution, as ``pip install`` takes it.
        minimum: Lowest version that will do.
        module: What is imported from it, if that has another name.

    Returns:
        ``None`` when it can be used, else the reason and the command.
    """
    from packaging.version import Version

    command = f"run `pip install '{package}>={minimum}'`"
    try:
        found = importlib.util.find_spec(module or package) is not None
        version = importlib.metadata.version(package)
    except (ImportError, ValueError):
        # A namespace package whose parent is not there can't even be looked for.
        return f"{package} is not installed; {command}"
    if not found:
        return f"{package} is not installed; {command}"
    if Version(version) < Version(minimum):
        return f"{package} {version} is installed and {minimum} or newer is needed; {command}"
    return None

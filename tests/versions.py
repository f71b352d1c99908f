"""Tests that need a newer release of a library than the lowest one that is allowed."""

from __future__ import annotations

from importlib.metadata import version

import pytest
from packaging.version import Version

__all__ = ["needs"]


def needs(library: str, lowest: str, because: str) -> pytest.MarkDecorator:
    """Skip a test with older releases of a library.

    Args:
        library: Name of the distribution.
        lowest: Its first release that the test was seen to pass with.
        because: What older ones do.
    """
    installed = version(library)
    return pytest.mark.skipif(
        Version(installed) < Version(lowest), reason=f"{library} {installed}, and the test needs {lowest}: {because}"
    )

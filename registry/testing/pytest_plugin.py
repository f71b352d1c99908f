"""The pytest plugin that comes with the distribution: the fixture ``loopback_hub``.

pytest loads this module in every run of an environment that has the distribution, so it imports nothing but pytest.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from registry.testing.loopback import LoopbackHub

__all__ = ["loopback_hub"]


@pytest.fixture
def loopback_hub() -> Iterator[LoopbackHub]:
    """A fresh, empty Hugging Face Hub on loopback; see ``registry.testing.LoopbackHub``."""
    from registry.testing.loopback import LoopbackHub

    with LoopbackHub() as hub:
        yield hub

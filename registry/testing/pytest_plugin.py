"""The pytest fixture ``loopback_hub``.

pytest loads this module in every run of an environment that has the distribution, so it imports nothing but pytest.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from registry.testing import LoopbackHub

__all__ = ["loopback_hub"]


@pytest.fixture
def loopback_hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[LoopbackHub]:
    """A fresh, empty Hugging Face Hub on loopback; see ``registry.testing.LoopbackHub``.

    During the test huggingface_hub is not in offline mode and does not use xet, which the hub does not have.
    """
    from registry.testing import LoopbackHub

    try:
        from huggingface_hub import constants
    except ImportError:
        pass  # the test has a client of its own
    else:
        # The client reads the variables when it is imported; child processes read them anew.
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.setenv("HF_HUB_DISABLE_XET", "1")
    with LoopbackHub() as hub:
        yield hub

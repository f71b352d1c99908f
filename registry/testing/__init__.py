"""A Hugging Face Hub on loopback for tests, with faults on demand.

Names are loaded when first used: pytest imports this package in every run, for the sake of its fixture.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from registry.testing.faults import Faults as Faults
    from registry.testing.loopback import LoopbackHub as LoopbackHub
    from registry.testing.loopback import LoopbackHubCrash as LoopbackHubCrash
    from registry.testing.loopback import Served as Served
    from registry.testing.store import Commit as Commit
    from registry.testing.store import Entry as Entry
    from registry.testing.store import Repo as Repo
    from registry.testing.store import User as User
    from registry.testing.wire import Request as Request

_HOMES = {
    "Commit": "store",
    "Entry": "store",
    "Faults": "faults",
    "LoopbackHub": "loopback",
    "LoopbackHubCrash": "loopback",
    "Repo": "store",
    "Request": "wire",
    "Served": "loopback",
    "User": "store",
}

__all__ = sorted(_HOMES)


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)

"""Gather facts of which any may fail: each is found, or has a reason."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

__all__ = ["Facts", "NotKnown", "explain"]


class NotKnown(Exception):
    """A fact that cannot be known; its text is the reason."""


def explain(error: Exception) -> str:
    """Return the reason for a fact that could not be read; the error's own text may name a place on this machine."""
    return f"could not be read ({type(error).__name__})"


@dataclass
class Facts:
    """Facts by name, and the reasons for those that are missing."""

    found: dict[str, Any] = field(default_factory=dict)
    reasons: dict[str, str] = field(default_factory=dict)

    def read(self, name: str, function: Callable[[], Any]) -> None:
        """Put what a function returns under a name; if it fails, the reason. A run never ends for its description."""
        self.reasons.pop(name, None)
        try:
            self.found[name] = function()
        except NotKnown as reason:
            self.reasons[name] = str(reason)
        except Exception as error:
            self.reasons[name] = explain(error)

    def take(self, name: str, before: Mapping[str, Any]) -> None:
        """Put the fact of another lineage under a name, or its reason."""
        self.found.pop(name, None)
        self.reasons.pop(name, None)
        reasons = before.get("not_recorded", {})
        if name in before:
            self.found[name] = before[name]
        else:
            self.reasons[name] = str(reasons.get(name, "the checkpoint does not say"))

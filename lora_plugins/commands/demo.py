"""``lora-plugins demo``: the whole product on this machine, offline."""

from __future__ import annotations


def demo() -> None:
    """Train, compare and reload an adapter on this machine, offline."""

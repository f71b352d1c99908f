"""The entry point by which the registry is a plugin of lora_plugins."""

from __future__ import annotations

import functools
import importlib.metadata
from typing import Any

__all__ = ["load_plugin"]

#: The group of entry points in which the registry is a plugin, named so; its module hands on what other plugins add.
_GROUP, _PLUGIN = "lora_plugins", "registry"


@functools.lru_cache(maxsize=1)
def load_plugin() -> Any:
    """Return the module by which the registry is a plugin, `registry.plugin`; ``None`` if it is not installed."""
    for entry in importlib.metadata.entry_points(group=_GROUP, name=_PLUGIN):
        return entry.load()
    return None

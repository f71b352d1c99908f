"""Which modules of a model get adapters."""

from __future__ import annotations

from lora_plugins.text import forward_names

# In version 0.1 this was a module.
__getattr__ = forward_names(__name__, {"resolve_targets": "lora_plugins"})

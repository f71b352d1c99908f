"""Former place of `pack`, which is a public name of `lora_plugins`."""

from __future__ import annotations

from lora_plugins.text import forward_names

__getattr__ = forward_names(__name__, {"pack": "lora_plugins"})

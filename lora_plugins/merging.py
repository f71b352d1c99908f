"""Former place of `merge_and_save`, which is a public name of `lora_plugins`."""

from __future__ import annotations

from lora_plugins.text import forward_names

__getattr__ = forward_names(__name__, {"merge_and_save": "lora_plugins"})

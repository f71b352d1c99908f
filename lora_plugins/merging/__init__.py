"""Merge an adapter into its base model, and measure the result."""

from __future__ import annotations

from lora_plugins.text import forward_names

# The public name is `lora_plugins.merge_and_save`; it used to be defined in this module.
__getattr__ = forward_names(__name__, {"merge_and_save": "lora_plugins"})

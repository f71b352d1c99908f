"""Former place of the command line, now `lora_plugins.commands.cli`."""

from __future__ import annotations

from lora_plugins.text import forward_names

__getattr__ = forward_names(
    __name__, {"is_expected": "lora_plugins.commands.cli", "program": "lora_plugins.commands.cli"}
)

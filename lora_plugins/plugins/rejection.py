"""Why a plugin does not load."""

from __future__ import annotations

import sys

import pluggy

from lora_plugins.text import one_line

__all__ = ["Rejected", "explain"]


class Rejected(Exception):
    """A plugin breaks one of the host's rules; the message is the full reason."""


def explain(error: BaseException) -> str:
    """Return why a plugin does not load, in one line, with a next step where there is one."""
    if isinstance(error, Rejected):
        return str(error)
    if isinstance(error, pluggy.PluginValidationError):
        return "wrong signature: " + one_line(error)
    if isinstance(error, ModuleNotFoundError) and error.name:
        package = error.name.partition(".")[0]
        hint = "" if package in sys.modules else f"; try `pip install {package}`"
        return f"missing dependency: {one_line(error)}{hint}"
    text = one_line(error)
    return f"it raised {type(error).__name__}: {text}" if text else f"it raised {type(error).__name__}"

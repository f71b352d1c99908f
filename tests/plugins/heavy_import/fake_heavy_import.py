"""Imports torch while it is loaded."""

import torch  # noqa: F401

from lora_plugins import Architecture, hookimpl


@hookimpl
def register_architectures():
    return [Architecture("heavy", ("q",))]

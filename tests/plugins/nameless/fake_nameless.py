"""Comes from a package without metadata."""

from lora_plugins import Architecture, hookimpl


@hookimpl
def register_architectures():
    return [Architecture("nameless", ("q",))]

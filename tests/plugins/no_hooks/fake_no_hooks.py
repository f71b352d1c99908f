"""Forgot the decorator."""

from lora_plugins import Architecture


def register_architectures():
    return [Architecture("no_hooks", ("q",))]

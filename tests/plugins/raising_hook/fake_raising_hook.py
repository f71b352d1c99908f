"""Raises in its second hook, after the first has answered."""

from lora_plugins import Architecture, hookimpl


@hookimpl
def register_architectures():
    return [Architecture("raising_hook", ("q",))]


@hookimpl
def register_quantizers():
    raise KeyError("calibration table")

"""A hook with an argument that the specification does not have."""

from lora_plugins import Architecture, hookimpl


@hookimpl
def register_architectures(model):
    return [Architecture("wrong_signature", ("q",))]

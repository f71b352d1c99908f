"""A hook that does not exist, beside one that does."""

from lora_plugins import Architecture, hookimpl


@hookimpl
def register_architectures():
    return [Architecture("misspelt", ("q",))]


@hookimpl
def register_quantisers():
    return []

"""One module behind two entry points."""

from lora_plugins import Architecture, hookimpl


@hookimpl
def register_architectures():
    return [Architecture("same_object", ("q",))]

"""An object that can not be hashed."""

from lora_plugins import Architecture, hookimpl


class Plugin:
    __hash__ = None

    @hookimpl
    def register_architectures(self):
        return [Architecture("unhashable", ("q",))]


plugin = Plugin()

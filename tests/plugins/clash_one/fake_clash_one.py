"""One of two plugins that claim the same three names."""

from lora_plugins import Architecture, Quantizer, hookimpl


class Contested(Quantizer):
    name = "contested"
    bits = 8

    def available(self, device, dtype, options):
        return None

    def quantize_linear(self, linear, options):
        return linear

    def owns(self, module):
        return False

    def dequantize(self, module):
        return module.weight


@hookimpl
def register_architectures():
    return [Architecture("contested", ("q",)), Architecture("clash_one", ("q",))]


@hookimpl
def register_quantizers():
    return [Contested()]


@hookimpl
def register_commands(app):
    @app.command()
    def contested(name: str):
        """Do something."""

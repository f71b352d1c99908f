"""A plugin that does everything right."""

from lora_plugins import Architecture, Quantizer, hookimpl


class Halves(Quantizer):
    name = "halves"
    bits = 16
    requires = ("pluggy>=1", "no-such-thing>=1.2")

    def available(self, device, dtype, options):
        return None

    def quantize_linear(self, linear, options):
        return linear.half()

    def owns(self, module):
        return False

    def dequantize(self, module):
        return module.weight.float()


@hookimpl
def register_architectures():
    yield Architecture("working", ("q", "v"))


@hookimpl
def register_quantizers():
    return [Halves()]


@hookimpl
def register_commands(app):
    @app.command()
    def say_hello():
        """Say hello."""
        print("hello from a plugin")

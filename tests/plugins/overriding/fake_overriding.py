"""Puts its own in the place of built-ins."""

from lora_plugins import Architecture, Quantizer, hookimpl


class OwnInt8(Quantizer):
    name = "int8"
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
    return [Architecture("bloom", ("own",))]


@hookimpl
def register_quantizers():
    return [OwnInt8()]


@hookimpl
def register_commands(app):
    @app.command()
    def demo():
        """Another demo."""
        print("another demo")

"""A backend whose requirement is no requirement."""

from lora_plugins import Quantizer, hookimpl


class Backend(Quantizer):
    name = "guess"
    bits = 16
    requires = ("hqq newer than 1",)

    def available(self, device, dtype, options):
        return None

    def quantize_linear(self, linear, options):
        return linear

    def owns(self, module):
        return False

    def dequantize(self, module):
        return module.weight


@hookimpl
def register_quantizers():
    return [Backend()]

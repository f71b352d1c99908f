"""Everything that a hook must not return."""

from lora_plugins import Architecture, Quantizer, hookimpl


class Backend(Quantizer):
    def available(self, device, dtype, options):
        return None

    def quantize_linear(self, linear, options):
        return linear

    def owns(self, module):
        return False

    def dequantize(self, module):
        return module.weight


class Nothing:
    @staticmethod
    @hookimpl
    def register_architectures():
        [Architecture("nothing", ("q",))]  # a forgotten `return`


class Text:
    @staticmethod
    @hookimpl
    def register_architectures():
        return "text"


class Record:
    @staticmethod
    @hookimpl
    def register_architectures():
        return Architecture("record", ("q",))


class Class:
    @staticmethod
    @hookimpl
    def register_quantizers():
        return [Backend]


class Twice:
    @staticmethod
    @hookimpl
    def register_architectures():
        return [Architecture("twice", ("q",)), Architecture("twice", ("v",))]


class Unnamed:
    @staticmethod
    @hookimpl
    def register_quantizers():
        return [Backend()]


class Letters:
    @staticmethod
    @hookimpl
    def register_architectures():
        return [Architecture("letters", "q_proj")]

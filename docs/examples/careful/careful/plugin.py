"""What lora-plugins loads; nothing heavy is imported before it is needed."""

from lora_plugins import Architecture, Quantizer, hookimpl


class Rounded(Quantizer):
    """Eight bits for each weight and a float32 scale for each output row."""

    name = "rounded"
    bits = 8

    def available(self, device, dtype, options):
        return None  # runs wherever torch runs

    def quantize_linear(self, linear, options):
        from careful.layer import RoundedLinear

        return RoundedLinear(linear)

    def owns(self, module):
        # By name: the module with the class need not be loaded just to answer.
        return type(module).__name__ == "RoundedLinear" and type(module).__module__ == "careful.layer"

    def dequantize(self, module):
        return module.dequantized()

    def lora_layer(self, module):
        from peft.tuners.lora import Linear

        return Linear

    def layer_bytes(self, in_features, out_features, dtype, options):
        return in_features * out_features + 4 * out_features


@hookimpl
def register_architectures():
    return [Architecture("gpt2", ("c_attn", "attn.c_proj"), scopes={"mlp": ("c_fc", "mlp.c_proj")})]


@hookimpl
def register_quantizers():
    return [Rounded()]

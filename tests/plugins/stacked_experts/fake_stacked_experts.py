"""A plugin with three backends: layers only, experts stored like layers, and a format of its own for experts."""

import torch
from torch import nn

from lora_plugins import ExpertFormat, ExpertsAsLayers, Quantizer, hookimpl


def round_rows(weight):
    """Return eight-bit values and a scale for each row."""
    scale = weight.abs().amax(dim=1, keepdim=True).clamp(min=1e-8).float() / 127
    return (weight / scale).round().to(torch.int8), scale


class RoundedLinear(nn.Module):
    """A frozen linear layer with eight-bit weights."""

    def __init__(self, linear, owner):
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        values, scale = round_rows(linear.weight.detach())
        self.weight = nn.Parameter(values, requires_grad=False)
        self.register_buffer("scale", scale)
        self.bias = linear.bias
        self.owner = owner

    def forward(self, x):
        bias = None if self.bias is None else self.bias.to(x.dtype)
        return nn.functional.linear(x, (self.weight * self.scale).to(x.dtype), bias)


class LayersOnly(Quantizer):
    """Says nothing about experts, so they stay in float."""

    name = "rounded-layers"
    bits = 8

    def available(self, device, dtype, options):
        return None

    def quantize_linear(self, linear, options):
        return RoundedLinear(linear, self.name)

    def owns(self, module):
        return isinstance(module, RoundedLinear) and module.owner == self.name

    def dequantize(self, module):
        return module.weight * module.scale


class LayersAndExperts(LayersOnly):
    """Stores every expert like a layer."""

    name = "rounded-experts"

    def expert_format(self, options):
        return ExpertsAsLayers(self, options)


class Pairs(ExpertFormat):
    """An expert as a pair of tensors."""

    def pack(self, weight):
        return round_rows(weight)

    def unpack(self, packed):
        values, scale = packed
        return values * scale

    def tensors(self, packed):
        return packed

    def bytes(self, in_features, out_features, dtype):
        return out_features * (in_features + 4)


class OwnFormat(LayersOnly):
    """Has a format of its own for experts."""

    name = "rounded-pairs"

    def expert_format(self, options):
        return Pairs()


class Forgetful(Pairs):
    """Gives back other weights the second time, as a kernel does that repacks its weight when it is used."""

    def unpack(self, packed):
        values, scale = packed
        weight = values * scale
        values.neg_()
        return weight


class Careless(LayersOnly):
    """Its experts can't be trained on."""

    name = "rounded-carelessly"

    def expert_format(self, options):
        return Forgetful()


@hookimpl
def register_quantizers():
    return [LayersOnly(), LayersAndExperts(), OwnFormat(), Careless()]

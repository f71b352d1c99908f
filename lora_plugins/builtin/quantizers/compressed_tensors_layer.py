"""A linear layer with a packed weight that every pass dequantizes."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from compressed_tensors.compressors import BaseCompressor, compress_module
from compressed_tensors.quantization import (
    QuantizationArgs,
    QuantizationScheme,
    initialize_module_for_quantization,
)
from compressed_tensors.quantization.utils import calculate_qparams
from torch import nn

__all__ = ["CompressedLinear", "compress", "keep_packed", "read_weight"]


class CompressedLinear(nn.Module):
    """A layer of compressed-tensors, with a gradient for its input.

    The library's own layer decompresses itself for good in the first pass (0.20). This one dequantizes in every pass,
    forward and backward, and keeps nothing. It is not an ``nn.Linear``, as it has no float ``weight``.
    """

    in_features: int
    out_features: int

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Run the layer on ``[..., in_features]``, in the dtype of the input."""
        with torch.autocast(x.device.type, enabled=False):
            output: torch.Tensor = _Product.apply(x, self)  # type: ignore[no-untyped-call]
            bias = self._parameters.get("bias")
            return output if bias is None else output + bias.to(output.dtype)

    def extra_repr(self) -> str:
        """Return the sizes, as ``nn.Linear`` prints them."""
        return f"in_features={self.in_features}, out_features={self.out_features}"


class _Product(torch.autograd.Function):
    """``x @ weight.T`` that holds neither the input nor the dequantized weight for the backward pass."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, layer: nn.Module) -> torch.Tensor:
        ctx.layer = layer
        return nn.functional.linear(x, read_weight(layer).to(x.dtype))

    @staticmethod
    def backward(ctx: Any, upstream: torch.Tensor) -> tuple[torch.Tensor, None]:
        return upstream @ read_weight(ctx.layer).to(upstream.dtype), None


def read_weight(module: Any) -> torch.Tensor:
    """Return the float weight of a layer, shape ``[out_features, in_features]``; the layer is left as it is."""
    tensors = {**module._parameters, **module._buffers}
    stored = {name: tensor.detach() for name, tensor in tensors.items() if tensor is not None}
    compressor = BaseCompressor.get_value_from_registry(module.quantization_scheme.format)
    with torch.no_grad():
        weight: torch.Tensor = compressor.decompress(stored, module.quantization_scheme)["weight"]
    return weight


def keep_packed(model: Any, layers: Iterable[Any]) -> None:
    """Let the library's layers stay packed: drop the hook that decompresses them, and its forward."""
    for module in model.modules():
        hook = vars(module).pop("ct_decompress_hook", None)
        if hook is not None:
            hook.remove()
    for layer in layers:
        # The library overrides `forward` on each instance, to quantize activations without a gradient.
        vars(layer).pop("forward", None)
        for parameter in layer.parameters():
            # The library makes scales that require a gradient.
            parameter.requires_grad_(False)
        layer.__class__ = CompressedLinear


def compress(linear: nn.Linear, settings: Mapping[str, Any]) -> nn.Module:
    """Return a layer rounded to the nearest stored value.

    Args:
        linear: The float layer; changed in place.
        settings: ``num_bits``, ``group_size``, ``symmetric`` and ``type``.
    """
    strategy = "group" if settings["group_size"] else "channel"
    arguments = QuantizationArgs(**settings, strategy=strategy)
    initialize_module_for_quantization(linear, QuantizationScheme(targets=["Linear"], weights=arguments))
    weight: Any = linear.weight.detach()
    size = settings["group_size"] or weight.shape[1]
    groups = weight.reshape(weight.shape[0], -1, size)
    scale, zero = calculate_qparams(groups.amin(-1), groups.amax(-1), arguments)
    layer: Any = linear
    layer.weight_scale.data.copy_(scale)
    if getattr(layer, "weight_zero_point", None) is not None:
        layer.weight_zero_point.data.copy_(zero)
    compress_module(linear)
    keep_packed(linear, [linear])
    return linear

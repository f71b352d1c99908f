"""Stand-ins for quantized layers on the meta device."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import nn

from lora_plugins.plugins.types import Quantizer
from lora_plugins.quantization.counting import tensor_bytes
from lora_plugins.quantization.request import Quantization
from lora_plugins.quantization.selftest import why_unavailable
from lora_plugins.quantization.walk import as_linear

__all__ = [
    "PlannedLinear",
    "flat_bytes",
    "keeps_input",
    "make_stand_in",
    "make_stand_in_of",
    "parameter_bytes",
    "stored_bytes",
    "weight_bytes",
]


#: Rows of the two small layers that are quantized to measure a backend that does not state a layer's bytes.
_SAMPLE_ROWS = (128, 256)


class PlannedLinear(nn.Linear):
    """A frozen layer on the meta device that computes like a quantized one: dequantize, multiply, discard.

    Its weight has the logical shape, so that parameters are counted right; ``stored_bytes`` has the real size.

    Args:
        in_features: Size of the input.
        out_features: Size of the output.
        bias: The bias, which is counted with the weight and is not a parameter of this layer.
        keeps_input: Whether the backend's layer holds its input until the backward pass.
        float_dtype: Dtype of the weight before it is quantized.
        stored_bytes: Bytes of weight, scales and bias of a layer that is quantized already, else ``None``.
        parameter_bytes: Of those, the bytes that are parameters.
        is_copied: Whether that layer holds its weight a second time.
        flat_bytes: Bytes of the parameter that an engine divides, of a layer that is quantized already and can be.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: torch.Tensor | None,
        keeps_input: bool,
        float_dtype: torch.dtype,
        stored_bytes: int | None = None,
        parameter_bytes: int = 0,
        is_copied: bool = False,
        flat_bytes: int | None = None,
    ) -> None:
        super().__init__(in_features, out_features, bias=False, device="meta")
        self.weight = nn.Parameter(
            torch.empty(out_features, in_features, dtype=torch.int8, device="meta"), requires_grad=False
        )
        self.keeps_input = keeps_input
        self.float_dtype = float_dtype
        self.stored_bytes = stored_bytes
        self.parameter_bytes = parameter_bytes
        self.is_copied = is_copied
        self.flat_bytes = flat_bytes
        # In a tuple, so that it is not registered: casts of the float layers must not reach it.
        self.held_bias = (bias,)

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        output: torch.Tensor = _DequantizeAndMultiply.apply(input, self)  # type: ignore[no-untyped-call]
        return output


class _DequantizeAndMultiply(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, input: torch.Tensor, layer: PlannedLinear) -> torch.Tensor:
        ctx.shape = (layer.out_features, layer.in_features)
        if layer.keeps_input:
            ctx.input = input
        bias = layer.held_bias[0]
        weight = torch.empty(ctx.shape, dtype=input.dtype, device="meta")
        return nn.functional.linear(input, weight, None if bias is None else bias.to(input.dtype))

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        return gradient @ torch.empty(ctx.shape, dtype=gradient.dtype, device="meta"), None


def make_stand_in(layer: Any, quantization: Quantization, device: torch.device) -> PlannedLinear:
    """Return the stand-in of a float layer that a backend would quantize.

    Args:
        layer: An ``nn.Linear`` or transformers' ``Conv1D`` on the meta device.
        quantization: The backend and its options.
        device: Device of the run.
    """
    linear = as_linear(layer)
    return PlannedLinear(
        linear.in_features,
        linear.out_features,
        linear.bias.detach() if linear.bias is not None else None,
        keeps_input(quantization.quantizer, device),
        linear.weight.dtype,
    )


def keeps_input(quantizer: Quantizer, device: torch.device) -> bool:
    """Whether a backend's layers hold their input until the backward pass."""
    return quantizer.keeps_input and device.type != "cpu"


def make_stand_in_of(module: Any, owner: Quantizer, options: Mapping[str, Any]) -> PlannedLinear:
    """Return the stand-in of a layer that is quantized already, with that layer's bytes.

    Args:
        module: The layer.
        owner: Its backend.
        options: With which it was quantized, as far as they are known.
    """
    device = next(module.parameters()).device
    bias = module.bias.detach().to("meta") if getattr(module, "bias", None) is not None else None
    size = tensor_bytes(module).total
    dtype = bias.dtype if bias is not None else torch.bfloat16
    held = keeps_input(owner, device)
    own, again = _count_packed_bytes(module), owner.copies_weight
    sizes = module.in_features, module.out_features
    flat = owner.divided_bytes(*sizes, options)
    return PlannedLinear(*sizes, bias, held, dtype, size, own, again, flat)


def stored_bytes(layer: PlannedLinear, quantization: Quantization | None) -> int:
    """Return the bytes of a stand-in's weight, scales and bias under a backend."""
    if layer.stored_bytes is not None:
        return layer.stored_bytes
    assert quantization is not None, "only a layer that arrived quantized needs no backend"  # noqa: S101 - narrows a type
    bias = layer.held_bias[0]
    size = weight_bytes(quantization, layer.in_features, layer.out_features, layer.float_dtype)
    return size + (bias.numel() * bias.element_size() if bias is not None else 0)


def weight_bytes(quantization: Quantization, in_features: int, out_features: int, dtype: torch.dtype) -> int:
    """Return the bytes of one quantized weight with its scales.

    The number comes from the backend, or from quantizing two small layers here; if the backend cannot run here, from
    its bits per weight.
    """
    quantizer = quantization.quantizer
    own = quantizer.layer_bytes(in_features, out_features, dtype, quantization.options)
    if own is not None:
        return own
    sample = _quantize_samples(_make_options(quantization), in_features, dtype)
    if sample is None:
        return int(quantizer.bits * in_features * out_features / 8)
    return _extrapolate([layer.total for layer in sample], out_features)


def parameter_bytes(layer: PlannedLinear, quantization: Quantization | None) -> tuple[int, bool]:
    """Return the bytes of a stand-in's quantized parameters, and whether the layer holds its weight a second time.

    If the backend cannot run here, the bytes are unknown and counted as 0.
    """
    if layer.stored_bytes is not None:
        return layer.parameter_bytes, layer.is_copied
    assert quantization is not None, "only a layer that arrived quantized needs no backend"  # noqa: S101 - narrows a type
    sample = _quantize_samples(_make_options(quantization), layer.in_features, layer.float_dtype)
    if sample is None:
        return 0, False
    return _extrapolate([one.parameters for one in sample], layer.out_features), sample[0].is_copied


def flat_bytes(layer: PlannedLinear, quantization: Quantization | None) -> tuple[int, int] | None:
    """Return the bytes of the parameter in which FSDP and ZeRO-3 divide a layer, and what the layer takes undivided.

    ``None`` if its backend does not divide layers. The bias is not among them.
    """
    if layer.stored_bytes is not None:
        bias = layer.held_bias[0]
        own = layer.stored_bytes - (bias.numel() * bias.element_size() if bias is not None else 0)
        return None if layer.flat_bytes is None else (layer.flat_bytes, own)
    assert quantization is not None, "only a layer that arrived quantized needs no backend"  # noqa: S101 - narrows a type
    sizes = layer.in_features, layer.out_features
    flat = quantization.quantizer.divided_bytes(*sizes, quantization.options)
    return None if flat is None else (flat, weight_bytes(quantization, *sizes, layer.float_dtype))


def _extrapolate(sizes: list[int], rows: int) -> int:
    """Return the bytes of a layer with more rows than the two samples."""
    small, large = sizes
    return round(small + (large - small) / (_SAMPLE_ROWS[1] - _SAMPLE_ROWS[0]) * (rows - _SAMPLE_ROWS[0]))


def _count_packed_bytes(module: Any) -> int:
    """Return the bytes of a quantized layer's parameters that are not float."""
    return sum(p.numel() * p.element_size() for p in module.parameters() if not p.is_floating_point())


class _Options:
    """A backend with its options, hashable as a cache key."""

    def __init__(self, quantizer: Quantizer, options: Mapping[str, Any], key: tuple[tuple[str, str], ...]) -> None:
        self.quantizer = quantizer
        self.options = options
        self._key = (id(quantizer), key)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Options) and self._key == other._key

    def __hash__(self) -> int:
        return hash(self._key)


def _make_options(quantization: Quantization) -> _Options:
    key = tuple(sorted((name, repr(value)) for name, value in quantization.options.items()))
    return _Options(quantization.quantizer, quantization.options, key)


class _Sample(NamedTuple):
    """Bytes of a small quantized layer."""

    total: int
    parameters: int
    is_copied: bool


@functools.lru_cache(maxsize=512)
def _quantize_samples(backend: _Options, in_features: int, dtype: torch.dtype) -> tuple[_Sample, _Sample] | None:
    """Quantize two layers with few rows; ``None`` if the backend cannot run on this machine."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if why_unavailable(Quantization(backend.quantizer, backend.options), device, dtype) is not None:
        return None
    samples = []
    for rows in _SAMPLE_ROWS:
        linear = nn.Linear(in_features, rows, bias=False, dtype=dtype, device=device).requires_grad_(False)
        with torch.no_grad():
            layer = backend.quantizer.quantize_linear(linear, backend.options)
        samples.append(_Sample(tensor_bytes(layer).total, _count_packed_bytes(layer), backend.quantizer.copies_weight))
    return samples[0], samples[1]

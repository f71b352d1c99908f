"""bitsandbytes' int8 layer with a lean training pass."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import bitsandbytes as bnb
import torch

__all__ = ["Int8Linear", "dequantize_rows", "dequantize_weight", "quantize_rows"]


#: Weights that are converted at a time, so that the float32 intermediate stays in the CPU's cache.
_BLOCK = 1 << 20
#: The constant of bitsandbytes' ``int8_vectorwise_dequant``, 1 / 127.
_PER_STEP = 7.874015718698502e-3


class Int8Linear(bnb.nn.Linear8bitLt):  # type: ignore[misc]
    """``Linear8bitLt`` that keeps its scale and trains without waste.

    PEFT 0.21.2 reads the weight of a layer on the CPU (DoRA does in every forward pass) and puts it back with
    ``weight.to("cpu")``. In bitsandbytes 0.50 that makes a parameter with a fresh ``CB`` and without scale, and the
    next forward pass fails on the missing scale (``tests/test_canaries.py`` says when that ends).

    The lean pass multiplies by the dequantized weight, on whichever device that is, and keeps nothing but the int8
    weight for the backward pass, where bitsandbytes keeps the input of every layer. On a CPU the products are those of
    bitsandbytes, with the same rounding. On a GPU bitsandbytes quantizes the input and multiplies in int8 instead.

    Attributes:
        lean: Whether training takes the lean pass; ``None``: on a CPU it does, elsewhere bitsandbytes' own is taken.
    """

    lean: bool | None = None

    def init_8bit_state(self) -> None:
        if self.weight.SCB is None and self.state.SCB is not None:
            self.weight.SCB = self.state.SCB
        super().init_8bit_state()

    def _apply(self, fn: Any, recurse: bool = True) -> Int8Linear:
        super()._apply(fn, recurse)
        # Moving a model replaces the weight, even from "cpu" to "cpu:0" as accelerate does, but not bitsandbytes'
        # second reference to it (0.50): the layer would hold both, or compute with the one on the old device.
        weight: Any = self.weight
        if weight.device.type != "meta" and weight.dtype == torch.int8:
            for holder in (weight, self.state):
                if holder.CB is not None and holder.CB.shape == weight.shape:
                    holder.CB = weight.data
                if holder.SCB is not None:
                    holder.SCB = holder.SCB.to(weight.device)
        return self

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        device = x.device.type
        lean = device == "cpu" if self.lean is None else self.lean
        if not self.training or not lean or torch.compiler.is_compiling():
            if x.dim() <= 3:
                return super().forward(x)
            # On a CPU bitsandbytes 0.50 fails on inputs of more dimensions
            # (https://github.com/bitsandbytes-foundation/bitsandbytes/pull/2062).
            return super().forward(x.flatten(0, -2)).unflatten(0, x.shape[:-1])
        if self.weight.CB is not None:
            self.init_8bit_state()
        weight, scale = self.weight.data, self.state.SCB
        if weight.dtype != torch.int8 or scale is None or self.weight.requires_grad:
            return super().forward(x)
        autocast = torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)
        dtype = torch.get_autocast_dtype(device) if autocast else x.dtype
        bias = None if self.bias is None else self.bias.to(dtype)
        product: Any = _Int8Product.apply
        with torch.autocast(device, enabled=False) if autocast else contextlib.nullcontext():
            # DeepSpeed gathers a partitioned weight for each pass; kept, it would be held from one to the other.
            return product(x.to(dtype), weight, scale, bias, not hasattr(self.weight, "ds_id"))


class _Int8Product(torch.autograd.Function):
    """``x @ weight.T + bias`` for a frozen int8 weight, in the dtype of ``x``.

    A weight that stays where it is needs no saving for the backward pass: it never changes, and gradient checkpointing
    would compute the last product of a block again only to save its weight again.
    """

    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor | None, stays: bool
    ) -> torch.Tensor:
        if stays:
            ctx.kept = weight, scale
        else:
            ctx.save_for_backward(weight, scale)
        return torch.nn.functional.linear(x, dequantize_rows(weight, scale, x.dtype), bias)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, None, None, torch.Tensor | None, None]:
        weight, scale = ctx.saved_tensors or ctx.kept
        of_input = of_bias = None
        if ctx.needs_input_grad[0]:
            of_input = gradient @ dequantize_rows(weight, scale, gradient.dtype)
        if ctx.needs_input_grad[3]:
            of_bias = gradient.flatten(0, -2).sum(0)
        return of_input, None, None, of_bias, None


def dequantize_rows(weight: torch.Tensor, scale: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Return an int8 weight as float, each value rounded once.

    Args:
        weight: Shape ``[out, in]``, int8.
        scale: Largest magnitude of each row in float32, shape ``[out]``.
        dtype: Dtype of the result.
    """
    factors = scale.unsqueeze(1).mul(1.0 / 127.0)
    if weight.device.type != "cpu":
        return weight.float().mul_(factors).to(dtype)
    result = torch.empty(weight.shape, dtype=dtype)
    for block in _split_rows(weight, _BLOCK):
        # int8 to float32 and the product are vectorized; int8 times float32 in one go is not.
        if dtype == torch.float32:
            result[block].copy_(weight[block]).mul_(factors[block])
        else:
            result[block] = weight[block].float().mul_(factors[block])
    return result


def dequantize_weight(weight: torch.Tensor, scale: torch.Tensor, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Return bitsandbytes' ``int8_vectorwise_dequant``, to the bit, on a CPU in no more memory than the result takes.

    It rounds twice in float32, where `dequantize_rows`, with the values of bitsandbytes' layers, rounds once.

    Args:
        weight: Shape ``[out, in]``, int8.
        scale: Largest magnitude of each row in float32, shape ``[out]``.
        dtype: Dtype to which the values are rounded in the end.
    """
    scale = scale.view(-1, 1)
    if dtype == torch.float32 or weight.device.type != "cpu":
        return weight.float().mul_(scale).mul_(_PER_STEP).to(dtype)
    result = torch.empty(weight.shape, dtype=dtype)
    # An eighth at most, so that no second weight is held in float32.
    for block in _split_rows(weight, min(_BLOCK, weight.numel() // 8)):
        result[block] = weight[block].float().mul_(scale[block]).mul_(_PER_STEP)
    return result


def quantize_rows(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantize a float weight on the CPU by rows, to the bits that bitsandbytes gives.

    Args:
        weight: Shape ``[out, in]``; rounded to float16 first, as bitsandbytes does.

    Returns:
        The int8 weight, shape ``[out, in]``, and the largest magnitude of each row in float32, shape ``[out]``.
    """
    result = torch.empty(weight.shape, dtype=torch.int8)
    scale = torch.empty(weight.shape[0], dtype=torch.float32)
    # An eighth at most, so that the intermediates take less than the layer itself.
    for block in _split_rows(weight, min(_BLOCK, weight.numel() // 8)):
        values = weight[block].to(torch.float16).float()
        largest = torch.maximum(values.amax(dim=1), values.amin(dim=1).neg_())
        scale[block] = largest
        result[block] = values.mul_((127.0 / largest).unsqueeze(1)).round_()
    return result, scale


def _split_rows(weight: torch.Tensor, size: int) -> Iterator[slice]:
    """Return slices of a weight's rows that hold about ``size`` values each."""
    rows = max(1, size // max(1, weight.shape[1]))
    return (slice(start, start + rows) for start in range(0, weight.shape[0], rows))

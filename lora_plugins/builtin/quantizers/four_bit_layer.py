"""bitsandbytes' 4-bit layer in one parameter that an engine can divide."""

from __future__ import annotations

import copy
from math import prod
from typing import Any, NamedTuple

import bitsandbytes as bnb
import torch
from torch import nn

__all__ = ["DividedLinear4bit", "divide_layer"]


class _Part(NamedTuple):
    """A tensor of a layer inside its flat parameter."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int

    @property
    def size(self) -> int:
        """Its bytes."""
        return prod(self.shape) * self.dtype.itemsize


class DividedLinear4bit(bnb.nn.Linear4bit):  # type: ignore[misc]
    """``Linear4bit`` with packed weight, scales and tables in one flat parameter of bytes, ``weight``.

    FSDP2 and ZeRO-3 divide parameters; what bitsandbytes keeps beside them would be whole on every process, a ninth of
    the bytes. The parameter is a plain one, because accelerate 1.15 leaves bitsandbytes' own class out of sharding, and
    holds bytes, because mixed precision casts float parameters before they are gathered, packed ones too.

    Nothing but the layer is kept for the backward pass, in which the engine gathers the parameter again.
    """

    parts: dict[str, _Part]
    undivided: Any
    compute_type_is_set: bool

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not self.compute_type_is_set:
            self.set_compute_type(x)
            self.compute_type_is_set = True
        own = x.dtype
        if self.compute_dtype is not None:
            x = x.to(self.compute_dtype)
        bias = None if self.bias is None else self.bias.to(x.dtype)
        product: Any = _Product.apply
        result: torch.Tensor = product(x, bias, self)
        return result.to(own)

    def read(self, flat: torch.Tensor | None = None) -> tuple[torch.Tensor, Any]:
        """Return the packed weight and bitsandbytes' state, as views of the parameter, which must be whole.

        Args:
            flat: The whole parameter, by default the layer's own.
        """
        flat = self.weight.detach() if flat is None else flat
        found = {name: _view(flat, part) for name, part in self.parts.items()}
        state = copy.copy(self.quant_state)
        state.absmax, state.code, state.offset = found["absmax"], found["code"], found.get("offset")
        if state.nested:
            state.state2 = copy.copy(state.state2)
            state.state2.absmax, state.state2.code = found["nested_absmax"], found["nested_code"]
        return found["packed"], state

    def dequantize(self) -> torch.Tensor:
        """Return the float weight, shape ``[out, in]``; under FSDP2 every process must call it."""
        weight: Any = self.weight
        whole = weight.full_tensor() if hasattr(weight, "full_tensor") else weight
        return bnb.functional.dequantize_4bit(*self.read(whole.detach()))

    def undivide(self) -> None:
        """Turn the layer, whose parameter must be whole, back into what it was, in place."""
        _undivide(self)

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        nn.Module._save_to_state_dict(self, destination, prefix, keep_vars)


class _Product(torch.autograd.Function):
    """bitsandbytes' product, which reads the weight of the layer again in the backward pass."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, bias: torch.Tensor | None, layer: DividedLinear4bit) -> torch.Tensor:
        ctx.layer = layer
        packed, state = layer.read()
        return bnb.matmul_4bit(x, packed, bias=bias, quant_state=state)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, torch.Tensor | None, None]:
        of_input = of_bias = None
        if ctx.needs_input_grad[0]:
            weight = bnb.functional.dequantize_4bit(*ctx.layer.read())
            of_input = gradient @ weight.to(gradient.dtype)
        if ctx.needs_input_grad[1]:
            of_bias = gradient.flatten(0, -2).sum(0)
        return of_input, of_bias, None


def divide_layer(layer: Any, alignment: int) -> None:
    """Turn a ``Linear4bit`` into a `DividedLinear4bit`, in place.

    Args:
        layer: The layer.
        alignment: Bytes at whose multiples a part begins.
    """
    if isinstance(layer, DividedLinear4bit):
        return
    state = layer.weight.quant_state
    tensors = {"packed": layer.weight.data, "absmax": state.absmax, "code": state.code}
    if state.nested:
        nested = {"offset": state.offset, "nested_absmax": state.state2.absmax, "nested_code": state.state2.code}
        tensors.update(nested)
    parts, end = {}, 0
    for name, tensor in tensors.items():
        parts[name] = _Part(tensor.dtype, tuple(tensor.shape), end)
        end += -(-parts[name].size // alignment) * alignment
    flat = torch.zeros(end, dtype=torch.uint8, device=layer.weight.device)
    for name, part in parts.items():
        if part.size:
            flat[part.start : part.start + part.size] = tensors[name].reshape(-1).view(torch.uint8)
    layer.parts, layer.undivided = parts, type(layer)
    layer.quant_state = _empty(state)
    layer.weight = nn.Parameter(flat, requires_grad=False)
    layer.__class__ = DividedLinear4bit


def _undivide(layer: Any) -> None:
    """Turn a layer whose parameter is whole back into what it was, in place."""
    layer.weight = nn.Parameter(layer.weight.detach().clone(), requires_grad=False)
    packed, state = layer.read()
    layer.__class__ = layer.undivided
    layer.weight = bnb.nn.Params4bit(
        packed.clone(),
        requires_grad=False,
        quant_state=_copy(state),
        blocksize=state.blocksize,
        compress_statistics=state.nested,
        quant_type=state.quant_type,
        quant_storage=layer.quant_storage,
        bnb_quantized=True,
        module=layer,
    )
    layer.quant_state = layer.weight.quant_state
    del layer.parts, layer.undivided


def _view(flat: torch.Tensor, part: _Part) -> torch.Tensor:
    found = flat[part.start : part.start + part.size]
    if found.storage_offset() % part.dtype.itemsize:
        # An engine may gather several parameters into one buffer, at any place.
        found = found.clone()
    return found.view(part.dtype).view(part.shape)


def _empty(state: Any) -> Any:
    """Return a copy of a state without its tensors."""
    found = copy.copy(state)
    found.absmax = found.code = found.offset = None
    if state.nested:
        found.state2 = copy.copy(state.state2)
        found.state2.absmax = found.state2.code = None
    return found


def _copy(state: Any) -> Any:
    """Return a copy of a state with tensors of its own."""
    found = copy.copy(state)
    found.absmax, found.code = state.absmax.clone(), state.code.clone()
    if state.nested:
        found.offset = state.offset.clone()
        found.state2 = copy.copy(state.state2)
        found.state2.absmax, found.state2.code = state.state2.absmax.clone(), state.state2.code.clone()
    return found

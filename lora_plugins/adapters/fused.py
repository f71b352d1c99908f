"""A LoRA branch as one autograd function that saves less for backward.

PEFT 0.21.2's layer casts its input to float32, saves that and the dropout mask in float32 for the backward pass, and
adds the scaled branch in two more passes. Here the input is saved in its own dtype (the base layer saves it too), the
mask takes one byte per value, and the rest is recomputed. On a CPU the mask comes from its own random stream, seeded by
torch's generator (see `draw_mask`).
"""

from __future__ import annotations

import contextlib
import types
from typing import Any

import numpy as np
import torch
from peft.tuners.lora.layer import Linear
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor

from lora_plugins.quantization.lora_layer import QuantizedLoraLinear

__all__ = ["LoraBranch", "draw_mask", "forward", "fuse_adapters", "is_plain_linear", "unfuse_adapters"]


def fuse_adapters(model: nn.Module) -> int:
    """Let the LoRA layers of a model compute their branch as one function during training.

    Only ``forward`` is replaced, on each layer object; classes, weights and names stay, so PEFT works as before.
    Every other case (several adapters, DoRA and other variants, merged or disabled adapters, evaluation, a mixed
    batch, a compiled model) goes to PEFT's own ``forward``.

    Returns:
        Number of layers changed.
    """
    count = 0
    for module in model.modules():
        if type(module) in _PLAIN and "forward" not in vars(module):
            module.forward = types.MethodType(forward, module)
            count += 1
    return count


def unfuse_adapters(model: nn.Module) -> int:
    """Restore PEFT's ``forward`` on the LoRA layers of a model; return the number of layers changed."""
    count = 0
    for module in model.modules():
        if getattr(vars(module).get("forward"), "__func__", None) is forward:
            del module.forward
            count += 1
    return count


#: The LoRA layer classes whose branch this module implements. Subclasses, layers of other backends and of other PEFT
#: methods keep their own ``forward``, because they may have changed it.
_PLAIN = (Linear, QuantizedLoraLinear)


# A bound method is pickled as its object and its name, so this function needs the name of the method it replaces.
def forward(layer: Any, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
    """Compute ``base_layer(x) + scaling * B(A(dropout(x)))``.

    Args:
        layer: A LoRA layer of PEFT over a linear base layer.
        x: Shape ``[..., in_features]``.
        *args: Any of these selects PEFT's forward, which gets them.
        **kwargs: As ``args``.

    Returns:
        Shape ``[..., out_features]``, in the dtype of the base layer's output.
    """
    name = None if args or kwargs else _find_only_adapter(layer, x)
    if name is None:
        return type(layer).forward(layer, x, *args, **kwargs)
    result = layer.base_layer(x)
    dropout = layer.lora_dropout[name]
    rate = float(getattr(dropout, "p", 0.0)) if dropout.training else 0.0
    a, b = layer.lora_A[name].weight, layer.lora_B[name].weight
    device = x.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else a.dtype
    branch: Any = LoraBranch.apply
    with _disable_autocast(device):
        return branch(result, x, a, b, layer.scaling[name], rate, dtype)


def _find_only_adapter(layer: Any, x: torch.Tensor) -> str | None:
    """Return the adapter's name if the fused branch can be used, else ``None``."""
    # Also without gradients: the first pass of reentrant checkpointing must draw the same masks as the second.
    if not layer.training or layer.disable_adapters or layer.merged:
        return None
    names = [name for name in layer.active_adapters if name in layer.lora_A]
    if len(names) != 1 or names[0] in layer.lora_variant or not layer.cast_input_dtype_enabled:
        return None
    if torch.compiler.is_compiling() or not x.is_floating_point() or not _is_plain(layer, names[0]):
        return None
    return names[0]


def _is_plain(layer: Any, name: str) -> bool:
    """Whether an adapter's modules are as PEFT made them: not wrapped, sharded or hooked, and without a bias."""
    if not (is_plain_linear(layer.lora_A[name]) and is_plain_linear(layer.lora_B[name])):
        return False
    dropout = layer.lora_dropout[name]
    if type(dropout) not in (nn.Dropout, nn.Identity) or _is_hooked(dropout):
        return False
    return not (getattr(dropout, "inplace", False) or getattr(dropout, "p", 0.0) >= 1)


def is_plain_linear(part: Any) -> bool:
    """Whether a part of an adapter is a linear layer as PEFT made it: without bias or hooks, and not sharded."""
    weight = part._parameters.get("weight")
    if type(weight) is not nn.Parameter or weight.numel() == 0 or hasattr(weight, "ds_id"):
        return False
    return type(part) is nn.Linear and part._parameters["bias"] is None and not _is_hooked(part)


def _is_hooked(module: Any) -> bool:
    hooks = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks)
    return any(hooks) or "forward" in vars(module)


#: Number of values of 16 random bits.
_OUTCOMES = 1 << 16


class LoraBranch(torch.autograd.Function):
    """``result + scaling * dropout(x) @ a.T @ b.T``.

    Arguments of ``apply``:
        result: Output of the base layer, shape ``[..., out]``.
        x: Its input, shape ``[..., in]``.
        a: Shape ``[r, in]``.
        b: Shape ``[out, r]``.
        scaling: Factor of the branch.
        rate: Probability that a value of ``x`` is dropped, below 1.
        dtype: Dtype in which the branch is computed.
    """

    @staticmethod
    def forward(
        ctx: Any,
        result: torch.Tensor,
        x: torch.Tensor,
        a: torch.Tensor,
        b: torch.Tensor,
        scaling: float,
        rate: float,
        dtype: torch.dtype,
    ) -> torch.Tensor:
        mask, kept = draw_mask(x, rate, dtype) if rate else (None, 1.0)
        inner = _drop(x, mask, dtype) @ a.to(dtype).T
        factor = scaling / kept
        ctx.save_for_backward(x, mask, inner, a, b)
        ctx.factor, ctx.dtype = factor, dtype
        if torch.promote_types(result.dtype, dtype) == dtype:
            # Write into a tensor of the final shape: models may modify the output in place, but not a view.
            total = torch.empty(result.shape, dtype=dtype, device=result.device)
            rows = result.reshape(-1, result.shape[-1]).to(dtype)
            torch.addmm(rows, inner, b.to(dtype).T, alpha=factor, out=total.view(rows.shape))
        else:
            total = result + (inner @ b.to(dtype).T).mul_(factor).view(result.shape)
        return total.to(result.dtype)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, mask, inner, a, b = ctx.saved_tensors
        if torch.is_grad_enabled():
            # This pass is itself differentiated (a gradient penalty), and the saved `inner` carries no graph.
            inner = _drop(x, mask, ctx.dtype) @ a.to(ctx.dtype).T
        for_result, for_x, for_a, for_b = ctx.needs_input_grad[:4]
        rows = gradient.reshape(-1, gradient.shape[-1]).to(ctx.dtype)
        of_x = of_a = of_b = None
        with _disable_autocast(x.device.type):
            of_inner = (rows @ b.to(ctx.dtype)).mul_(ctx.factor)
            if for_b:
                of_b = (rows.T @ inner).mul_(ctx.factor).to(b.dtype)
            if for_a:
                of_a = (of_inner.T @ _drop(x, mask, ctx.dtype)).to(a.dtype)
            if for_x:
                of_x = _drop(of_inner @ a.to(ctx.dtype), mask, ctx.dtype).to(x.dtype).view(x.shape)
        return gradient if for_result else None, of_x, of_a, of_b, None, None, None


def draw_mask(x: torch.Tensor, rate: float, dtype: torch.dtype) -> tuple[torch.Tensor, float]:
    """Draw the dropout mask of a branch's input.

    On non-Intel CPUs torch 2.13 draws such masks one number at a time, which takes a twentieth of a training step or
    more. So on a CPU 16 random bits decide about each value, from a generator that is seeded with a number from
    torch's: ``manual_seed``, a resumed checkpoint and the second pass of gradient checkpointing reproduce the mask. On
    other devices the mask is that of ``torch.nn.Dropout``.

    Args:
        x: Shape ``[..., in]``.
        rate: Probability that a value is dropped, above 0 and below 1.
        dtype: Dtype in which the branch is computed.

    Returns:
        The mask as bool, shape ``[rows, in]``, and the exact probability that a value stays, at most 2⁻¹⁶ from
        ``1 - rate``.
    """
    if x.device.type != "cpu" or isinstance(x, FakeTensor):
        return torch.native_dropout(x.reshape(-1, x.shape[-1]).to(dtype), rate, True)[1], 1 - rate
    limit = min(max(round(rate * _OUTCOMES), 1), _OUTCOMES - 1)
    seed = int(torch.randint(2**63 - 1, (), device="cpu"))
    bits = np.random.SFC64(seed).random_raw(-(-x.numel() // 4)).view(np.uint16)[: x.numel()]
    return torch.from_numpy(bits >= limit).view(-1, x.shape[-1]), 1 - limit / _OUTCOMES


def _drop(values: torch.Tensor, mask: torch.Tensor | None, dtype: torch.dtype) -> torch.Tensor:
    """Return the values as rows in a dtype, with dropped ones set to zero."""
    rows = values.reshape(-1, values.shape[-1]).to(dtype)
    # torch 2.13 vectorizes a product with a float tensor, but not one with a bool tensor.
    return rows if mask is None else mask.view(torch.uint8).to(dtype).mul_(rows)


def _disable_autocast(device: str) -> contextlib.AbstractContextManager[Any]:
    return torch.autocast(device, enabled=False) if torch.is_autocast_enabled(device) else contextlib.nullcontext()

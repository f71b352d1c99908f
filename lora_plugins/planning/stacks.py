"""Stand-ins for quantized stacks of experts on the meta device."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from lora_plugins.models.experts import is_transposed
from lora_plugins.plugins.types import ExpertFormat
from lora_plugins.quantization.request import Quantization
from lora_plugins.quantization.selftest import why_unavailable
from lora_plugins.quantization.stacks import QuantizedStack, list_parts, list_quantized_stacks

__all__ = ["PlannedExperts", "list_planned", "make_planned_stack", "make_planned_stack_of", "stack_bytes"]


#: Rows of the two small experts that are packed to measure a format that does not state its bytes.
_SAMPLE_ROWS = (128, 256)


class PlannedExperts(ExpertFormat):
    """A format that holds no data: an expert is dequantized into memory of its size.

    Args:
        in_features: Columns of an expert's weight.
        out_features: Rows of it.
        float_dtype: Dtype of the weight before it is quantized.
        stored_bytes: Bytes of a stack that is quantized already, else ``None``.
    """

    def __init__(
        self, in_features: int, out_features: int, float_dtype: torch.dtype, stored_bytes: int | None = None
    ) -> None:
        self.in_features = in_features
        self.out_features = out_features
        self.float_dtype = float_dtype
        self.stored_bytes = stored_bytes

    def pack(self, weight: torch.Tensor) -> Any:
        return None

    def unpack(self, packed: Any) -> torch.Tensor:
        return torch.empty(self.out_features, self.in_features, dtype=self.float_dtype, device="meta")

    def tensors(self, packed: Any) -> Iterable[torch.Tensor]:
        return ()

    def bytes(self, in_features: int, out_features: int, dtype: torch.dtype) -> int | None:
        return None


def make_planned_stack(module: nn.Module, stack: torch.Tensor, quantization: Quantization) -> nn.Parameter:
    """Return the stand-in of a float stack that a backend would quantize."""
    transposed = is_transposed(module)
    sizes = stack.shape[1:]
    rows, columns = reversed(sizes) if transposed else sizes
    return _wrap(PlannedExperts(columns, rows, stack.dtype), quantization, transposed, stack)


def make_planned_stack_of(stack: QuantizedStack) -> nn.Parameter:
    """Return the stand-in of a stack that is quantized already, or is a stand-in."""
    if isinstance(stack.form, PlannedExperts):
        return _wrap(stack.form, stack.quantization, stack.transposed, stack)
    sizes = stack.shape[1:]
    rows, columns = reversed(sizes) if stack.transposed else sizes
    held = sum(part.nbytes for part in stack.list_tensors())
    return _wrap(PlannedExperts(columns, rows, stack.dtype, held), stack.quantization, stack.transposed, stack)


def _wrap(form: PlannedExperts, quantization: Quantization, transposed: bool, like: torch.Tensor) -> nn.Parameter:
    experts = [None] * like.shape[0]
    stack = QuantizedStack(experts, form, quantization, transposed, like.dtype, torch.device("meta"), like.shape)
    return nn.Parameter(stack, requires_grad=False)


def list_planned(model: nn.Module) -> list[tuple[str, QuantizedStack, PlannedExperts]]:
    """Return path, stand-in and format of every planned stack of a model."""
    found = []
    for path, _, _, stack in list_quantized_stacks(model):
        if isinstance(stack.form, PlannedExperts):
            found.append((path, stack, stack.form))
    return found


def stack_bytes(stack: QuantizedStack, quantization: Quantization | None) -> int:
    """Return the bytes of a planned stack under a backend, scales included."""
    form: Any = stack.form
    if form.stored_bytes is not None or quantization is None:
        return int(form.stored_bytes or 0)
    one = _measure_expert(quantization, form.in_features, form.out_features, form.float_dtype)
    return one * len(stack.experts)


def _measure_expert(quantization: Quantization, in_features: int, out_features: int, dtype: torch.dtype) -> int:
    # A backend without a format leaves stacks in float, so they have no stand-in.
    real: Any = quantization.quantizer.expert_format(quantization.options)
    told = real.bytes(in_features, out_features, dtype)
    if told is not None:
        return int(told)
    if why_unavailable(quantization, torch.device("cpu"), dtype) is not None:
        return int(quantization.quantizer.bits * in_features * out_features / 8)
    small, large = (_measure_sample(real, in_features, rows, dtype) for rows in _SAMPLE_ROWS)
    return round(small + (large - small) / (_SAMPLE_ROWS[1] - _SAMPLE_ROWS[0]) * (out_features - _SAMPLE_ROWS[0]))


def _measure_sample(form: ExpertFormat, in_features: int, rows: int, dtype: torch.dtype) -> int:
    with torch.no_grad():
        packed = form.pack(torch.zeros(rows, in_features, dtype=dtype))
    return sum(part.nbytes for tensor in form.tensors(packed) for part in list_parts(tensor))

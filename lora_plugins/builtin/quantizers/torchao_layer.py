"""The linear layer around a weight of torchao."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from lora_plugins import CastsInput

__all__ = ["TorchaoLinear", "dequantize_weight", "restore_zeros"]


#: Values that are scaled at a time on a CPU, which scales half precision in float32 copies.
_BLOCK = 1 << 16


class TorchaoLinear(CastsInput, nn.Linear):  # type: ignore[misc]
    """``nn.Linear`` whose weight is a quantized tensor, which multiplies in the dtype it was quantized from."""


def restore_zeros(weight: Any) -> None:
    """Make zeros of the values that torchao 0.18 divides by a scale of zero in float8, which are NaN.

    A row of zeros has such a scale, as in layers that were added to a model with weights of zero.

    Args:
        weight: A ``Float8Tensor``; it is changed in place. Others are left alone, and so are those without values.
    """
    if weight.qdata.is_meta:
        return
    if weight.qdata.is_floating_point() and not weight.scale.all():
        weight.qdata.view(torch.uint8).masked_fill_(weight.qdata.float().isnan(), 0)


def dequantize_weight(weight: Any) -> torch.Tensor:
    """Return ``weight.dequantize()``, to the bit, in no more memory than the result takes.

    torchao 0.18 makes a float tensor for the stored values, one for those less the zero points, and one for the
    product with the scales. The first two are exact in half precision too, so only the product is rounded.

    Args:
        weight: An ``Int8Tensor`` or ``Float8Tensor`` of shape ``[out, in]``, with a scale for every tensor, row, group
            of a row, or rectangle.
    """
    values = weight.qdata.to(weight.dtype, memory_format=torch.contiguous_format)
    rows, columns = values.shape
    zeros = getattr(weight, "zero_point", None)
    scales = _spread_over_rows(weight.scale, rows)
    if zeros is not None:
        _in_groups(values, zeros).sub_(_spread_over_rows(zeros, rows).to(values.dtype))
    block = min(_BLOCK, values.numel() // 16) if values.device.type == "cpu" else values.numel()
    step = max(1, block // max(1, columns))
    grouped = _in_groups(values, weight.scale)
    for start in range(0, rows, step):
        grouped[start : start + step].mul_(scales[start : start + step])
    return values


def _in_groups(values: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """Return a view ``[out, groups, columns of a group]`` of a weight."""
    groups = 1 if scales.numel() == 1 else scales.shape[1]
    return values.view(values.shape[0], groups, values.shape[1] // groups)


def _spread_over_rows(scales: torch.Tensor, rows: int) -> torch.Tensor:
    """Return a scale for each row and group, shape ``[rows, groups, 1]``."""
    table = scales.reshape(1, 1) if scales.numel() == 1 else scales
    return table.repeat_interleave(rows // table.shape[0], dim=0).unsqueeze(-1)

"""The linear layer around a weight of torchao."""

from __future__ import annotations

from torch import nn

from lora_plugins import CastsInput

__all__ = ["TorchaoLinear"]


class TorchaoLinear(CastsInput, nn.Linear):  # type: ignore[misc]
    """``nn.Linear`` whose weight is a quantized tensor, which multiplies in the dtype it was quantized from."""

"""The layer of the backend."""

import torch
from torch import nn


class RoundedLinear(nn.Module):
    """A frozen linear layer with eight-bit weights, one scale for each output row."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        weight = linear.weight.detach().float()
        self.register_buffer("scale", weight.abs().amax(dim=1, keepdim=True).clamp(min=1e-8) / 127)
        self.weight = nn.Parameter((weight / self.scale).round().to(torch.int8), requires_grad=False)
        self.bias = linear.bias

    def dequantized(self) -> torch.Tensor:
        """The float weight, ``[out_features, in_features]``."""
        return self.weight * self.scale

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Take ``[..., in_features]``, return ``[..., out_features]``."""
        bias = None if self.bias is None else self.bias.to(x.dtype)
        return nn.functional.linear(x, self.dequantized().to(x.dtype), bias)

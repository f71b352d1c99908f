"""A mixin for quantized layers whose kernel accepts one input dtype."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

__all__ = ["CastsInput"]


class CastsInput:
    """Compute in the layer's own dtype and return the input's dtype.

    Put it before the layer's class: ``class MyLayer(CastsInput, TheirLinear)``. Inputs differ from the layer's
    dtype under autocast, when norms are held in float32, and when a float32 base gets bfloat16 activations.
    Autocast is disabled inside, because it would affect the forward pass of these layers and not the backward pass.
    """

    def computes_in(self) -> torch.dtype:
        """Return the dtype of the matrix product; by default that of the weight."""
        dtype: torch.dtype = self.weight.dtype  # type: ignore[attr-defined]
        return dtype

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Run the layer on ``[..., in_features]``; the output has the input's dtype."""
        import torch

        with torch.autocast(x.device.type, enabled=False):
            output: torch.Tensor = super().forward(x.to(self.computes_in()), *args, **kwargs)  # type: ignore[misc]
        return output.to(x.dtype)

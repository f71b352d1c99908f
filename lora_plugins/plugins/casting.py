"""A mixin for quantized layers whose matrix product only takes one dtype."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

__all__ = ["CastsInput"]


class CastsInput:
    """Compute in the layer's own dtype, whatever comes in, and give back the dtype that came in.

    Put it before the layer's class: ``class MyLayer(CastsInput, TheirLinear)``. Inputs differ from the layer's
    dtype under autocast, when norms are held in float32, and when a float32 base gets bfloat16 activations.
    Autocast is off inside, because it would reach the forward pass of these layers and not their backward pass.
    """

    def computes_in(self) -> torch.dtype:
        """The dtype of the matrix product; by default that of the weight."""
        dtype: torch.dtype = self.weight.dtype  # type: ignore[attr-defined]
        return dtype

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Run the layer on ``[..., in_features]``; the output has the input's dtype."""
        import torch

        with torch.autocast(x.device.type, enabled=False):
            output: torch.Tensor = super().forward(x.to(self.computes_in()), *args, **kwargs)  # type: ignore[misc]
        return output.to(x.dtype)

"""The LoRA layer over a quantized linear layer of any backend."""

from __future__ import annotations

from typing import Any

import torch
from peft.tuners.lora.layer import Linear
from peft.tuners.tuners_utils import check_adapters_to_merge
from torch import nn

from lora_plugins.errors import MergeError
from lora_plugins.quantization.request import Quantization, quantization_of

__all__ = ["QuantizedLoraLinear", "check_mergeable"]


class QuantizedLoraLinear(Linear):  # type: ignore[misc]
    """``peft.tuners.lora.Linear`` whose base layer may be quantized by a backend of the registry.

    Training is PEFT's own. Merging dequantizes, adds and quantizes again, which rounds the sum to the backend's
    grid: 8 bits are fine enough for that. Below 8 bits most of the adapter would be rounded away, so that
    is refused. Unmerging restores the previous base layer, bit by bit.
    """

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Add adapters to the base layer's weight.

        Raises:
            MergeError: The backend has less than 8 bits, or the sum is not finite.
        """
        base = self.get_base_layer()
        quantization = quantization_of(base)
        if quantization is None:
            super().merge(safe_merge=safe_merge, adapter_names=adapter_names)
            return
        names = [name for name in check_adapters_to_merge(self, adapter_names) if name in self.lora_A]
        if not names:
            return
        check_mergeable(quantization)
        weight = quantization.quantizer.dequantize(base).detach()
        total = weight.float()
        bias = base.bias
        for name in names:
            if name in self.lora_variant:
                total = self.lora_variant[name].merge_safe(self, name, total)
            else:
                total = total + self.get_delta_weight(name).float()
            if self.lora_bias[name]:
                update = self.lora_B[name].bias * self.scaling[name]
                bias = update if bias is None else bias + update
        if safe_merge and not bool(total.isfinite().all()):
            raise MergeError(f"The merged weight is not finite: the adapter {' or '.join(names)} seems to be broken.")
        if not self.merged:
            # In a list, so that it is not a submodule.
            self.unmerged: list[nn.Module] = [base]
        self.base_layer = _requantize(total.to(weight.dtype), bias, quantization).train(base.training)
        self.merged_adapters.extend(names)

    def unmerge(self) -> None:
        """Put back the base layer from before the merge."""
        if not self.merged or not getattr(self, "unmerged", None):
            super().unmerge()
            return
        self.base_layer = self.unmerged.pop()
        self.merged_adapters.clear()


def check_mergeable(quantization: Quantization) -> None:
    """Refuse to merge into weights of less than 8 bits.

    Raises:
        MergeError: The backend has less.
    """
    if quantization.quantizer.bits < 8:
        raise MergeError(
            f"Merging into the {quantization.quantizer.bits:g}-bit weights of {quantization.name!r} would round most "
            "of the adapter away. Call lora_plugins.dequantize_model(model) first and merge then, or save the adapter "
            "and run `lora-plugins merge`, which merges into float weights."
        )


def _requantize(weight: torch.Tensor, bias: Any, quantization: Quantization) -> nn.Module:
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta")
    linear.weight = nn.Parameter(weight, requires_grad=False)
    if bias is not None:
        linear.bias = nn.Parameter(bias.detach().to(weight.dtype), requires_grad=False)
    return quantization.quantize(linear)

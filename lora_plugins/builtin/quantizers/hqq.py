"""The HQQ backends ``int8-hqq`` and ``int4-hqq``."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from lora_plugins import Quantizer, hookimpl

if TYPE_CHECKING:
    import torch
    from torch import nn

__all__ = ["Hqq", "Int4Hqq", "Int8Hqq", "register_quantizers"]


#: Default group sizes; the first that divides a layer's rows is used.
_GROUP_SIZES = (64, 32, 16, 8)


class Hqq(Quantizer):
    """Groups of weights with a scale and a zero point each, fitted so that outliers cost little.

    Options: ``group_size`` (64, or less where that does not divide a layer's rows; a multiple of 8);
    ``compute_dtype`` is the dtype of the matrix products, by default that of the activations.
    Source: https://mobiusml.github.io/hqq_blog/
    """

    bits: int
    requires = ("hqq>=0.2.8",)
    options = ("group_size", "compute_dtype")
    # Its layers write a custom state dict, which FSDP2 (torch 2.13) cannot put into a checkpoint.
    engines = ("ddp", "deepspeed")

    def available(self, device: torch.device, dtype: torch.dtype, options: Mapping[str, Any]) -> str | None:
        if options.get("group_size", 8) % 8:
            return f"group_size must be a multiple of 8, not {options['group_size']!r}"
        return None

    def unsuitable(self, in_features: int, out_features: int, options: Mapping[str, Any]) -> str | None:
        size = _choose_group_size(in_features, options)
        if size is None:
            wanted = options.get("group_size", "a multiple of 8")
            return f"{in_features} input features cannot be parted in groups of {wanted}"
        if self.bits == 4 and (in_features // size * out_features) % 2:
            return f"an odd number of groups of {size} cannot be packed two by two"
        return None

    def quantize_linear(self, linear: nn.Linear, options: Mapping[str, Any]) -> nn.Module:
        from hqq.core.quantize import BaseQuantizeConfig

        from lora_plugins.builtin.quantizers.hqq_layer import HQQLinear

        config = BaseQuantizeConfig(nbits=self.bits, group_size=_choose_group_size(linear.in_features, options), axis=1)
        return HQQLinear(
            linear,
            config,
            compute_dtype=options.get("compute_dtype") or linear.weight.dtype,
            device=str(linear.weight.device),
        )

    def owns(self, module: Any) -> bool:
        # A model can only hold these layers once somebody has imported hqq.
        layer = getattr(sys.modules.get("hqq.core.quantize"), "HQQLinear", None)
        return layer is not None and isinstance(module, layer) and _read_bits(module) == self.bits

    def dequantize(self, module: Any) -> torch.Tensor:
        return module.dequantize()

    def layer_bytes(
        self, in_features: int, out_features: int, dtype: torch.dtype, options: Mapping[str, Any]
    ) -> int | None:
        size = _choose_group_size(in_features, options)
        if size is None:
            return None
        groups = in_features // size * out_features
        # A scale and a zero point for each group.
        item = (options.get("compute_dtype") or dtype).itemsize
        return in_features * out_features * self.bits // 8 + 2 * groups * item

    def extra_tensors(self, module: Any) -> Iterable[torch.Tensor]:
        import torch

        kept = [*module.meta.values(), module.bias]
        return [tensor for tensor in kept if isinstance(tensor, torch.Tensor)]


def _choose_group_size(in_features: int, options: Mapping[str, Any]) -> int | None:
    sizes = (options["group_size"],) if options.get("group_size") else _GROUP_SIZES
    return next((size for size in sizes if in_features % size == 0), None)


def _read_bits(module: Any) -> int | None:
    return module.meta["nbits"] if module.meta else None


class Int8Hqq(Hqq):
    """8 bits a weight; the finest of the 8-bit backends, and the slowest to quantize."""

    name = "int8-hqq"
    bits = 8


class Int4Hqq(Hqq):
    """4 bits a weight."""

    name = "int4-hqq"
    bits = 4


@hookimpl
def register_quantizers() -> list[Quantizer]:
    return [Int8Hqq(), Int4Hqq()]

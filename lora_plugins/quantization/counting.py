"""Logical parameter counts and real bytes of a model."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from lora_plugins.models.sharding import read_part
from lora_plugins.plugins.host import PluginHost, plugin_host
from lora_plugins.quantization.request import count_logical, is_unknown_layer, owner_of
from lora_plugins.quantization.stacks import QuantizedStack, list_parts
from lora_plugins.text import dtype_name

__all__ = ["ParameterCount", "TensorBytes", "count_parameters", "tensor_bytes"]


@dataclass(frozen=True)
class ParameterCount:
    """How many weights a model has, by what they are and not by how they are packed.

    Attributes:
        trainable: Weights that get gradients.
        total: All weights of the base model and its adapters. A head that is trained as a copy counts
            once, tied weights count once.
        quantized: Weights held by quantized layers and quantized stacks of experts.
    """

    trainable: int
    total: int
    quantized: int

    @property
    def percent(self) -> float:
        """Trainable weights in per cent of all."""
        return 100 * self.trainable / self.total if self.total else 0.0


@dataclass(frozen=True)
class TensorBytes:
    """Bytes of live tensor storage, each storage once.

    Attributes:
        by_dtype: Bytes of parameters and buffers by dtype name.
        quantization_state: Bytes of scales and tables that quantized layers keep elsewhere.
        trainable: Bytes of the parameters that get gradients.
    """

    by_dtype: dict[str, int] = field(default_factory=dict)
    quantization_state: int = 0
    trainable: int = 0

    @property
    def total(self) -> int:
        """All bytes."""
        return sum(self.by_dtype.values()) + self.quantization_state


def count_parameters(model: nn.Module, host: PluginHost | None = None) -> ParameterCount:
    """Count the weights of a model, quantized or not, wrapped or not.

    Packed layers count ``in_features * out_features``. Works on the meta device and on parameters that
    DeepSpeed ZeRO-3 has partitioned.
    """
    host = host or plugin_host()
    seen: set[int] = set()
    trainable = total = quantized = 0
    for module in _list_logical_modules(model):
        packed = owner_of(module, host) is not None or is_unknown_layer(module, host)
        for name, parameter in module.named_parameters(recurse=False):
            if id(parameter) in seen:
                continue
            seen.add(id(parameter))
            if packed and name != "bias":
                # The packed weight and its scales count once, below.
                continue
            count = int(getattr(parameter, "ds_numel", parameter.numel()))
            total += count
            quantized += count if isinstance(parameter, QuantizedStack) else 0
            trainable += count if parameter.requires_grad else 0
        if packed and id(module) not in seen:
            seen.add(id(module))
            count = count_logical(module)
            quantized += count
            total += count
            bias = getattr(module, "bias", None)
            if bias is not None and "bias" not in module._parameters:
                total += bias.numel()
    return ParameterCount(trainable, total, quantized)


def _list_logical_modules(model: nn.Module) -> Iterator[Any]:
    """Return all modules except the frozen originals that PEFT keeps beside a head it trains as a copy."""
    hidden: set[int] = set()
    module: Any
    for module in model.modules():
        originals = getattr(module, "original_module", None)
        if originals is not None and hasattr(module, "modules_to_save") and len(module.modules_to_save):
            hidden.update(id(part) for part in originals.modules())
    return (module for module in model.modules() if id(module) not in hidden)


def tensor_bytes(model: nn.Module, host: PluginHost | None = None) -> TensorBytes:
    """Measure the tensors that a model holds; storages shared by several tensors count once.

    Of a model that FSDP2 or ZeRO-3 divides, these are the parts that this process holds. On the meta device this is
    what the tensors would take.
    """
    host = host or plugin_host()
    seen: set[Any] = set()
    by_dtype: dict[str, int] = {}
    trainable = 0
    for tensor in [*model.parameters(), *model.buffers()]:
        for part in list_parts(tensor):
            size = _measure_new(part, seen)
            dtype = dtype_name(part.dtype)
            by_dtype[dtype] = by_dtype.get(dtype, 0) + size
            trainable += size if tensor.requires_grad else 0
    state = 0
    for module in model.modules():
        owner = owner_of(module, host)
        if owner is not None:
            state += sum(_measure_new(tensor, seen) for tensor in owner.extra_tensors(module))
    return TensorBytes(dict(sorted(by_dtype.items())), state, trainable)


def _measure_new(tensor: torch.Tensor, seen: set[Any]) -> int:
    """Return the bytes of a tensor's storage, 0 when an earlier tensor shares it."""
    if tensor.is_meta:
        key, size = id(tensor), tensor.numel() * tensor.element_size()
    else:
        local = read_part(tensor)
        storage = local.untyped_storage()
        key, size = storage.data_ptr(), storage.nbytes()
        if key == 0:
            return 0
    if key in seen:
        return 0
    seen.add(key)
    return int(size)

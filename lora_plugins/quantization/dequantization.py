"""Convert a quantized model back to float weights, in place."""

from __future__ import annotations

from typing import Any

import torch
from peft.tuners.lora.layer import Linear, ParamWrapper
from torch import nn
from transformers.pytorch_utils import Conv1D

from lora_plugins.errors import QuantizationError
from lora_plugins.models.sharding import gather
from lora_plugins.models.wrapping import base_of, module_places
from lora_plugins.quantization.facts import FACTS_ATTRIBUTE, RECORD_ATTRIBUTE, record_facts
from lora_plugins.quantization.lora_layer import QuantizedLoraLinear
from lora_plugins.quantization.marks import untag_dequantized
from lora_plugins.quantization.request import quantization_of
from lora_plugins.quantization.stacks import dequantize_stack, list_quantized_stacks

__all__ = ["dequantize_model"]


def dequantize_model(model: nn.Module, dtype: str | torch.dtype | None = None) -> list[str]:
    """Replace every quantized layer, and every quantized stack of experts, by its dequantized values.

    Adapters stay, and can be merged afterwards with PEFT's ``merge_and_unload()`` without being rounded to the
    grid of a few bits. The model grows to the size of its float weights.

    Args:
        model: A quantized model, wrapped or not; changed in place.
        dtype: Dtype of the float weights, by default that of the model's other frozen weights.

    Returns:
        Dotted names of the layers and stacks that were replaced.

    Raises:
        QuantizationError: The model has no quantized layer.
    """
    wanted = getattr(torch, dtype.removeprefix("torch.")) if isinstance(dtype, str) else dtype or _find_dtype(model)
    places = module_places(model)
    replaced = []
    for name, module in list(model.named_modules()):
        quantization = quantization_of(module)
        if quantization is None:
            continue
        with gather(module.parameters()):
            layer = _make_float_layer(module, quantization.quantizer.dequantize(module).detach().to(wanted))
        layer.train(module.training)
        for parent, attribute in places[id(module)]:
            setattr(parent, attribute, layer)
        replaced.append(name)
    for name, module, attribute, stack in list(list_quantized_stacks(model)):
        module._parameters[attribute] = nn.Parameter(dequantize_stack(stack, wanted), requires_grad=False)
        replaced.append(name)
    if not replaced:
        raise QuantizationError("The model has no quantized layer, so there is nothing to dequantize.")
    _refit_lora_layers(model)
    untag_dequantized(base_of(model))
    if hasattr(base_of(model), FACTS_ATTRIBUTE):
        record_facts(model)
    record = getattr(model, RECORD_ATTRIBUTE, None)
    if record is not None:
        record.quantization = None
        record.notes.append(f"{len(replaced)} layers were dequantized")
    return replaced


def _find_dtype(model: nn.Module) -> torch.dtype:
    quantized = {id(module) for module in model.modules() if quantization_of(module) is not None}
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            if parameter.is_floating_point() and not parameter.requires_grad and id(module) not in quantized:
                return parameter.dtype
    return torch.float32


def _make_float_layer(module: Any, weight: torch.Tensor) -> nn.Module:
    """Return a layer of the class that was quantized, with a weight of shape ``[out_features, in_features]``."""
    out_features, in_features = weight.shape
    bias = None if module.bias is None else module.bias.detach().to(weight.dtype)
    layer: Any
    if issubclass(getattr(module, "source_cls", nn.Linear), Conv1D):
        layer = Conv1D(out_features, in_features).to(device=weight.device, dtype=weight.dtype)
        weight = weight.T.contiguous()
    else:
        layer = nn.Linear(in_features, out_features, bias=bias is not None, device="meta")
    layer.weight = nn.Parameter(weight, requires_grad=False)
    if bias is not None:
        layer.bias = nn.Parameter(bias, requires_grad=False)
    return layer


def _refit_lora_layers(model: nn.Module) -> None:
    """Give LoRA layers the class and orientation that fit the float layers now under them."""
    for module in model.modules():
        if isinstance(module, QuantizedLoraLinear):
            module.__class__ = Linear
            transposed = isinstance(module.get_base_layer(), Conv1D)
            module.fan_in_fan_out = module.is_target_conv_1d_layer = transposed
        elif isinstance(module, ParamWrapper):
            for method in ("merge", "unmerge"):
                vars(module).pop(method, None)

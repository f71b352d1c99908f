"""Copy a model to the meta device, to try an adapter on it."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from torch import nn

__all__ = ["skeleton"]


def skeleton(model: nn.Module) -> nn.Module:
    """Copy a model to the meta device, without adapters and quantization; the model is not changed.

    A quantized layer becomes a plain linear layer of its logical shape.
    """
    return _copy_module(_unwrap_peft(model), {}, {}, {})


def _unwrap_peft(model: nn.Module) -> nn.Module:
    from peft import PeftModel

    model = getattr(model, "_orig_mod", model)
    return model.base_model.model if isinstance(model, PeftModel) else model


def _copy_module(
    module: nn.Module, modules: dict[int, nn.Module], tensors: dict[int, Any], configs: dict[int, Any]
) -> nn.Module:
    module = _unwrap_layer(module)
    known = modules.get(id(module))
    if known is not None:
        return known
    linear = _make_linear(module)
    if linear is not None:
        modules[id(module)] = linear
        return linear
    # Not copy.copy: in torch 2.13, parametrized modules (weight norm of speech models) refuse to be copied by state.
    clone: nn.Module = object.__new__(type(module))
    clone.__dict__.update(vars(module))
    modules[id(module)] = clone
    # Copy the dicts, which are still shared: PEFT adds modules, parameters and hooks to them.
    for key, value in vars(module).items():
        if isinstance(value, dict):
            clone.__dict__[key] = type(value)(value)
        elif key == "config":
            # PEFT 0.21.2 writes the number of layers into it if an adapter replicates layers.
            clone.__dict__[key] = copy.deepcopy(value, configs)
    for name, parameter in module._parameters.items():
        clone._parameters[name] = _make_meta(parameter, tensors)
    for name, buffer in module._buffers.items():
        clone._buffers[name] = _make_meta(buffer, tensors)
    for name, child in module._modules.items():
        clone._modules[name] = None if child is None else _copy_module(child, modules, tensors, configs)
    return clone


def _unwrap_layer(module: nn.Module) -> nn.Module:
    """Return the module inside an adapter layer or a fully trained head."""
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import AuxiliaryTrainingWrapper

    while True:
        if isinstance(module, BaseTunerLayer):
            module = module.get_base_layer()
        elif isinstance(module, AuxiliaryTrainingWrapper):
            module = module.original_module
        else:
            return module


def _make_linear(module: nn.Module) -> nn.Module | None:
    """Return a plain linear layer for a quantized one; ``None`` for any other module."""
    from torch import nn

    sizes = getattr(module, "in_features", None), getattr(module, "out_features", None)
    if not all(isinstance(size, int) for size in sizes) or any(module.children()):
        return None
    weight = getattr(module, "weight", None)
    packed = weight is None or tuple(weight.shape) != (sizes[1], sizes[0]) or not weight.dtype.is_floating_point
    # Subclasses, such as quantized layers, may need values at injection.
    if not packed and type(module) is nn.Linear:
        return None
    return nn.Linear(*sizes, bias=getattr(module, "bias", None) is not None, device="meta")  # type: ignore[arg-type]


def _make_meta(tensor: torch.Tensor | None, tensors: dict[int, Any]) -> Any:
    import torch

    if tensor is None:
        return None
    if id(tensor) not in tensors:
        # The logical shape: under ZeRO-3 and FSDP each process holds a part.
        shape = getattr(tensor, "ds_shape", None) or tensor.shape
        empty = torch.empty(tuple(shape), dtype=tensor.dtype, device="meta")
        if isinstance(tensor, torch.nn.Parameter):
            empty = torch.nn.Parameter(empty, requires_grad=False)
        tensors[id(tensor)] = empty
    return tensors[id(tensor)]

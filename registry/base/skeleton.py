"""A copy of a model on the meta device, to try an adapter on."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from torch import nn

__all__ = ["skeleton"]


def skeleton(model: nn.Module) -> nn.Module:
    """Copy a model to the meta device, without adapters and quantization; the model is not changed.

    What stands for a quantized layer is a plain linear layer of its logical shape.
    """
    return _copied(_without_peft(model), {}, {})


def _without_peft(model: nn.Module) -> nn.Module:
    from peft import PeftModel

    model = getattr(model, "_orig_mod", model)
    return model.base_model.model if isinstance(model, PeftModel) else model


def _copied(module: nn.Module, modules: dict[int, nn.Module], tensors: dict[int, Any]) -> nn.Module:
    module = _bare(module)
    known = modules.get(id(module))
    if known is not None:
        return known
    linear = _linear(module)
    if linear is not None:
        modules[id(module)] = linear
        return linear
    # Not copy.copy: a parametrized module (weight norm of speech models) refuses to be copied by its state.
    clone: nn.Module = object.__new__(type(module))
    clone.__dict__.update(vars(module))
    modules[id(module)] = clone
    # Shared until here; PEFT puts modules, parameters and hooks into them.
    for key, value in vars(module).items():
        if isinstance(value, dict):
            clone.__dict__[key] = type(value)(value)
    for name, parameter in module._parameters.items():
        clone._parameters[name] = _meta(parameter, tensors)
    for name, buffer in module._buffers.items():
        clone._buffers[name] = _meta(buffer, tensors)
    for name, child in module._modules.items():
        clone._modules[name] = None if child is None else _copied(child, modules, tensors)
    return clone


def _bare(module: nn.Module) -> nn.Module:
    """What is under an adapter layer, or under a head that is trained along."""
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import AuxiliaryTrainingWrapper

    while True:
        if isinstance(module, BaseTunerLayer):
            module = module.get_base_layer()
        elif isinstance(module, AuxiliaryTrainingWrapper):
            module = module.original_module
        else:
            return module


def _linear(module: nn.Module) -> nn.Module | None:
    """The plain layer that a quantized one stands for; ``None`` for any other module."""
    from torch import nn

    sizes = getattr(module, "in_features", None), getattr(module, "out_features", None)
    if not all(isinstance(size, int) for size in sizes) or any(module.children()):
        return None
    weight = getattr(module, "weight", None)
    packed = weight is None or tuple(weight.shape) != (sizes[1], sizes[0]) or not weight.dtype.is_floating_point
    # Subclasses, quantized ones among them, may do more at injection than can be done without values.
    if not packed and type(module) is nn.Linear:
        return None
    return nn.Linear(*sizes, bias=getattr(module, "bias", None) is not None, device="meta")  # type: ignore[arg-type]


def _meta(tensor: torch.Tensor | None, tensors: dict[int, Any]) -> Any:
    import torch

    if tensor is None:
        return None
    if id(tensor) not in tensors:
        # The logical shape: FSDP and ZeRO-3 hold parts.
        shape = getattr(tensor, "ds_shape", None) or tensor.shape
        empty = torch.empty(tuple(shape), dtype=tensor.dtype, device="meta")
        if isinstance(tensor, torch.nn.Parameter):
            empty = torch.nn.Parameter(empty, requires_grad=False)
        tensors[id(tensor)] = empty
    return tensors[id(tensor)]

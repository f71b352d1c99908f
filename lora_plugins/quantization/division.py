"""Quantized layers that an engine divides among processes."""

from __future__ import annotations

from peft.tuners.lora.layer import Linear
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from lora_plugins.quantization.request import owner_of

__all__ = ["divide_layers", "find_read_layers", "find_replaced_layer", "undivide_layers"]


def divide_layers(model: nn.Module) -> list[nn.Module]:
    """Let the engine divide the quantized layers of a model whose backend can; return those that stay whole."""
    read = find_read_layers(model)
    whole = []
    for module in list(model.modules()):
        owner = owner_of(module)
        if owner is not None and (id(module) in read or not owner.divide(module)):
            whole.append(module)
    return whole


def undivide_layers(model: nn.Module) -> None:
    """Undo `divide_layers` on a model that is whole again."""
    for module in list(model.modules()):
        owner = owner_of(module)
        if owner is not None:
            owner.undivide(module)


def find_read_layers(model: nn.Module) -> set[int]:
    """Return the ids of the layers whose weight an adapter may read, as DoRA does, instead of calling the layer."""
    tuners = (module for module in model.modules() if isinstance(module, BaseTunerLayer))
    readers = (tuner for tuner in tuners if not isinstance(tuner, Linear) or tuner.lora_variant)
    return {id(tuner.get_base_layer()) for tuner in readers}


def find_replaced_layer(model: nn.Module) -> tuple[str, nn.Module] | None:
    """Return path and layer of the first quantized layer whose weight DoRA reads and PEFT then puts anew, if any.

    The new weight is a parameter that an engine has never seen.
    """
    for path, tuner in model.named_modules():
        if isinstance(tuner, BaseTunerLayer) and any(getattr(tuner, "use_dora", {}).values()):
            layer = tuner.get_base_layer()
            owner = owner_of(layer)
            if owner is not None and owner.replaces_weight:
                return path, layer
    return None

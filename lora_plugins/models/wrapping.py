"""See through PEFT's wrappers: base model, paths, adapter modules."""

from __future__ import annotations

import sys
from typing import Any

from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import ModulesToSaveWrapper
from torch import nn

__all__ = ["adapter_modules", "base_of", "is_lora", "module_places", "plain_path"]


def base_of(model: Any) -> nn.Module:
    """Return the base model of a `peft.PeftModel`; any other model is returned unchanged."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def module_places(model: nn.Module) -> dict[int, list[tuple[nn.Module, str]]]:
    """Return the parents and attributes of each module, by its id: a shared layer must be replaced in all of them."""
    places: dict[int, list[tuple[nn.Module, str]]] = {}
    for module in model.modules():
        for attribute, child in module._modules.items():
            if child is not None:
                places.setdefault(id(child), []).append((module, attribute))
    return places


def plain_path(path: str) -> str:
    """Return a module's path in the base model, without the parts that PEFT adds."""
    path = path.removeprefix("base_model.model.")
    for part in (".base_layer", ".original_module", ".token_adapter"):
        path = path.replace(part, "")
    return path


def adapter_modules(model: nn.Module) -> set[nn.Module]:
    """Return the modules that belong to adapters: LoRA's small linear layers and fully trained heads."""
    if "peft" not in sys.modules:
        return set()
    inside: set[nn.Module] = set()
    for module in model.modules():
        if isinstance(module, ModulesToSaveWrapper):
            inside.update(module.modules())
        elif isinstance(module, BaseTunerLayer):
            base = module.get_base_layer()
            inside.update(part for part in module.modules() if part is not base and part is not module)
    return inside


def is_lora(name: str) -> bool:
    """Whether a parameter's name is that of a LoRA matrix."""
    return "lora_A" in name or "lora_B" in name or "lora_embedding_" in name

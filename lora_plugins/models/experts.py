"""Find experts that use transformers' interface for experts functions."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import nn

from lora_plugins.models.structure import is_expert_stack, is_flat_stack
from lora_plugins.models.wrapping import adapter_modules, plain_path

__all__ = [
    "computes_through_interface",
    "has_known_forward",
    "is_computable",
    "is_transposed",
    "list_expert_stacks",
    "list_flat_stacks",
    "list_stacks",
]


#: What transformers' decorator ``use_experts_implementation`` has set on the experts of a block since 5.5.
_MARKS = ("has_gate", "has_bias", "is_transposed", "_apply_gate")


def computes_through_interface(module: Any) -> bool:
    """Whether a module's experts are computed by a function of transformers' ``ALL_EXPERTS_FUNCTIONS``."""
    return all(hasattr(module, mark) for mark in _MARKS) and isinstance(
        getattr(module, "down_proj", None), nn.Parameter
    )


#: Classes outside of the interface whose forward is known, and whether their stacks are ``[experts, in, out]``.
_KNOWN = {"Llama4TextExperts": True, "LongcatFlashExperts": False, "Step3p7Experts": False}


def has_known_forward(module: Any) -> bool:
    """Whether a module's experts are of a class outside of the interface that this package can compute."""
    return type(module).__name__ in _KNOWN and isinstance(getattr(module, "down_proj", None), nn.Parameter)


def is_computable(module: Any) -> bool:
    """Whether this package can compute a module's experts."""
    return computes_through_interface(module) or has_known_forward(module)


def is_transposed(module: Any) -> bool:
    """Whether a module's stacks are ``[experts, in, out]``."""
    return bool(getattr(module, "is_transposed", _KNOWN.get(type(module).__name__, False)))


def list_stacks(module: Any) -> tuple[str, str]:
    """Return the names of the first and of the second stack of such a module."""
    return ("gate_up_proj" if getattr(module, "has_gate", True) else "up_proj", "down_proj")


def list_expert_stacks(model: nn.Module) -> Iterator[tuple[str, nn.Module, str, Any]]:
    """Yield path and module, name and value of every stacked expert weight of a model, quantized ones too."""
    modules = dict(model.named_modules())
    adapters = adapter_modules(model)
    for path, module in modules.items():
        for name, value in module._parameters.items():
            if value is None or module in adapters or not is_expert_stack(f"{path}.{name}", value, modules):
                continue
            yield path, module, name, value


def list_flat_stacks(model: nn.Module) -> list[str]:
    """Return the plain paths of the weights that hold all routed experts one below the other, in two dimensions."""
    modules, adapters = dict(model.named_modules()), adapter_modules(model)
    return [
        f"{plain_path(path)}.{name}"
        for path, module in modules.items()
        if module not in adapters
        for name, value in module._parameters.items()
        if value is not None and is_flat_stack(f"{path}.{name}", value, modules)
    ]

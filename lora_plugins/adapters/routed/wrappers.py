"""Choose our experts function and give it the adapters on experts."""

from __future__ import annotations

import types
from collections.abc import Iterator
from typing import Any

import torch
from peft.tuners.lora.layer import ParamWrapper
from torch import nn
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from lora_plugins.adapters.fused import is_plain_linear
from lora_plugins.adapters.routed.classes import forward as KNOWN_FORWARD
from lora_plugins.adapters.routed.classes import run_experts
from lora_plugins.adapters.routed.function import ExpertAdapter
from lora_plugins.errors import PreparationError
from lora_plugins.models.experts import (
    computes_through_interface,
    has_known_forward,
    is_computable,
    is_transposed,
    list_stacks,
)
from lora_plugins.models.wrapping import plain_path
from lora_plugins.quantization.expert_merging import merge, unmerge
from lora_plugins.quantization.stacks import find_stacks

__all__ = ["EXPERTS_FUNCTION", "forward", "is_served", "list_wrappers", "use_experts_function"]


#: The name of the function among transformers' experts functions.
EXPERTS_FUNCTION = "lora_plugins"

_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def use_experts_function(model: nn.Module) -> int:
    """Let this package compute the experts that are quantized or adapted.

    transformers looks the function up by ``config._experts_implementation``, which is not saved. PEFT's wrappers stay
    as they are; the outermost one of a block gets another ``forward``.

    Args:
        model: The prepared model; experts that are neither quantized nor adapted are left alone.

    Returns:
        Number of blocks of experts.

    Raises:
        PreparationError: The experts are spread over processes (expert parallelism).
    """
    count = 0
    for path, base, wrappers in _find_experts(model):
        stacks = find_stacks(base)
        if not stacks and (not wrappers or _find_obstacle(base, wrappers)):
            continue
        if getattr(base, "_is_expert_parallel", False):
            raise PreparationError(
                f"The experts of {plain_path(path)} are spread over processes (expert parallelism), where they can be "
                "neither quantized nor adapted. Load the model without distributed_config=, or leave the experts as "
                "they are: experts='none' and, under quantization=, skip_modules=['experts']."
            )
        if has_known_forward(base):
            base.forward = types.MethodType(KNOWN_FORWARD, base)
        else:
            base.config._experts_implementation = EXPERTS_FUNCTION
        for wrapper in wrappers:
            if wrapper.parameter_name in stacks:
                wrapper.merge = types.MethodType(merge, wrapper)
                wrapper.unmerge = types.MethodType(unmerge, wrapper)
        if wrappers:
            wrappers[0].forward = types.MethodType(forward, wrappers[0])
        count += 1
    return count


def _find_experts(model: nn.Module) -> Iterator[tuple[str, Any, list[Any]]]:
    """Yield path and module of each block of experts, with PEFT's wrappers around it, the outermost first."""
    inner: set[int] = set()
    for path, module in model.named_modules():
        if id(module) in inner:
            continue
        wrappers = list_wrappers(module)
        base = wrappers[-1].base_layer if wrappers else module
        if is_computable(base):
            inner.update(id(part) for part in (*wrappers, base))
            yield path, base, wrappers


def list_wrappers(module: Any) -> list[Any]:
    """Return PEFT's wrappers of expert parameters from a module inwards."""
    found: list[Any] = []
    while isinstance(module, ParamWrapper):
        found.append(module)
        module = module.base_layer
    return found


def is_served(wrapper: Any) -> bool:
    """Whether this package computes the experts under one of PEFT's wrappers, so that its adapter may have dropout."""
    base = wrapper.get_base_layer()
    return is_computable(base) and not _find_obstacle(base, list_wrappers(wrapper))


def _find_obstacle(base: Any, wrappers: list[Any]) -> str:
    """Return why PEFT's own forward must be used, empty if there is no reason."""
    for wrapper in wrappers:
        if wrapper.parameter_name not in list_stacks(base):
            return f"the adapter changes {wrapper.parameter_name}"
        if wrapper.num_experts < 2:
            return "there is one expert"
        for name in wrapper.lora_A:
            if not (is_plain_linear(wrapper.lora_A[name]) and is_plain_linear(wrapper.lora_B[name])):
                return "the adapter's tensors are sharded, hooked or replaced"
    if any(parameter.requires_grad for parameter in base.parameters(recurse=False)):
        return "weights of the experts are trained themselves"
    if any(getattr(base, name).dtype not in _FLOATS for name in list_stacks(base)):
        return "the weights are stored in a format of few bits by another library"
    return ""


# A bound method is pickled as its object and its name, so this function needs the name of the method it replaces.
def forward(layer: Any, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
    """Compute the experts with the adapters of all nested wrappers.

    Args:
        layer: The outermost wrapper of a block of experts.
        x: Shape ``[tokens, hidden]``.
        *args: The routing, as the experts' own ``forward`` gets it.
        **kwargs: As ``args``.

    Raises:
        PreparationError: The experts are quantized, and PEFT's forward would be needed.
    """
    base = layer.get_base_layer()
    wrappers = list_wrappers(layer)
    if "adapter_names" in kwargs:
        # PEFT refuses batches with several adapters here.
        return type(layer).forward(layer, x, *args, **kwargs)
    obstacle = _find_obstacle(base, wrappers)
    through = computes_through_interface(base)
    if not obstacle and through and base.config._experts_implementation != EXPERTS_FUNCTION:
        obstacle = f"experts_implementation={base.config._experts_implementation!r} was set"
    if obstacle and find_stacks(base):
        raise PreparationError(f"The quantized experts cannot be computed: {obstacle}. Keep the experts in float.")
    if obstacle:
        return type(layer).forward(layer, x, *args, **kwargs)
    adapters = {wrapper.parameter_name: _list_active(wrapper) for wrapper in wrappers}
    result: torch.Tensor = base(x, *args, adapters=adapters, **kwargs)
    return result


def _list_active(wrapper: Any) -> tuple[ExpertAdapter, ...]:
    """Return the adapters of one stack that are switched on."""
    if wrapper.disable_adapters and wrapper.merged:
        wrapper.unmerge()
    if wrapper.disable_adapters or wrapper.merged:
        return ()
    return tuple(_read_adapter(wrapper, name) for name in wrapper.active_adapters if name in wrapper.lora_A)


def _read_adapter(wrapper: Any, name: str) -> ExpertAdapter:
    dropout = wrapper.lora_dropout[name]
    rate = float(getattr(dropout, "p", 0.0)) if dropout.training else 0.0
    a, b = wrapper.lora_A[name].weight, wrapper.lora_B[name].weight
    # PEFT takes the axes of a stack for in and out, and exchanges them for some modules: which, differs by release.
    swapped = is_transposed(wrapper.get_base_layer()) == bool(wrapper._did_swap_in_out_features)
    return ExpertAdapter(a, b, wrapper.scaling[name], rate, swapped)


ALL_EXPERTS_FUNCTIONS.register(EXPERTS_FUNCTION, run_experts)

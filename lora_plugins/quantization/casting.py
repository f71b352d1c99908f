"""Cast trained tensors to float32, and inputs to the dtype of their layer."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from lora_plugins.models.sharding import is_part
from lora_plugins.quantization.request import owner_of

__all__ = ["cast_trained", "meet_inputs", "return_input_dtype"]


_HALF = (torch.float16, torch.bfloat16)

#: Attributes of a layer: the dtype of the model around it, and that of its last input.
_AROUND, _CAME_IN = "lora_plugins_dtype_around", "lora_plugins_dtype_that_came_in"


def cast_trained(model: nn.Module, dtype: torch.dtype, *, adapters: bool = True) -> list[str]:
    """Cast every tensor that gets gradients to one dtype, whatever the dtype of the frozen base.

    PEFT 0.21.2 makes adapters in float32 and copies saved modules in the base's dtype
    (https://github.com/huggingface/peft/pull/2433).

    A layer whose tensors are trained computes in that dtype and returns its input's dtype, or for tokens the dtype
    of the base. A trained bias beside a frozen weight matrix stays as it is: both must have one dtype. For the same
    reason frozen tensors of a trained adapter are cast, too.

    Args:
        model: The prepared model, wrapped or not.
        dtype: The dtype.
        adapters: Whether the tensors of adapter layers are cast too; those of saved modules and of the base always are.

    Returns:
        Names of the trained tensors that keep another dtype.
    """
    around = _find_main_dtype(model)
    adapter_parts = _find_adapter_parts(model)
    kept: list[str] = []
    for path, module in model.named_modules():
        own = {name: p for name, p in module._parameters.items() if p is not None and p.is_floating_point()}
        trained = [p for p in own.values() if p.requires_grad and not is_part(p)]
        if not trained:
            continue
        if module in adapter_parts:
            _cast(trained, dtype if adapters else None)
        elif owner_of(module) is not None or any(not p.requires_grad and p.dim() > 1 for p in own.values()):
            kept += [f"{path}.{name}" for name, p in own.items() if p.requires_grad and p.dtype != dtype]
        else:
            _cast(own.values(), dtype)
            if around is not None and around != dtype:
                return_input_dtype(module, around)
    if adapters:
        for tensors in _list_adapters(model):
            # Some initializations freeze one factor, such as MiCA's lora_B: a layer's factors are multiplied.
            if any(tensor.requires_grad for tensor in tensors):
                _cast([tensor for tensor in tensors if tensor.is_floating_point() and not is_part(tensor)], dtype)
    return kept


def _cast(parameters: Any, dtype: torch.dtype | None) -> None:
    for parameter in parameters:
        if dtype is not None and parameter.dtype != dtype:
            parameter.data = parameter.data.to(dtype)


def _find_adapter_parts(model: nn.Module) -> set[nn.Module]:
    """Return the adapter layers and their parts, without base layers: they cast their inputs themselves."""
    found: set[nn.Module] = set()
    for module in model.modules():
        if isinstance(module, BaseTunerLayer):
            found.add(module)
            found.update(
                part for name, child in module.named_children() if name != "base_layer" for part in child.modules()
            )
    return found


def _list_adapters(model: nn.Module) -> Iterator[list[nn.Parameter]]:
    """Yield the parameters of each adapter in each adapter layer."""
    for layer in model.modules():
        if not isinstance(layer, BaseTunerLayer):
            continue
        found: dict[str, list[nn.Parameter]] = {}
        for name, child in layer.named_children():
            if name != "base_layer" and isinstance(child, (nn.ModuleDict, nn.ParameterDict)):
                for adapter, held in child.items():
                    tensors = [held] if isinstance(held, nn.Parameter) else held.parameters()
                    found.setdefault(adapter, []).extend(tensors)
        yield from found.values()


def _find_main_dtype(model: nn.Module) -> torch.dtype | None:
    """Return the dtype of most frozen float weights outside quantized layers."""
    sizes: dict[torch.dtype, int] = {}
    for module in model.modules():
        if owner_of(module) is None:
            for parameter in module.parameters(recurse=False):
                if parameter.is_floating_point() and not parameter.requires_grad:
                    sizes[parameter.dtype] = sizes.get(parameter.dtype, 0) + parameter.numel()
    return max(sizes, key=lambda dtype: sizes[dtype], default=None)


def meet_inputs(model: nn.Module, keep: nn.Module | None = None) -> int:
    """Let layers take inputs of any float dtype: audio and images come in float32, whatever the base's dtype.

    torch's own layers, and layers that own a matrix, refuse an input whose dtype differs from their weight's. Under
    autocast torch 2.13 casts for all but norms on a CPU
    (https://github.com/intel/intel-extension-for-pytorch/issues/731).

    Args:
        model: The prepared model.
        keep: A module to leave without a hook.

    Returns:
        How many layers were changed.
    """
    count = 0
    adapter_parts = _find_adapter_parts(model)
    inside = _find_inner_linears(model)
    for module in model.modules():
        own = [p for p in module._parameters.values() if p is not None and p.is_floating_point()]
        if module is keep or module in adapter_parts or module in inside or not own or owner_of(module) is not None:
            continue
        if type(module).__module__.startswith("torch.nn.") or any(p.dim() > 1 for p in own):
            module.register_forward_pre_hook(_cast_input)
            count += 1
    return count


def _find_inner_linears(model: nn.Module) -> set[nn.Module]:
    """Return the linear layers in blocks of a float32 model: their inputs are hidden states, always float32."""
    if any(p.dtype in _HALF for p in model.parameters()):
        return set()
    stacks = [module for module in model.modules() if isinstance(module, nn.ModuleList)]
    return {part for stack in stacks for part in stack.modules() if isinstance(part, nn.Linear)}


def return_input_dtype(module: nn.Module, around: torch.dtype | None = None) -> None:
    """Let a layer compute in its own dtype and return its input's dtype.

    Args:
        module: The layer.
        around: The output's dtype where the input is not a float, as for tokens.
    """
    # Hooks and not a new forward: they belong to the module and go with it into a copy of the model.
    if _enter not in module._forward_pre_hooks.values():
        module.register_forward_pre_hook(_enter)
        module.register_forward_hook(_leave)
    setattr(module, _AROUND, around)


def _enter(module: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    first = inputs[0] if inputs else None
    if not isinstance(first, torch.Tensor) or not first.is_floating_point():
        setattr(module, _CAME_IN, getattr(module, _AROUND))
        return inputs
    setattr(module, _CAME_IN, first.dtype)
    return (first.to(_read_dtype(module, first.dtype)), *inputs[1:])


def _leave(module: nn.Module, inputs: tuple[Any, ...], output: Any) -> Any:
    dtype = getattr(module, _CAME_IN)
    return output if dtype is None or not isinstance(output, torch.Tensor) else output.to(dtype)


def _cast_input(module: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...] | None:
    if not inputs or not isinstance(inputs[0], torch.Tensor) or not inputs[0].is_floating_point():
        return None
    x = inputs[0]
    dtype = _read_dtype(module, x.dtype)
    if x.dtype == dtype or (torch.is_autocast_enabled(x.device.type) and not _refuses(module, x)):
        return None
    return (x.to(dtype), *inputs[1:])


def _refuses(module: nn.Module, x: torch.Tensor) -> bool:
    """Whether a layer under autocast refuses its input: 16-bit norms on a CPU do, which torch 2.13 does not cast."""
    own = [p for p in module._parameters.values() if p is not None]
    return x.device.type == "cpu" and all(p.dim() == 1 and p.dtype in _HALF for p in own)


def _read_dtype(module: nn.Module, default: torch.dtype) -> torch.dtype:
    """Return the dtype of a layer's tensors, or ``default``: PEFT 0.21.2 removes experts' parameters during a pass."""
    own = (p.dtype for p in module._parameters.values() if p is not None and p.is_floating_point())
    return next(own, default)

"""Merge adapters into quantized experts, and take them out again."""

from __future__ import annotations

from typing import Any

import torch
from peft.tuners.tuners_utils import check_adapters_to_merge
from torch import nn

from lora_plugins.errors import MergeError
from lora_plugins.quantization.lora_layer import check_mergeable
from lora_plugins.quantization.stacks import QuantizedStack

__all__ = ["merge", "unmerge"]


# Bound to PEFT's wrappers, whose class PEFT recognizes by its name; a bound method is pickled by the name of the method
# that it replaces.
def merge(layer: Any, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
    """Add adapters to the quantized experts under a ``ParamWrapper``, one expert at a time.

    Args:
        layer: The wrapper of a quantized stack.
        safe_merge: Whether to refuse a sum that is not finite.
        adapter_names: Adapters to merge; the active ones by default.

    Raises:
        MergeError: The backend has less than 8 bits, or the sum is not finite.
    """
    names = [name for name in check_adapters_to_merge(layer, adapter_names) if name in layer.lora_A]
    stack = layer.get_param()
    if not names:
        return
    check_mergeable(stack.quantization)
    experts = []
    with torch.no_grad():
        for number in range(len(stack.experts)):
            total = stack.read_expert(number).float()
            for name in names:
                total = total + _compute_delta(layer, name, number)
            if safe_merge and not bool(total.isfinite().all()):
                raise MergeError(
                    f"The merged weight is not finite: the adapter {' or '.join(names)} seems to be broken."
                )
            experts.append(stack.form.pack(total.to(stack.dtype)))
    if not layer.merged:
        layer.unmerged_stack = [stack]
    _set_stack(layer, stack.copy_with(experts))
    layer.merged_adapters.extend(names)


def unmerge(layer: Any) -> None:
    """Put back the quantized experts from before the merge, bit by bit."""
    if layer.merged:
        _set_stack(layer, layer.unmerged_stack.pop())
        layer.merged_adapters.clear()


def _set_stack(layer: Any, stack: QuantizedStack) -> None:
    layer.get_base_layer()._parameters[layer.parameter_name] = nn.Parameter(stack, requires_grad=False)


def _compute_delta(layer: Any, name: str, expert: int) -> torch.Tensor:
    """Return the change of one expert's weight, shape ``[out, in]``."""
    a, b = layer.lora_A[name].weight, layer.lora_B[name].weight
    a = a.reshape(layer.num_experts, -1, a.shape[-1])[expert]
    b = b.reshape(b.shape[0], -1, layer.num_experts)[..., expert]
    delta: torch.Tensor = (b.float() @ a.float()) * layer.scaling[name]
    return delta

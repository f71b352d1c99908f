"""Restore tensors of an adapter that PEFT loses on loading."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from peft import PeftModel

__all__ = ["lora_tensors", "put_back"]


def lora_tensors(model: PeftModel, adapter_name: str) -> Iterator[tuple[str, torch.nn.Parameter]]:
    """Yield the LoRA parameters of an adapter under the names that its file has."""
    for name, parameter in model.named_parameters():
        before, dot, after = name.rpartition(f".{adapter_name}")
        if dot and "lora_" in before and after in ("", ".weight", ".bias"):
            # PEFT writes the magnitudes of DoRA without the name of their parameter.
            yield before if before.endswith("lora_magnitude_vector") else before + after, parameter


def put_back(model: PeftModel, stored: Mapping[str, torch.Tensor], adapter_name: str) -> int:
    """Restore the LoRA tensors of an adapter from its file where PEFT did not load them.

    PEFT renames the tensors of an adapter as transformers renames those of old checkpoints of the base. For some types
    the patterns match the new names as well; PEFT then warns of missing keys and leaves the adapter without effect.

    Args:
        model: A wrapped model that has the adapter.
        stored: What the file holds.
        adapter_name: Which of the model's adapters.

    Returns:
        How many tensors PEFT had lost.
    """
    count = 0
    with torch.no_grad():
        for name, parameter in lora_tensors(model, adapter_name):
            value = stored.get(name)
            if value is None or value.shape != parameter.shape:
                continue
            value = value.to(parameter.device, parameter.dtype)
            if not torch.equal(value, parameter):
                parameter.copy_(value)
                count += 1
    return count

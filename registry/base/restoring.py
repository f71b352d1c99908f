"""Restore adapter tensors that PEFT drops on loading."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from peft import PeftModel

__all__ = ["lora_tensors", "put_back"]


def lora_tensors(model: PeftModel, adapter_name: str) -> Iterator[tuple[str, torch.nn.Parameter]]:
    """Yield the LoRA parameters of an adapter under their names in its file."""
    for name, parameter in model.named_parameters():
        before, dot, after = name.rpartition(f".{adapter_name}")
        if dot and "lora_" in before and after in ("", ".weight", ".bias"):
            # PEFT 0.21.2 saves DoRA magnitudes without the name of their parameter.
            yield before if before.endswith("lora_magnitude_vector") else before + after, parameter


def put_back(model: PeftModel, stored: Mapping[str, torch.Tensor], adapter_name: str) -> int:
    """Restore the LoRA tensors of an adapter that PEFT did not load from its file.

    PEFT renames an adapter's tensors with the patterns that transformers applies to old checkpoints of the base. For
    some model types the patterns also match current names; PEFT 0.21.2 then warns of missing keys and leaves the
    adapter without effect. https://github.com/huggingface/peft/pull/3262 describes such a type.

    Args:
        model: A wrapped model that has the adapter.
        stored: The tensors in the file.
        adapter_name: Name of the adapter in the model.

    Returns:
        How many tensors were restored.
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

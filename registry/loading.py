"""Tensors of a release that PEFT loses while it loads them, put back by their names."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from registry.paths import ADAPTER_WEIGHTS

if TYPE_CHECKING:
    from peft import PeftModel

__all__ = ["put_back"]


def put_back(model: PeftModel, folder: str, adapter_name: str) -> int:
    """Give the LoRA tensors of a model the values of the release, where PEFT has not.

    PEFT renames the tensors of an adapter as transformers renames those of old checkpoints of the base. For some types
    the patterns match the new names as well; PEFT then warns of missing keys and leaves the adapter without effect.

    Args:
        model: The model that has just got the adapter.
        folder: The folder of the release.
        adapter_name: What the adapter is called in the model.

    Returns:
        How many tensors were lost.
    """
    import torch
    from safetensors.torch import load_file

    stored = load_file(str(Path(folder, ADAPTER_WEIGHTS)), device="cpu")
    count = 0
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            before, dot, after = name.rpartition(f".{adapter_name}")
            # PEFT writes the magnitudes of DoRA without the name of their parameter.
            value = stored.get(before + after, stored.get(before))
            if not dot or "lora_" not in before or value is None or value.shape != parameter.shape:
                continue
            value = value.to(parameter.device, parameter.dtype)
            if not torch.equal(value, parameter):
                parameter.copy_(value)
                count += 1
    return count

"""Detect adapters whose tensors PEFT would not find in their own file."""

from __future__ import annotations

import warnings

import torch
from peft import PeftModel

from lora_plugins.errors import PreparationWarning, UnloadableAdapter
from registry import lora_tensors

__all__ = ["check_loadable", "renamed_on_loading"]


def check_loadable(model: PeftModel, adapter_name: str, *, strict: bool) -> str | None:
    """Check before the training whether PEFT will find an adapter's tensors in its file.

    PEFT 0.21.2 renames them as transformers 5.23 renames the tensors of old base checkpoints. For some model types the
    patterns also match current names; PEFT then looks for names that do not exist, warns of missing keys, and leaves
    the adapter at zero.

    Args:
        model: The wrapped model.
        adapter_name: Name of the adapter.
        strict: Whether a lost tensor is an error; otherwise it is a warning.

    Returns:
        A sentence for the report if a tensor would be lost, else ``None``.

    Raises:
        UnloadableAdapter: PEFT would lose at least one tensor, and ``strict`` is set.
    """
    tensors = dict(lora_tensors(model, adapter_name))
    lost = renamed_on_loading(model, adapter_name)
    if not lost:
        return None
    name, other = next(iter(lost.items()))
    text = (
        f"PEFT would not find {len(lost)} of the {len(tensors)} tensors of this adapter in its own file: it renames "
        f"them as transformers renames those of old checkpoints of {model.config.model_type!r} models (first {name}, "
        f"for which it looks under {other})"
    )
    if strict:
        raise UnloadableAdapter(
            f"{text}. PeftModel.from_pretrained would give the base model with a warning about missing keys. Choose "
            "target_modules outside of it, or another release of PEFT and transformers; with strict=False it is "
            "trained all the same, and prepare_model(…, adapter=…, strict=False), merging and the registry's load() "
            "put the tensors back by name."
        )
    warnings.warn(text + ".", PreparationWarning, stacklevel=2)
    return text


def renamed_on_loading(model: PeftModel, adapter_name: str) -> dict[str, str]:
    """Return the tensors that PEFT looks for under another name: name in the file -> name that PEFT looks for."""
    try:
        from peft.utils.transformers_weight_conversion import convert_peft_adapter_state_dict_for_transformers
    except ImportError:
        # A private module of PEFT (seen in 0.19 to 0.21.2); a release without it renames nothing.
        return {}
    state = {
        name: torch.empty(getattr(parameter, "ds_shape", parameter.shape), device="meta")
        for name, parameter in lora_tensors(model, adapter_name)
    }
    config = model.peft_config[adapter_name]

    def loaded(part: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        converted: dict[str, torch.Tensor] = convert_peft_adapter_state_dict_for_transformers(
            model, config, part, adapter_name
        )
        return converted

    found = loaded(dict(state))
    lost = [name for name in state if name not in found]
    return {name: next(iter(loaded({name: state[name]})), "nothing") for name in lost}

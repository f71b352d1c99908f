"""Compare checkpoints with the model, and restore the best one."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, PeftType
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn
from transformers import Trainer

from lora_plugins.adapters import files as adapters
from lora_plugins.adapters.saving import find_plain_state
from lora_plugins.errors import AdapterMismatch, BrokenCheckpoint
from lora_plugins.models.sharding import gather_state, is_part, is_sharded

__all__ = [
    "check_checkpoint",
    "is_loadable",
    "load_adapters",
    "restore_best",
]


def is_loadable(trainer: Trainer) -> bool:
    """Whether the adapters of a Trainer's model can be loaded here: LoRA in whole tensors, outside any engine."""
    model = trainer.model
    if not isinstance(model, PeftModel) or trainer.is_deepspeed_enabled or trainer.is_fsdp_enabled:
        return False
    return not _is_spread(model) and all(_is_lora(config) for config in model.peft_config.values())


def _is_lora(config: Any) -> bool:
    return bool(config.peft_type == PeftType.LORA)


def _is_spread(model: nn.Module) -> bool:
    return any(is_part(parameter) for parameter in model.parameters() if parameter.requires_grad)


def check_checkpoint(model: Any, folder: Path, *, read: bool = True) -> None:
    """Raise `BrokenCheckpoint` unless a checkpoint holds every adapter as it is in the model.

    Args:
        model: The model; if it is sharded, every process must call. Models without PEFT adapters, and adapters that
            are prompts, are skipped.
        folder: The checkpoint's folder.
        read: Whether this process compares; the others only contribute their shards.
    """
    if not isinstance(model, PeftModel):
        return
    state = gather_state(model) if is_sharded(model) else None
    if not read:
        return
    for name, config in model.peft_config.items():
        if not config.is_prompt_learning:
            live = find_plain_state(model, name, folder, adapters.adapter_state(model, name, state))
            _check_file(_find_file(folder, name), folder, live)


def _check_file(file: Path, folder: Path, live: Mapping[str, torch.Tensor]) -> None:
    stored = _read_adapter(file, live, f"The adapter in the checkpoint {folder} cannot be used")
    wrong = adapters.differing_tensors(stored, live)
    if wrong:
        raise BrokenCheckpoint(f"{len(wrong)} tensors in {file} are not what the model holds, first {wrong[0]}.")
    infinite = [key for key, tensor in stored.items() if not bool(tensor.isfinite().all())]
    if infinite:
        raise BrokenCheckpoint(f"{len(infinite)} tensors in {file} are not finite, first {infinite[0]}.")


def restore_best(model: Any, folder: Path) -> None:
    """Load every adapter of the best checkpoint into the model, byte for byte.

    Sharded adapters have already been loaded by the engine, and are compared with the files. Every process must call.

    Raises:
        BrokenCheckpoint: The checkpoint has no usable adapter, or the model does not hold it.
    """
    if not _is_spread(model):
        load_adapters(model, folder, f"The best checkpoint {folder} cannot be restored")
        return
    for name in model.peft_config:
        live = adapters.adapter_state(model, name)
        stored = _read_adapter(_find_file(folder, name), live, f"The best checkpoint {folder} cannot be restored")
        wrong = adapters.differing_tensors(stored, live)
        if wrong:
            raise BrokenCheckpoint(
                f"The best checkpoint {folder} was loaded and {len(wrong)} tensors of the adapter {name!r} are not "
                f"those in its file, first {wrong[0]}."
            )


def load_adapters(model: PeftModel, folder: Path, problem: str) -> None:
    """Load every adapter of a model from a checkpoint; which ones are active and trained stays as it is.

    Args:
        model: A wrapped model with whole tensors.
        folder: The checkpoint.
        problem: The beginning of an error's message.

    Raises:
        BrokenCheckpoint: A file is missing, does not fit, or the model does not hold its values afterwards.
    """
    for name, config in model.peft_config.items():
        if config.is_prompt_learning:
            continue
        file = _find_file(folder, name)
        try:
            adapters.load_weights(model, file, name)
        except (AdapterMismatch, SafetensorError) as error:
            raise BrokenCheckpoint(f"{problem}: {error}") from error


def _find_file(folder: Path, name: str) -> Path:
    file = adapters.find_adapter_file(folder, name)
    if file is None:
        raise BrokenCheckpoint(f"The checkpoint {folder} has no {adapters.ADAPTER_FILE} of the adapter {name!r}.")
    return file


def _read_adapter(file: Path, live: Mapping[str, torch.Tensor], problem: str) -> dict[str, torch.Tensor]:
    """Read an adapter's file. Its tensors must have the names and shapes of the live ones."""
    try:
        stored: dict[str, torch.Tensor] = load_file(str(file), device="cpu")
        adapters.check_same_tensors(
            {k: tuple(v.shape) for k, v in stored.items()}, {k: tuple(v.shape) for k, v in live.items()}, file
        )
    except (SafetensorError, AdapterMismatch) as error:
        raise BrokenCheckpoint(f"{problem}: {error}") from error
    return stored

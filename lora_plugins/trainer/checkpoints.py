"""What a checkpoint must hold, and putting the best one back: adapters compared with their files, byte by byte."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from lora_plugins.adapters import files as adapters
from lora_plugins.errors import AdapterMismatch, BrokenCheckpoint
from lora_plugins.models.sharding import gathered_state, is_part, is_sharded

__all__ = ["check_checkpoint", "restore_best"]


def check_checkpoint(model: Any, folder: Path, *, read: bool = True) -> None:
    """Raise `BrokenCheckpoint` unless a checkpoint holds the adapter as it is in the model.

    Args:
        model: The wrapped model. Where it is spread over processes, each of them must call.
        folder: The checkpoint's folder.
        read: Whether this process compares; the others only give their parts.
    """
    state = gathered_state(model) if is_sharded(model) else None
    if not read:
        return
    name = model.active_adapters[0]
    file = _file_of(folder, name)
    live = adapters.adapter_state(model, name, state)
    stored = _stored(file, live, f"The adapter in the checkpoint {folder} can't be used")
    wrong = adapters.differing_tensors(stored, live)
    if wrong:
        raise BrokenCheckpoint(f"{len(wrong)} tensors in {file} are not what the model holds, first {wrong[0]}.")
    infinite = [key for key, tensor in stored.items() if not bool(tensor.isfinite().all())]
    if infinite:
        raise BrokenCheckpoint(f"{len(infinite)} tensors in {file} are not finite, first {infinite[0]}.")


def restore_best(model: Any, folder: Path) -> None:
    """Put the best checkpoint's adapter into the model, whatever its name, equal to its file to the byte.

    The Trainer itself finds only an adapter called "default"; for any other name it keeps the last step's
    weights and still reports the best checkpoint. Where adapters are spread over processes, the engine has
    put them back, and here they are compared. Each process must call.

    Raises:
        BrokenCheckpoint: The checkpoint has no usable adapter, or the model does not hold it.
    """
    name = model.active_adapters[0]
    spread = any(is_part(parameter) for parameter in model.parameters() if parameter.requires_grad)
    live = adapters.adapter_state(model, name) if spread else {}
    file = _file_of(folder, name)
    if not spread:
        try:
            adapters.load_weights(model, file, name)
        except AdapterMismatch as error:
            raise BrokenCheckpoint(f"The best checkpoint {folder} can't be restored: {error}") from error
        return
    wrong = adapters.differing_tensors(_stored(file, live, f"The best checkpoint {folder} can't be restored"), live)
    if wrong:
        raise BrokenCheckpoint(
            f"The best checkpoint {folder} was loaded and {len(wrong)} tensors of the adapter are not those in its "
            f"file, first {wrong[0]}."
        )


def _file_of(folder: Path, name: str) -> Path:
    file = adapters.find_adapter_file(folder, name)
    if file is None:
        raise BrokenCheckpoint(f"The checkpoint {folder} has no {adapters.ADAPTER_FILE} of the adapter {name!r}.")
    return file


def _stored(file: Path, live: Mapping[str, torch.Tensor], problem: str) -> dict[str, torch.Tensor]:
    """Read an adapter's file whose tensors must have the names and shapes of the live ones."""
    try:
        stored: dict[str, torch.Tensor] = load_file(str(file), device="cpu")
        adapters.check_same_tensors(
            {k: tuple(v.shape) for k, v in stored.items()}, {k: tuple(v.shape) for k, v in live.items()}, file
        )
    except (SafetensorError, AdapterMismatch) as error:
        raise BrokenCheckpoint(f"{problem}: {error}") from error
    return stored

"""Gather and write adapters whose parameters are sharded."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

__all__ = ["gather", "gather_state", "is_adapter_tensor", "is_part", "is_sharded", "read_part", "write_adapters"]


#: Substrings that mark the name of an adapter's parameter in PEFT.
_MARKERS = (".lora_", ".modules_to_save.", ".trainable_tokens_")


def is_adapter_tensor(name: str) -> bool:
    """Whether a name is that of an adapter's parameter in PEFT."""
    return any(marker in name for marker in _MARKERS)


def is_sharded(model: nn.Module) -> bool:
    """Whether FSDP2 or ZeRO-3 has sharded parameters of the model."""
    return any(is_part(parameter) for parameter in model.parameters())


def is_part(parameter: Any) -> bool:
    """Whether a parameter is sharded over processes, so that this one holds only a part of it."""
    return hasattr(parameter, "ds_id") or hasattr(parameter, "to_local")


def read_part(tensor: Any) -> torch.Tensor:
    """Return what this process holds of a tensor: its part of a sharded one, else the tensor itself."""
    if hasattr(tensor, "ds_tensor"):
        part: torch.Tensor = tensor.ds_tensor
        return part
    local: torch.Tensor = tensor.to_local() if hasattr(tensor, "to_local") else tensor
    return local


@contextlib.contextmanager
def gather(parameters: Iterable[Any]) -> Iterator[None]:
    """Gather the parameters that ZeRO-3 has partitioned while the context is open.

    Every process must enter it, with the same parameters in the same order.
    """
    partitioned = [parameter for parameter in parameters if hasattr(parameter, "ds_id")]
    if not partitioned:
        yield
        return
    import deepspeed

    with deepspeed.zero.GatheredParameters(partitioned):
        yield


def gather_state(model: nn.Module) -> dict[str, torch.Tensor]:
    """Return full copies on the CPU of every tensor that an adapter file may hold, by name in the model.

    These are all trained parameters and the parameters of frozen adapters. Every process must call it, and
    each gets all tensors.
    """
    own = [(name, p) for name, p in model.named_parameters() if p.requires_grad or is_adapter_tensor(name)]
    with gather(parameter for _, parameter in own):
        return {name: _take_full(parameter).detach().to("cpu", copy=True) for name, parameter in own}


def write_adapters(model: Any, folder: Path, *, write: bool) -> None:
    """Write the adapters of a sharded model, as ``save_pretrained`` does.

    Args:
        model: The wrapped model.
        folder: Output folder.
        write: Whether this process writes the files; every process must call.
    """
    state = gather_state(model)
    if write:
        model.save_pretrained(str(folder), state_dict=state, save_embedding_layers=False)


def _take_full(parameter: Any) -> torch.Tensor:
    tensor: torch.Tensor = parameter.full_tensor() if hasattr(parameter, "full_tensor") else parameter
    return tensor

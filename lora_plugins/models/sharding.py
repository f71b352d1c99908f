"""Gather and write adapters whose parameters are sharded."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

__all__ = ["gather", "gather_state", "is_adapter_tensor", "is_part", "is_sharded", "write_adapters"]


#: Parts of the names that PEFT gives to an adapter's parameters.
_MARKERS = (".lora_", ".modules_to_save.", ".trainable_tokens_")


def is_adapter_tensor(name: str) -> bool:
    """Whether a parameter's name is one that PEFT gives to an adapter's."""
    return any(marker in name for marker in _MARKERS)


def is_sharded(model: nn.Module) -> bool:
    """Whether FSDP2 or ZeRO-3 has spread parameters of the model over the processes."""
    return any(is_part(parameter) for parameter in model.parameters())


def is_part(parameter: Any) -> bool:
    """Whether a parameter is spread over processes, so that its data here is a part of it."""
    return hasattr(parameter, "ds_id") or hasattr(parameter, "to_local")


@contextlib.contextmanager
def gather(parameters: Iterable[Any]) -> Iterator[None]:
    """Gather parameters that ZeRO-3 has partitioned, for as long as the context is open.

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
    """Return whole copies on the CPU of everything in a model that an adapter file may hold.

    Those are the trained parameters and those of adapters that are not trained, under their names in the
    model. Every process must call it, and each gets all of it.
    """
    own = [(name, p) for name, p in model.named_parameters() if p.requires_grad or is_adapter_tensor(name)]
    with gather(parameter for _, parameter in own):
        return {name: _take_full(parameter).detach().to("cpu", copy=True) for name, parameter in own}


def write_adapters(model: Any, folder: Path, *, write: bool) -> None:
    """Write the adapters of a model that is spread over processes, as ``save_pretrained`` does.

    Args:
        model: The wrapped model.
        folder: Where to.
        write: Whether this process writes; every process must call.
    """
    state = gather_state(model)
    if write:
        model.save_pretrained(str(folder), state_dict=state, save_embedding_layers=False)


def _take_full(parameter: Any) -> torch.Tensor:
    tensor: torch.Tensor = parameter.full_tensor() if hasattr(parameter, "full_tensor") else parameter
    return tensor

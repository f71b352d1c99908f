"""Parse, show and compare amounts of memory."""

from __future__ import annotations

import re
from dataclasses import dataclass

import psutil
import torch

from lora_plugins.errors import PlanError

__all__ = ["USABLE", "Memory", "available_memory", "fits", "parse_memory", "present_memory", "show_bytes"]


_UNITS = {"": 1, "b": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "tb": 10**12}
_UNITS |= {"k": 2**10, "m": 2**20, "g": 2**30, "t": 2**40}
_UNITS |= {"kib": 2**10, "mib": 2**20, "gib": 2**30, "tib": 2**40}


#: Share of a device's memory that tensors can fill: kernels, their workspace and fragmentation take the rest.
USABLE = 0.9


def parse_memory(text: str | int) -> int:
    """Parse an amount of memory such as ``"24GiB"``, ``"80 GB"`` or ``"16g"`` into bytes.

    Raises:
        PlanError: The text is not an amount of memory.
    """
    if isinstance(text, int):
        return text
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-zA-Z]*)\s*", text)
    if found is None or found[2].lower() not in _UNITS:
        raise PlanError(f"{text!r} is not an amount of memory; write 24GiB, 80GB or a number of bytes.")
    return int(float(found[1]) * _UNITS[found[2].lower()])


def show_bytes(size: float) -> str:
    """Return an amount in a readable unit: ``"13.18 GiB"``."""
    for unit in ("B", "KiB", "MiB"):
        if abs(size) < 1024:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.2f} GiB"


def present_memory() -> int | None:
    """Return the bytes of the current GPU, ``None`` without a GPU."""
    return int(torch.cuda.mem_get_info()[1]) if torch.cuda.is_available() else None


def available_memory(processes: int = 1) -> int:
    """Return the bytes of the current GPU; without one, this process's part of the main memory that is available.

    Args:
        processes: How many processes share the main memory.
    """
    return present_memory() or psutil.virtual_memory().available // processes


@dataclass(frozen=True)
class Memory:
    """Bytes on one device during a training step.

    Attributes:
        weights: Base, adapters and buffers, with the scales of quantized layers.
        gradients: Gradients of all trained tensors, counted for the whole step.
        optimizer: State of the optimizer after its first step.
        activations: Peak of everything else: tensors kept for the backward pass, logits, workspace.
        communication: Extra for several devices: gathered weights, buckets of gradients.
    """

    weights: int
    gradients: int
    optimizer: int
    activations: int
    communication: int = 0

    @property
    def total(self) -> int:
        """Sum of all parts."""
        return self.weights + self.gradients + self.optimizer + self.activations + self.communication


def fits(memory: Memory, limit: int | None) -> bool | None:
    """Whether the tensors fit on a device, ``None`` when its memory is unknown."""
    return None if limit is None else memory.total <= USABLE * limit

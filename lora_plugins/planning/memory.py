"""Amounts of memory: read, written, asked of the machine; and how several devices share them."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass

from lora_plugins.errors import PlanError
from lora_plugins.planning.records import Memory

_UNITS = {"": 1, "b": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "tb": 10**12}
_UNITS |= {"k": 2**10, "m": 2**20, "g": 2**30, "t": 2**40}
_UNITS |= {"kib": 2**10, "mib": 2**20, "gib": 2**30, "tib": 2**40}

#: Share of a device's memory that tensors can fill: kernels, their work space and fragmentation take the rest.
USABLE = 0.9


def parse_memory(text: str | int) -> int:
    """Return the bytes that a text such as ``"24GiB"``, ``"80 GB"`` or ``"16g"`` names.

    Raises:
        PlanError: It names none.
    """
    if isinstance(text, int):
        return text
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-zA-Z]*)\s*", text)
    if found is None or found[2].lower() not in _UNITS:
        raise PlanError(f"{text!r} is no amount of memory; write 24GiB, 80GB or a number of bytes.")
    return int(float(found[1]) * _UNITS[found[2].lower()])


def show_bytes(size: float) -> str:
    """Return an amount in the unit that leaves it readable: ``"13.18 GiB"``."""
    for unit in ("B", "KiB", "MiB"):
        if abs(size) < 1024:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.2f} GiB"


def present_memory() -> int | None:
    """Return the bytes of the GPU that is there, ``None`` when there is none."""
    import torch

    return int(torch.cuda.mem_get_info()[1]) if torch.cuda.is_available() else None


def fits(memory: Memory, limit: int | None) -> bool | None:
    """Whether tensors fit a device, ``None`` when its memory is unknown."""
    return None if limit is None else memory.total <= USABLE * limit


@dataclass(frozen=True)
class Parts:
    """What is divided among devices; bytes.

    Attributes:
        memory: What one device alone would hold.
        shardable: Of its weights, those in float parameters: quantized layers and buffers stay whole.
        block: Float weights of the largest block.
        outside: Float weights outside of blocks: embeddings, heads.
    """

    memory: Memory
    shardable: int
    block: int
    outside: int


def _whole(parts: Parts, devices: int) -> Memory:
    return parts.memory


def _replicated(parts: Parts, devices: int) -> Memory:
    """DDP: everything on every device, and the buckets through which gradients are averaged."""
    m = parts.memory
    return Memory(m.weights, m.gradients, m.optimizer, m.activations, m.gradients if devices > 1 else 0)


def _zero2(parts: Parts, devices: int) -> Memory:
    """ZeRO-2: gradients and optimizer state divided; gradients pass through a bucket on their way."""
    m = parts.memory
    communication = m.gradients if devices > 1 else 0
    return Memory(m.weights, -(-m.gradients // devices), -(-m.optimizer // devices), m.activations, communication)


def _sharded(parts: Parts, devices: int) -> Memory:
    """FSDP: float weights divided too; the blocks at work, this one and the next, and what is outside are whole."""
    m = parts.memory
    weights = m.weights - parts.shardable + -(-parts.shardable // devices)
    gathered = min(parts.shardable, 2 * parts.block + parts.outside) if devices > 1 else 0
    return Memory(weights, -(-m.gradients // devices), -(-m.optimizer // devices), m.activations, gathered)


def _zero3(parts: Parts, devices: int) -> Memory:
    """ZeRO-3: as FSDP, but weights outside of blocks are given back after use."""
    m = _sharded(parts, devices)
    gathered = min(parts.shardable, max(2 * parts.block, parts.outside)) if devices > 1 else 0
    return Memory(m.weights, m.gradients, m.optimizer, m.activations, gathered)


#: How devices share the work -> what each of them holds.
STRATEGIES: dict[str, Callable[[Parts, int], Memory]] = {
    "single": _whole,
    "ddp": _replicated,
    "zero2": _zero2,
    "zero3": _zero3,
    "fsdp": _sharded,
}


def per_device(parts: Parts, strategy: str, devices: int) -> Memory:
    """Return what each of several devices holds.

    Args:
        parts: What there is to divide.
        strategy: A key of `STRATEGIES`.
        devices: How many.

    Raises:
        PlanError: The strategy is unknown, or the number makes no sense.
    """
    if strategy not in STRATEGIES:
        raise PlanError(f"There is no strategy {strategy!r}. Known: {', '.join(STRATEGIES)}.")
    if devices < 1 or (strategy == "single" and devices != 1):
        raise PlanError(f"devices={devices} makes no sense with the strategy {strategy!r}.")
    return STRATEGIES[strategy](parts, devices)

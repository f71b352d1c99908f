"""Draw seeded random numbers without advancing the caller's generators."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import nn

__all__ = ["seeded"]


@contextlib.contextmanager
def seeded(model: nn.Module, seed: int) -> Iterator[None]:
    """Fork the random generators of the CPU and of the model's devices, and seed the fork."""
    devices = {p.device for p in model.parameters() if p.device.type not in ("cpu", "meta")}
    kinds = {device.type for device in devices}
    indices = sorted({device.index or 0 for device in devices})
    kind = kinds.pop() if len(kinds) == 1 else "cuda"
    with torch.random.fork_rng(devices=indices, device_type=kind):
        torch.manual_seed(seed)
        yield

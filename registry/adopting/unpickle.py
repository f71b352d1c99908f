"""Convert a pickle of tensors to safetensors, as its own process.

``torch.load`` with ``weights_only=True`` builds tensors and plain containers only. Limits on memory, processor time and
the size of what is written are set before the file is opened.
"""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Mapping
from typing import Any

import torch
from safetensors.torch import save_file

with contextlib.suppress(ImportError):  # Windows has no such limits; the caller's time limit holds
    import resource

__all__ = ["main"]

#: Keys under which trainers wrap a state dict.
_WRAPPERS = ("state_dict", "model_state_dict", "model", "module")
_ROOM = 1024**3


def main(source: str, target: str) -> str:
    """Convert one file.

    Returns:
        What is wrong with it; empty if it was converted.
    """
    size = os.path.getsize(source)
    _limit(size)
    try:
        state = torch.load(source, map_location="cpu", weights_only=True)
    except MemoryError:
        return f"it needs more memory than a file of {size:,} bytes may"
    except Exception as error:
        return f"torch.load(weights_only=True) refuses it: {type(error).__name__}: {str(error)[:300]}"
    state = _unwrap(state)
    wrong = _find_wrong(state, size)
    if wrong:
        return wrong
    save_file({name: tensor.detach().contiguous().clone() for name, tensor in state.items()}, target, {"format": "pt"})
    return ""


def _limit(size: int) -> None:
    if "resource" not in sys.modules:
        return
    used = 0
    if os.path.exists("/proc/self/statm"):
        with open("/proc/self/statm", "rb") as file:
            used = int(file.read().split()[0]) * resource.getpagesize()
    limits = {"RLIMIT_CPU": 60 + size // 10_000_000, "RLIMIT_FSIZE": 2 * size + _ROOM // 64, "RLIMIT_CORE": 0}
    if used:
        limits["RLIMIT_AS"] = used + 6 * size + _ROOM
    for name, limit in limits.items():
        _, hard = resource.getrlimit(getattr(resource, name))
        most = limit if hard == resource.RLIM_INFINITY else min(limit, hard)
        resource.setrlimit(getattr(resource, name), (most, most))


def _unwrap(state: Any) -> Any:
    for key in _WRAPPERS:
        if isinstance(state, Mapping) and isinstance(state.get(key), Mapping):
            return state[key]
    return state


def _find_wrong(state: Any, size: int) -> str:
    if not isinstance(state, Mapping) or not state:
        return f"it holds a {type(state).__name__}, not tensors by name"
    for name, tensor in state.items():
        if not isinstance(name, str) or not isinstance(tensor, torch.Tensor) or tensor.layout != torch.strided:
            return f"{str(name)[:100]!r} is a {type(tensor).__name__}, not a dense tensor"
    total = sum(tensor.numel() * tensor.element_size() for tensor in state.values())
    # An expanded tensor of a few bytes can claim any size.
    return f"its tensors take {total:,} bytes, and the file has {size:,}" if total > 4 * size else ""


if __name__ == "__main__":
    reason = main(*sys.argv[1:3])
    sys.stdout.write(reason)
    sys.exit(2 if reason else 0)

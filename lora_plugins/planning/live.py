"""Bytes of tensors that are alive while operations run, on any device; on the meta device what they would take."""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode


class LiveBytes(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts tensor storages as they come and go while the mode is active, each storage once.

    On the meta device a value that Python code asks for is answered with "true" or one: that is how a
    batch without padding answers, and a tensor without data has no other answer.

    Args:
        *existing: Tensors that are there from the start.

    Attributes:
        live: Bytes now.
        peak: Most bytes so far.
    """

    def __init__(self, *existing: torch.Tensor) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.live = 0
        self.peak = 0
        self._sizes: dict[int, int] = {}
        for tensor in existing:
            self.add(tensor)

    def add(self, tensor: torch.Tensor) -> None:
        """Count a tensor's storage from now until it is freed, unless it is counted already."""
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._sizes:
            return
        size = self._sizes[key] = storage.nbytes()
        self.live += size
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self._gone, key)

    def forget(self, tensor: torch.Tensor) -> None:
        """Take a tensor's storage out of the count, or leave it out from the start."""
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._sizes:
            self.live -= self._sizes[key]
        else:
            weakref.finalize(storage, self._gone, key)
        self._sizes[key] = 0

    def _gone(self, key: int) -> None:
        self.live -= self._sizes.pop(key, 0)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default and args[0].is_meta:
            return True if args[0].dtype == torch.bool else 1
        if func is torch.ops.aten.nonzero.default and args[0].is_meta:
            # Every label counts and every flag is set.
            full = torch.empty(args[0].numel(), args[0].dim(), dtype=torch.long, device="meta")
            self.add(full)
            return full
        grouped = func is torch.ops.aten._grouped_mm.default and args[0].is_meta
        output: Any = (_grouped_mm if grouped else func)(*args, **(kwargs or {}))
        if isinstance(output, torch.Tensor):
            self.add(output)
        elif isinstance(output, (tuple, list)):
            for item in output:
                if isinstance(item, torch.Tensor):
                    self.add(item)
        return output


def _grouped_mm(first: torch.Tensor, second: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
    """Products of experts, which on the meta device are known for bfloat16 only."""
    half = torch.ops.aten._grouped_mm.default(first.to(torch.bfloat16), second.to(torch.bfloat16), *args, **kwargs)
    output: torch.Tensor = half.to(first.dtype)
    return output

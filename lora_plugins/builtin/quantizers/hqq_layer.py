"""HQQ's linear layer, under any activations."""

from __future__ import annotations

import torch
from hqq.core.quantize import HQQBackend
from hqq.core.quantize import HQQLinear as Original

from lora_plugins import CastsInput

__all__ = ["HQQLinear"]


class HQQLinear(CastsInput, Original):  # type: ignore[misc]
    """``hqq.core.quantize.HQQLinear``, which multiplies in its ``compute_dtype``.

    It keeps the name, because PEFT 0.21.2 recognises these layers by it.
    """

    @classmethod
    def set_backend(cls, backend: HQQBackend) -> None:
        # hqq 0.2.8 calls this in the constructor; it sets `forward` on the class that it is called for.
        Original.set_backend(backend)

    def computes_in(self) -> torch.dtype:
        return self.compute_dtype

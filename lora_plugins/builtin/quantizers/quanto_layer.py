"""optimum-quanto's linear layer, under any activations."""

from __future__ import annotations

from typing import Any

from optimum.quanto import QLinear

from lora_plugins import CastsInput

__all__ = ["QuantoLinear"]


class QuantoLinear(CastsInput, QLinear):  # type: ignore[misc]
    """``optimum.quanto.QLinear``, which multiplies in the dtype of its scales."""

    @classmethod
    def around(cls, layer: Any) -> QuantoLinear:
        """Return a layer that shares all attributes with a ``QLinear``, whose class Python does not let us change."""
        made: QuantoLinear = cls.__new__(cls)
        made.__dict__ = layer.__dict__
        return made

"""bitsandbytes' int8 layer, with a scale that survives being dequantized on a CPU."""

from __future__ import annotations

import bitsandbytes as bnb


class Int8Linear(bnb.nn.Linear8bitLt):  # type: ignore[misc]
    """``Linear8bitLt`` that keeps its scale.

    PEFT reads the weight of a layer on the CPU (DoRA does in every forward pass) and puts it back with
    ``weight.to("cpu")``. That makes a parameter with a fresh ``CB`` and without scale, from which
    bitsandbytes would take over the missing scale, and the next forward pass fails.
    """

    def init_8bit_state(self) -> None:
        if self.weight.SCB is None and self.state.SCB is not None:
            self.weight.SCB = self.state.SCB
        super().init_8bit_state()

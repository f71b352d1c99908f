"""Register the architectures that the tables beside this file list.

Query and value projections are the default where the LoRA paper and PEFT use them; a model with one fused
projection adapts that one; hybrid models adapt the projections of every kind of mixer that may be adapted.
"""

from __future__ import annotations

from lora_plugins import Architecture, hookimpl
from lora_plugins.builtin.architectures import decoders, encoders, multimodal, perception


@hookimpl
def register_architectures() -> list[Architecture]:
    return [
        *decoders.ARCHITECTURES,
        *encoders.ARCHITECTURES,
        *multimodal.ARCHITECTURES,
        *perception.ARCHITECTURES,
    ]

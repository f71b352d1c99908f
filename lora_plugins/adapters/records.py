"""The record of a preparation, stored on the prepared model."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from lora_plugins.quantization.counting import TensorBytes
from lora_plugins.quantization.facts import RECORD_ATTRIBUTE
from lora_plugins.quantization.request import Quantization, QuantizedLayers
from lora_plugins.targets.resolution import Required, TargetPlan

__all__ = ["Preparation", "preparation_of"]


@dataclass
class Preparation:
    """How a model was prepared, for the report and the checks during training.

    Attributes:
        adapter_name: Name of the trained adapter, ``None`` if the preparation added none.
        plan: Which modules were chosen and why; ``None`` if none were chosen here.
        quantization: Backend of the base, ``None`` for a float base.
        layers: Which layers were quantized here; ``None`` if the base was loaded quantized or stays in float.
        before: Bytes before the preparation.
        after: Bytes after the preparation.
        compute_dtype: Dtype that the frozen float weights were cast to, ``None`` if they were not cast.
        upcast: Names of the modules that are deliberately held in float32.
        heads: Names of the modules that are trained and saved in full.
        required: The newly initialized parts of the base, which a run must train and save.
        notes: Sentences for the report.
        parent: The adapter that was loaded into the model, ``"none"`` for a new one, or the reason why it is not known.
    """

    adapter_name: str | None
    plan: TargetPlan | None
    quantization: Quantization | None
    layers: QuantizedLayers | None
    before: TensorBytes
    after: TensorBytes = field(default_factory=TensorBytes)
    compute_dtype: torch.dtype | None = None
    upcast: list[str] = field(default_factory=list)
    heads: tuple[str, ...] = ()
    required: Required = field(default_factory=Required)
    notes: list[str] = field(default_factory=list)
    parent: dict[str, Any] | str = "the model came with an adapter that lora-plugins neither made nor loaded"


def preparation_of(model: nn.Module) -> Preparation | None:
    """Return the record of a model's preparation, ``None`` for a model prepared elsewhere."""
    return getattr(model, RECORD_ATTRIBUTE, None)

"""The record that preparing leaves on a model."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import nn

from lora_plugins.quantization.counting import TensorBytes
from lora_plugins.quantization.request import Quantization, QuantizedLayers
from lora_plugins.targets.resolution import Required, TargetPlan

__all__ = ["RECORD_ATTRIBUTE", "Preparation", "preparation_of"]


#: Where the record of a preparation is kept on the prepared model.
RECORD_ATTRIBUTE = "lora_plugins_preparation"


@dataclass
class Preparation:
    """What was done to a model, for the report and the checks during training.

    Attributes:
        adapter_name: Name of the trained adapter, ``None`` when the model got none from us.
        plan: Which modules were chosen and why.
        quantization: Backend of the base, ``None`` for a float base.
        layers: Which layers were quantized here; ``None`` when the model arrived quantized or in float.
        before: Bytes before anything was done.
        after: Bytes when everything was done.
        compute_dtype: Dtype that the frozen float weights were cast to, ``None`` when they were left.
        upcast: Names of the modules held in float32 on purpose.
        heads: Names of the modules that are trained and saved whole.
        required: What is newly initialized in the base, which a run must train and save.
        notes: Sentences for the report.
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


def preparation_of(model: nn.Module) -> Preparation | None:
    """Return the record that preparing left on a model, ``None`` for a model prepared elsewhere."""
    return getattr(model, RECORD_ATTRIBUTE, None)

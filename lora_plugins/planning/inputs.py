"""Make a training batch without data for a model's forward."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from lora_plugins.models.images import read_image_shape
from lora_plugins.models.wrapping import base_of

__all__ = ["make_batch"]


#: Frames of a spectrogram, and samples per token of a waveform: those of Whisper and wav2vec 2.0.
_FRAMES = 3000
_SAMPLES_PER_TOKEN = 320


def make_batch(model: nn.Module, batch_size: int, length: int) -> dict[str, torch.Tensor]:
    """Return the tensors of one training batch on the meta device, labels among them.

    Text has no padding. An image model gets one image per example, in the size that its configuration names; a
    vision-language model gets text only.

    Args:
        model: The base model or its `peft.PeftModel`.
        batch_size: Examples.
        length: Tokens per example.
    """
    base: Any = base_of(model)
    accepted = inspect.signature(base.forward).parameters
    main = getattr(base, "main_input_name", "input_ids")
    makers = _list_makers(base.config, batch_size, length)
    names = ["input_ids"] if "input_ids" in accepted and main not in ("input_features", "input_values") else [main]
    if "bbox" in accepted:
        names.append("bbox")
    batch = {name: makers[name]() for name in names if name in makers}
    batch.update(_make_labels(base, accepted, batch_size, length))
    return batch


def _list_makers(config: Any, batch_size: int, length: int) -> dict[str, Callable[[], torch.Tensor]]:
    def ids(*shape: int) -> torch.Tensor:
        return torch.empty(shape, dtype=torch.long, device="meta")

    dtype = getattr(config, "dtype", None) or torch.float32
    bins = getattr(config, "num_mel_bins", None) or 80

    def floats(*shape: int) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    return {
        "input_ids": lambda: ids(batch_size, length),
        "bbox": lambda: ids(batch_size, length, 4),
        "pixel_values": lambda: floats(batch_size, *read_image_shape(config)),
        "input_features": lambda: floats(batch_size, bins, _FRAMES),
        "input_values": lambda: floats(batch_size, length * _SAMPLES_PER_TOKEN),
    }


def _make_labels(base: Any, accepted: Mapping[str, Any], batch_size: int, length: int) -> dict[str, torch.Tensor]:
    one = torch.empty((batch_size,), dtype=torch.long, device="meta")
    if "start_positions" in accepted:
        return {"start_positions": one, "end_positions": one}
    if "labels" not in accepted:
        return {}
    whole = type(base).__name__.endswith(("ForSequenceClassification", "ForImageClassification"))
    return {"labels": one if whole else torch.empty((batch_size, length), dtype=torch.long, device="meta")}

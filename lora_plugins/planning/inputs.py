"""A training batch without data, by what a model's forward takes."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from lora_plugins.models.images import read_image_shape
from lora_plugins.models.wrapping import base_of

__all__ = ["make_batch"]


#: Seconds of sound that models of spectrograms take, and samples in a second for those of the wave itself.
_FRAMES = 3000
_SAMPLES_PER_TOKEN = 320


def make_batch(model: nn.Module, batch_size: int, length: int) -> dict[str, torch.Tensor]:
    """Return the tensors of one training batch on the meta device, labels among them.

    Text is without padding. A model of images gets one image for each example, in the size its
    configuration names; a language model that can see gets text only.

    Args:
        model: The base model or the wrapped one.
        batch_size: Examples.
        length: Tokens in each.
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

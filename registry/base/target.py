"""What a check needs to know of a base model, wherever it is."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from registry.formats.records import TensorSource

if TYPE_CHECKING:
    from torch import nn
    from transformers import PretrainedConfig

    from registry.hubs.protocol import Hub

__all__ = ["Base", "Candidate", "open_base_hub"]


@dataclass(frozen=True)
class Candidate:
    """One way to read a base model's configuration: as a class of transformers.

    Attributes:
        model_class: The class; ``None`` for a model in memory.
        config: The configuration with the adapter's number of labels; ``None`` for a model in memory.
        make_empty: Makes the model without weights, with the adapter's vocabulary.
    """

    model_class: Any
    config: PretrainedConfig | None
    make_empty: Callable[[], nn.Module]


@dataclass(frozen=True)
class Base:
    """A base model to check against.

    Attributes:
        title: What messages call it.
        candidates: Makes the ways to read it, the likeliest first.
        values: Its configuration, the part that defines the computation.
        tensors: Where single tensors can be read, if they can.
        local: Whether reading whole tensors costs no network.
        vocabulary: How many entries its own vocabulary has, before any were added.
        id: What it is called on a hub.
        commit: Its commit there.
    """

    title: str
    candidates: Callable[[], Iterator[Candidate]]
    values: Mapping[str, object]
    tensors: TensorSource | None
    local: bool = True
    vocabulary: int | None = None
    id: str | None = None
    commit: str | None = None


def open_base_hub(hub: Hub | str | os.PathLike[str] | None, token: str | bool | None) -> Hub:
    """Open the hub that base models are on. ``LORA_REGISTRY`` says where adapters are, and counts for nothing here."""
    from registry.hubs import open_hub
    from registry.hubs.huggingface import HuggingFaceHub

    return HuggingFaceHub(token=token) if hub is None else open_hub(hub, token)

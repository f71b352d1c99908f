"""Description of a base model for a check, wherever the model is."""

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
    """One transformers class that a base model may have.

    Attributes:
        model_class: The class; ``None`` for a model in memory.
        config: The configuration with the adapter's number of labels; ``None`` for a model in memory.
        make_empty: Builds the model without weights, with the adapter's vocabulary.
    """

    model_class: Any
    config: PretrainedConfig | None
    make_empty: Callable[[], nn.Module]


@dataclass(frozen=True)
class Base:
    """A base model to check against.

    Attributes:
        title: Its name in messages.
        candidates: Yields its candidate classes, the likeliest first.
        values: The configuration values that define the computation.
        tensors: Source of its tensors, if they can be read.
        local: Whether tensors can be read without the network.
        vocabulary: Size of its own vocabulary, before any tokens were added.
        id: Its id on a hub.
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
    """Open the hub of the base models. ``LORA_REGISTRY`` names the hub of the adapters and is ignored here."""
    from registry.hubs import open_hub
    from registry.hubs.huggingface import HuggingFaceHub

    return HuggingFaceHub(token=token) if hub is None else open_hub(hub, token)

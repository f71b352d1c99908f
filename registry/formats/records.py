"""The records that a manifest is made of."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

__all__ = [
    "MAX_TENSORS",
    "BaseKind",
    "BaseRecord",
    "FileRecord",
    "Fingerprint",
    "TensorPrint",
    "TensorRecord",
    "TensorSource",
    "is_tensor_name",
]

#: Tensors that an adapter may have.
MAX_TENSORS = 50_000
_TENSOR = re.compile(r"[A-Za-z_][\w.\-]{0,511}", re.ASCII)


@dataclass(frozen=True)
class FileRecord:
    """The size in bytes and the sha256 (hex) of a file."""

    size: int
    sha256: str


@dataclass(frozen=True)
class TensorRecord:
    """The dtype, as safetensors calls it (``F32``, ``BF16``, …), and the shape of a tensor."""

    dtype: str
    shape: tuple[int, ...]


def is_tensor_name(name: str) -> bool:
    """Return whether a tensor can have this name: identifiers and numbers with dots, and no dunder among them."""
    if _TENSOR.fullmatch(name) is None or ".." in name or name.endswith("."):
        return False
    return "__" not in name or not any(part.startswith("__") and part.endswith("__") for part in name.split("."))


@dataclass(frozen=True)
class TensorPrint:
    """What one tensor of a base model looked like.

    Attributes:
        sha256: Of its shape and its first rows, rounded to bfloat16.
        dtype: The dtype it was read in. float16 holds small bfloat16 values only roughly, so that a hash can differ
            where the model is the same.
        values: The first few values, to compare roughly in that case.
    """

    sha256: str
    dtype: str
    values: tuple[float, ...] = ()


@dataclass(frozen=True)
class Fingerprint:
    """By what a base model is recognized, wherever it lies and whatever it is called.

    Attributes:
        config: The configuration keys that define the computation, with values that are compared one by one.
        tensors: A few tensors that are never quantized nor trained, by their name in the model.
    """

    config: Mapping[str, object] = field(default_factory=dict)
    tensors: Mapping[str, TensorPrint] = field(default_factory=dict)


@dataclass(frozen=True)
class BaseRecord:
    """A base model.

    Attributes:
        id: What it is called on a hub, if it is on one.
        commit: Its commit there.
        fingerprint: By what it is recognized, as far as that is known.
        aliases: Other ids under which it may be found, should the first one be gone; ``None`` without any. They count
            only where the fingerprint matches.
    """

    id: str | None = None
    commit: str | None = None
    fingerprint: Fingerprint | None = None
    aliases: tuple[str, ...] | None = None


@dataclass(frozen=True)
class BaseKind:
    """The kind of base model.

    Attributes:
        model_type: Of its configuration.
        class_name: Its class in transformers.
        vocab_size: Rows of its input embedding.
        num_labels: Classes of its head, if it has one for classes.
    """

    model_type: str | None = None
    class_name: str | None = None
    vocab_size: int | None = None
    num_labels: int | None = None


class TensorSource(Protocol):
    """Where single tensors of a model can be read."""

    def rows(self, name: str, count: int) -> Any:
        """The first rows of the tensor called ``name``, or so but for a prefix; ``None`` where it cannot be read."""

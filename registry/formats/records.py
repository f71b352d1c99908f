"""The records of a manifest."""

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

#: Maximum number of tensors in an adapter.
MAX_TENSORS = 50_000
_TENSOR = re.compile(r"[A-Za-z_][\w.\-]{0,511}", re.ASCII)


@dataclass(frozen=True)
class FileRecord:
    """The size in bytes and the sha256 (hex) of a file."""

    size: int
    sha256: str


@dataclass(frozen=True)
class TensorRecord:
    """The dtype in safetensors' notation (``F32``, ``BF16``, …) and the shape of a tensor."""

    dtype: str
    shape: tuple[int, ...]


def is_tensor_name(name: str) -> bool:
    """Return whether a tensor may have this name: dotted identifiers and numbers without dunder names."""
    if _TENSOR.fullmatch(name) is None or ".." in name or name.endswith("."):
        return False
    return "__" not in name or not any(part.startswith("__") and part.endswith("__") for part in name.split("."))


@dataclass(frozen=True)
class TensorPrint:
    """The print of one tensor of a base model.

    Attributes:
        sha256: Hash of its shape and its first rows, rounded to bfloat16.
        dtype: The dtype it was read in. float16 represents small bfloat16 values inexactly, so hashes of the same model
            can differ.
        values: A sample of these rows' values, for an approximate comparison in that case.
    """

    sha256: str
    dtype: str
    values: tuple[float, ...] = ()


@dataclass(frozen=True)
class Fingerprint:
    """Identifies a base model independently of its location and name.

    Attributes:
        config: The configuration values that define the computation, compared one by one.
        tensors: Prints of a few tensors that are never quantized or trained, by their name in the model.
    """

    config: Mapping[str, object] = field(default_factory=dict)
    tensors: Mapping[str, TensorPrint] = field(default_factory=dict)


@dataclass(frozen=True)
class BaseRecord:
    """A base model.

    Attributes:
        id: Its id on a hub, if it is on one.
        commit: Its commit there.
        fingerprint: Its fingerprint, if known.
        aliases: Further ids to try if the first one is gone; ``None`` without any. A model under an alias is accepted
            only if its fingerprint matches.
    """

    id: str | None = None
    commit: str | None = None
    fingerprint: Fingerprint | None = None
    aliases: tuple[str, ...] | None = None


@dataclass(frozen=True)
class BaseKind:
    """The kind of base model.

    Attributes:
        model_type: ``model_type`` of its configuration.
        class_name: Its transformers class.
        vocab_size: Rows of its input embedding.
        num_labels: Number of labels of its classification head, if it has one.
    """

    model_type: str | None = None
    class_name: str | None = None
    vocab_size: int | None = None
    num_labels: int | None = None


class TensorSource(Protocol):
    """A source of single tensors of a model."""

    def rows(self, name: str, count: int) -> Any:
        """Return the first rows of the tensor ``name``, up to a dotted prefix; ``None`` if it cannot be read."""

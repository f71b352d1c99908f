"""Check an adapter's files for a push, before anything is uploaded."""

from __future__ import annotations

import hashlib
import os
import warnings
from collections.abc import Collection, Mapping, Sequence
from math import prod
from pathlib import Path, PurePath

from registry.errors import AdapterWarning, InvalidAdapter, TooLarge
from registry.formats.adapter_config import AdapterConfig
from registry.formats.fields import is_finite
from registry.formats.paths import ADAPTER_WEIGHTS
from registry.formats.records import FileRecord, TensorRecord
from registry.formats.tensors import check_weights, other_tensors
from registry.formats.tokenizer_files import MAX_TOKENIZER_CONFIG, TOKENIZER_CONFIG, check_tokenizer_config

__all__ = [
    "LARGE",
    "check_metrics",
    "check_size",
    "check_tensors",
    "check_tokenizer",
    "check_use",
    "record_file",
    "warn_of_rest",
]

#: Maximum total bytes of tensors other than LoRA's, except those allowed by name.
LARGE = 32 * 1024 * 1024
_BYTES = {"F32": 4, "BF16": 2, "F16": 2}
_CHUNK = 4 * 1024 * 1024
#: Suffixes of files that hold tensors.
_TENSORS = frozenset({".bin", ".ckpt", ".npz", ".pkl", ".pt", ".pth", ".safetensors"})
#: Name prefixes of a Trainer's state for resuming, which is not part of the result.
_TO_GO_ON = ("optimizer", "rng_state", "scaler", "scheduler", "training_args")


def check_tensors(file: Path, config: AdapterConfig, allow: Sequence[str]) -> Mapping[str, TensorRecord]:
    """Check the weights of an adapter.

    Args:
        file: The safetensors file.
        config: The adapter's configuration.
        allow: Names of modules whose tensors may be large although they are not LoRA's.

    Raises:
        InvalidAdapter: They are unusable.
        UnsafeFile: The file is malformed.
        TooLarge: Tensors other than LoRA's are large.
    """
    checked = check_weights(file, config)
    if checked.warnings:
        raise InvalidAdapter(checked.warnings[0])
    tensors = checked.header.tensors
    check_size({name: _count_bytes(tensors[name]) for name in other_tensors(tensors)}, allow, file.stat().st_size)
    return tensors


def check_size(sizes: Mapping[str, int], allow: Sequence[str], total: int) -> None:
    """Refuse large tensors other than LoRA's.

    Args:
        sizes: Bytes of these tensors, by name.
        allow: Names of modules whose tensors may be large.
        total: Bytes of all tensors.

    Raises:
        TooLarge: Those not allowed have more than 32 MB in total.
    """
    refused = {name: size for name, size in sizes.items() if not any(f".{part}." in f".{name}" for part in allow)}
    if sum(refused.values()) <= LARGE:
        return
    largest = sorted(refused, key=lambda name: -refused[name])[:5]
    listed = ", ".join(f"{name} ({refused[name] / 1e6:,.1f} MB)" for name in largest)
    modules = sorted({name.split(".")[-2] for name in largest})
    raise TooLarge(
        f"{sum(refused.values()) / 1e6:,.1f} of {total / 1e6:,.1f} MB are tensors that are not LoRA's: {listed}. "
        f"If they were trained and have to be published, say so: push_adapter(…, allow={modules!r})"
    )


def check_use(config: AdapterConfig) -> None:
    """Refuse a configuration with which the adapter has no effect, or that needs other adapters.

    Raises:
        InvalidAdapter: ``lora_alpha`` is zero: PEFT multiplies every update by it. Or it is an Arrow router, which has
            no weights of its own.
    """
    if config.fields.get("arrow_config"):
        raise InvalidAdapter(
            "arrow_config makes it a router between other adapters of the model, which a release cannot hold. Publish "
            "those adapters; PEFT's create_arrow_model makes the router of them"
        )
    patterns = config.fields.get("alpha_pattern") or {}
    if config.fields.get("lora_alpha", 8) == 0 and not any(patterns.values()):
        raise InvalidAdapter(
            "lora_alpha is 0, by which every update is multiplied: the adapter changes nothing. Set it to what the "
            "adapter was trained with; PEFT's default is 8"
        )


def check_tokenizer(folder: Path, names: Collection[str]) -> None:
    """Refuse a tokenizer that makes transformers run code; only ``tokenizer_config.json`` can.

    Raises:
        UnsafeFile: It has ``auto_map`` or ``trust_remote_code``, or is malformed.
    """
    if TOKENIZER_CONFIG in names:
        with open(folder / TOKENIZER_CONFIG, "rb") as file:
            check_tokenizer_config(file.read(MAX_TOKENIZER_CONFIG + 1))


def warn_of_rest(source: Path) -> None:
    """Warn of files with tensors beside an adapter that are not published with it."""
    names = sorted(name for name in os.listdir(source) if _is_left_behind(name))
    if names:
        warnings.warn(
            f"{source} holds {', '.join(names)}, which a release does not: only what PEFT loads, {ADAPTER_WEIGHTS}, is "
            "published. If these were trained, the published adapter is not what was trained: have PEFT save them "
            "(modules_to_save, trainable_token_indices), or publish them elsewhere",
            AdapterWarning,
            stacklevel=6,
        )


def _is_left_behind(name: str) -> bool:
    return PurePath(name).suffix in _TENSORS and name != ADAPTER_WEIGHTS and not name.startswith(_TO_GO_ON)


def check_metrics(metrics: Mapping[str, float]) -> dict[str, float]:
    """Return metrics as floats.

    Raises:
        InvalidAdapter: One is not a finite number.
    """
    for name, value in metrics.items():
        if not isinstance(name, str) or not is_finite(value):
            raise InvalidAdapter(f"The metric {name!r} is {value!r}; metrics must be finite numbers by name")
    return {name: float(value) for name, value in metrics.items()}


def record_file(path: Path) -> FileRecord:
    """Return the size and the hash of a file."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
    return FileRecord(path.stat().st_size, digest.hexdigest())


def _count_bytes(record: TensorRecord) -> int:
    return prod(record.shape) * _BYTES.get(record.dtype, 8)

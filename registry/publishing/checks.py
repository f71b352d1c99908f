"""Check an adapter's files for a push, before anything is uploaded."""

from __future__ import annotations

import hashlib
import re
import warnings
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from registry.base.peft_fields import read_peft_config
from registry.base.stored import StoredAdapter
from registry.checks.adapter_files import AdapterFiles
from registry.checks.folder import CHECKS as FOLDER_CHECKS
from registry.checks.table import PARTS, enforce
from registry.checks.tensors import describe_large
from registry.errors import AdapterWarning, InvalidAdapter, TooLarge
from registry.formats.fields import is_finite
from registry.formats.paths import ADAPTER_CONFIG, ADAPTER_WEIGHTS
from registry.formats.records import FileRecord
from registry.formats.tensors import PREFIX, lora_modules

__all__ = [
    "check_for_push",
    "check_metrics",
    "check_size",
    "check_tokenizer",
    "check_without_base",
    "record_file",
    "warn_of_rest",
]

_CHUNK = 4 * 1024 * 1024


def check_for_push(files: AdapterFiles) -> None:
    """Run every check of a push on an adapter's configuration and weights.

    Raises:
        InvalidAdapter: They are unusable, or without effect.
        UnsafeFile: The file is malformed.
        TooLarge: Tensors other than LoRA's are large.
    """
    enforce(files, "push", PARTS)


def check_size(sizes: Mapping[str, int], allow: Sequence[str], total: int) -> None:
    """Refuse large tensors other than LoRA's.

    Args:
        sizes: Bytes of these tensors, by name.
        allow: Names of modules whose tensors may be large.
        total: Bytes of all tensors.

    Raises:
        TooLarge: Those not allowed have more than 32 MB in total.
    """
    reason = describe_large(sizes, allow, total)
    if reason is not None:
        raise TooLarge(reason)


def check_without_base(adapter: StoredAdapter) -> None:
    """Refuse what no base could take: fields that PEFT cannot use, and tensors that the configuration does not make.

    Raises:
        BaseMismatch: PEFT cannot use its configuration.
        InvalidAdapter: Configuration and tensors contradict each other.
    """
    config, _ = read_peft_config(adapter)
    modules = lora_modules(adapter.tensors)
    problem = (
        _describe_untargeted(modules, config)
        or _describe_magnitudes(adapter.tensors, modules, config)
        or _describe_untrained(adapter.tensors, config)
    )
    if problem:
        raise InvalidAdapter(f"{ADAPTER_CONFIG} and {ADAPTER_WEIGHTS} contradict each other: {problem}")


def _describe_untargeted(modules: Collection[str], config: Any) -> str:
    from peft.tuners.tuners_utils import check_target_module_exists

    if config.target_parameters or not config.target_modules or config.target_modules == "all-linear":
        # Which modules these are depends on the base.
        return ""
    names = [name.removeprefix(PREFIX) for name in modules]
    stray = [name for name in names if not check_target_module_exists(config, name)]
    if config.ensure_weight_tying:
        # PEFT also adapts what the base ties to a target: an embedding or a head, which no numbered block holds.
        stray = [name for name in stray if any(part.isdecimal() for part in name.split("."))]
    return f"{len(stray)} of {len(names)} modules are not among its targets, first {stray[0]}" if stray else ""


def _describe_magnitudes(tensors: Collection[str], modules: Collection[str], config: Any) -> str:
    count = sum(".lora_magnitude_vector" in name for name in tensors)
    if config.use_dora and not count:
        return "use_dora is true, and no tensor is a lora_magnitude_vector"
    if count and not config.use_dora:
        return f"use_dora is false, and {count} tensors are a lora_magnitude_vector"
    return ""


def _describe_untrained(tensors: Collection[str], config: Any) -> str:
    saved = config.modules_to_save or ()
    # For a classifier, PEFT lists several names of heads, of which a model has one.
    if saved and not any(re.search(rf"(^|\.){part}(\.|$)", name) for part in saved for name in tensors):
        return f"modules_to_save names {', '.join(map(repr, sorted(saved)))}, and no tensor belongs to one"
    if config.trainable_token_indices and not any("trainable_tokens_" in name for name in tensors):
        return "trainable_token_indices names tokens, and no tensor holds their rows"
    return ""


def check_tokenizer(folder: Path, names: Collection[str]) -> None:
    """Refuse a tokenizer that makes transformers run code.

    Raises:
        UnsafeFile: It has ``auto_map`` or ``trust_remote_code``, or is malformed.
    """
    enforce(AdapterFiles(folder, given={"names": tuple(names)}), "push", ("files",), checks=FOLDER_CHECKS)


def warn_of_rest(source: Path) -> None:
    """Warn of files with tensors beside an adapter that are not published with it."""
    for message in enforce(AdapterFiles(source), "folder", ("files",), checks=FOLDER_CHECKS):
        warnings.warn(message, AdapterWarning, stacklevel=6)


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

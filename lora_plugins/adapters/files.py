"""Stored adapters: find, check, load and compare them."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model_state_dict, set_peft_model_state_dict
from safetensors.torch import load_file

from lora_plugins.errors import (
    AdapterMismatch,
    BrokenCheckpoint,
    PreparationError,
)
from lora_plugins.models.randomness import seeded
from lora_plugins.models.sharding import gather_state, is_sharded
from lora_plugins.text import one_line
from registry import BaseMismatch, CheckResult, check_contract, expand_path, is_path, pull_adapter, put_back

__all__ = [
    "ADAPTER_CONFIG",
    "ADAPTER_FILE",
    "MismatchedBase",
    "adapter_folder",
    "adapter_shapes",
    "adapter_state",
    "check_base",
    "check_same_tensors",
    "copy_adapter",
    "differing_tensors",
    "find_adapter_file",
    "load_config",
    "load_weights",
]


class MismatchedBase(AdapterMismatch, BaseMismatch):
    """A stored adapter does not belong to the base model; a subclass of the registry's error and of this package's."""


ADAPTER_FILE = "adapter_model.safetensors"
ADAPTER_CONFIG = "adapter_config.json"


def find_adapter_file(folder: Path, adapter_name: str) -> Path | None:
    """Return the path of an adapter's weights in a folder that PEFT or the Trainer wrote, ``None`` if there are none.

    PEFT writes the adapter "default" into the folder itself and every other one into a subfolder of its name.
    """
    places = [folder / adapter_name, folder] if adapter_name != "default" else [folder, folder / adapter_name]
    for place in places:
        if (place / ADAPTER_FILE).is_file():
            return place / ADAPTER_FILE
    return None


def adapter_folder(adapter: str | os.PathLike[str]) -> Path:
    """Return the local folder of an adapter given as a folder or as a registry reference.

    What is visibly a path (`registry.is_path`) is a folder; any other string is a reference like ``org/name@1.2`` and
    is pulled, even if a folder of that name exists.

    Raises:
        PreparationError: The folder holds no adapter.
    """
    if isinstance(adapter, str) and not is_path(adapter):
        return Path(os.fspath(pull_adapter(adapter)))
    folder = expand_path(adapter)
    if not (folder / ADAPTER_CONFIG).is_file():
        nested = sorted(path.parent.name for path in folder.glob(f"*/{ADAPTER_CONFIG}"))
        hint = f" It has adapters in the subfolders {', '.join(nested)}: name one of them." if nested else ""
        raise PreparationError(f"The folder {folder} has no {ADAPTER_CONFIG}.{hint}")
    return folder


def check_base(folder: Path, base: Any, *, warn: bool = True) -> CheckResult:
    """Check that a stored adapter belongs to a base model, with `registry.check_contract`.

    Args:
        folder: The adapter: a pulled release, or any adapter folder.
        base: The base model, without PEFT's wrapper; or its folder or configuration.
        warn: Whether to warn if the base fits and cannot be distinguished from others of its shape.

    Raises:
        MismatchedBase: It was trained on another base, or does not fit this one.
        InvalidAdapter: Its tensors are not those of a valid LoRA adapter.
        UnsafeFile: A file is malformed.
    """
    try:
        return check_contract(folder, base, warn=warn)
    except BaseMismatch as error:
        raise MismatchedBase(str(error)) from None


def load_config(folder: Path) -> LoraConfig:
    """Read the configuration of a stored LoRA adapter.

    Raises:
        PreparationError: It is not a LoRA adapter, or not valid JSON with PEFT's fields.
    """
    try:
        config = PeftConfig.from_pretrained(str(folder))
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise PreparationError(
            f"The {ADAPTER_CONFIG} in {folder} cannot be read: {one_line(error)}. `lora-plugins doctor {folder}` names "
            "the damage, and what can be cured."
        ) from error
    if not isinstance(config, LoraConfig):
        raise PreparationError(f"The adapter in {folder} is of type {config.peft_type}, not LoRA.")
    config.inference_mode = False
    return config


def load_weights(model: PeftModel, file: Path, adapter_name: str) -> None:
    """Load stored weights into an adapter of the model; check that all keys match and all values are loaded.

    Args:
        model: A wrapped model that has the adapter.
        file: A safetensors file that ``save_pretrained`` wrote.
        adapter_name: Name of the adapter to load into.

    Raises:
        AdapterMismatch: Names or shapes differ.
        BrokenCheckpoint: The model does not hold the file's values afterwards.
    """
    stored = load_file(str(file), device="cpu")
    check_same_tensors({k: tuple(v.shape) for k, v in stored.items()}, adapter_shapes(model, adapter_name), file)
    set_peft_model_state_dict(model, stored, adapter_name=adapter_name)
    put_back(model, stored, adapter_name)
    wrong = differing_tensors(stored, adapter_state(model, adapter_name))
    if wrong:
        raise BrokenCheckpoint(f"{file} was loaded and {len(wrong)} tensors differ afterwards, first {wrong[0]}")


def copy_adapter(model: PeftModel, source: str, copy: str, seed: int) -> None:
    """Add a frozen copy of an adapter, with its configuration and values; the active adapter stays active.

    Args:
        model: A wrapped model.
        source: Name of the adapter to copy.
        copy: Name of the copy.
        seed: Seed of the initial values, which are then overwritten; the caller's random state is unchanged.

    Raises:
        ValueError: PEFT cannot hold two adapters with this configuration.
    """
    active = model.active_adapter
    with seeded(model, seed):
        model.add_adapter(copy, model.peft_config[source])
    state = {name: tensor.detach().clone() for name, tensor in adapter_state(model, source).items()}
    set_peft_model_state_dict(model, state, adapter_name=copy)
    put_back(model, state, copy)
    model.set_adapter(active)


def adapter_state(
    model: PeftModel, adapter_name: str, state: Mapping[str, torch.Tensor] | None = None
) -> dict[str, torch.Tensor]:
    """Return the tensors of an adapter by their names in its file.

    Args:
        model: The wrapped model.
        adapter_name: Name of the adapter.
        state: The result of `gather_state`, if it was called before. Otherwise a sharded model is gathered here,
            and every process must call this function.
    """
    if state is None and is_sharded(model):
        # PEFT 0.21.2 would gather the whole base model as well.
        state = gather_state(model)
    # With "auto", PEFT 0.21.2 asks the Hub for the base's vocabulary size, which a check must never do:
    # https://github.com/huggingface/peft/issues/1452
    return get_peft_model_state_dict(
        model, None if state is None else dict(state), adapter_name=adapter_name, save_embedding_layers=False
    )


def adapter_shapes(model: PeftModel, adapter_name: str) -> dict[str, tuple[int, ...]]:
    """Return the shapes of an adapter's tensors by their names in its file."""
    return {name: tuple(tensor.shape) for name, tensor in adapter_state(model, adapter_name).items()}


def check_same_tensors(
    stored: Mapping[str, tuple[int, ...]], live: Mapping[str, tuple[int, ...]], source: Path
) -> None:
    """Compare names and shapes of a stored adapter with those in the model.

    Embeddings that PEFT saved in addition (names without ``lora_`` that the model's adapter lacks) are allowed.

    Raises:
        AdapterMismatch: They differ; the message gives counts and the first examples.
    """
    missing = sorted(set(live) - set(stored))
    extra = sorted(name for name in set(stored) - set(live) if "lora_" in name or "modules_to_save" in name)
    shapes = [
        f"{n}: stored {stored[n]}, model {live[n]}" for n in sorted(set(stored) & set(live)) if stored[n] != live[n]
    ]
    problems = []
    if missing:
        problems.append(f"{len(missing)} tensors of the model are not in it, first {missing[0]}")
    if extra:
        problems.append(f"it has {len(extra)} tensors that the model lacks, first {extra[0]}")
    if shapes:
        problems.append(f"{len(shapes)} shapes differ, first {shapes[0]}")
    if problems:
        raise AdapterMismatch(f"The adapter {source} does not fit this model: {'; '.join(problems)}.")


def differing_tensors(stored: Mapping[str, torch.Tensor], live: Mapping[str, torch.Tensor]) -> list[str]:
    """Return the names of the tensors whose values differ by more than rounding to the dtype of either side."""
    return [name for name, tensor in live.items() if name in stored and not _is_same(stored[name], tensor)]


def _is_same(stored: torch.Tensor, live: torch.Tensor) -> bool:
    live = live.detach().cpu()
    return torch.equal(stored, live.to(stored.dtype)) or torch.equal(stored.to(live.dtype), live)

"""Copy the files to publish to a private folder.

The copies are checked and uploaded, so changes to the originals meanwhile have no effect.
"""

from __future__ import annotations

import functools
import json
import os
import stat
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from registry.checks.adapter_files import AdapterFiles
from registry.checks.folder import PRESENCE
from registry.checks.table import enforce
from registry.errors import BaseMismatch, InvalidAdapter, TooLarge, UnsafeFile
from registry.formats.adapter_config import AdapterConfig
from registry.formats.paths import ADAPTER_CONFIG, ADAPTER_WEIGHTS, TOKENIZER_FILES, max_size
from registry.formats.weights import read_open_header

if TYPE_CHECKING:
    import torch
    from peft import LoraConfig, PeftConfig, PeftModel

__all__ = ["copy_adapter", "copy_file", "copy_tokenizer", "read_config", "read_state", "save_model"]

_CHUNK = 4 * 1024 * 1024


def copy_adapter(source: Path, target: Path) -> None:
    """Copy configuration and weights of an adapter folder.

    Raises:
        InvalidAdapter: The folder holds no adapter.
        UnsafeFile: A file is a link or not a regular file, or the weights are a pickle.
        TooLarge: A file is larger than allowed.
    """
    if not source.is_dir():
        raise InvalidAdapter(
            f"{source} is not a folder: give a PeftModel, a Trainer, or a folder that save_pretrained wrote"
        )
    enforce(AdapterFiles(source), "folder", ("files",), checks=PRESENCE)
    for name in (ADAPTER_CONFIG, ADAPTER_WEIGHTS):
        copy_file(source / name, target / name, max_size(name))


def copy_tokenizer(source: Path, target: Path) -> list[str]:
    """Copy the tokenizer files of a folder, and return their names."""
    found = sorted(name for name in os.listdir(source) if name in TOKENIZER_FILES)
    for name in found:
        copy_file(source / name, target / name, max_size(name))
    return found


def copy_file(source: Path, target: Path, limit: int) -> None:
    """Copy a regular file of at most ``limit`` bytes.

    Raises:
        UnsafeFile: It is a link, not a regular file, or weights with a header that does not describe them.
        TooLarge: It is larger.
    """
    # Non-blocking, because opening a FIFO would wait for its writer.
    flags = os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)
    try:
        descriptor = os.open(source, flags)
    except OSError as error:
        if source.is_symlink():
            raise UnsafeFile(
                f"{source} is a symbolic link: what it leads to might be no part of the adapter. Copy it."
            ) from None
        raise UnsafeFile(f"{source} cannot be read: {error.strerror}") from None
    status = os.fstat(descriptor)
    if not stat.S_ISREG(status.st_mode):
        os.close(descriptor)
        raise UnsafeFile(f"{source} is not a regular file")
    with os.fdopen(descriptor, "rb") as file, open(target, "xb") as copy:
        if status.st_nlink > 1:
            raise UnsafeFile(
                f"{source} has {status.st_nlink} names (hard links): another one might belong to something secret, or "
                "be written to meanwhile. Copy it."
            )
        if status.st_size > limit:
            raise TooLarge(f"{source} has {status.st_size:,} bytes; a file of a release may have {limit:,}")
        if source.name == ADAPTER_WEIGHTS:
            # A sparse file can claim any size; its header must account for every byte.
            read_open_header(file, source.name)
            file.seek(0)
        left = limit
        while chunk := file.read(min(_CHUNK, left + 1)):
            left -= len(chunk)
            if left < 0:
                raise TooLarge(f"{source} grows while it is read, above {limit:,} bytes")
            copy.write(chunk)


def save_model(
    model: PeftModel, adapter_name: str, state: Mapping[str, torch.Tensor], config: LoraConfig, target: Path
) -> None:
    """Save tensors and configuration of one adapter of a model, without asking a hub about its base."""
    from safetensors.torch import save_file

    tensors = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in state.items()}
    save_file(tensors, str(target / ADAPTER_WEIGHTS), metadata={"format": "pt"})
    config.save_pretrained(str(target), auto_mapping_dict=_make_auto_mapping(model, adapter_name))


def _find_ends_left_out(model: PeftModel, state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return the embedding or head of a grown vocabulary that PEFT 0.21.2 omits if the other one has an adapter."""
    from registry.base.places import ends_of

    saved = {tensor.data_ptr() for tensor in state.values()}
    weights = {f"{name}.weight": end._parameters.get("weight") for name, end in ends_of(model).items()}
    return {name: w for name, w in weights.items() if w is not None and w.data_ptr() not in saved}


def read_state(model: PeftModel, adapter_name: str) -> dict[str, torch.Tensor]:
    """Return the tensors of one adapter of a model, under their names in its file.

    Raises:
        InvalidAdapter: The model has no adapter of that name, or trains tensors that no adapter holds.
    """
    import peft

    if adapter_name not in model.peft_config:
        known = ", ".join(model.peft_config)
        raise InvalidAdapter(f"The model has no adapter {adapter_name!r}; it has {known}")
    # By default, PEFT 0.21.2 asks the Hub for the base's vocabulary size:
    # https://github.com/huggingface/peft/issues/1452
    read = functools.partial(peft.get_peft_model_state_dict, model, adapter_name=adapter_name)
    found: dict[str, torch.Tensor] = read(save_embedding_layers=False)
    resized = _is_resized(model)
    # Where it is not known how many rows the base's files have, both ends are kept beside an adapter on one of them.
    grown = resized or (resized is None and _adapts_ends(model, found))
    if grown or _are_ends_named(model.peft_config[adapter_name]):
        found = read(save_embedding_layers=True)
    if grown:
        found = {**_find_ends_left_out(model, found), **found}
    _check_trained(model, adapter_name, found)
    return found


def _check_trained(model: PeftModel, adapter_name: str, state: Mapping[str, torch.Tensor]) -> None:
    """Raise `InvalidAdapter` if a trained tensor belongs to no adapter."""
    held = {tensor.data_ptr() for tensor in state.values()}
    others = {f".{name}." for name in model.peft_config if name != adapter_name}
    lost = [
        name
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
        and parameter.numel()
        and parameter.data_ptr() not in held
        and not any(other in name for other in others)
    ]
    # skip_checks=["unsaved-tensors"] states that these tensors need not be saved.
    if lost and not vars(model).get("lora_plugins_unsaved_allowed", False):
        raise InvalidAdapter(
            f"{len(lost)} tensors of the model are trained and belong to no adapter, first {lost[0]}: a release would "
            "lack them. Name their modules in modules_to_save=[…] when the adapter is made, or freeze them."
        )


def read_config(model: PeftModel, adapter_name: str) -> AdapterConfig:
    """Return the configuration of one adapter of a model, parsed like its file.

    Raises:
        UnsafeFile: It cannot be published.
    """
    values = model.peft_config[adapter_name].to_dict()
    plain = {key: sorted(value) if isinstance(value, set) else value for key, value in values.items()}
    return AdapterConfig.parse(json.dumps(plain, default=str).encode(), own=True)


def _make_auto_mapping(model: PeftModel, adapter_name: str) -> dict[str, str] | None:
    """Return the record by which PEFT's auto class finds the base's class, for adapters without a task type."""
    if model.peft_config[adapter_name].task_type is not None:
        return None
    base = type(model.get_base_model())
    if not base.__module__.startswith("transformers."):
        # Others do not have a custom class, and importing it runs code.
        return None
    return {"base_model_class": base.__name__, "parent_library": base.__module__}


def _count_original_rows(base: Any) -> int | None:
    """Return how many rows the embedding had when the base was loaded: some classes make more than the vocabulary."""
    from registry.base.classes import config_of, empty_model, rows_of_embedding
    from registry.base.files import original_config

    config = original_config(base)
    try:
        return None if config is None else rows_of_embedding(empty_model(config_of(type(base), config), type(base)))
    except BaseMismatch:
        return None


def _is_resized(model: PeftModel) -> bool | None:
    """Whether the embeddings have other rows than those of the loaded base; ``None`` if its files are not at hand."""
    from registry.base.files import original_vocabulary
    from registry.base.places import ends_of

    base = model.get_base_model()
    embedding = next(iter(ends_of(base).values()), None)
    weight = getattr(getattr(embedding, "base_layer", embedding), "weight", None)
    before = original_vocabulary(base)
    if before is not None and weight is not None and int(weight.shape[0]) != before:
        before = _count_original_rows(base) or before
    if before is None or weight is None:
        return None
    return int(weight.shape[0]) != before


def _adapts_ends(model: PeftModel, state: Iterable[str]) -> bool:
    """Whether the adapter with these tensors has factors on the input embedding or the output head."""
    from registry.base.places import ends_of

    ends = tuple(f"{name}." for name in ends_of(model))
    return any(name.startswith(ends) and "lora_" in name for name in state)


def _are_ends_named(config: PeftConfig) -> bool:
    """Whether the targets have a name beside whose adapter PEFT 0.21.2 saves the weight: it knows these two."""
    targets = getattr(config, "target_modules", None) or ()
    targeted = not isinstance(targets, str) and any(name in targets for name in ("embed_tokens", "lm_head"))
    return targeted and getattr(config, "trainable_token_indices", None) is None

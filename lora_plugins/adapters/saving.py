"""Saving adapters without asking the Hub, with the rows of a grown vocabulary."""

from __future__ import annotations

import types
from pathlib import Path
from typing import Any

from huggingface_hub import try_to_load_from_cache
from peft import PeftModel
from peft.utils.other import match_target_against_key
from peft.utils.save_and_load import EMBEDDING_LAYER_NAMES
from transformers import PreTrainedModel

from lora_plugins.models.wrapping import base_of

__all__ = ["is_vocabulary_grown", "save_offline", "save_pretrained"]


def save_offline(model: PeftModel) -> None:
    """Let a model's ``save_pretrained`` decide from local files whether embeddings belong to an adapter.

    PEFT 0.21 asks the Hub for the base's configuration at each save, and leaves out the rows of a resized embedding
    where it gets no answer (https://github.com/huggingface/peft/issues/1452).
    """
    if "save_pretrained" not in vars(model):
        model.save_pretrained = types.MethodType(save_pretrained, model)


# A bound method is pickled as its object and its name, so this must be called what it stands in for.
def save_pretrained(model: PeftModel, save_directory: str, *args: Any, **kwargs: Any) -> Any:
    """Save as PEFT does, with ``save_embedding_layers`` decided here where it is ``"auto"``."""
    if len(args) < 3 and kwargs.get("save_embedding_layers", "auto") == "auto" and not _targets_embeddings(model):
        kwargs["save_embedding_layers"] = is_vocabulary_grown(model)
    return type(model).save_pretrained(model, save_directory, *args, **kwargs)


def _targets_embeddings(model: PeftModel) -> bool:
    """Whether an adapter lies over embeddings, which PEFT then saves and asks nobody about."""
    names = [path for path, _ in base_of(model).named_modules() if path.rpartition(".")[2] in EMBEDDING_LAYER_NAMES]
    targets = [getattr(config, "target_modules", None) for config in model.peft_config.values()]
    for target in targets:
        if isinstance(target, str):
            if any(match_target_against_key(target, name) for name in names):
                return True
        elif any(name in (target or ()) for name in EMBEDDING_LAYER_NAMES):
            return True
    return False


def is_vocabulary_grown(model: Any) -> bool:
    """Whether a base has another number of tokens than the checkpoint it was loaded from, as far as local files say.

    Args:
        model: The model, wrapped or not.

    Returns:
        False for a base that was not loaded, and for one whose configuration is neither in its folder nor in the cache.
    """
    base: Any = base_of(model)
    if not isinstance(base, PreTrainedModel):
        return False
    folder = _find_checkpoint(base.config)
    if folder is None:
        return False
    try:
        stored = type(base.config).from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError, TypeError):
        return False
    return _vocabulary(stored) != _vocabulary(base.config)


def _vocabulary(config: Any) -> int | None:
    return getattr(config.get_text_config(), "vocab_size", None)


def _find_checkpoint(config: Any) -> Path | None:
    """The folder with the configuration that a model was loaded with: its own, or the Hub's cache."""
    name = getattr(config, "name_or_path", None)
    if not name:
        return None
    if (Path(name) / "config.json").is_file():
        return Path(name)
    try:
        file = try_to_load_from_cache(name, "config.json", revision=getattr(config, "_commit_hash", None))
    except ValueError:
        # Neither a folder that is there nor a name that the Hub could have.
        return None
    return Path(file).parent if isinstance(file, str) else None

"""What servers ask of a live model's adapter."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterable, Mapping
from typing import Any

from peft import LoraConfig, PeftModel

from lora_plugins.adapters.files import adapter_shapes
from lora_plugins.adapters.saving import saves_embeddings
from lora_plugins.errors import ServingWarning
from lora_plugins.models.wrapping import base_of
from lora_plugins.plugins.servers import AdapterTraits
from lora_plugins.plugins.traits import judge, read_traits
from registry import changes_base

__all__ = ["read_live_traits", "traits_of", "warn_unserved"]


def read_live_traits(config: LoraConfig, names: Iterable[str], base_config: Any) -> AdapterTraits:
    """Return what servers ask of an adapter.

    Args:
        config: Its configuration.
        names: Names of the tensors in its file.
        base_config: Configuration of the base model, ``None`` if it has none.
    """
    changed = changes_base(config.init_lora_weights)
    return read_traits(config.to_dict(), names, _describe_text(base_config), changes_base=changed)


def traits_of(model: PeftModel, adapter_name: str = "default", *, init: bool | str | None = None) -> AdapterTraits:
    """Return what servers will ask of a live model's adapter.

    Args:
        model: The model.
        adapter_name: Name of the adapter.
        init: Its ``init_lora_weights``, if the model was made with another one.
    """
    config: Any = model.peft_config[adapter_name]
    if init is not None:
        config = copy.copy(config)
        config.init_lora_weights = init
    names = [*adapter_shapes(model, adapter_name), *_name_whole(model)]
    return read_live_traits(config, names, getattr(base_of(model), "config", None))


def _name_whole(model: PeftModel) -> list[str]:
    """Return the names of the embedding and head that are saved whole, because their rows are not the checkpoint's."""
    if not saves_embeddings(model):
        return []
    ends = [id(end) for end in (model.get_input_embeddings(), model.get_output_embeddings()) if end is not None]
    return [f"{path}.weight" for path, module in model.named_modules() if id(module) in ends]


def warn_unserved(model: Any, adapter_name: str, servers: Iterable[str]) -> None:
    """Warn for each server that will not take the adapter of a prepared model."""
    names = tuple(servers)
    for verdict in judge(traits_of(model, adapter_name), names) if names else ():
        if not verdict.served:
            warnings.warn(f"The adapter is for {verdict.server}: {verdict}", ServingWarning, stacklevel=2)


def _describe_text(config: Any) -> Mapping[str, Any] | None:
    """Return the fields that rules ask for, under the names that transformers gives them in all configurations."""
    if not hasattr(config, "get_text_config"):
        return None
    text = config.get_text_config()
    names = ("model_type", "num_hidden_layers", "tie_word_embeddings")
    return {name: getattr(text, name) for name in names if hasattr(text, name)}

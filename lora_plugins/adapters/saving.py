"""Save a prepared model: all that is trained, no local path, no network."""

from __future__ import annotations

import types
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, try_to_load_from_cache
from peft import PeftModel, PeftType, get_peft_model_state_dict
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import match_target_against_key
from peft.utils.save_and_load import EMBEDDING_LAYER_NAMES
from torch import nn
from transformers import PreTrainedModel

from lora_plugins.errors import UnsavedTensors
from lora_plugins.models.sharding import is_adapter_tensor
from lora_plugins.models.wrapping import base_of

__all__ = [
    "allow_unsaved",
    "check_everything_is_saved",
    "find_unsaved",
    "find_wrapper",
    "guard_saving",
    "is_local_path",
    "is_vocabulary_grown",
    "release_saving",
    "save_pretrained",
]


#: Set on a model whose user has switched the check off.
_ALLOWED = "lora_plugins_unsaved_allowed"


def guard_saving(model: Any) -> None:
    """Let a prepared model, and the base model in it, save what was trained.

    ``save_pretrained`` of the model decides about embeddings without asking the Hub and fails where a trained tensor
    is in no file; its card names no local folder. ``save_pretrained`` of the base model, which users still hold in a
    variable, saves the adapters, too, as long as they are in it: PEFT's layers would otherwise be written into a file
    that loads as random weights.

    Args:
        model: What was prepared. A model without PEFT's wrapper stays as it is.
    """
    if not isinstance(model, PeftModel):
        return
    base: Any = model.get_base_model()
    # A bound method is pickled as its object and its name, so these must be called what they stand in for.
    model.save_pretrained = types.MethodType(save_pretrained, model)
    model.create_or_update_model_card = types.MethodType(create_or_update_model_card, model)
    if hasattr(type(base), "save_pretrained"):
        base.save_pretrained = types.MethodType(_BaseSaving.save_pretrained, model)


def release_saving(base: nn.Module) -> None:
    """Let a base model that has left its PEFT wrapper save itself again, and hold that wrapper no longer."""
    vars(base).pop("save_pretrained", None)


def find_wrapper(base: nn.Module) -> PeftModel | None:
    """Return the PEFT model that a base model was wrapped in by an earlier preparation and still is, else ``None``."""
    owner = getattr(vars(base).get("save_pretrained"), "__self__", None)
    wrapped = isinstance(owner, PeftModel) and any(isinstance(module, BaseTunerLayer) for module in base.modules())
    return owner if wrapped else None


def save_pretrained(model: PeftModel, save_directory: Any, *args: Any, **kwargs: Any) -> None:
    """Save as `peft.PeftModel` does, which every argument belongs to.

    Raises:
        UnsavedTensors: The files are written, and a tensor that is trained is in none of them.
    """
    # PEFT 0.21 asks the Hub for the base's configuration at each save, and leaves out the rows of a resized embedding
    # where it gets no answer: https://github.com/huggingface/peft/issues/1452
    if len(args) < 3 and kwargs.get("save_embedding_layers", "auto") == "auto" and not _targets_embeddings(model):
        kwargs["save_embedding_layers"] = is_vocabulary_grown(model)
    type(model).save_pretrained(model, str(save_directory), *args, **kwargs)
    if kwargs.get("selected_adapters") is None:
        check_everything_is_saved(model)


def create_or_update_model_card(model: PeftModel, output_dir: Any) -> None:
    """Write the card as `peft.PeftModel` does, without a base model that is a folder of this machine."""
    type(model).create_or_update_model_card(model, str(output_dir))
    file = Path(output_dir) / "README.md"
    card = ModelCard.load(file, ignore_metadata_errors=True)
    name = card.data.get("base_model")
    if not isinstance(name, str) or not is_local_path(name):
        return
    card.data.base_model = None
    card.data.tags = [tag for tag in card.data.tags or [] if not tag.startswith("base_model:")] or None
    card.save(file)


class _BaseSaving:
    """Holds the function that stands in for the base model's ``save_pretrained``."""

    @staticmethod
    def save_pretrained(model: PeftModel, save_directory: Any, *args: Any, **kwargs: Any) -> Any:
        """Save the adapters while they are in the base model, else the base model."""
        base: Any = model.get_base_model()
        if any(isinstance(module, BaseTunerLayer) for module in base.modules()):
            return model.save_pretrained(save_directory, *args, **kwargs)
        return type(base).save_pretrained(base, save_directory, *args, **kwargs)


def check_everything_is_saved(model: nn.Module) -> None:
    """Raise `UnsavedTensors` if PEFT's files would lack a tensor that is trained."""
    unsaved = find_unsaved(model)
    if not unsaved or vars(model).get(_ALLOWED, False):
        return
    modules = sorted({name.rpartition(".")[0].rpartition(".")[2] for name in unsaved})
    raise UnsavedTensors(
        f"{len(unsaved)} tensors are trained and PEFT writes them into none of its files, first {unsaved[0]}: the "
        f"adapter would be loaded without them. Add modules_to_save={modules!r} to the LoRA arguments, which trains "
        "and saves whole modules, or freeze these tensors."
    )


def allow_unsaved(model: nn.Module) -> None:
    """Let a model be saved without some of its trained tensors: its user has switched the check off."""
    setattr(model, _ALLOWED, True)


def find_unsaved(model: Any) -> list[str]:
    """Return the names of trained parameters that no adapter's file holds; none for a model without adapters of PEFT.

    A plain model is saved whole, by its own ``save_pretrained``.
    """
    if not isinstance(model, PeftModel) or getattr(model, "_tp_size", None):
        # Tensor parallelism gathers copies, and its own checks compare them.
        return []
    named = list(model.named_parameters(remove_duplicate=False))
    state = {name: p for name, p in named if p.requires_grad or is_adapter_tensor(name)}
    state |= dict(model.named_buffers())
    saved: set[int] = set()
    for name in model.peft_config:
        saved |= {id(value) for value in _select_state(model, name, state).values()}
    if _targets_embeddings(model) or is_vocabulary_grown(model):
        layers = (model.get_input_embeddings(), model.get_output_embeddings())
        saved |= {id(p) for layer in layers if layer is not None for p in layer.parameters()}
    return [name for name, p in model.named_parameters() if p.requires_grad and id(p) not in saved]


def _select_state(model: PeftModel, adapter_name: str, state: Mapping[str, Any]) -> dict[str, Any]:
    """Return what an adapter's file holds of a state, the very same tensors."""
    if model.peft_config[adapter_name].peft_type != PeftType.LORA:
        # Other methods copy and cut what they save.
        prefix = getattr(model.base_model, "prefix", "prompt_encoder")
        return {name: p for name, p in state.items() if prefix in name or is_adapter_tensor(name)}
    selected: dict[str, Any] = get_peft_model_state_dict(
        model, dict(state), adapter_name=adapter_name, save_embedding_layers=False
    )
    return selected


def is_local_path(name: str) -> bool:
    """Whether a base model's name means a folder of this machine and not a repository of the Hub."""
    return name.startswith((".", "~", "/")) or "\\" in name or name.count("/") > 1 or Path(name).is_dir()


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

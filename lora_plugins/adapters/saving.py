"""Save a prepared model: all trained tensors, no local path, no network."""

from __future__ import annotations

import json
import re
import types
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import ModelCard, try_to_load_from_cache
from peft import PeftModel, PeftType, get_peft_model_state_dict
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME
from peft.utils.other import match_target_against_key
from peft.utils.save_and_load import EMBEDDING_LAYER_NAMES
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import PreTrainedModel
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from lora_plugins.adapters.lineage.recording import write_lineage
from lora_plugins.errors import UnsavedTensors
from lora_plugins.models.sharding import is_adapter_tensor, is_sharded
from lora_plugins.models.wrapping import base_of
from registry import InvalidAdapter, changes_base, is_path, make_plain

__all__ = [
    "allow_unsaved",
    "check_everything_is_saved",
    "find_plain_state",
    "find_unsaved",
    "find_wrapper",
    "guard_saving",
    "is_local_path",
    "release_saving",
    "save_pretrained",
    "saves_embeddings",
]


#: Name of a folder from which a Trainer resumes.
_CHECKPOINT = re.compile(rf"{PREFIX_CHECKPOINT_DIR}-\d+")
#: Fields of a configuration that change when an adapter becomes plain LoRA.
_OF_INITIALIZATION = (
    "alpha_pattern",
    "corda_config",
    "init_lora_weights",
    "loftq_config",
    "lora_alpha",
    "lora_ga_config",
    "r",
    "rank_pattern",
)
#: Attribute set on a model whose user has switched the check off.
_ALLOWED = "lora_plugins_unsaved_allowed"


def guard_saving(model: Any) -> None:
    """Make a prepared model, and the base model in it, save everything that was trained.

    ``save_pretrained`` of the model decides about embeddings without asking the Hub and fails if a trained tensor is
    missing from the files; the model card names no local folder. ``save_pretrained`` of the base model, which users
    may still hold in a variable, saves the adapters as long as the base contains them. Otherwise it would write
    PEFT's layers into a file that loads as random weights (PEFT 0.21.2, transformers 5.23).

    Args:
        model: The prepared model. A model without PEFT's wrapper is left unchanged.
    """
    if not isinstance(model, PeftModel):
        return
    base: Any = model.get_base_model()
    # A bound method is pickled as its object and its name, so each function has the name of the method it replaces.
    model.save_pretrained = types.MethodType(save_pretrained, model)
    model.create_or_update_model_card = types.MethodType(create_or_update_model_card, model)
    if hasattr(type(base), "save_pretrained"):
        base.save_pretrained = types.MethodType(_BaseSaving.save_pretrained, model)


def release_saving(base: nn.Module) -> None:
    """Restore the own ``save_pretrained`` of a base model that has left its PEFT wrapper, and release the wrapper."""
    vars(base).pop("save_pretrained", None)


def find_wrapper(base: nn.Module) -> PeftModel | None:
    """Return the PEFT model that an earlier preparation put around a base that still has adapters, else ``None``."""
    owner = getattr(vars(base).get("save_pretrained"), "__self__", None)
    wrapped = isinstance(owner, PeftModel) and any(isinstance(module, BaseTunerLayer) for module in base.modules())
    return owner if wrapped else None


def save_pretrained(model: PeftModel, save_directory: Any, *args: Any, **kwargs: Any) -> None:
    """Save as ``save_pretrained`` of `peft.PeftModel` does, with the same arguments.

    An adapter whose initialization changed the base is saved as plain LoRA for the base's own weights, unless the
    folder is a Trainer's checkpoint, from which the training resumes.

    Raises:
        UnsavedTensors: The files are written, and a trained tensor is in none of them; or an initialization changed the
            base and cannot be undone here.
    """
    # PEFT 0.21.2 asks the Hub for the base's configuration at each save, and leaves out the rows of a resized embedding
    # if it gets no answer: https://github.com/huggingface/peft/issues/1452
    if len(args) < 3 and kwargs.get("save_embedding_layers", "auto") == "auto" and not _targets_embeddings(model):
        kwargs["save_embedding_layers"] = saves_embeddings(model)
    type(model).save_pretrained(model, str(save_directory), *args, **kwargs)
    if kwargs.get("path_initial_model_for_weight_conversion") is None and kwargs.get("is_main_process", True):
        names = kwargs.get("selected_adapters") or list(model.peft_config)
        _make_files_plain(model, Path(save_directory), names)
        write_lineage(model, Path(save_directory), names)
    if kwargs.get("selected_adapters") is None:
        check_everything_is_saved(model)


def find_plain_state(
    model: PeftModel, adapter_name: str, folder: Path, state: dict[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    """Return the tensors that `save_pretrained` writes into a folder, given those of the adapter in the model."""
    return make_plain(model, adapter_name, state)[0] if _is_saved_plain(model, adapter_name, folder) else state


def _is_saved_plain(model: PeftModel, adapter_name: str, folder: Path) -> bool:
    init = getattr(model.peft_config[adapter_name], "init_lora_weights", True)
    return changes_base(init) and not is_sharded(model) and _CHECKPOINT.fullmatch(folder.name) is None


def _make_files_plain(model: PeftModel, folder: Path, names: Sequence[str]) -> None:
    """Replace the files of adapters whose initialization changed the base by plain LoRA with the same effect."""
    for name in names:
        place = folder if name == "default" else folder / name
        weights, settings = place / SAFETENSORS_WEIGHTS_NAME, place / CONFIG_NAME
        if not _is_saved_plain(model, name, folder) or not weights.is_file():
            continue
        try:
            state, config = make_plain(model, name, load_file(weights))
        except InvalidAdapter as error:
            raise UnsavedTensors(
                f"{error} The files in {place} are written, and hold the adapter for the changed base only."
            ) from error
        save_file({key: value.contiguous() for key, value in state.items()}, weights, metadata={"format": "pt"})
        made = config.to_dict()
        written = json.loads(settings.read_text(encoding="utf-8"))
        plain = {key: made[key] for key in _OF_INITIALIZATION if key in made}
        settings.write_text(json.dumps({**written, **plain}, indent=2, sort_keys=True), encoding="utf-8")


def create_or_update_model_card(model: PeftModel, output_dir: Any) -> None:
    """Write the card as `peft.PeftModel` does, but without a base model that is a local folder."""
    # PEFT 0.21.2 writes the path into the card, and the Hub then rejects it:
    # https://github.com/huggingface/transformers/issues/33922
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
    """Namespace of the function that replaces the base model's ``save_pretrained``."""

    @staticmethod
    def save_pretrained(model: PeftModel, save_directory: Any, *args: Any, **kwargs: Any) -> Any:
        """Save the adapters if the base model contains any, else the base model."""
        base: Any = model.get_base_model()
        if any(isinstance(module, BaseTunerLayer) for module in base.modules()):
            return model.save_pretrained(save_directory, *args, **kwargs)
        return type(base).save_pretrained(base, save_directory, *args, **kwargs)


def check_everything_is_saved(model: nn.Module) -> None:
    """Raise `UnsavedTensors` if PEFT's files would lack a trained tensor."""
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
    """Switch off the check that all trained tensors of a model are saved."""
    setattr(model, _ALLOWED, True)


def find_unsaved(model: Any) -> list[str]:
    """Return the names of the trained parameters that no adapter file contains.

    Empty for a model without PEFT's wrapper, whose own ``save_pretrained`` saves everything.
    """
    if not isinstance(model, PeftModel) or getattr(model, "_tp_size", None):
        # Tensor parallelism saves gathered copies, which have their own checks.
        return []
    named = list(model.named_parameters(remove_duplicate=False))
    state = {name: p for name, p in named if p.requires_grad or is_adapter_tensor(name)}
    state |= dict(model.named_buffers())
    saved: set[int] = set()
    for name in model.peft_config:
        saved |= {id(value) for value in _select_state(model, name, state).values()}
    if _targets_embeddings(model) or saves_embeddings(model):
        layers = (model.get_input_embeddings(), model.get_output_embeddings())
        saved |= {id(p) for layer in layers if layer is not None for p in layer.parameters()}
    return [name for name, p in model.named_parameters() if p.requires_grad and id(p) not in saved]


def _select_state(model: PeftModel, adapter_name: str, state: Mapping[str, Any]) -> dict[str, Any]:
    """Return the entries of a state that an adapter's file would contain, as the same tensor objects."""
    if model.peft_config[adapter_name].peft_type != PeftType.LORA:
        # Other methods copy or slice the tensors that they save.
        prefix = getattr(model.base_model, "prefix", "prompt_encoder")
        return {name: p for name, p in state.items() if prefix in name or is_adapter_tensor(name)}
    selected: dict[str, Any] = get_peft_model_state_dict(
        model, dict(state), adapter_name=adapter_name, save_embedding_layers=False
    )
    return selected


def is_local_path(name: str) -> bool:
    """Whether a base model's name is a local folder instead of a Hub repository."""
    return is_path(name) or name.count("/") > 1 or Path(name).is_dir()


def _targets_embeddings(model: PeftModel) -> bool:
    """Whether an adapter targets embeddings, which PEFT then saves without asking the Hub."""
    names = [path for path, _ in base_of(model).named_modules() if path.rpartition(".")[2] in EMBEDDING_LAYER_NAMES]
    targets = [getattr(config, "target_modules", None) for config in model.peft_config.values()]
    for target in targets:
        if isinstance(target, str):
            if any(match_target_against_key(target, name) for name in names):
                return True
        elif any(name in (target or ()) for name in EMBEDDING_LAYER_NAMES):
            return True
    return False


def saves_embeddings(model: Any) -> bool:
    """Whether the embeddings are saved whole: they have rows that the base's checkpoint lacks and no adapter holds.

    Reads local files only.

    Args:
        model: A `peft.PeftModel`.

    Returns:
        False if the base was not loaded, or its configuration is neither in its folder nor in the Hub's cache.
    """
    base: Any = base_of(model)
    before, now = _find_vocabulary_before(base), _read_vocabulary(getattr(base, "config", None))
    if before is None or now is None or before == now:
        return False
    return now < before or not _are_rows_trained(model, base, set(range(before, now)))


def _are_rows_trained(model: PeftModel, base: Any, rows: set[int]) -> bool:
    """Whether every adapter holds these rows of the input embedding, and of an output head with a weight of its own."""
    tied = getattr(base.config.get_text_config(), "tie_word_embeddings", False)
    layers = [base.get_input_embeddings(), *([] if tied else [base.get_output_embeddings()])]
    held = [getattr(layer, "token_adapter", None) for layer in layers if layer is not None]
    return all(
        wrapper is not None and rows <= set(wrapper.token_indices.get(name, ()))
        for wrapper in held
        for name in model.peft_config
    )


def _find_vocabulary_before(base: Any) -> int | None:
    """Return the vocabulary size in the configuration that a base was loaded with, ``None`` if it is not at hand."""
    folder = _find_checkpoint(base.config) if isinstance(base, PreTrainedModel) else None
    if folder is None:
        return None
    try:
        return _read_vocabulary(type(base.config).from_pretrained(folder, local_files_only=True))
    except (OSError, ValueError, TypeError):
        return None


def _read_vocabulary(config: Any) -> int | None:
    return getattr(config.get_text_config(), "vocab_size", None) if config is not None else None


def _find_checkpoint(config: Any) -> Path | None:
    """Return the folder of the configuration that a model was loaded with: its own, or one in the Hub's cache."""
    name = getattr(config, "name_or_path", None)
    if not name:
        return None
    if (Path(name) / "config.json").is_file():
        return Path(name)
    try:
        file = try_to_load_from_cache(name, "config.json", revision=getattr(config, "_commit_hash", None))
    except ValueError:
        # The name is neither an existing folder nor a valid repository id.
        return None
    return Path(file).parent if isinstance(file, str) else None

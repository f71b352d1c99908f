"""Load the base model in the class, size and dtype that an adapter needs."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import transformers
from torch import nn
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel
from transformers.models.auto import modeling_auto

from lora_plugins.errors import MergeError, UntrainableFormat
from lora_plugins.merging.job import Job
from lora_plugins.merging.names import base_name, place_of
from lora_plugins.quantization.dequantization import dequantize_model
from lora_plugins.quantization.formats import check_config, read_method
from lora_plugins.quantization.marks import forget_unpacking
from lora_plugins.quantization.request import detect_quantization, is_float
from lora_plugins.text import one_line

__all__ = [
    "LoadedBase",
    "choose_class",
    "fit_vocabulary",
    "is_quantized",
    "load_base",
    "make_empty",
    "read_config",
    "trained_tokens",
]


#: Mapping of transformers with the classes for each task of PEFT. Other classes are found by the tensors' names.
_TASKS = {
    "CAUSAL_LM": "MODEL_FOR_CAUSAL_LM_MAPPING",
    "SEQ_2_SEQ_LM": "MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING",
    "SEQ_CLS": "MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING",
    "TOKEN_CLS": "MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING",
    "QUESTION_ANS": "MODEL_FOR_QUESTION_ANSWERING_MAPPING",
    "FEATURE_EXTRACTION": "MODEL_MAPPING",
}

_T = TypeVar("_T")


@dataclass(frozen=True)
class LoadedBase:
    """A base model without the adapter.

    Attributes:
        model: The model.
        stored_quantized: Whether its files are quantized.
        notes: Sentences about weights that were filled in.
        fresh: Names of weights that are in neither the base's files nor the adapter.
    """

    model: PreTrainedModel
    stored_quantized: bool
    notes: tuple[str, ...] = ()
    fresh: frozenset[str] = frozenset()


def read_config(job: Job) -> PreTrainedConfig:
    """Read the base model's configuration.

    Raises:
        MergeError: It cannot be read.
    """
    return _load_from_base(job, lambda: AutoConfig.from_pretrained(job.base, revision=job.revision or "main"))


def is_quantized(config: PreTrainedConfig) -> bool:
    """Whether a configuration declares the stored weights as quantized."""
    return getattr(config, "quantization_config", None) is not None


def load_base(job: Job, dtype: torch.dtype | str, *, dequantize: bool = True) -> LoadedBase:
    """Load the base model in the form that an adapter was trained on.

    Args:
        job: Adapter and base.
        dtype: Dtype of the weights, ``"auto"`` for the one that the base is stored in.
        dequantize: Whether to dequantize a base whose files are quantized.

    Raises:
        MergeError: The base cannot be loaded, or weights of the trained model are in neither base nor adapter.
    """
    config = read_config(job)
    _check_stored(job, config)
    made = choose_class(job, config)
    stored_quantized = is_quantized(config)

    def load() -> Any:
        # A head of a different size is loaded from the adapter's file.
        return made.from_pretrained(
            job.base,
            revision=job.revision or "main",
            config=config,
            dtype=dtype,
            output_loading_info=True,
            ignore_mismatched_sizes=True,
        )

    model, info = _load_from_base(job, load)
    mismatched = {entry[0] if isinstance(entry, tuple) else entry for entry in info["mismatched_keys"]}
    fresh = (set(info["missing_keys"]) | mismatched) - {base_name(name) for name in job.shapes}
    notes = list(_check_complete(model, sorted(fresh), other_shape=bool(fresh & mismatched)))
    quantized = detect_quantization(model) is not None
    if not quantized and not is_float(model):
        raise MergeError(_ask_for_float_twin(job, "its layers are of a kind that no registered backend reads"))
    if not quantized:
        forget_unpacking(model)
    if quantized and dequantize:
        wanted = dtype if isinstance(dtype, torch.dtype) else None
        dequantize_model(model, wanted)
        if wanted is not None:
            model.to(wanted)
    notes += fit_vocabulary(job, model)
    return LoadedBase(model, stored_quantized, tuple(notes), frozenset(fresh))


def make_empty(job: Job, config: PreTrainedConfig) -> PreTrainedModel:
    """Return the base on the meta device, in the class and size that an adapter needs.

    Raises:
        MergeError: transformers has no class for this configuration.
    """
    made = choose_class(job, config)
    empty = _make_empty(made, config)
    if empty is None:
        raise MergeError(f"{made.__name__} cannot be made from the configuration of {job.base}.")
    rows = _count_rows_needed(job, empty)
    if rows is not None:
        empty.resize_token_embeddings(rows, mean_resizing=False)
    return empty


def choose_class(job: Job, config: PreTrainedConfig) -> type[PreTrainedModel]:
    """Return the model class that has a module for each tensor of the adapter.

    Candidates in order: the class that the manifest names, the one in PEFT's ``auto_mapping``, those of the adapter's
    task, the base's own, every other one that transformers has for this configuration. The first class with a module
    for every tensor wins, else the first with the most. If the file has a head of a different size, it sets the
    number of labels in ``config``.

    Raises:
        MergeError: transformers has no class for this configuration.
    """
    best: tuple[int, type[PreTrainedModel]] | None = None
    for made in dict.fromkeys(_find_candidates(job, config)):
        empty = _make_empty(made, config)
        if empty is None:
            continue
        placed = _count_placed(job, empty)
        if best is None or placed > best[0]:
            best = placed, made
        if placed == len(job.shapes):
            break
    if best is None:
        raise MergeError(f"transformers has no class for the base {job.base}, a {config.model_type!r}.")
    _set_labels(job, _make_empty(best[1], config), config)
    return best[1]


def _find_candidates(job: Job, config: PreTrainedConfig) -> Iterator[type[PreTrainedModel]]:
    noted = (job.config.auto_mapping or {}).get("base_model_class")
    for name in (job.class_name, noted):
        yield from _find_named(name)
    task = _TASKS.get(str(job.config.task_type or ""))
    if task:
        yield from _find_mapped(task, config)
    for name in config.architectures or ():
        yield from _find_named(name)
    for mapping in sorted(vars(modeling_auto)):
        if mapping.startswith("MODEL_") and mapping.endswith("_MAPPING"):
            yield from _find_mapped(mapping, config)


def _find_named(name: object) -> Iterator[type[PreTrainedModel]]:
    found = getattr(transformers, name, None) if isinstance(name, str) and name.isidentifier() else None
    if isinstance(found, type) and issubclass(found, PreTrainedModel):
        yield found


def _find_mapped(mapping: str, config: PreTrainedConfig) -> Iterator[type[PreTrainedModel]]:
    found = getattr(modeling_auto, mapping).get(type(config), None)
    yield from found if isinstance(found, (tuple, list)) else [found] if found else []


def _make_empty(made: type[PreTrainedModel], config: PreTrainedConfig) -> PreTrainedModel | None:
    """Make a model on the meta device; ``None`` if the class does not accept this configuration."""
    with warnings.catch_warnings(), torch.device("meta"):
        warnings.simplefilter("ignore")
        try:
            return made(copy.deepcopy(config))
        except Exception:
            # A constructor may raise anything for another model's configuration.
            return None


def _count_placed(job: Job, empty: nn.Module) -> int:
    places = {name for name, _ in empty.named_modules()}
    return sum(place_of(name) in places for name in job.shapes)


def _set_labels(job: Job, empty: Any, config: Any) -> None:
    """Set the configuration's number of labels to the rows of the head in the adapter's file."""
    own = dict(empty.named_parameters())
    labels = getattr(config, "num_labels", None)
    for name, shape in job.shapes.items():
        here = own.get(base_name(name))
        if here is None or not shape or here.shape == shape or here.shape[0] != labels or here.shape[1:] != shape[1:]:
            continue
        if not _is_end(empty, place_of(name)):
            config.num_labels = shape[0]
            return


def _is_end(model: Any, place: str) -> bool:
    """Whether a module is the input or output embedding."""
    return model.get_submodule(place) in _find_ends(model)


def _find_ends(model: Any) -> list[Any]:
    found: list[Any] = []
    for get in ("get_input_embeddings", "get_output_embeddings"):
        try:
            end = getattr(model, get)()
        except (AttributeError, NotImplementedError):
            continue
        if isinstance(end, nn.Module):
            found.append(end)
    return found


def _check_complete(model: PreTrainedModel, fresh: list[str], *, other_shape: bool) -> Iterator[str]:
    """Refuse a head that loading initialized at random and that is not in the adapter.

    Yields:
        A note, if the random weights were random in training as well.

    Raises:
        MergeError: There is such a head; the message names the weights.
    """
    if not fresh:
        return
    text = f"{len(fresh)} weights of {type(model).__name__} are in neither base nor adapter, first {fresh[0]}"
    if other_shape or model.base_model is not model:
        raise MergeError(
            f"{text}. In training they had random values that nobody saved, so the trained model cannot be put "
            "together again. Train them with modules_to_save, or name the base that has them with base= (--base)."
        )
    yield f"{text}: they are random, as they were in training"


def _check_stored(job: Job, config: PreTrainedConfig) -> None:
    """Refuse a base in a format that nothing here dequantizes, before its weights are read.

    Raises:
        MergeError: The format is one that adapters cannot be trained on, or that is not known.
    """
    try:
        check_config(config)
    except UntrainableFormat as error:
        method = read_method(getattr(config, "quantization_config", None))
        raise MergeError(_ask_for_float_twin(job, f"nothing here reads quant_method {method!r}")) from error


def _ask_for_float_twin(job: Job, reason: str) -> str:
    return (
        f"The base {job.base} is stored quantized and cannot be dequantized here: {reason}. Name the float model that "
        "it was made from with base= (--base)."
    )


def _count_rows_needed(job: Job, model: Any) -> int | None:
    """Return how many rows the embeddings had in training, ``None`` if there is no sign of a different number."""
    ends = [end for end in _find_ends(model) if hasattr(end, "weight")]
    if not ends:
        return None
    names = {id(module): name for name, module in model.named_modules()}
    for end in ends:
        stored = [_read_rows(name, shape) for name, shape in job.shapes.items() if place_of(name) == names.get(id(end))]
        found = next((count for count in stored if count is not None), None)
        if found is not None and found != end.weight.shape[0]:
            return found
    rows = int(ends[0].weight.shape[0])
    last = max(trained_tokens(job), default=-1)
    # The manifest's size counts only if the adapter contains new rows: no other file has them.
    return max(job.vocabulary or 0, last + 1) if last >= rows else None


def _read_rows(name: str, shape: tuple[int, ...]) -> int | None:
    if "lora_embedding_A" in name:
        return shape[1]
    if "lora_B" in name and name.endswith("weight"):
        return shape[0]
    return shape[0] if "lora_" not in name and "trainable_tokens" not in name and len(shape) == 2 else None


def fit_vocabulary(job: Job, model: Any) -> list[str]:
    """Give the embeddings of a loaded base the rows that they had in training, for tokens that were added there.

    Returns:
        Sentences about rows that are in no file.
    """
    rows = _count_rows_needed(job, model)
    return [] if rows is None else list(_resize(job, model, rows))


def trained_tokens(job: Job) -> list[int]:
    """Return the ids of the tokens that were trained with ``trainable_token_indices``."""
    asked = job.config.trainable_token_indices
    lists = asked.values() if isinstance(asked, dict) else [asked or []]
    return sorted({int(index) for part in lists for index in part})


def _resize(job: Job, model: Any, rows: int) -> Iterator[str]:
    """Resize the embeddings to the rows they had in training; rows that are in no file get the mean of the others."""
    before = int(_find_ends(model)[0].weight.shape[0])
    model.resize_token_embeddings(rows, mean_resizing=False)
    known = set(trained_tokens(job))
    names = {id(module): name for name, module in model.named_modules()}
    stored = {base_name(name) for name in job.shapes}
    saved = [end.weight for end in _find_ends(model) if f"{names[id(end)]}.weight" in stored]
    trained = {place_of(name) for name in job.shapes if "trainable_tokens" in name}
    with_tokens = [end.weight for end in _find_ends(model) if names[id(end)] in trained]
    for end in _find_ends(model):
        # An untied head has no rows of tokens that were trained in the embedding alone.
        held = known if any(end.weight is weight for weight in with_tokens) else set()
        left = [row for row in range(before, rows) if row not in held]
        if not left or any(end.weight is weight for weight in saved):
            continue
        with torch.no_grad():
            end.weight[left] = end.weight[:before].float().mean(0).to(end.weight.dtype)
        saved.append(end.weight)
        yield f"{len(left)} rows that training added to {names[id(end)]} are in no file and hold the mean of the others"


def _load_from_base(job: Job, load: Callable[[], _T]) -> _T:
    try:
        return load()
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        text = one_line(error)
        raise MergeError(f"The base model {job.base} cannot be loaded: {text}") from error
    except (ImportError, NotImplementedError) as error:
        text = one_line(error) or type(error).__name__
        raise MergeError(_ask_for_float_twin(job, text)) from error

"""Find a base model's transformers class; build it without weights."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from registry.errors import BaseMismatch

if TYPE_CHECKING:
    from torch import nn
    from transformers import PretrainedConfig

__all__ = ["config_of", "empty_model", "find_classes", "rows_of_embedding", "with_labels"]

#: PEFT task types that add a head to the base, with the transformers tables of the classes that have it. The classes
#: of sounds and images have tables of their own, and no task type of their own.
_HEADS = {
    "SEQ_CLS": (
        "MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING",
        "MODEL_FOR_AUDIO_CLASSIFICATION_MAPPING",
        "MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING",
        "MODEL_FOR_VIDEO_CLASSIFICATION_MAPPING",
    ),
    "TOKEN_CLS": ("MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING", "MODEL_FOR_AUDIO_FRAME_CLASSIFICATION_MAPPING"),
    "QUESTION_ANS": (
        "MODEL_FOR_QUESTION_ANSWERING_MAPPING",
        "MODEL_FOR_DOCUMENT_QUESTION_ANSWERING_MAPPING",
        "MODEL_FOR_VISUAL_QUESTION_ANSWERING_MAPPING",
    ),
}
#: The other task types. A base saved with its own head names its class in its configuration.
_WITHOUT_HEADS = {
    "CAUSAL_LM": "MODEL_FOR_CAUSAL_LM_MAPPING",
    "SEQ_2_SEQ_LM": "MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING",
}
#: Building a model on the meta device takes time per module; the largest published models have about 100,000.
_MOST_MODULES = 200_000
_MOST_LAYERS = 2_000
_MOST_LABELS = 10_000_000
_LAYERS = ("layer", "block", "depth")


def find_classes(class_name: str | None, task_type: str | None, config: PretrainedConfig) -> list[Any]:
    """Return the candidate classes of a base model, the likeliest first.

    The order is: the class it was trained as; the task's class, if the task adds a head; the class named in the base's
    configuration; the task's class for other tasks; the model without a head.

    Names are looked up only among the models of transformers.
    """
    found = [
        _find_by_name(class_name),
        *(_find_by_task(table, config) for table in _HEADS.get(task_type or "", ())),
        *(_find_by_name(name) for name in config.architectures or ()),
        _find_by_task(_WITHOUT_HEADS.get(task_type or ""), config),
        _find_by_task("MODEL_MAPPING", config),
    ]
    return list(dict.fromkeys(cls for cls in found if cls is not None))


def _find_by_name(name: str | None) -> Any:
    import transformers

    found = getattr(transformers, name, None) if isinstance(name, str) and name.isidentifier() else None
    return found if isinstance(found, type) and issubclass(found, transformers.PreTrainedModel) else None


def _find_by_task(table: str | None, config: PretrainedConfig) -> Any:
    import transformers

    try:
        found = getattr(transformers, table)[type(config)] if table else None
    except KeyError:
        return None
    return found[0] if isinstance(found, tuple) else found


def config_of(model_class: Any, config: PretrainedConfig) -> PretrainedConfig:
    """Return the configuration for a class: the text part of a composite one for a text-only class."""
    text = config.get_text_config()
    return text if text is not config and type(text) is model_class.config_class else config


def with_labels(config: PretrainedConfig, model_class: Any, shapes: Mapping[str, tuple[int, ...]]) -> PretrainedConfig:
    """Return a configuration with the number of labels of a trained head.

    Building the model with one more label shows which axis of which parameter depends on the number of labels.

    Args:
        config: Configuration of the base.
        model_class: The class.
        shapes: Shapes of the trained parameters, by their names in the model.
    """
    more = copy.deepcopy(config)
    more.num_labels = config.num_labels + 1
    one = _read_shapes(empty_model(config, model_class))
    try:
        other = _read_shapes(empty_model(more, model_class))
    except BaseMismatch:
        # Some heads have a fixed number of labels, such as DistilBERT's for answers in a text.
        return config
    found = set()
    for name in one.keys() & other.keys() & shapes.keys():
        axes = [axis for axis, (a, b) in enumerate(zip(one[name], other[name], strict=False)) if a != b]
        if len(axes) == 1 and len(shapes[name]) == len(one[name]):
            found.add(config.num_labels + shapes[name][axes[0]] - one[name][axes[0]])
    if len(found) != 1 or not 0 < (labels := found.pop()) <= _MOST_LABELS or labels == config.num_labels:
        return config
    changed = copy.deepcopy(config)
    changed.num_labels = labels
    return changed


def _read_shapes(model: nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(parameter.shape) for name, parameter in model.named_parameters(remove_duplicate=False)}


def empty_model(config: PretrainedConfig, model_class: Any) -> nn.Module:
    """Build a model from a configuration on the meta device.

    Raises:
        BaseMismatch: transformers cannot build the class from this configuration, or it has too many modules.
    """
    import torch

    _check_layers(config)
    try:
        with torch.device("meta"), _limit_modules():
            # A copy, because PEFT 0.21.2 changes the configuration if an adapter replicates layers.
            made: nn.Module = model_class(copy.deepcopy(config))
            return made
    except Exception as error:
        # A model's constructor may raise anything for another model's configuration.
        first = str(error).splitlines()[0][:200] if str(error) else type(error).__name__
    raise BaseMismatch(
        f"The base is a model of type {config.model_type!r}, of which transformers cannot make a "
        f"{model_class.__name__}: {first}"
    )


def _check_layers(config: PretrainedConfig) -> None:
    """Refuse an implausible number of layers before the model is built, which would take hours."""
    values: list[tuple[str, Any]] = list(config.to_dict().items())
    while values:
        key, value = values.pop()
        if isinstance(value, dict):
            values += [(str(inner), item) for inner, item in value.items()]
        length = len(value) if isinstance(value, (list, tuple)) else value
        if type(length) is int and length > _MOST_LAYERS and any(part in key for part in _LAYERS) and "size" not in key:
            raise BaseMismatch(
                f"The base's configuration has {key} of {str(length)[:20]}; a model with more than {_MOST_LAYERS:,} "
                "layers is not checked"
            )


@contextmanager
def _limit_modules() -> Iterator[None]:
    from torch.nn.modules.module import register_module_module_registration_hook

    count = 0

    def add(*_: Any) -> None:
        nonlocal count
        count += 1
        if count > _MOST_MODULES:
            raise OverflowError(f"it has more than {_MOST_MODULES:,} modules")

    handle = register_module_module_registration_hook(add)
    try:
        yield
    finally:
        handle.remove()


def rows_of_embedding(model: nn.Module) -> int | None:
    """Return the number of rows of a model's input embedding; ``None`` for a model without one."""
    try:
        weight = model.get_input_embeddings().weight  # type: ignore[operator]
    except (AttributeError, NotImplementedError):
        return None
    return int(weight.shape[0])

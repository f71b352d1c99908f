"""The class of transformers that a base model has, and an instance of it without weights."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from registry.errors import BaseMismatch

if TYPE_CHECKING:
    from torch import nn
    from transformers import PretrainedConfig

__all__ = ["empty_model", "model_class"]

#: PEFT's tasks, and the auto classes of transformers that make models for them.
_AUTO = {
    "CAUSAL_LM": "AutoModelForCausalLM",
    "SEQ_2_SEQ_LM": "AutoModelForSeq2SeqLM",
    "SEQ_CLS": "AutoModelForSequenceClassification",
    "TOKEN_CLS": "AutoModelForTokenClassification",
    "QUESTION_ANS": "AutoModelForQuestionAnswering",
    "FEATURE_EXTRACTION": "AutoModel",
}


def model_class(class_name: str | None, task_type: str | None, config: PretrainedConfig) -> Any:
    """The class to load a base model with: the one it was trained as, else that of its task, else its own.

    A name is looked up among the models of transformers and nowhere else.
    """
    import transformers

    for name in (class_name, _AUTO.get(task_type or ""), *(config.architectures or ())):
        found = getattr(transformers, name, None) if name and name.isidentifier() else None
        if isinstance(found, type) and (issubclass(found, transformers.PreTrainedModel) or name in _AUTO.values()):
            return found
    return transformers.AutoModel


def empty_model(config: PretrainedConfig, class_name: str | None, task_type: str | None) -> nn.Module:
    """A model of a configuration, on the meta device.

    Raises:
        BaseMismatch: transformers can't make that class from this configuration.
    """
    import torch

    made = model_class(class_name, task_type, config)
    try:
        with torch.device("meta"):
            return made.from_config(config) if hasattr(made, "from_config") else made(config)
    except Exception as error:
        # Whatever a model's constructor raises for a configuration that isn't its own.
        first = str(error).splitlines()[0][:200] if str(error) else type(error).__name__
    raise BaseMismatch(f"The base is a {config.model_type}, of which no {made.__name__} can be made: {first}")

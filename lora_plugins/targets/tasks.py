"""Find PEFT's task type for a model."""

from __future__ import annotations

import inspect

from torch import nn

__all__ = ["PEFT_HEADS", "task_type"]


#: Part of a model's class name, and PEFT's task type for it.
_TASKS = {
    "ForSequenceClassification": "SEQ_CLS",
    "ForTokenClassification": "TOKEN_CLS",
    "ForQuestionAnswering": "QUESTION_ANS",
}

#: Names of heads that PEFT's wrapper for a task trains and saves, as far as the model has them.
PEFT_HEADS = {
    "SEQ_CLS": ("classifier", "score"),
    "TOKEN_CLS": ("classifier", "score"),
    "QUESTION_ANS": ("qa_outputs",),
}

#: What every such wrapper passes to the model's ``forward``.
_PASSED = ("input_ids", "attention_mask", "inputs_embeds", "labels", "output_attentions", "output_hidden_states")


def task_type(model: nn.Module) -> str | None:
    """Return PEFT's task type for a model, ``None`` if none of PEFT's wrappers fits.

    A wrapper fits if the model's ``forward`` takes the arguments that it passes.
    """
    task = _read_task(model)
    return task if task is not None and _takes_all(model) else None


def _read_task(model: nn.Module) -> str | None:
    name = type(model).__name__
    for part, task in _TASKS.items():
        if part in name:
            return task
    config = getattr(model, "config", None)
    if getattr(model, "main_input_name", "input_ids") != "input_ids":
        # PEFT's wrappers for language models (0.21.2) would pass input_ids to a speech or vision model.
        return None
    if name.endswith(("ForCausalLM", "LMHeadModel")):
        return "CAUSAL_LM"
    if name.endswith("ForConditionalGeneration"):
        return "SEQ_2_SEQ_LM" if getattr(config, "is_encoder_decoder", False) else "CAUSAL_LM"
    return None


def _takes_all(model: nn.Module) -> bool:
    parameters = inspect.signature(model.forward).parameters
    anything = any(item.kind is inspect.Parameter.VAR_KEYWORD for item in parameters.values())
    # QUESTION_ANS passes start and end positions in place of labels; every such class takes them.
    return anything or all(name in parameters for name in _PASSED if name != "labels")

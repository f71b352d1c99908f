"""Name a model's task in PEFT's words."""

from __future__ import annotations

import inspect

from torch import nn

__all__ = ["PEFT_HEADS", "task_type"]


#: What the classes that PEFT has a wrapper for are called, and its word for the task.
_TASKS = {
    "ForSequenceClassification": "SEQ_CLS",
    "ForTokenClassification": "TOKEN_CLS",
    "ForQuestionAnswering": "QUESTION_ANS",
}

#: Heads that PEFT's wrapper for a task trains and saves, whichever of them a model has.
PEFT_HEADS = {
    "SEQ_CLS": ("classifier", "score"),
    "TOKEN_CLS": ("classifier", "score"),
    "QUESTION_ANS": ("qa_outputs",),
}

#: What every such wrapper passes to the model's ``forward``.
_PASSED = ("input_ids", "attention_mask", "inputs_embeds", "labels", "output_attentions", "output_hidden_states")


def task_type(model: nn.Module) -> str | None:
    """Return the task of a model in PEFT's words, ``None`` where none of PEFT's wrappers fits.

    A wrapper fits a model whose ``forward`` takes what it passes.
    """
    task = _named_task(model)
    return task if task is not None and _takes_all(model) else None


def _named_task(model: nn.Module) -> str | None:
    name = type(model).__name__
    for part, task in _TASKS.items():
        if part in name:
            return task
    config = getattr(model, "config", None)
    if getattr(model, "main_input_name", "input_ids") != "input_ids":
        # PEFT's wrappers for language models would pass input_ids to a speech or vision model.
        return None
    if name.endswith(("ForCausalLM", "LMHeadModel")):
        return "CAUSAL_LM"
    if name.endswith("ForConditionalGeneration"):
        return "SEQ_2_SEQ_LM" if getattr(config, "is_encoder_decoder", False) else "CAUSAL_LM"
    return None


def _takes_all(model: nn.Module) -> bool:
    parameters = inspect.signature(model.forward).parameters
    anything = any(item.kind is inspect.Parameter.VAR_KEYWORD for item in parameters.values())
    # QUESTION_ANS passes start and end positions in place of labels, which every such class takes with them.
    return anything or all(name in parameters for name in _PASSED if name != "labels")

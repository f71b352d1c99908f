"""What a model's class says about its task: PEFT's word for it, and the heads that are new."""

from __future__ import annotations

from torch import nn

from lora_plugins.models.structure import Structure
from lora_plugins.plugins.host import PluginHost, plugin_host
from lora_plugins.targets.candidates import find_record

__all__ = ["task_heads", "task_type"]


#: What a class name says about the task, in PEFT's words; the head is new in all of them.
_TASKS = {
    "ForSequenceClassification": "SEQ_CLS",
    "ForTokenClassification": "TOKEN_CLS",
    "ForQuestionAnswering": "QUESTION_ANS",
    "ForMultipleChoice": None,
    "ForImageClassification": None,
    "ForAudioClassification": None,
    "ForVideoClassification": None,
}


def task_heads(model: nn.Module, host: PluginHost | None = None) -> list[str]:
    """Names of the heads that a model's class adds to the pretrained part, which must be trained."""
    if not any(task in type(model).__name__ for task in _TASKS):
        return []
    record = find_record(model, host or plugin_host())
    known = record.heads if record is not None else ("score", "classifier", "qa_outputs")
    return Structure(model).task_heads(known)


def task_type(model: nn.Module) -> str | None:
    """The task of a model in PEFT's words, from its class; ``None`` where PEFT has no wrapper that fits."""
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

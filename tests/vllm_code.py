"""Ask vLLM's own code: python vllm_code.py QUESTION ARGUMENTS, in an environment with vLLM.

QUESTION is ``helper``, ``load`` or ``takes``, ARGUMENTS a JSON list of its arguments. Prints ``ANSWERS`` and a JSON
list.
"""

from __future__ import annotations

import json
import sys
from types import SimpleNamespace
from typing import Any

import torch
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from vllm.lora.lora_model import LoRAModel
from vllm.lora.peft_helper import PEFTHelper
from vllm.model_executor.models.interfaces import supports_lora
from vllm.model_executor.models.registry import ModelRegistry

#: Modules of vLLM's Llama that take an adapter.
EXPECTED = {*"q_proj k_proj v_proj o_proj gate_proj up_proj down_proj embed_tokens lm_head".split()}  # noqa: SIM905


def helper(folder: str) -> str:
    """Read and validate an adapter's configuration; return the error, empty if it is taken."""
    try:
        PEFTHelper.from_local_dir(folder, 512).validate_legal(SimpleNamespace(max_lora_rank=512))
    except Exception as error:
        return str(error) or type(error).__name__
    return ""


def load(folder: str, rows: int) -> str:
    """Do what vLLM's worker does with a Llama's adapter, up to the tensors; return the error, empty if it is loaded.

    Args:
        folder: The adapter.
        rows: Size of the base's vocabulary.
    """
    refused = helper(folder)
    if refused:
        return refused
    options: dict[str, Any] = {"lora_model_id": 1, "device": "cpu", "dtype": torch.float32, "model_vocab_size": rows}
    try:
        LoRAModel.from_local_checkpoint(folder, EXPECTED, PEFTHelper.from_local_dir(folder, 512), **options)
    except Exception as error:
        return str(error) or type(error).__name__
    return ""


def takes(kind: str) -> list[Any] | None:
    """Load the class for a type of text model, as vLLM does when it starts.

    Returns:
        Whether it takes adapters, and the names of its embeddings and heads that do; ``None`` without a class.
    """
    name = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(kind)
    found = ModelRegistry._try_load_model_cls(name) if isinstance(name, str) else None
    return None if found is None else [supports_lora(found), sorted(getattr(found, "embedding_modules", {}))]


QUESTIONS = {"helper": helper, "load": load, "takes": takes}

if __name__ == "__main__":
    ask = QUESTIONS[sys.argv[1]]
    print("ANSWERS" + json.dumps([ask(*arguments) for arguments in json.loads(sys.argv[2])]))

"""Load adapters as vLLM does: python vllm_load.py FOLDERS ROWS, in an environment with vLLM.

FOLDERS is a JSON list, ROWS the size of the base's vocabulary. Prints ``ANSWERS`` and a JSON list: empty for an adapter
that was loaded, else the error.
"""

from __future__ import annotations

import json
import sys
from types import SimpleNamespace

import torch
from vllm.lora.lora_model import LoRAModel
from vllm.lora.peft_helper import PEFTHelper

#: Modules of vLLM's Llama that take an adapter.
EXPECTED = {*"q_proj k_proj v_proj o_proj gate_proj up_proj down_proj embed_tokens lm_head".split()}  # noqa: SIM905


def load(folder: str, rows: int) -> str:
    """Do what vLLM's worker does with an adapter, up to the tensors."""
    try:
        helper = PEFTHelper.from_local_dir(folder, 512)
        helper.validate_legal(SimpleNamespace(max_lora_rank=512))
        LoRAModel.from_local_checkpoint(
            folder, EXPECTED, helper, lora_model_id=1, device="cpu", dtype=torch.float32, model_vocab_size=rows
        )
    except Exception as error:
        return str(error) or type(error).__name__
    return ""


if __name__ == "__main__":
    print("ANSWERS" + json.dumps([load(folder, int(sys.argv[2])) for folder in json.loads(sys.argv[1])]))

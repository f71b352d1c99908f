"""The size of an adapter's file."""

from __future__ import annotations

import json
from typing import Any

from peft import get_peft_model_state_dict
from peft.utils.constants import EMBEDDING_LAYER_NAMES

#: Names of float dtypes in the file's header, by size: only their length matters.
_NAMES = {8: "F64", 4: "F32", 2: "F16"}


def file_bytes(model: Any, adapter_name: str) -> int:
    """Return the bytes of the safetensors file that PEFT would write: header and tensors.

    Args:
        model: A `peft.PeftModel`, on any device.
        adapter_name: The adapter.
    """
    named = model.peft_config[adapter_name].target_modules
    # PEFT saves an embedding that it adapts; whether the vocabulary was resized it would ask the Hub.
    embeddings = bool(set(named if isinstance(named, (list, set)) else ()) & set(EMBEDDING_LAYER_NAMES))
    tensors = get_peft_model_state_dict(model, adapter_name=adapter_name, save_embedding_layers=embeddings)
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, tensor in sorted(tensors.items()):
        start, end = end, end + tensor.numel() * tensor.element_size()
        dtype = _NAMES[tensor.element_size()]
        header[name] = {"dtype": dtype, "shape": list(tensor.shape), "data_offsets": [start, end]}
    length = len(json.dumps(header, separators=(",", ":")))
    return 8 + -(-length // 8) * 8 + end

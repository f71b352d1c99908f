"""The model types whose adapters llama.cpp takes, and its order of rows."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

__all__ = ["FAMILIES", "Family"]

#: From the text configuration to the order of a module's output rows: row ``i`` of the GGUF tensor is row
#: ``order[i]`` of transformers'.
RowOrder = Callable[[Any], torch.Tensor]


@dataclass(frozen=True)
class Family:
    """One model type as llama.cpp stores it.

    The order of rows is that of ``conversion/`` in llama.cpp, which its ``convert_hf_to_gguf.py`` gives the base.

    Attributes:
        architecture: Its ``general.architecture``.
        orders: Row orders by the last part of a module's path; other modules keep theirs.
        head: Whether the output head can have an adapter. llama.cpp drops it for types that always share it with the
            input embedding.
    """

    architecture: str
    orders: Mapping[str, RowOrder] = field(default_factory=dict)
    head: bool = True


def _order_rotary(heads: int, size: int) -> torch.Tensor:
    """Return the order of ``LlamaModel.permute``: both halves of each head's rotary pairs interleaved."""
    rows = torch.arange(heads * size)
    return rows.reshape(heads, 2, size // 2).swapaxes(1, 2).reshape(-1)


def _head_size(config: Any) -> int:
    return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)


def _order_query(config: Any) -> torch.Tensor:
    return _order_rotary(config.num_attention_heads, _head_size(config))


def _order_key(config: Any) -> torch.Tensor:
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    return _order_rotary(heads, _head_size(config))


def _order_fused(config: Any) -> torch.Tensor:
    """Return the order of a fused projection whose rows are query, key and value of one head after another."""
    heads, width = config.num_attention_heads, config.hidden_size
    rows = torch.arange(3 * width)
    return rows.reshape(heads, 3, width // heads).swapaxes(0, 1).reshape(-1)


_ROTARY: Mapping[str, RowOrder] = {"q_proj": _order_query, "k_proj": _order_key}
_FUSED: Mapping[str, RowOrder] = {"query_key_value": _order_fused}

#: By ``model_type`` of the text model's configuration. Each has been run in llama.cpp by ``make test-serving``.
FAMILIES: Mapping[str, Family] = {
    "bloom": Family("bloom", _FUSED),
    "gemma": Family("gemma", head=False),
    "gemma2": Family("gemma2", head=False),
    "gemma3_text": Family("gemma3"),
    "gpt2": Family("gpt2"),
    "gpt_neox": Family("gptneox", _FUSED),
    "granite": Family("granite", _ROTARY),
    "llama": Family("llama", _ROTARY),
    "mistral": Family("llama", _ROTARY),
    "mixtral": Family("llama", _ROTARY),
    "olmo2": Family("olmo2"),
    "olmoe": Family("olmoe"),
    "phi3": Family("phi3"),
    "qwen2": Family("qwen2"),
    "qwen2_moe": Family("qwen2moe"),
    "qwen3": Family("qwen3"),
    "qwen3_moe": Family("qwen3moe"),
    "smollm3": Family("smollm3", _ROTARY),
    "starcoder2": Family("starcoder2"),
}

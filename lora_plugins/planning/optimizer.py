"""Bytes that an optimizer keeps for each trained tensor."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from math import prod
from typing import Any

import torch
from peft import get_peft_model_state_dict
from peft.utils.constants import EMBEDDING_LAYER_NAMES

from lora_plugins.adapters.saving import saves_embeddings
from lora_plugins.errors import PlanError
from lora_plugins.text import did_you_mean

__all__ = ["RULES", "file_bytes", "optimizer_bytes", "state_bytes"]


#: Values of the smallest tensor with 8-bit state; bitsandbytes 0.50 keeps that of smaller ones in float32.
_SMALLEST_IN_8_BITS = 4096

#: Values that share one scale in bitsandbytes' 8-bit states.
_BLOCK = 256

_Rule = Callable[[tuple[int, ...], int], int]


def _make_elementwise_rule(states: int, scalars: int = 1) -> _Rule:
    """Make a rule for states in the tensor's own dtype, and float32 scalars such as the step."""
    return lambda shape, item: states * prod(shape) * item + 4 * scalars


def _make_float32_rule(states: int) -> _Rule:
    return lambda shape, item: 4 * states * prod(shape)


def _make_8bit_rule(states: int) -> _Rule:
    def rule(shape: tuple[int, ...], item: int) -> int:
        size = prod(shape)
        if size < _SMALLEST_IN_8_BITS:
            return 4 * states * size
        return states * (size + 4 * -(-size // _BLOCK))

    return rule


def _count_factored(shape: tuple[int, ...], item: int) -> int:
    """Return Adafactor's bytes: for a matrix a float32 row and column, for a vector all of it, and the update's RMS."""
    if len(shape) < 2:
        return 4 * prod(shape) + 4
    return 4 * (prod(shape[:-1]) + prod((*shape[:-2], shape[-1]))) + 4


RULES: dict[str, _Rule] = {
    **dict.fromkeys(("adamw_torch", "adamw_torch_fused"), _make_elementwise_rule(2)),
    **dict.fromkeys(("adagrad", "rmsprop"), _make_elementwise_rule(1)),
    "sgd": lambda shape, item: 0,
    "adafactor": _count_factored,
    **dict.fromkeys(("adamw_bnb_8bit", "adamw_8bit", "paged_adamw_8bit"), _make_8bit_rule(2)),
    "paged_adamw_32bit": _make_float32_rule(2),
    **dict.fromkeys(("lion_8bit", "paged_lion_8bit", "rmsprop_bnb_8bit"), _make_8bit_rule(1)),
    **dict.fromkeys(("lion_32bit", "paged_lion_32bit", "rmsprop_bnb", "rmsprop_bnb_32bit"), _make_float32_rule(1)),
}

#: Bytes of the tables that 8-bit states share: one of 256 float32 values per state.
_TABLES = {
    **dict.fromkeys(("adamw_bnb_8bit", "adamw_8bit", "paged_adamw_8bit"), 2 * 1024),
    **dict.fromkeys(("lion_8bit", "paged_lion_8bit", "rmsprop_bnb_8bit"), 1024),
}


def optimizer_bytes(optim: str, parameters: Iterable[torch.Tensor]) -> int:
    """Return the bytes of an optimizer's state after its first step.

    Args:
        optim: A name of ``TrainingArguments.optim``.
        parameters: The trained tensors.

    Raises:
        PlanError: The state of this optimizer is not known.
    """
    return state_bytes(optim, [(tuple(p.shape), p.element_size()) for p in parameters])


def state_bytes(optim: str, trained: Iterable[tuple[tuple[int, ...], int]]) -> int:
    """Return the bytes of an optimizer's state after its first step.

    Args:
        optim: A name of ``TrainingArguments.optim``.
        trained: Shape and bytes per value of each trained tensor.

    Raises:
        PlanError: The state of this optimizer is not known.
    """
    rule = RULES.get(optim)
    if rule is None:
        hint = did_you_mean(optim, RULES)
        raise PlanError(f"The state of the optimizer {optim!r} is not known.{hint} Known: {', '.join(RULES)}.")
    trained = list(trained)
    tables = _TABLES.get(optim, 0) if any(prod(shape) >= _SMALLEST_IN_8_BITS for shape, _ in trained) else 0
    return tables + sum(rule(shape, item) for shape, item in trained)


#: Dtype names for the file's header, by item size; only their length matters.
_NAMES = {8: "F64", 4: "F32", 2: "F16"}


def file_bytes(model: Any, adapter_name: str) -> int:
    """Return the bytes of the safetensors file that PEFT would write: header and tensors.

    Args:
        model: A `peft.PeftModel`, on any device.
        adapter_name: The adapter.
    """
    named = model.peft_config[adapter_name].target_modules
    # PEFT saves an embedding that it adapts, and one with new rows that no adapter holds.
    adapted = bool(set(named if isinstance(named, (list, set)) else ()) & set(EMBEDDING_LAYER_NAMES))
    embeddings = adapted or saves_embeddings(model)
    tensors = get_peft_model_state_dict(model, adapter_name=adapter_name, save_embedding_layers=embeddings)
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, tensor in sorted(tensors.items()):
        start, end = end, end + tensor.numel() * tensor.element_size()
        dtype = _NAMES[tensor.element_size()]
        header[name] = {"dtype": dtype, "shape": list(tensor.shape), "data_offsets": [start, end]}
    length = len(json.dumps(header, separators=(",", ":")))
    return 8 + -(-length // 8) * 8 + end

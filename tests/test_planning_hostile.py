"""Configurations that no model has: planning them ends soon, with an error of ours."""

from __future__ import annotations

import contextlib
import json
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import LlamaConfig

from lora_plugins import plan
from lora_plugins.errors import PlanError
from lora_plugins.planning.limits import LimitedBuilding

LLAMA: dict[str, Any] = {
    "model_type": "llama",
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}

#: Names the field in the message where a number is out of all bounds.
NUMBERS: list[tuple[dict[str, Any], str]] = [
    ({"num_hidden_layers": 10**7}, "num_hidden_layers=10,000,000"),
    ({"num_hidden_layers": 10**400}, "num_hidden_layers=a number of more than 30 digits"),
    ({"num_labels": 10**8}, "num_labels=100,000,000"),
    ({"num_hidden_layers": -(10**9)}, "num_hidden_layers=-1,000,000,000"),
    ({"model_type": "gpt2", "n_layer": 10**6}, "n_layer=1,000,000"),
    ({"model_type": "qwen3_moe", "num_experts": 10**8}, "num_experts=100,000,000"),
    ({"model_type": "swin", "depths": [2, 10**6]}, "depths=1,000,000"),
    ({"model_type": "llava", "text_config": {**LLAMA, "num_hidden_layers": 10**7}}, "num_hidden_layers=10,000,000"),
    ({"hidden_size": 10**400}, "hidden_size=a number of more than 30 digits"),
    ({"max_position_embeddings": 10**18}, "max_position_embeddings="),
]

#: Any error of ours will do.
OTHERS: list[dict[str, Any]] = [
    {"architectures": ["__loader__"]},
    {"architectures": ["__path__"], "model_type": "nothing"},
    {"architectures": ["BertModel"]},
    {"architectures": ["AutoModelForCausalLM"], "num_attention_heads": 0},
    {"architectures": [["LlamaForCausalLM"]], "hidden_size": "large"},
    {"architectures": "LlamaForCausalLM", "vocab_size": -1},
    {"num_attention_heads": 0},
    {"num_key_value_heads": 0},
    {"num_hidden_layers": "two"},
    {"num_hidden_layers": 2.5},
    {"hidden_size": None},
    {"hidden_size": 0, "num_attention_heads": 0},
    {"vocab_size": [1, 2]},
    {"rope_parameters": {"rope_type": "none of ours"}},
    {"rope_parameters": 3},
    {"hidden_act": "os.system"},
    {"model_type": "bert", "hidden_size": 30, "num_attention_heads": 4},
    {"model_type": "bert", "num_labels": -5, "architectures": ["BertForSequenceClassification"]},
    {"model_type": "t5", "num_layers": 2, "d_kv": "x"},
    {"model_type": ["llama"]},
    {"model_type": "__loader__"},
    {"dtype": "complex64"},
    {"dtype": "no dtype"},
]


def check_refused(source: Any, match: str = "") -> None:
    started = time.process_time()
    with pytest.raises(PlanError, match=match):
        plan(source, length=8)
    assert time.process_time() - started < 10


@pytest.mark.parametrize(("fields", "message"), NUMBERS)
def test_a_number_that_no_model_has_is_named(fields: dict[str, Any], message: str, tmp_path: Path) -> None:
    check_refused({**LLAMA, **fields}, message)
    (tmp_path / "config.json").write_text(json.dumps({**LLAMA, **fields}))
    check_refused(tmp_path / "config.json", message)
    check_refused(tmp_path, message)


@pytest.mark.parametrize("fields", OTHERS)
def test_a_configuration_that_makes_no_model_is_an_error_of_ours(fields: dict[str, Any]) -> None:
    started = time.process_time()
    with contextlib.suppress(PlanError):
        assert plan({**LLAMA, **fields}, length=8).total > 0, "what transformers makes a model of can be planned"
    assert time.process_time() - started < 10


@pytest.mark.parametrize("text", ["[1, 2]", "null", "{", "[" * 100_000, '{"model_type": 3}', "9" * 5000, "\x00"])
def test_a_file_that_is_not_a_configuration_is_an_error_of_ours(text: str, tmp_path: Path) -> None:
    file = tmp_path / "config.json"
    file.write_text(text)
    check_refused(file)


def test_a_live_configuration_is_bounded_too() -> None:
    config = LlamaConfig(
        **{**LLAMA, "model_type": None} if False else {k: v for k, v in LLAMA.items() if k != "model_type"}
    )
    config.num_hidden_layers = 10**7
    check_refused(config, "num_hidden_layers=10,000,000")


def test_a_model_with_too_many_tensors_is_refused_while_it_is_made() -> None:
    with pytest.raises(PlanError, match="more than 1,000 tensors"), torch.device("meta"), LimitedBuilding(most=1000):
        nn.ModuleList(nn.Linear(1, 1, bias=False) for _ in range(10**7))
    with pytest.raises(PlanError, match=r"more than 0\.2 seconds"), torch.device("meta"), LimitedBuilding(seconds=0.2):
        nn.ModuleList(nn.Linear(1, 1, bias=False) for _ in range(10**7))


def test_large_and_real_configurations_are_planned() -> None:
    rotary = {**LLAMA, "rope_parameters": {"rope_type": "default", "rope_theta": 3_580_165_449}}
    assert plan({**rotary, "max_position_embeddings": 10_485_760, "num_hidden_layers": 40}, length=8).trainable

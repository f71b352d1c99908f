"""Every field of a configuration that decides something has a type and a bound, and a refusal that names it."""

from __future__ import annotations

import json
from typing import Any

import pytest

from registry.errors import UnsafeFile
from registry.formats.adapter_config import AdapterConfig
from registry.formats.tokenizer_files import check_tokenizer_config

PLAIN = {"peft_type": "LORA", "r": 2, "target_modules": ["q_proj"]}


def parse(*, own: bool = False, **fields: Any) -> AdapterConfig:
    return AdapterConfig.parse(json.dumps({**PLAIN, **fields}).encode(), own=own)


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"peft_type": "IA3"}, "peft_type"),
    ({"peft_type": None}, "peft_type"),
    ({"lora_parameters": {}}, "MLX"),
    ({"r": 0}, "r is 0"),
    ({"r": -1}, "r is -1"),
    ({"r": 65_537}, "r is 65537"),
    ({"r": "8"}, "r is '8'"),
    ({"r": True}, "r is True"),
    ({"bias": "some"}, "bias"),
    ({"task_type": 1}, "task_type"),
    ({"base_model_name_or_path": ["x"]}, "base_model_name_or_path"),
    ({"revision": 1}, "revision"),
    ({"peft_version": 1}, "peft_version"),
    ({"lora_alpha": "16"}, "lora_alpha"),
    ({"lora_alpha": 1e7}, "lora_alpha"),
    ({"lora_dropout": True}, "lora_dropout"),
    ({"use_dora": 1}, "use_dora"),
    ({"use_rslora": "yes"}, "use_rslora"),
    ({"rank_pattern": {"q": 0}}, "rank_pattern"),
    ({"rank_pattern": {"q": 1.5}}, "rank_pattern"),
    ({"rank_pattern": {"q": 65_537}}, "rank_pattern"),
    ({"rank_pattern": {f"m{i}": 2 for i in range(20_001)}}, "rank_pattern"),
    ({"alpha_pattern": {"q": "1"}}, "alpha_pattern"),
    ({"alpha_pattern": {"q": 1e7}}, "alpha_pattern"),
    ({"alpha_pattern": {f"m{i}": 2 for i in range(20_001)}}, "alpha_pattern"),
    ({"rank_pattern": {f"m{i}": i + 1 for i in range(501)}}, "rank_pattern .*500 different numbers"),
    ({"alpha_pattern": {f"m{i}": i / 2 for i in range(501)}}, "alpha_pattern .*500 different numbers"),
    ({"rank_pattern": {f"m{i}": 2 for i in range(501)}, "layer_replication": [[0, 2]]}, "beside layer_replication"),
    ({"alpha_pattern": {f"m{i}": 2 for i in range(501)}, "target_parameters": ["x"]}, "beside .*target_parameters"),
    ({"modules_to_save": [1]}, "modules_to_save"),
    ({"modules_to_save": ["x" * 1001]}, "modules_to_save"),
    ({"target_parameters": "x"}, "target_parameters"),
    ({"target_modules": 5}, "target_modules"),
    ({"target_modules": ["q"] * 20_001}, "target_modules"),
    ({"layers_to_transform": [-1]}, "layers_to_transform"),
    ({"layers_to_transform": "0"}, "layers_to_transform"),
    ({"layers_to_transform": list(range(2_001))}, "layers_to_transform"),
    ({"layer_replication": [[0, 2001]]}, "layer_replication"),
    ({"layer_replication": [[0]]}, "layer_replication"),
    ({"layer_replication": "x"}, "layer_replication"),
    ({"trainable_token_indices": 5}, "trainable_token_indices"),
    ({"trainable_token_indices": [2**31]}, "trainable_token_indices"),
    ({"trainable_token_indices": {"embed": 5}}, "trainable_token_indices"),
    ({"megatron_core": "evil"}, "megatron_core"),
    ({"megatron_config": {"a": 1}}, "megatron_core"),
    ({"trust_remote_code": True}, "trust_remote_code"),
    ({"auto_map": {"AutoModel": "evil.M"}}, "auto_map"),
    ({"custom_pipelines": {"x": {}}}, "custom_pipelines"),
    ({"auto_mapping": {"base_model_class": "M", "parent_library": "os"}}, "auto_mapping"),
    ({"auto_mapping": {"base_model_class": "M", "parent_library": "transformers.evil_module.deep.er"}}, "auto_mapping"),
    ({"auto_mapping": "os"}, "auto_mapping"),
]


@pytest.mark.parametrize(("fields", "says"), REFUSED, ids=lambda each: str(each)[:40])
def test_what_a_field_cannot_be(fields: dict[str, Any], says: str) -> None:
    with pytest.raises(UnsafeFile, match=rf"adapter_config\.json cannot be used: .*{says}"):
        parse(**fields)


@pytest.mark.parametrize(
    "fields",
    [
        {"r": 65_536, "lora_alpha": -1e6, "lora_dropout": 0.1, "bias": "lora_only"},
        {"rank_pattern": {"q_proj": 65_536}, "alpha_pattern": {"q_proj": 0.5}},
        {"layers_to_transform": 3, "layers_pattern": "layers"},
        {"layers_to_transform": list(range(2_000)), "layer_replication": [[0, 1000], [500, 1500]]},
        {"trainable_token_indices": {"embed_tokens": [1, 2]}},
        {"megatron_core": "megatron.core", "megatron_config": None, "trust_remote_code": False, "auto_map": {}},
        {"auto_mapping": {"base_model_class": "LlamaModel", "parent_library": "transformers.models.llama"}},
        {"modules_to_save": None, "target_parameters": None, "exclude_modules": None},
        {"use_dora": None, "use_rslora": None, "fan_in_fan_out": None, "lora_bias": None},
    ],
)  # fmt: skip
def test_what_people_use_passes(fields: dict[str, Any]) -> None:
    assert parse(**fields).fields["peft_type"] == "LORA"


def test_a_class_of_ones_own_is_left_out_of_ones_own_folder_only() -> None:
    mapping = {"base_model_class": "Mine", "parent_library": "__main__"}
    assert parse(own=True, auto_mapping=mapping).base_class is None
    with pytest.raises(UnsafeFile, match="auto_mapping"):
        parse(auto_mapping=mapping)


def test_properties() -> None:
    found = parse(
        task_type="CAUSAL_LM", rank_pattern={"q": 4}, trainable_token_indices=[3, 7], peft_version="0.19.0",
        base_model_name_or_path="org/base", modules_to_save=["b", "a"], lora_alpha=16, revision="main",
    )  # fmt: skip
    assert (found.rank, found.ranks, found.task_type) == (2, {2, 4}, "CAUSAL_LM")
    assert (found.token_indices, found.trained_tokens) == ({3, 7}, 8)
    assert parse().trained_tokens == 0
    assert AdapterConfig({}).rank == 8
    assert (found.base_id, found.peft_version) == ("org/base", "0.19.0")
    assert parse(base_model_name_or_path="").base_id is None
    changed = found.non_default({"lora_alpha": 8, "r": 8, "task_type": None})
    assert changed["modules_to_save"] == ["a", "b"]
    assert not {"base_model_name_or_path", "revision", "peft_version"} & set(changed)
    assert "lora_alpha" not in found.non_default({"lora_alpha": 16})
    published = json.loads(found.published("org/other", "c" * 40))
    assert (published["base_model_name_or_path"], published["revision"]) == ("org/other", "c" * 40)
    assert published["inference_mode"] is True


@pytest.mark.parametrize(
    "data",
    [b"{", b"[]", b"[" * 100_000, b"\xff", b'{"auto_map": {"AutoTokenizer": ["e.T", null]}}',
     b'{"trust_remote_code": true}', b'{"custom_pipelines": {"a": 1}}', b" " * (32 * 1024 * 1024 + 1)],
    ids=lambda data: repr(data[:20]),
)  # fmt: skip
def test_tokenizers_that_run_code_or_are_damaged_are_refused(data: bytes) -> None:
    with pytest.raises(UnsafeFile, match="tokenizer_config"):
        check_tokenizer_config(data)


def test_a_plain_tokenizer_passes() -> None:
    check_tokenizer_config(b'{"model_max_length": 1000000000000000019884624838656, "auto_map": null}')

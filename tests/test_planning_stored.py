"""A plan from the configuration of a base that is stored quantized plans what would be trained."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import stored_bases
import tiny
import torch
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, QuantoConfig, TorchAoConfig

from lora_plugins import plan, prepare_model
from lora_plugins.errors import PlanError, UntrainableFormat
from lora_plugins.quantization.counting import count_parameters, tensor_bytes

SAME: dict[str, Any] = {"length": 8, "r": 4}


def config_file(folder: Path, stored: Any) -> Path:
    config = stored_bases.llama().config
    config.architectures = ["LlamaForCausalLM"]
    config.save_pretrained(folder)
    return stored_bases.declare(folder, stored) / "config.json"


NF4 = {
    "quant_method": "bitsandbytes",
    "load_in_4bit": True,
    "bnb_4bit_quant_type": "nf4",
    "bnb_4bit_use_double_quant": True,
}
INT8 = {"quant_method": "bitsandbytes", "load_in_8bit": True}


@pytest.mark.parametrize(
    ("stored", "name"),
    [
        (NF4, "nf4"),
        ({**NF4, "bnb_4bit_quant_type": "fp4"}, "fp4"),
        (INT8, "int8"),
        ({"quant_method": "quanto", "weights": "int8"}, "int8-quanto"),
    ],
)
def test_a_base_that_is_stored_quantized_is_planned_with_its_own_backend(
    tmp_path: Path, stored: dict[str, Any], name: str
) -> None:
    made = plan(config_file(tmp_path, stored), **SAME)
    assert made.chosen.quantization == name
    assert {row.quantization for row in made.rows} == {"", name}
    assert any(f"stored with '{name}'" in note for note in made.notes)


def test_the_bytes_of_a_stored_base_are_those_that_loading_it_takes(tmp_path: Path) -> None:
    folder = stored_bases.compressed(tmp_path, num_bits=4, group_size=32, strategy="group", symmetric=True, type="int")
    made = plan(folder, compute_dtype="bfloat16", **SAME)
    model = prepare_model(AutoModelForCausalLM.from_pretrained(folder), compute_dtype="bfloat16", r=4)
    assert made.chosen.memory.weights == tensor_bytes(model).total
    count = count_parameters(model)
    assert (made.trainable, made.total) == (count.trainable, count.total)


@pytest.mark.parametrize("method", ["fp8", "mxfp4", "gguf", "metal"])
def test_a_base_that_is_dequantized_while_loading_is_planned_in_float(tmp_path: Path, method: str) -> None:
    made = plan(config_file(tmp_path, {"quant_method": method}), **SAME)
    assert made.chosen.quantization == ""
    assert any(f"quant_method {method!r}" in note and "in float" in note for note in made.notes)


@pytest.mark.parametrize("method", ["awq", "gptq", "higgs", "auto-round", "somethingnew"])
def test_a_base_that_cannot_train_is_refused_before_its_weights_are_there(tmp_path: Path, method: str) -> None:
    file = config_file(tmp_path, {"quant_method": method, "bits": 4})
    for source in (file, json.loads(file.read_text()), tmp_path):
        with pytest.raises(UntrainableFormat, match=rf"quant_method '{method}'.*Instead, .*load"):
            plan(source, **SAME)
    with pytest.raises(PlanError, match=rf"quant_method '{method}', whose bytes no backend here knows"):
        plan(file, allow_format=method, **SAME)


def test_another_backend_than_the_stored_one_is_refused(tmp_path: Path) -> None:
    with pytest.raises(PlanError, match=r"'int8' was asked for and the base is stored with 'nf4'"):
        plan(config_file(tmp_path, NF4), quantization="int8", **SAME)


@pytest.mark.parametrize(
    "stored",
    [
        {"quant_method": "torchao", "quant_type": {"default": {"_type": "Int4WeightOnlyConfig", "_data": {}}}},
        {"quant_method": "quanto", "weights": "int2"},
        {"quant_method": "hqq", "quant_config": {"weight_quant_params": {"nbits": 4}}},
    ],
)
def test_settings_that_no_backend_reads_are_refused_and_not_counted(tmp_path: Path, stored: dict[str, Any]) -> None:
    with pytest.raises(PlanError, match=r"cannot read how|no backend here reads"):
        plan(config_file(tmp_path, stored), **SAME)


@pytest.mark.parametrize(
    ("config", "backend"),
    [
        (BitsAndBytesConfig(load_in_8bit=True), "int8"),
        (BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4"), "nf4"),
        (QuantoConfig(weights="int4"), "int4-quanto"),
    ],
)
def test_each_config_is_read_by_one_backend(config: Any, backend: str) -> None:
    from lora_plugins.plugins.host import plugin_host

    assert [one.name for one in plugin_host().quantizers() if one.reads(config)] == [backend]


def test_the_configs_of_torchao_are_told_apart() -> None:
    torchao = pytest.importorskip("torchao.quantization")
    from lora_plugins.plugins.host import plugin_host

    kinds = {"int8-torchao": torchao.Int8WeightOnlyConfig, "float8-torchao": torchao.Float8WeightOnlyConfig}
    for backend, kind in kinds.items():
        config = TorchAoConfig(kind())
        assert [one.name for one in plugin_host().quantizers() if one.reads(config)] == [backend]


def test_a_live_base_that_cannot_train_is_refused_too() -> None:
    model: Any = tiny.llama()
    model.config.quantization_config = {"quant_method": "vptq"}
    model.model.layers[0].mlp.gate_proj.weight = torch.nn.Parameter(
        torch.zeros(64, 32, dtype=torch.uint8), requires_grad=False
    )
    with pytest.raises(UntrainableFormat, match="VPTQ"):
        plan(model, **SAME)

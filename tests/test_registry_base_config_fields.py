"""Every field of PEFT's LoraConfig: pushed, pulled and loaded alike, or refused before the upload."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from peft import LoraConfig, LoraRuntimeConfig, get_peft_model
from transformers import LlamaForCausalLM

from registry import check_contract, pull_adapter, push_adapter
from registry.errors import InvalidAdapter, RegistryError, UnsafeFile

IDS = torch.arange(1, 9)[None]

#: Field of ``LoraConfig`` -> values, each with what it takes besides; sub-configurations as they are in a file.
VALUES: dict[str, list[dict[str, Any]]] = {
    "alora_invocation_tokens": [{"alora_invocation_tokens": [3, 4]}],
    "alpha_pattern": [{"alpha_pattern": {r"^model\.layers\.0.*": 32}}, {"alpha_pattern": {"q_proj": 0.5}}],
    "auto_mapping": [
        {
            "task_type": None,
            "auto_mapping": {
                "base_model_class": "LlamaForCausalLM",
                "parent_library": "transformers.models.llama.modeling_llama",
            },
        }
    ],
    "base_model_name_or_path": [{"base_model_name_or_path": "org/other"}],
    "bias": [{"bias": "all"}, {"bias": "lora_only"}],
    "corda_config": [{"corda_config": {"corda_method": "kpm"}}],
    "ensure_weight_tying": [{"ensure_weight_tying": True, "modules_to_save": ["embed_tokens"]}],
    "eva_config": [{"init_lora_weights": "eva", "eva_config": {"rho": 1.0}}],
    "exclude_modules": [{"exclude_modules": ["layers.0.self_attn.q_proj"]}, {"exclude_modules": r".*layers\.0.*"}],
    "fan_in_fan_out": [{"fan_in_fan_out": True}],
    "inference_mode": [{"inference_mode": True}],
    "init_lora_weights": [
        {"init_lora_weights": init}
        for init in (False, "gaussian", "olora", "pissa", "pissa_niter_4", "orthogonal", "mica", "eva")
    ],
    "kasa_config": [{"kasa_config": {"beta": 0.01}}],
    "layer_replication": [{"layer_replication": [[0, 2], [1, 2]]}, {"layer_replication": [[1, 2]]}],
    "layers_pattern": [{"layers_to_transform": [1], "layers_pattern": pattern} for pattern in ("layers", ["layers"])],
    "layers_to_transform": [{"layers_to_transform": [1]}, {"layers_to_transform": 0}],
    "loftq_config": [{"loftq_config": {"loftq_bits": 4}}],
    "lora_alpha": [{"lora_alpha": 3.5}],
    "lora_bias": [{"lora_bias": True}],
    "lora_dropout": [{"lora_dropout": 0.3}],
    "lora_ga_config": [{"lora_ga_config": {"scale": "unit"}}],
    "modules_to_save": [{"modules_to_save": names} for names in (["lm_head"], ["embed_tokens", "lm_head"], ["norm"])],
    "monteclora_config": [{"monteclora_config": {"num_samples": 4}}],
    "peft_version": [{"peft_version": "0.5.0"}],
    "qalora_group_size": [{"qalora_group_size": 8}],
    "r": [{"r": 3}, {"r": 1}],
    "rank_pattern": [{"rank_pattern": {"q_proj": 2, r"layers\.1\.self_attn\.v_proj": 6}}],
    "revision": [{"revision": "main"}, {"revision": "b" * 40}],
    "runtime_config": [{"runtime_config": LoraRuntimeConfig(ephemeral_gpu_offload=True)}],
    "target_modules": [
        {"target_modules": names} for names in (r".*\.(q|down)_proj", "all-linear", ["embed_tokens", "lm_head"])
    ],
    "target_parameters": [{"target_modules": [], "target_parameters": ["q_proj.weight"]}],
    "task_type": [{"task_type": task} for task in (None, "SEQ_CLS", "FEATURE_EXTRACTION", "SEQ_2_SEQ_LM")],
    "trainable_token_indices": [
        {"trainable_token_indices": [1, 5, 90]},
        {"trainable_token_indices": {"embed_tokens": [2]}},
    ],
    "use_bdlora": [
        {"use_bdlora": {"target_modules_bd_a": ["q_proj"], "target_modules_bd_b": ["v_proj"], "nblocks": 2}}
    ],
    "use_dora": [{"use_dora": True}],
    "use_qalora": [{"use_qalora": True, "qalora_group_size": 8}],
    "use_rslora": [{"use_rslora": True}],
    "velora_config": [{"velora_config": {"num_groups": 4}}],
}
#: Values that no release can have: what the file says, and why it is refused.
REFUSED: dict[str, tuple[dict[str, Any], type[RegistryError], str]] = {
    "arrow_config": ({"arrow_config": {"top_k": 2}}, InvalidAdapter, "a router between other adapters"),
    "megatron_config": ({"megatron_config": {"hidden_size": 32}}, UnsafeFile, "megatron_config"),
    "megatron_core": ({"megatron_core": "os"}, UnsafeFile, "names a library to import"),
    "peft_type": ({"peft_type": "IA3"}, UnsafeFile, "peft_type is 'IA3'"),
    "init_lora_weights": ({"init_lora_weights": "lora_ga"}, InvalidAdapter, "cannot be repeated"),
    "loftq_config": (
        {"init_lora_weights": "loftq", "loftq_config": {"loftq_bits": 4}},
        InvalidAdapter,
        "initialised with 'loftq'",
    ),
    "corda_config": ({"init_lora_weights": "corda", "corda_config": {}}, InvalidAdapter, "initialised with 'corda'"),
    "use_bdlora": ({"use_bdlora": {"nblocks": 0}}, UnsafeFile, "use_bdlora"),
}
#: These change the base, and are published as plain LoRA of twice the rank: equal to rounding.
CONVERTED = ("olora", "pissa", "pissa_niter_4")
FIELDS = [field.name for field in dataclasses.fields(LoraConfig)]

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base")
    tiny.llama(num_key_value_heads=4).save_pretrained(folder)
    return folder


def trained(base: Path, **fields: Any) -> Any:
    """A model whose trained tensors have moved."""
    torch.manual_seed(3)
    values = {"r": 4, "target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM", **fields}
    values.setdefault("base_model_name_or_path", str(base))
    model = get_peft_model(LlamaForCausalLM.from_pretrained(base), LoraConfig(**values))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad or "lora_" in name:
                parameter.add_(torch.randn_like(parameter) * 0.05)
    return model


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model.eval()(IDS).logits
    return found


def parameters() -> list[Any]:
    """The values of each field that the installed PEFT knows."""
    return [
        pytest.param(field, number, id=f"{field}-{number}")
        for field in FIELDS
        for number in range(len(VALUES.get(field, ())))
        if VALUES[field][number].keys() <= set(FIELDS)
    ]


def test_every_field_that_peft_knows_is_tried() -> None:
    new = sorted(set(FIELDS) - VALUES.keys() - REFUSED.keys())
    assert not new, f"PEFT has new fields: {', '.join(new)}. Give each a value in VALUES, or its reason in REFUSED"


@pytest.mark.parametrize(("field", "number"), parameters())
def test_a_field_at_its_own_value_survives_push_pull_and_load(
    field: str, number: int, base: Path, tmp_path: Path
) -> None:
    fields = VALUES[field][number]
    default = {item.name: item.default for item in dataclasses.fields(LoraConfig)}[field]
    assert fields[field] != default or field == "task_type"
    model = trained(base, **fields)
    expected = logits(model)
    sources: list[tuple[str, Any]] = [("1.0.0", model)]
    if fields.get("init_lora_weights") != "pissa_niter_4":
        model.save_pretrained(tmp_path / "folder")
        sources.append(("2.0.0", tmp_path / "folder"))
    for version, source in sources:
        push_adapter(source, "org/a", version=version, hub=tmp_path / "hub", allow=["embed_tokens", "lm_head"])
        adapter = pull_adapter(f"org/a@{version}", hub=tmp_path / "hub", cache_dir=tmp_path / "cache")
        live = LlamaForCausalLM.from_pretrained(base)
        before = live.config.to_dict()
        adapter.check(base)
        adapter.check(live)
        assert live.config.to_dict() == before
        found = logits(adapter.load(live, trust_identity=True))
        if source is model and fields.get("init_lora_weights") in CONVERTED:
            torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
        else:
            assert torch.equal(found, expected)


@pytest.mark.parametrize("field", [field for field in REFUSED if REFUSED[field][0].keys() <= set(FIELDS)])
def test_a_value_that_no_release_can_have_is_refused_before_anything_is_uploaded(
    field: str, base: Path, tmp_path: Path
) -> None:
    fields, error, reason = REFUSED[field]
    model = trained(base)
    model.save_pretrained(tmp_path / "folder")
    file = tmp_path / "folder" / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **fields}))
    with pytest.raises(error, match=reason):
        push_adapter(tmp_path / "folder", "org/a", version="1.0.0", hub=tmp_path / "hub")
    assert not [path for path in tmp_path.glob("hub/**/*") if path.is_file()]
    with pytest.raises(RegistryError):
        check_contract(tmp_path / "folder", LlamaForCausalLM.from_pretrained(base))

"""An adapter whose initialisation changed the base is published as plain LoRA for the base itself."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from adapters import pulled
from peft import LoraConfig, get_peft_model
from peft.tuners.lora.corda import preprocess_corda
from transformers import GPT2LMHeadModel, LlamaForCausalLM

from registry.errors import InvalidAdapter

IDS = torch.arange(1, 9)[None]

pytestmark = pytest.mark.filterwarnings("ignore")


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model.eval()(IDS).logits
    return found


def trained(model: Any, **lora: Any) -> Any:
    """A model whose adapters have moved on from where they began."""
    torch.manual_seed(3)
    fields = {"r": 4, "target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM", **lora}
    wrapped = get_peft_model(model, LoraConfig(**fields))
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if "lora_" in name:
                parameter.add_(torch.randn_like(parameter) * 0.05)
    return wrapped


KINDS: dict[str, dict[str, Any]] = {
    "pissa": {"init_lora_weights": "pissa"},
    "pissa by iterations": {"init_lora_weights": "pissa_niter_4"},
    "olora": {"init_lora_weights": "olora"},
    "with rsLoRA": {"init_lora_weights": "pissa_niter_2", "use_rslora": True, "lora_alpha": 16},
    "with ranks by name": {"init_lora_weights": "olora", "rank_pattern": {"v_proj": 2}, "alpha_pattern": {"v_proj": 4}},
    "orthogonal": {"init_lora_weights": "orthogonal"},
    "mica": {"init_lora_weights": "mica"},
    "eva": {"init_lora_weights": "eva"},
    "gaussian": {"init_lora_weights": "gaussian"},
}


@pytest.mark.parametrize("kind", KINDS)
def test_the_published_adapter_does_on_the_base_what_was_trained(kind: str, tmp_path: Path) -> None:
    tiny.llama().save_pretrained(tmp_path / "base")
    model = trained(LlamaForCausalLM.from_pretrained(tmp_path / "base"), **KINDS[kind])
    expected = logits(model)
    adapter = pulled(model, tmp_path / "release")
    config = json.loads(Path(adapter.path, "adapter_config.json").read_text())
    assert config["init_lora_weights"] in (True, "gaussian")
    loaded = adapter.load(tmp_path / "base")
    assert torch.allclose(logits(loaded), expected, atol=2e-5)
    assert torch.equal(logits(model), expected)
    # The model that was trained goes on as it is.
    assert model.peft_config["default"].init_lora_weights == KINDS[kind]["init_lora_weights"]


def test_a_transposed_layer_is_undone_too(tmp_path: Path) -> None:
    tiny.gpt2().save_pretrained(tmp_path / "base")
    fields = {"init_lora_weights": "pissa", "target_modules": ["c_attn"], "fan_in_fan_out": True}
    model = trained(GPT2LMHeadModel.from_pretrained(tmp_path / "base"), **fields)
    adapter = pulled(model, tmp_path / "release")
    assert torch.allclose(logits(adapter.load(tmp_path / "base")), logits(model), atol=2e-5)


def test_corda_is_undone(tmp_path: Path) -> None:
    tiny.llama().save_pretrained(tmp_path / "base")
    base = LlamaForCausalLM.from_pretrained(tmp_path / "base")
    config = LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights="corda", task_type="CAUSAL_LM")
    preprocess_corda(base, config, run_model=lambda: base(IDS))
    model = get_peft_model(base, config)
    adapter = pulled(model, tmp_path / "release")
    assert torch.allclose(logits(adapter.load(tmp_path / "base")), logits(model), atol=2e-5)


@pytest.mark.parametrize("init", ["pissa_niter_4", "corda", "lora_ga", "loftq", "Magic"])
def test_a_folder_that_nothing_can_undo_is_refused_before_it_is_published(init: str, tmp_path: Path) -> None:
    trained(tiny.llama()).save_pretrained(tmp_path / "folder")
    file = tmp_path / "folder" / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "init_lora_weights": init}))
    with pytest.raises(InvalidAdapter, match=f"initialised with '{init}'"):
        pulled(tmp_path / "folder", tmp_path / "release")


def test_without_the_base_s_own_weights_it_is_refused(tmp_path: Path) -> None:
    model = trained(tiny.llama(), init_lora_weights="pissa_niter_4")
    with pytest.raises(InvalidAdapter, match="the base's own are not on this machine"):
        pulled(model, tmp_path / "release")


def test_a_base_that_changed_otherwise_is_refused(tmp_path: Path) -> None:
    tiny.llama().save_pretrained(tmp_path / "base")
    model = trained(LlamaForCausalLM.from_pretrained(tmp_path / "base"), init_lora_weights="pissa_niter_4")
    with torch.no_grad():
        model.base_model.model.model.layers[0].self_attn.q_proj.base_layer.weight.add_(torch.randn(32, 32) * 0.1)
    with pytest.raises(InvalidAdapter, match="differs from"):
        pulled(model, tmp_path / "release")

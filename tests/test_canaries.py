"""Each test fails when a workaround of ours is no longer needed, and says which: take the workaround out then.

accelerate's is ``test_the_shim_is_still_needed`` in ``test_trainer_engines.py``, which needs a process of its own.
"""

from __future__ import annotations

from pathlib import Path

import bitsandbytes as bnb
import peft
import pytest
import tiny
import torch
from peft.utils.other import ModulesToSaveWrapper
from torch import nn
from transformers import BitsAndBytesConfig

from lora_plugins.builtin.quantizers.bitsandbytes import FourBit, Int8
from lora_plugins.plugins.host import plugin_host


def int8_layer() -> bnb.nn.Linear8bitLt:
    """bitsandbytes' own layer, without what ours adds."""
    layer = Int8().quantize_linear(nn.Linear(32, 32, bias=False).requires_grad_(False), {})
    layer.__class__ = bnb.nn.Linear8bitLt
    return layer  # type: ignore[return-value]


# -- bitsandbytes ------------------------------------------------------------------------------


def test_bitsandbytes_int8_still_fails_on_four_dimensions_on_a_cpu() -> None:
    """Workaround: `Int8Linear.forward` flattens them. Upstream: bitsandbytes #980, pull request 2062."""
    with pytest.raises(RuntimeError, match="size of tensor"):
        int8_layer().eval()(torch.randn(1, 2, 3, 32))


def test_bitsandbytes_int8_still_loses_its_scale_when_peft_moves_the_weight() -> None:
    """Workaround: `Int8Linear.init_8bit_state`. PEFT's DoRA does this in every forward pass on a CPU."""
    layer = int8_layer().eval()
    layer(torch.randn(2, 32))
    layer.weight = layer.weight.to("cpu")
    with pytest.raises((RuntimeError, TypeError, AttributeError)):
        layer(torch.randn(2, 32))


def test_bitsandbytes_int8_still_keeps_the_input_of_a_layer() -> None:
    """Workaround: `_Int8Product`, which keeps the weight only; and `Int8.keeps_input` for `plan`."""
    layer = int8_layer().train()
    kept = []
    x = torch.randn(4, 32, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.shape), lambda t: t):
        output = layer(x)
    assert any(isinstance(part, torch.Tensor) for part in vars(output.grad_fn).values()) or kept


def test_bitsandbytes_4_bit_still_packs_for_avx512_bf16() -> None:
    """Workaround: `_keep_trainable`. The packed form has no backward pass. Upstream: pull request 1804."""
    layer = bnb.nn.Linear4bit(32, 32, bias=False, quant_type="nf4")
    assert hasattr(layer, "support_avx512bf16_for_cpu")
    ours = plugin_host().quantizer("nf4")
    assert isinstance(ours, FourBit)
    made = ours.quantize_linear(nn.Linear(32, 32, bias=False).requires_grad_(False), {})
    assert made.support_avx512bf16_for_cpu is False


# -- peft --------------------------------------------------------------------------------------


def test_peft_still_copies_heads_in_the_dtype_of_the_base() -> None:
    """Workaround: `cast_trained`. Adapters are made in float32, saved modules are not (peft pull request 2433)."""
    config = peft.LoraConfig(target_modules=["q_proj"], modules_to_save=["lm_head"], task_type="CAUSAL_LM")
    model = peft.get_peft_model(tiny.llama().bfloat16(), config)
    head = next(module for module in model.modules() if isinstance(module, ModulesToSaveWrapper))
    assert head.modules_to_save["default"].weight.dtype == torch.bfloat16


def test_peft_still_gives_a_float32_head_its_16_bit_input() -> None:
    """Workaround: `return_input_dtype`."""
    config = peft.LoraConfig(target_modules=["q_proj"], modules_to_save=["lm_head"], task_type="CAUSAL_LM")
    model = peft.get_peft_model(tiny.llama().bfloat16(), config)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    with pytest.raises(RuntimeError, match="dtype"):
        model(torch.arange(1, 9)[None])


def test_peft_still_asks_the_hub_when_it_saves(tmp_path: object, monkeypatch: pytest.MonkeyPatch) -> None:
    """Workaround: `save_offline`. Upstream: peft #1452, #3211."""
    base = tiny.llama()
    base.name_or_path = "org/never-seen"
    model = peft.get_peft_model(base, peft.LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.warns(UserWarning, match="Could not find a config file in org/never-seen"):
        model.save_pretrained(str(tmp_path))


def test_peft_still_refuses_dropout_on_expert_parameters() -> None:
    """Workaround: `inject` sets it on the modules that can have it."""
    config = peft.LoraConfig(target_modules=[], target_parameters=["mlp.up_proj.weight"], lora_dropout=0.1)
    with pytest.raises(ValueError, match="dropout"):
        peft.get_peft_model(tiny.llama(), config)


# -- transformers ------------------------------------------------------------------------------


def test_transformers_still_computes_4_bit_layers_in_float32_by_default() -> None:
    """Workaround: `FourBit.load_config` names the dtype. Upstream: bitsandbytes pull request 2077."""
    assert BitsAndBytesConfig(load_in_4bit=True).bnb_4bit_compute_dtype == torch.float32


def test_transformers_still_wants_every_flag_of_a_quantized_model(tmp_path: Path) -> None:
    """Workaround: `tag_quantized` sets all of them: with one alone the Trainer fails on the others."""
    model = tiny.llama()
    model.is_quantized = True
    with pytest.raises((AttributeError, ValueError)):
        tiny.trainer(tmp_path, model)


# -- torch -------------------------------------------------------------------------------------


def test_torch_still_has_no_autocast_for_the_meta_device() -> None:
    """Workaround: `as_on_a_device` exchanges ``torch.autocast`` while a step is simulated."""
    with pytest.raises(RuntimeError, match=r"meta|scalarType"):
        torch.autocast("meta")


def test_torch_still_multiplies_experts_on_the_meta_device_in_bfloat16_only() -> None:
    """Workaround: `_grouped_mm` in ``planning/step.py``."""
    first, second = torch.empty(8, 16, device="meta"), torch.empty(2, 16, 16, device="meta")
    offsets = torch.tensor([4, 8], dtype=torch.int32, device="meta")
    with pytest.raises(RuntimeError):
        torch.ops.aten._grouped_mm.default(first, second, offsets)


def test_torch_still_refuses_a_16_bit_norm_under_autocast_on_a_cpu() -> None:
    """Workaround: `meet_inputs` casts there. Upstream: intel-extension-for-pytorch #731 ("no plan to fix it")."""
    norm = nn.LayerNorm(8).half()
    with torch.autocast("cpu", dtype=torch.bfloat16), pytest.raises(RuntimeError, match="mixed dtype"):
        norm(torch.randn(2, 8))

"""Each test fails when a workaround of ours is no longer needed, and says which: take the workaround out then.

accelerate's is ``test_the_shim_is_still_needed`` in ``test_trainer_engines.py``, which needs a process of its own.
"""

from __future__ import annotations

import copy
import importlib
from pathlib import Path
from typing import Any

import bitsandbytes as bnb
import peft
import pytest
import tiny
import torch
from huggingface_hub.utils import get_session
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import ModulesToSaveWrapper, TrainableTokensWrapper
from safetensors.torch import load_file
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    TrainerCallback,
)

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


def test_peft_still_lists_a_head_twice() -> None:
    """Workaround: `inject` removes the second."""
    config = peft.LoraConfig(target_modules=["query"], modules_to_save=["classifier"], task_type="SEQ_CLS")
    held = peft.get_peft_model(tiny.bert_classifier(), config).peft_config["default"].modules_to_save
    assert held.count("classifier") == 2


def test_peft_still_hides_the_bias_of_a_layer_with_trained_tokens() -> None:
    """Workaround: `inject` sets it to ``None``."""
    config = peft.LoraConfig(target_modules=["q_proj"], trainable_token_indices={"lm_head": [1]})
    model = peft.get_peft_model(tiny.llama(), config)
    assert not any(hasattr(m, "bias") for m in model.modules() if isinstance(m, TrainableTokensWrapper))


def test_peft_still_leaves_adapters_behind_when_it_refuses_a_layer() -> None:
    """Workaround: `unknown_layers` looks first, and the error names the layer that was refused."""
    base = tiny.llama()
    base.model.layers[1].self_attn.q_proj = nn.Bilinear(2, 2, 2)  # type: ignore[assignment]
    with pytest.raises(ValueError, match="not supported"):
        peft.get_peft_model(base, peft.LoraConfig(target_modules=["q_proj"]))
    assert isinstance(base.model.layers[0].self_attn.q_proj, BaseTunerLayer)


def test_peft_still_saves_a_magnitude_without_the_name_of_its_parameter() -> None:
    """Workaround: `lora_tensors`."""
    model = peft.get_peft_model(tiny.llama(), peft.LoraConfig(target_modules=["q_proj"], use_dora=True))
    saved = peft.get_peft_model_state_dict(model)
    assert any(name.endswith("lora_magnitude_vector") for name in saved)
    assert any(name.endswith("lora_magnitude_vector.default.weight") for name, _ in model.named_parameters())


@pytest.fixture
def grown() -> LlamaForCausalLM:
    base = tiny.llama()
    base.resize_token_embeddings(tiny.VOCABULARY + 4, mean_resizing=False)
    return base


def test_peft_still_saves_a_grown_embedding_twice(grown: LlamaForCausalLM) -> None:
    """Workaround: `_compare` in ``registry/base/places.py`` and `_find_places` in ``merging/weights.py``."""
    model = peft.get_peft_model(grown, peft.LoraConfig(target_modules=["q_proj"], modules_to_save=["embed_tokens"]))
    saved = peft.get_peft_model_state_dict(model, save_embedding_layers=True)
    copies = [name for name in saved if name.endswith("weight") and "embed_tokens" in name]
    assert len(copies) > 1


def test_peft_still_leaves_out_the_head_beside_an_adapted_embedding(grown: LlamaForCausalLM) -> None:
    """Workaround: `_find_ends_left_out` in ``registry/publishing/snapshot.py``."""
    model = peft.get_peft_model(grown, peft.LoraConfig(target_modules=["q_proj", "embed_tokens"]))
    assert not any("lm_head" in name for name in peft.get_peft_model_state_dict(model, save_embedding_layers=True))


def test_peft_still_writes_a_folder_as_base_model_into_the_card(tmp_path: Path) -> None:
    """Workaround: `create_or_update_model_card`. Upstream: transformers #33922."""
    base = tiny.llama()
    base.name_or_path = str(tmp_path / "base")
    model = peft.get_peft_model(base, peft.LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM"))
    model.create_or_update_model_card(str(tmp_path))
    assert str(tmp_path / "base") in (tmp_path / "README.md").read_text()


@pytest.mark.skipif(not hasattr(PreTrainedModel, "is_activation_checkpointing"), reason="newer than transformers 5.5")
def test_peft_still_uses_a_deprecated_name_of_transformers() -> None:
    """Workaround: `calm` hides the warning from a command's user."""
    with pytest.warns(FutureWarning, match="is_gradient_checkpointing"):
        peft.get_peft_model(tiny.llama(), peft.LoraConfig(target_modules=["q_proj"]))


def test_peft_still_renames_tensors_where_it_is_looked_for() -> None:
    """Without this private module, `renamed_on_loading`, `rewritten_names` and `place_tensors` expect no renaming."""
    module = importlib.import_module("peft.utils.transformers_weight_conversion")
    assert callable(module.convert_peft_adapter_state_dict_for_transformers)
    assert callable(module.convert_peft_config_for_transformers)


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


def test_transformers_still_saves_int8_layers_that_it_reads_as_something_else(tmp_path: Path) -> None:
    """Workaround: `QuantizedInPlace`, without which saving raises no error."""
    model = tiny.llama()
    for layer in model.model.layers:
        layer.mlp.up_proj = Int8().quantize_linear(layer.mlp.up_proj.requires_grad_(False), {})  # type: ignore[assignment]
    model.save_pretrained(tmp_path)
    _, info = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert any(name.endswith("up_proj.SCB") for name in info["unexpected_keys"])


def test_the_trainer_still_says_that_it_trains_after_an_error(tmp_path: Path) -> None:
    """Workaround: `is_training` reads the frames."""

    class Stop(TrainerCallback):
        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            raise InterruptedError

    trainer = tiny.trainer(tmp_path, callbacks=[Stop()])
    with pytest.raises(InterruptedError):
        trainer.train()
    assert trainer.is_in_train


def test_an_evaluation_still_leaves_its_model_with_the_trainer(tmp_path: Path) -> None:
    """Workaround: `put_model` clears accelerate's list, and the names of the forward arguments."""
    trainer = tiny.trainer(tmp_path, trainer_arguments={"eval_dataset": tiny.rows(4)})
    trainer.evaluate()
    assert trainer.accelerator._models
    assert trainer._signature_columns


def test_the_trainer_still_restores_no_adapter_of_another_name(tmp_path: Path) -> None:
    """Workaround: `_around_load_best_model`. Upstream: transformers pull request 36201."""
    config = peft.LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM")
    model = peft.get_peft_model(tiny.llama(), config, adapter_name="mine")
    trainer = tiny.trainer(tmp_path, model, save_strategy="steps", save_steps=1)
    trainer.train()
    trainer.state.best_model_checkpoint = str(tmp_path / "checkpoint-1")
    trainer._load_best_model()
    stored = load_file(tmp_path / "checkpoint-1" / "mine" / "adapter_model.safetensors")
    live = peft.get_peft_model_state_dict(model, adapter_name="mine")
    assert any(not torch.equal(live[name], value) for name, value in stored.items() if "lora_B" in name)


# -- huggingface_hub, torchao, hqq -------------------------------------------------------------


def test_huggingface_hub_still_waits_without_end() -> None:
    """Workaround: the deadlines of ``registry/hubs/client.py``."""
    timeout = get_session().timeout
    assert (timeout.connect, timeout.read) == (None, None)


def test_torchao_still_changes_the_whole_process_by_default() -> None:
    """Workaround: ``set_inductor_config=False``."""
    quantization = pytest.importorskip("torchao.quantization")
    assert quantization.Int8WeightOnlyConfig().set_inductor_config is True


def test_hqq_still_sets_the_forward_of_a_class_for_one_layer() -> None:
    """Workaround: `HQQLinear.set_backend`."""
    quantize = pytest.importorskip("hqq.core.quantize")
    kind = type("Mine", (quantize.HQQLinear,), {})
    settings = quantize.BaseQuantizeConfig(nbits=4, group_size=64)
    kind(nn.Linear(64, 64, bias=False), settings, compute_dtype=torch.float32, device="cpu")
    assert "forward" in vars(kind)


# -- torch -------------------------------------------------------------------------------------


def test_torch_still_refuses_to_copy_a_parametrized_module() -> None:
    """Workaround: `_copy_module` in ``registry/base/skeleton.py``."""
    with pytest.raises(RuntimeError, match="parametrized"):
        copy.copy(nn.utils.parametrizations.weight_norm(nn.Linear(2, 2)))


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

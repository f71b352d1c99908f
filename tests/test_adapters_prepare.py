"""One list of steps prepares a model and its plan; what is trained stays trained, whatever comes after."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import tiny
import torch
from torch import nn

from lora_plugins import attach, plan, prepare_model
from lora_plugins.adapters import steps
from lora_plugins.adapters.prepare import choose_targets
from lora_plugins.adapters.settings import LoraSettings
from lora_plugins.adapters.steps import Job
from lora_plugins.errors import PreparationError
from lora_plugins.planning.layers import PlannedLinear
from lora_plugins.planning.source import copy_without_data
from lora_plugins.planning.variants import Workbench
from lora_plugins.quantization.request import owner_of

Facts = dict[str, tuple[tuple[int, ...], torch.dtype, bool]]


def describe(model: nn.Module) -> tuple[Facts, set[str]]:
    """Every tensor outside of quantized layers, and the paths of those layers."""
    quantized = {path for path, m in model.named_modules() if isinstance(m, PlannedLinear) or owner_of(m) is not None}
    tensors = {
        name: (tuple(tensor.shape), tensor.dtype, tensor.requires_grad)
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]
        if name.rpartition(".")[0] not in quantized
    }
    return tensors, quantized


def planned_model(base: nn.Module, **arguments: Any) -> Any:
    settings = LoraSettings.from_arguments(**arguments)
    meta = copy_without_data(base)
    return Workbench(meta, settings, choose_targets(meta, settings), torch.device("cpu")).whole(settings.quantization)


@pytest.mark.parametrize("backend", [None, "int8", "nf4", "int8-torchao", "int4-hqq"])
@pytest.mark.parametrize(
    ("make", "arguments"),
    [
        (tiny.llama, {}),
        (tiny.llama, {"compute_dtype": "bfloat16", "upcast": "norms", "modules_to_save": ["lm_head"]}),
        (tiny.gpt2, {"compute_dtype": "float16", "target_modules": "all-linear"}),
        (tiny.bert_classifier, {"compute_dtype": "bfloat16", "bias": "all", "use_rslora": True}),
    ],
)
def test_the_planned_model_is_the_prepared_one(
    make: Callable[[], Any], arguments: dict[str, Any], backend: str | None
) -> None:
    arguments = {**arguments, "quantization": backend}
    found, layers = describe(planned_model(make(), **copy.deepcopy(arguments)))
    real, quantized = describe(prepare_model(make(), **arguments))
    assert found == real
    assert layers == quantized
    assert bool(quantized) == (backend is not None)


def test_a_step_that_is_added_appears_in_plan_and_prepare(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []

    def double_precision(job: Job) -> None:
        seen.append(job.base.device.type)  # type: ignore[union-attr]
        for name, parameter in job.model.named_parameters():
            if "lora_" in name:
                parameter.data = parameter.data.double()

    before = plan(tiny.llama(), length=8, quantization="int8").chosen.memory
    monkeypatch.setattr(steps, "LAST_STEPS", (*steps.LAST_STEPS, double_precision))
    model = prepare_model(tiny.llama(), quantization="int8")
    assert seen == ["cpu"]
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float64}
    after = plan(tiny.llama(), length=8, quantization="int8").chosen.memory
    assert "meta" in seen
    assert after.gradients == 2 * before.gradients


# -- nothing that is trained is frozen by a later step -----------------------------------------


@pytest.mark.parametrize("init", ["pissa", "olora", "pissa_niter_2"])
@pytest.mark.parametrize("backend", ["int8", "nf4"])
def test_adapters_that_start_from_the_float_weights_are_trained(init: str, backend: str) -> None:
    plain = prepare_model(tiny.llama(), target_modules=["q_proj", "v_proj"])
    model = prepare_model(
        tiny.llama(), target_modules=["q_proj", "v_proj"], init_lora_weights=init, quantization=backend
    )
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trained == {name for name, p in plain.named_parameters() if p.requires_grad}
    ids = torch.arange(1, 9)[None]
    model.train()(input_ids=ids, labels=ids).loss.backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


def test_heads_and_biases_beside_such_adapters_are_trained() -> None:
    model = prepare_model(
        tiny.bert_classifier(), init_lora_weights="pissa", quantization="int8", bias="all", modules_to_save=["pooler"]
    )
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert any("pooler.modules_to_save" in name for name in trained)
    assert any("query.base_layer.bias" in name for name in trained), "a bias of a quantized layer"
    assert any("LayerNorm.bias" in name for name in trained)


@pytest.mark.parametrize("backend", ["int8", "nf4"])
def test_quantizing_under_adapters_keeps_trained_biases(backend: str) -> None:
    config = peft.LoraConfig(target_modules=["query", "value"], bias="all", task_type="SEQ_CLS")
    wrapped: Any = peft.get_peft_model(tiny.bert_classifier(), config)
    before = {name for name, p in wrapped.named_parameters() if p.requires_grad}
    prepare_model(wrapped, quantization=backend)
    assert {name for name, p in wrapped.named_parameters() if p.requires_grad} == before


def test_quantizing_over_a_trained_weight_is_refused_by_name() -> None:
    config = peft.LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM")
    wrapped: Any = peft.get_peft_model(tiny.llama(), config)
    wrapped.base_model.model.model.layers[1].mlp.up_proj.weight.requires_grad_(True)
    with pytest.raises(PreparationError, match=r"first base_model\.model\.model\.layers\.1\.mlp\.up_proj\.weight"):
        prepare_model(wrapped, quantization="int8")
    again: Any = peft.get_peft_model(tiny.llama(), config)
    up = again.base_model.model.model.layers[1].mlp.up_proj.weight.requires_grad_(True)
    prepare_model(again, quantization={"name": "int8", "skip_modules": ["layers.1.mlp.up_proj"]})
    assert up.requires_grad


def test_a_norm_that_the_user_unfroze_stays_so() -> None:
    config = peft.LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM")
    wrapped: Any = peft.get_peft_model(tiny.llama(), config)
    norm = wrapped.base_model.model.model.norm.weight.requires_grad_(True)
    prepare_model(wrapped, quantization="int8", compute_dtype="bfloat16")
    assert norm.requires_grad
    assert norm.dtype == torch.float32


def test_layers_that_keep_their_weight_transposed_need_no_warning(tmp_path: Path) -> None:
    """GPT-2's: PEFT sets fan_in_fan_out itself; a user who gave no such field has nothing to do."""
    tiny.gpt2().save_pretrained(tmp_path / "base")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        plan(tmp_path / "base")
        plan(tiny.gpt2())
        model = prepare_model(tiny.gpt2())
        attach(tiny.trainer(tmp_path / "out", tiny.gpt2()))
    assert [str(warning.message) for warning in caught if "fan_in_fan_out" in str(warning.message)] == []
    assert model.peft_config["default"].fan_in_fan_out is True

"""Routed experts: quantized and adapted by our experts function, equal to transformers' and PEFT's."""

from __future__ import annotations

import copy
import functools
import gc
import importlib
import itertools
import pickle
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora.layer import ParamWrapper
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import (
    AutoModelForCausalLM,
    DeepseekV3Config,
    GptOssConfig,
    Llama4TextConfig,
    LongcatFlashConfig,
    MixtralConfig,
    NemotronHConfig,
    PreTrainedConfig,
    Qwen3MoeConfig,
    Trainer,
    TrainingArguments,
)
from versions import needs

from lora_plugins import dequantize_model, plan, prepare_model, quantization_config
from lora_plugins.adapters.report import make_report
from lora_plugins.adapters.routed.function import ExpertAdapter, Experts, Projection, compute_experts
from lora_plugins.adapters.routed.wrappers import EXPERTS_FUNCTION, use_experts_function
from lora_plugins.errors import (
    MergeError,
    PreparationError,
    QuantizationError,
    QuantizerSelfTestFailed,
    UnsupportedTraining,
)
from lora_plugins.models.experts import is_computable, list_expert_stacks
from lora_plugins.planning.step import LiveBytes
from lora_plugins.quantization.counting import tensor_bytes
from lora_plugins.quantization.request import parse_quantization
from lora_plugins.quantization.stacks import (
    QuantizedStack,
    dequantize_stack,
    list_quantized_stacks,
    quantize_stack,
)
from lora_plugins.testing import check_quantizer
from lora_plugins.trainer.engines import prepare_quantized

IDS = torch.randint(0, 64, (2, 9), generator=torch.Generator().manual_seed(0))
SMALL: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "pad_token_id": 0,
}
QWEN = Qwen3MoeConfig(**SMALL, head_dim=16, moe_intermediate_size=24, num_experts=6, num_experts_per_tok=2)
MIXTRAL = MixtralConfig(**SMALL, intermediate_size=24, num_local_experts=4)
#: Interleaved gate and up values, transposed stacks, biases.
GPT_OSS = GptOssConfig(**SMALL, head_dim=16, intermediate_size=24, num_local_experts=6, num_experts_per_tok=2)
#: Shared experts, and a dense first block.
DEEPSEEK = DeepseekV3Config(
    **SMALL, intermediate_size=48, moe_intermediate_size=24, n_routed_experts=8, num_experts_per_tok=2, n_group=1,
    topk_group=1, first_k_dense_replace=1, q_lora_rank=16, kv_lora_rank=16, qk_rope_head_dim=8, qk_nope_head_dim=8,
    v_head_dim=16,
)  # fmt: skip
#: Experts without a gate.
NEMOTRON = NemotronHConfig(
    **SMALL, head_dim=16, intermediate_size=48, moe_intermediate_size=24, moe_shared_expert_intermediate_size=24,
    n_routed_experts=4, num_experts_per_tok=2, n_group=1, topk_group=1, layers_block_type=["attention", "moe"],
)  # fmt: skip
#: No interface: transposed stacks, which PEFT reads the other way round, and tokens that come already weighted.
LLAMA4 = Llama4TextConfig(
    **SMALL, head_dim=16, intermediate_size=24, intermediate_size_mlp=48, num_local_experts=4, num_experts_per_tok=1,
    interleave_moe_layer_step=1, attention_chunk_size=32,
)  # fmt: skip
#: No interface: experts that give back their input, so that the two stacks have different numbers of experts.
LONGCAT = LongcatFlashConfig(
    **SMALL, num_layers=1, ffn_hidden_size=48, expert_ffn_hidden_size=24, n_routed_experts=4, zero_expert_num=2,
    moe_topk=2, q_lora_rank=16, kv_lora_rank=16, qk_rope_head_dim=8, qk_nope_head_dim=8, v_head_dim=16, head_dim=8,
)  # fmt: skip
OTHERS = {"llama4": LLAMA4, "longcat": LONGCAT}
KINDS = {"qwen3_moe": QWEN, "mixtral": MIXTRAL, "gpt_oss": GPT_OSS, "deepseek_v3": DEEPSEEK, "nemotron_h": NEMOTRON}


def make(config: PreTrainedConfig, dtype: torch.dtype = torch.float32) -> Any:
    """A small model whose weights are large enough for differences to be seen."""
    torch.manual_seed(0)
    model: Any = AutoModelForCausalLM.from_config(copy.deepcopy(config), attn_implementation="eager").to(dtype)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" not in name and "A_log" not in name:
                parameter.normal_(std=0.2)
    return model


def stack_names(model: nn.Module) -> list[str]:
    return sorted({f"experts.{name}" for _, _, name, _ in list_expert_stacks(model)})


def adapted(config: PreTrainedConfig, *, ours: bool, dtype: torch.dtype = torch.float64) -> Any:
    """A model with adapters on its experts and on attention, B included, as PEFT alone or with our function."""
    base = make(config, dtype)
    base.config._experts_implementation = "eager"
    names = stack_names(base)
    model: Any = get_peft_model(base, LoraConfig(r=3, lora_alpha=6, target_modules=["o_proj"], target_parameters=names))
    model = randomize(model.to(dtype)).train()
    if ours:
        assert use_experts_function(model) == sum(is_computable(module) for module in model.modules()) > 0
    return model


def randomize(model: Any) -> Any:
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.normal_(std=0.2)
    return model


def run(model: Any, ids: torch.Tensor = IDS) -> dict[str, torch.Tensor]:
    """Logits and every gradient, that of the input too."""
    x = model.get_input_embeddings()(ids).detach().requires_grad_()
    output = model(inputs_embeds=x, labels=ids, use_cache=False)
    output.loss.backward()
    grads = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return {"logits": output.logits.detach(), "input": x.grad, **grads}


def assert_close(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor], tolerance: float) -> None:
    assert one.keys() == other.keys()
    for name, value in one.items():
        scale = value.abs().max().clamp(min=1e-3)
        assert (value - other[name]).abs().max() <= tolerance * scale, name


# -- equal to PEFT and transformers ------------------------------------------------------------


@pytest.mark.parametrize("kind", [*KINDS, *OTHERS])
def test_equals_pefts_wrapper_in_float64(kind: str) -> None:
    """Biases, interleaved and transposed stacks, shared experts, no gate: output and all gradients are PEFT's."""
    theirs, ours = (run(adapted({**KINDS, **OTHERS}[kind], ours=own)) for own in (False, True))
    assert sum("lora_A" in name and "experts" in name for name in ours) >= 2
    assert ours["logits"].std() > 0.1, "the comparison would show nothing"
    # Nemotron-H adds its experts up in float32 whatever the model's dtype.
    assert_close(theirs, ours, 1e-5 if kind == "nemotron_h" else 1e-10)


@pytest.mark.parametrize("implementation", ["eager", "batched_mm"])
def test_equals_transformers_without_adapters(implementation: str) -> None:
    model = make(GPT_OSS, torch.float64)
    model.config._experts_implementation = implementation
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    theirs = run_input(model)
    model.config._experts_implementation = EXPERTS_FUNCTION
    assert_close(theirs, run_input(model), 1e-10)


def run_input(model: Any) -> dict[str, torch.Tensor]:
    x = model.get_input_embeddings()(IDS).detach().requires_grad_()
    logits = model(inputs_embeds=x, use_cache=False).logits
    logits.square().sum().backward()
    return {"logits": logits.detach(), "input": x.grad}


@needs("transformers", "5.23", "its own experts take no index beyond the last expert")
def test_tokens_routed_nowhere_and_expert_nobody_hits() -> None:
    """An index from the number of experts on is skipped; an expert without tokens gets a zero gradient, not none."""
    found = {}
    for own in (False, True):
        model = adapted(QWEN, ours=own)
        experts = model.get_submodule("base_model.model.model.layers.0.mlp.experts")
        x = torch.randn(5, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_()
        index = torch.tensor([[0, 6], [2, 0], [6, 6], [5, 2], [0, 2]])
        weights = torch.rand(5, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).requires_grad_()
        output = experts(x, index, weights)
        output.square().sum().backward()
        grads = {name: p.grad for name, p in experts.named_parameters() if p.grad is not None}
        found[own] = {"output": output.detach(), "x": x.grad, "weights": weights.grad, **grads}
        assert not output[2].any(), "routed nowhere"
        rows = experts.lora_A["default"].weight.grad.view(6, -1)
        assert [bool(row.any()) for row in rows] == [True, False, True, False, False, True]
    assert_close(found[False], found[True], 1e-10)


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_changes_nothing(reentrant: bool) -> None:
    model = adapted(QWEN, ours=True)
    plain = run(model)
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    assert_close(plain, run(model), 1e-12)


@pytest.mark.parametrize("reentrant", [False, True])
def test_dropout_is_the_same_in_the_second_pass_of_checkpointing(reentrant: bool) -> None:
    model = prepare_model(make(QWEN, torch.float64), r=3, lora_dropout=0.3, experts="routed")
    randomize(model.double()).train()
    torch.manual_seed(5)
    plain = run(model)
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    torch.manual_seed(5)
    assert_close(plain, run(model), 1e-12)
    torch.manual_seed(6)
    assert not torch.equal(plain["logits"], run(model)["logits"]), "nothing was dropped"


def test_numerical_gradient_with_dropout() -> None:
    """Gradients of A, B, input and routing weights under one dropout mask, with a norm after each expert."""
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(shape, dtype=torch.float64, generator=generator)

    stacks = random(3, 8, 4), random(3, 4, 4)
    index = torch.tensor([[0, 2], [2, 1], [0, 3]])
    leaves = [random(3, 4), random(3, 2).abs(), random(6, 4), random(8, 6), random(6, 4), random(4, 6)]

    biases = random(3, 8), random(3, 4)

    def compute(normed: bool, x: Any, weights: Any, *tensors: Any) -> torch.Tensor:
        torch.manual_seed(0)
        first, second = (ExpertAdapter(a, b, 0.7, 0.4) for a, b in (tensors[:2], tensors[2:]))
        up = Projection(stacks[0], biases[0], False, (first,))
        down = Projection(stacks[1], biases[1], False, (second,))
        norm = torch.tanh if normed else None
        return compute_experts(Experts(up, down, gate, norm, torch.float64), x, index, weights)

    for normed in (False, True):
        inputs = [leaf.clone().requires_grad_() for leaf in leaves]
        assert torch.autograd.gradcheck(functools.partial(compute, normed), inputs, fast_mode=True)


def gate(values: torch.Tensor) -> torch.Tensor:
    return torch.tanh(values[..., :4]) * values[..., 4:]


def test_batch_that_reaches_no_expert_gives_zeros() -> None:
    model = adapted(QWEN, ours=True)
    experts = model.get_submodule("base_model.model.model.layers.0.mlp.experts")
    x = torch.randn(3, 32, dtype=torch.float64, requires_grad=True)
    output = experts(x, torch.full((3, 2), 6), torch.ones(3, 2, dtype=torch.float64))
    output.sum().backward()
    assert not output.any()
    assert not x.grad.any()
    empty = experts(x[:0], torch.zeros(0, 2, dtype=torch.long), torch.ones(0, 2, dtype=torch.float64))
    assert empty.shape == (0, 32)


def test_expert_parallelism_is_refused_by_name() -> None:
    base = make(QWEN)
    base.model.layers[1].mlp.experts._is_expert_parallel = True
    with pytest.raises(PreparationError, match=r"layers\.1\.mlp\.experts .*expert parallelism.*experts='none'"):
        prepare_model(base, r=2, experts="routed")


# -- prepared models ---------------------------------------------------------------------------


def losses(model: Any, steps: int = 4) -> list[float]:
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.05)
    found = []
    for _ in range(steps):
        loss = model(input_ids=IDS, labels=IDS).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        found.append(loss.item())
    return found


def test_without_dropout_losses_are_pefts() -> None:
    """Four steps in float32 from the same start: each loss is within 1e-5 of PEFT's."""
    found = [losses(adapted(MIXTRAL, ours=own, dtype=torch.float32)) for own in (False, True)]
    assert found[0][0] - found[0][-1] > 0.01
    assert found[0] == pytest.approx(found[1], abs=1e-5)


def test_dropout_on_experts_trains_and_is_said(tmp_path: Path) -> None:
    """The adapters on experts have dropout; the file says 0, which PEFT can load, and gives the same output."""
    model = prepare_model(make(QWEN), r=2, lora_dropout=0.05, experts="routed")
    wrappers = [module for module in model.modules() if isinstance(module, ParamWrapper)]
    assert len(wrappers) == 4
    assert all(wrapper.lora_dropout["default"].p == 0.05 for wrapper in wrappers)
    assert any("the saved configuration says 0" in note for note in make_report(model).notes)
    found = losses(model.train(), 8)
    assert found[-1] < found[0]
    model.save_pretrained(tmp_path)
    plain = PeftModel.from_pretrained(make(QWEN), tmp_path)
    assert plain.peft_config["default"].lora_dropout == 0
    with torch.no_grad():
        assert torch.allclose(plain.eval()(IDS).logits, model.eval()(IDS).logits, atol=1e-5)


def test_adapters_are_switched_off_and_merged_as_before() -> None:
    model = adapted(QWEN, ours=True).eval()
    with torch.no_grad():
        trained = model(IDS).logits
        with model.disable_adapter():
            plain = model(IDS).logits
        base = make(QWEN, torch.float64)
        base.config._experts_implementation = "eager"
        assert torch.allclose(plain, base(IDS).logits, atol=1e-10)
        merged = model.merge_and_unload().eval()
        assert torch.allclose(merged(IDS).logits, trained, atol=1e-10)
    assert not torch.allclose(trained, plain, atol=1e-3)


def test_two_active_adapters_add_up() -> None:
    found = []
    for own in (False, True):
        model = adapted(QWEN, ours=False)
        model.add_adapter("other", copy.deepcopy(model.peft_config["default"]))
        model = randomize(model.double())
        model.base_model.set_adapter(["default", "other"])
        if own:
            use_experts_function(model)
        found.append(run(model))
    assert_close(*found, 1e-10)


def test_trained_experts_are_left_to_peft() -> None:
    """Weights that are trained themselves need a gradient, which our function does not compute."""
    model = adapted(QWEN, ours=False)
    for _, module, name, _ in list_expert_stacks(model):
        module._parameters[name].requires_grad_(True)
    theirs = run(model)
    assert use_experts_function(model) == 0
    assert_close(theirs, run(model), 1e-12)
    assert any(name.endswith("gate_up_proj") for name in theirs)


# -- quantized ---------------------------------------------------------------------------------


#: Every backend on two kinds, and one on the classes outside of the interface.
PAIRS = [(kind, name) for kind in ("qwen3_moe", "gpt_oss") for name in ("int8", "nf4", "fp4", "int8-torchao")]


@pytest.mark.parametrize(("kind", "backend"), [*PAIRS, *((kind, "nf4") for kind in OTHERS)])
def test_quantized_experts_equal_their_dequantized_weights(kind: str, backend: str) -> None:
    """Output and gradients are those of the float model that holds the dequantized values."""
    base = make({**KINDS, **OTHERS}[kind])
    model = prepare_model(base, quantization=backend, r=2, lora_dropout=0.0, experts="routed")
    randomize(model).train()
    stacks = list(list_quantized_stacks(model))
    assert len(stacks) == (2 if kind == "longcat" else 4)
    quantized = run(model)
    again = copy.deepcopy(model)
    dequantize_model(again)
    assert not list(list_quantized_stacks(again))
    assert_close(quantized, run(again.train()), 2e-3 if backend == "int8" else 1e-3)


@pytest.mark.parametrize("backend", ["int8", "nf4"])
def test_nearly_all_expert_bytes_are_quantized_and_stated(backend: str) -> None:
    base = make(QWEN)
    float_bytes = sum(stack.nbytes for _, _, _, stack in list_expert_stacks(base))
    model = prepare_model(base, quantization=backend, r=2, experts="routed")
    held = sum(part.nbytes for _, _, _, stack in list_quantized_stacks(model) for part in stack.list_tensors())
    assert held < float_bytes * (0.35 if backend == "int8" else 0.25)
    report = make_report(model)
    experts = sum(stack.numel() for _, _, _, stack in list_quantized_stacks(model))
    assert report.quantized_share > experts / report.total
    assert report.bytes_after < (report.bytes_before or 0)
    assert not any("stay in float" in note and "expert" in note for note in report.notes)


def test_quantized_base_trains_saves_and_reloads_everywhere(tmp_path: Path) -> None:
    """One file: plain PEFT loads it onto a float base, we load it onto a quantized one."""
    model = prepare_model(make(QWEN), quantization="int8", r=2, lora_dropout=0.0, experts="routed").train()
    found = losses(model, 6)
    assert found[-1] < found[0]
    model.save_pretrained(tmp_path)
    ours = prepare_model(make(QWEN), quantization="int8", adapter=tmp_path)
    plain = PeftModel.from_pretrained(make(QWEN), tmp_path)
    with torch.no_grad():
        trained = model.train()(IDS).logits
        assert torch.equal(ours.train()(IDS).logits, trained)
        assert torch.nn.functional.mse_loss(plain.eval()(IDS).logits, trained) < 0.01 * trained.var()


def test_trainer_evaluates_in_between_and_goes_on(tmp_path: Path) -> None:
    """An evaluation changes no stored expert: bitsandbytes' own 4-bit layers repack themselves there."""
    model = prepare_model(make(MIXTRAL), quantization="nf4", r=2, lora_dropout=0.05, experts="routed")
    before = [dequantize_stack(stack) for _, _, _, stack in list_quantized_stacks(model)]
    arguments = TrainingArguments(
        str(tmp_path), max_steps=4, per_device_train_batch_size=2,
        eval_strategy="steps", eval_steps=1, learning_rate=0.01,
        report_to=[], save_strategy="no", use_cpu=True, logging_steps=1,
    )  # fmt: skip
    data = [{"input_ids": row, "labels": row} for row in IDS.repeat(4, 1)]
    trainer = Trainer(model, arguments, train_dataset=data, eval_dataset=data[:2])
    trainer.train()
    after = [dequantize_stack(stack) for _, _, _, stack in list_quantized_stacks(model)]
    assert all(torch.equal(*pair) for pair in zip(before, after, strict=True))
    norms = [entry["grad_norm"] for entry in trainer.state.log_history if "grad_norm" in entry]
    assert len(norms) == 4
    assert min(norms) > 0
    moved = [p for name, p in model.named_parameters() if "experts" in name and "lora_B" in name]
    assert len(moved) == 4
    assert all(p.any() for p in moved)


def test_experts_of_a_model_that_was_loaded_quantized(tmp_path: Path) -> None:
    """transformers' loader leaves stacks in float; preparing the model quantizes them."""
    make(QWEN).save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=quantization_config("nf4"))
    assert not list(list_quantized_stacks(loaded))
    model = prepare_model(loaded, r=2, lora_dropout=0.0, experts="routed")
    assert len(list(list_quantized_stacks(model))) == 4
    assert any("loaded in float" in note for note in make_report(model).notes)
    assert losses(model.train(), 6)[-1] < losses(model, 1)[0] + 1


def test_experts_are_skipped_where_the_user_says_so() -> None:
    wanted = {"name": "nf4", "skip_modules": ["layers.0.mlp.experts"]}
    model = prepare_model(make(QWEN), quantization=wanted, r=2)
    assert [path for path, *_ in list_quantized_stacks(model)] == [
        f"base_model.model.model.layers.1.mlp.experts.{name}" for name in ("gate_up_proj", "down_proj")
    ]
    assert any("2 stacked expert weights stay in float: skip_modules" in note for note in make_report(model).notes)
    run(model.train())


def test_merging_into_int8_experts_and_back() -> None:
    model = randomize(prepare_model(make(QWEN), quantization="int8", r=2, lora_dropout=0.0, experts="routed")).eval()
    for module in model.modules():
        module.training = True  # the same kernel for attention everywhere
    before = [dequantize_stack(stack) for _, _, _, stack in list_quantized_stacks(model)]
    with torch.no_grad():
        trained = model(IDS).logits
        with model.disable_adapter():
            plain = model(IDS).logits
        model.merge_adapter()
        merged = model(IDS).logits
        assert (merged - trained).norm() < 0.1 * (plain - trained).norm()
        model.unmerge_adapter()
        assert torch.equal(model(IDS).logits, trained)
    after = [dequantize_stack(stack) for _, _, _, stack in list_quantized_stacks(model)]
    assert all(torch.equal(*pair) for pair in zip(before, after, strict=True))


def test_merging_into_4_bit_experts_is_refused() -> None:
    wanted = {"name": "nf4", "skip_modules": ["self_attn"]}
    model = prepare_model(make(QWEN), quantization=wanted, r=2, experts="routed", lora_dropout=0.0)
    with pytest.raises(MergeError, match="dequantize_model"):
        model.merge_adapter()
    expected = run(randomize(model).train())["logits"]
    dequantize_model(model)
    with torch.no_grad():
        assert torch.allclose(model.merge_and_unload()(IDS).logits, expected, atol=1e-4)


# -- the stack as a tensor ---------------------------------------------------------------------


def quantized_base(backend: str = "nf4", dtype: torch.dtype = torch.float32) -> Any:
    return prepare_model(make(QWEN, dtype), quantization=backend, r=2)


def test_stack_is_copied_pickled_cast_and_never_written_into() -> None:
    model = quantized_base()
    stack = next(stack for *_, stack in list_quantized_stacks(model))
    assert isinstance(stack, nn.Parameter)
    assert stack.shape == (6, 48, 32)
    assert torch.equal(stack[2], dequantize_stack(stack)[2])
    assert torch.equal(stack.sum((1, 2)), dequantize_stack(stack).sum((1, 2)))
    for other in (copy.deepcopy(stack), pickle.loads(pickle.dumps(stack)), stack.detach()):
        assert isinstance(other, QuantizedStack)
        assert torch.equal(dequantize_stack(other), dequantize_stack(stack))
    assert isinstance(copy.deepcopy(stack), nn.Parameter)
    assert stack.to(torch.bfloat16)[0].dtype == torch.bfloat16
    with pytest.raises(QuantizationError, match="would write into experts that are stored quantized"):
        stack.data += 1
    with pytest.raises(QuantizationError, match="dequantize_model"):
        stack.data.zero_()


def test_moving_and_casting_a_model_keeps_its_experts_quantized() -> None:
    model = quantized_base()
    model.to("cpu").train()
    expected = [dequantize_stack(stack) for *_, stack in list_quantized_stacks(model)]
    model.get_base_model().model.layers[0].mlp.experts.to(torch.bfloat16)
    stacks = [stack for *_, stack in list_quantized_stacks(model)]
    assert [stack.dtype for stack in stacks] == [torch.bfloat16] * 2 + [torch.float32] * 2
    assert all(torch.equal(dequantize_stack(s, torch.float32), e) for s, e in zip(stacks, expected, strict=True))


def test_base_in_bfloat16_is_multiplied_in_bfloat16() -> None:
    model = prepare_model(make(QWEN, torch.bfloat16), quantization="int8", r=2, compute_dtype="bfloat16")
    assert {stack.dtype for *_, stack in list_quantized_stacks(model)} == {torch.bfloat16}
    run(model.train())
    held = {type(p).__name__ for p in model.parameters() if p.dim() == 3}
    assert held == {"QuantizedStack"}


def peak_floats(step: Callable[[], Any], values: int) -> int:
    """Most float tensors of one expert's number of values that were alive at once while a function ran."""

    class Watch(TorchDispatchMode):
        def __init__(self) -> None:
            super().__init__()
            self.alive: set[int] = set()
            self.peak = 0

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            output = func(*args, **(kwargs or {}))
            for tensor in output if isinstance(output, (tuple, list)) else [output]:
                if isinstance(tensor, torch.Tensor) and not isinstance(tensor, QuantizedStack):
                    self.note(tensor)
            return output

        def note(self, tensor: torch.Tensor) -> None:
            storage = tensor.untyped_storage()
            if not tensor.is_floating_point() or storage.nbytes() != values * tensor.element_size():
                return
            if storage._cdata not in self.alive:
                self.alive.add(storage._cdata)
                self.peak = max(self.peak, len(self.alive))
                weakref.finalize(storage, self.alive.discard, storage._cdata)

    watch = Watch()
    with watch:
        step()
    return watch.peak


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("backend", ["int8", "nf4", "fp4", "int8-torchao", "float8-torchao"])
def test_step_holds_one_float_expert_at_a_time(backend: str, dtype: torch.dtype) -> None:
    """Of sizes that nothing else has: the values of one expert's first or second projection, in any float dtype."""
    config = Qwen3MoeConfig(
        **{**SMALL, "hidden_size": 46}, head_dim=16, moe_intermediate_size=26, num_experts=6, num_experts_per_tok=2
    )
    wanted = {"quantization": backend, "compute_dtype": dtype, "lora_dropout": 0.0, "experts": "routed"}
    model = prepare_model(make(config, dtype), r=2, **wanted).train()
    for rows, columns in ((52, 46), (46, 26)):
        assert peak_floats(lambda: run(model), rows * columns) == 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("backend", ["int8", "nf4", "fp4", "int8-torchao", "float8-torchao"])
def test_dequantizing_an_expert_takes_the_memory_of_the_result(backend: str, dtype: torch.dtype) -> None:
    """Counted by the allocator, which sees what operators hold inside."""
    quantization = parse_quantization(backend)
    assert quantization is not None
    stack = quantize_stack(torch.randn(1, 512, 1024, dtype=dtype), quantization)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as found:
        weight = stack.read_expert(0, dtype)
    sizes = [event.nbytes() for event in found.profiler.kineto_results.events() if event.name() == "[memory]"]
    assert weight.dtype == dtype
    assert weight.nbytes <= max(itertools.accumulate(sizes)) < 1.4 * weight.nbytes
    assert torch.equal(weight, stack.read_expert(0).to(dtype))


@pytest.mark.parametrize("backend", ["int8", "nf4", "fp4", "int8-torchao"])
def test_quantizing_in_place_peaks_at_the_float_model_and_one_stack(backend: str) -> None:
    sizes = {"hidden_size": 128, "intermediate_size": 256, "num_local_experts": 8, "num_hidden_layers": 3}
    config = MixtralConfig(**{**SMALL, **sizes})
    prepare_model(make(config), quantization=backend, r=2, experts="routed")  # the self-test's tensors
    model = make(config)
    stack = max(stack.nbytes for *_, stack in list_expert_stacks(model))
    gc.collect()
    live = LiveBytes(*model.parameters(), *model.buffers())
    float_model = live.live
    with live:
        prepare_model(model, quantization=backend, r=2, experts="routed")
    gc.collect()
    assert live.live < 0.4 * float_model, "freed storages are seen"
    assert float_model < live.peak <= float_model + stack


def test_tiny_models_without_experts_are_left_alone() -> None:
    model = prepare_model(tiny.llama(), quantization="int8", r=2)
    assert use_experts_function(model) == 0
    assert model.config._experts_implementation != EXPERTS_FUNCTION


# -- other people's backends -------------------------------------------------------------------


@pytest.fixture
def plugin(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The module of the plugin package with four backends, installed as far as Python can tell."""
    monkeypatch.syspath_prepend(str(Path(__file__).parent / "plugins" / "stacked_experts"))
    return importlib.import_module("fake_stacked_experts")


@pytest.mark.parametrize("name", ["LayersAndExperts", "OwnFormat"])
def test_a_plugins_backend_quantizes_experts(plugin: Any, name: str) -> None:
    backend = getattr(plugin, name)()
    check_quantizer(backend)
    model = prepare_model(make(QWEN), quantization=backend, r=2, lora_dropout=0.0, experts="routed").train()
    assert len(list(list_quantized_stacks(model))) == 4
    found = losses(model, 6)
    assert found[-1] < found[0]
    planned = plan(make(QWEN).to("meta"), quantization=backend, length=8, experts="routed", r=2, lora_dropout=0.0)
    assert backend.name not in planned.float_experts
    assert planned.chosen.memory.weights == tensor_bytes(model).total


def test_a_backend_that_says_nothing_leaves_experts_in_float_and_trains(plugin: Any) -> None:
    backend = plugin.LayersOnly()
    check_quantizer(backend)
    model = prepare_model(make(QWEN), quantization=backend, r=2, experts="routed").train()
    assert not list(list_quantized_stacks(model))
    reason = "the backend 'rounded-layers' has no format for stacked experts"
    assert f"4 stacked expert weights stay in float: {reason}" in make_report(model).notes
    found = losses(model, 6)
    assert found[-1] < found[0]
    planned = plan(make(QWEN).to("meta"), quantization=backend, length=8)
    assert planned.float_experts[backend.name] == reason
    assert "rounded-layers" in str(planned)
    assert planned.chosen.quantized_share < 0.5


def test_a_format_that_gives_other_weights_back_is_refused(plugin: Any) -> None:
    with pytest.raises(QuantizerSelfTestFailed, match=r"with stacked experts: .*skip_modules=\['experts'\]"):
        prepare_model(make(QWEN), quantization=plugin.Careless(), r=2)
    with pytest.raises(AssertionError, match="with stacked experts"):
        check_quantizer(plugin.Careless())


@pytest.mark.parametrize("backend", ["int8", "nf4", "fp4", "int8-torchao", "float8-torchao"])
def test_plan_knows_the_bytes_of_quantized_experts(backend: str) -> None:
    """The weights of every backend are planned to the byte, and again for a base that is quantized already."""
    planned = plan(make(QWEN).to("meta"), quantization="nf4", length=8, experts="routed", r=2)
    weights = {row.quantization: row.memory.weights for row in planned.rows}
    model = prepare_model(make(QWEN), quantization=backend, r=2, experts="routed")
    assert weights[backend] == tensor_bytes(model).total
    assert backend not in planned.float_experts
    assert planned.chosen.quantized_share > 0.8
    assert plan(model, length=8).chosen.memory.weights == tensor_bytes(model).total


def test_engines_that_divide_parameters_are_refused_by_name(tmp_path: Path) -> None:
    model = quantized_base()
    trainer = Trainer(model, TrainingArguments(str(tmp_path), report_to=[], use_cpu=True))
    prepare_quantized(trainer, model)
    trainer.is_deepspeed_enabled = True
    with pytest.raises(UnsupportedTraining, match=r"experts that are stored quantized, first .*skip_modules"):
        prepare_quantized(trainer, model)
    ignored = model._ddp_params_and_buffers_to_ignore
    assert set(ignored) == {path for path, *_ in list_quantized_stacks(model)} <= set(dict(model.named_parameters()))

"""The backends beside int8 and nf4: loading, one adapter on all of them, merging, odd shapes, what is refused."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import os
import sys
import threading
import time
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError
from pathlib import Path
from typing import Any

import peft
import pytest
import tiny
import torch
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForCausalLM

from lora_plugins import (
    LoraCallback,
    Quantizer,
    dequantize_model,
    missing_package,
    prepare_model,
    quantization_config,
)
from lora_plugins.adapters.report import make_report
from lora_plugins.builtin.quantizers import quanto
from lora_plugins.builtin.quantizers.torchao import Int8Torchao
from lora_plugins.errors import (
    MergeError,
    NothingQuantized,
    PreparationError,
    QuantizationError,
    QuantizerSelfTestFailed,
    QuantizerUnavailable,
)
from lora_plugins.quantization.counting import count_parameters, tensor_bytes
from lora_plugins.quantization.lora_layer import QuantizedLoraLinear
from lora_plugins.quantization.request import owner_of, parse_quantization, quantization_of
from lora_plugins.quantization.selftest import check_usable
from lora_plugins.quantization.walk import quantize_in_place

NEW = ("fp4", "int8-torchao", "float8-torchao", "int8-quanto", "int4-quanto", "int8-hqq", "int4-hqq")
ALL = ("int8", "nf4", *NEW)
EIGHT_BITS = ("int8", "int8-torchao", "float8-torchao", "int8-quanto", "int8-hqq")
LOADABLE = tuple(name for name in ALL if not name.endswith("hqq"))

CPU = torch.device("cpu")
IDS = torch.arange(1, 13)[None]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama of 2 layers and hidden size 128 in bfloat16."""
    path = tmp_path_factory.mktemp("model")
    tiny.llama(hidden_size=128, intermediate_size=256).to(torch.bfloat16).save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def adapter(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter with random weights, made on the float model."""
    path = tmp_path_factory.mktemp("adapter")
    wrapped = randomized(prepare_model(fresh(folder), r=4, lora_dropout=0.0))
    wrapped.save_pretrained(path)
    return path


def fresh(folder: Path, **arguments: Any) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16, **arguments)


def randomized(model: Any) -> Any:
    torch.manual_seed(3)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.05)
    return model


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    output: torch.Tensor = model.train()(IDS).logits.float()
    return output


def quantized_layers(model: nn.Module) -> list[nn.Module]:
    return [module for module in model.modules() if owner_of(module) is not None]


# -- in place and while loading ----------------------------------------------------------------


@pytest.mark.parametrize("name", LOADABLE)
def test_loaded_equals_in_place(folder: Path, name: str) -> None:
    # A CPU that is slow at bfloat16 would otherwise get float32 in one of them.
    wanted = {"name": name, "compute_dtype": "bfloat16"} if name in ("nf4", "fp4") else name
    same: dict[str, Any] = {"r": 4, "lora_dropout": 0.0, "compute_dtype": "bfloat16"}
    loaded = prepare_model(fresh(folder, quantization_config=quantization_config(wanted)), **same)
    ours = prepare_model(fresh(folder), quantization=name, **same)
    assert len(quantized_layers(loaded)) == len(quantized_layers(ours)) == 14
    assert [type(m) for m in loaded.modules()] == [type(m) for m in ours.modules()]
    for training in (True, False):
        with torch.no_grad():
            assert torch.equal(loaded.train(training)(IDS).logits, ours.train(training)(IDS).logits)


@pytest.mark.parametrize("name", ["int8-hqq", "int4-hqq"])
def test_backend_that_cant_load_says_how_else(name: str) -> None:
    with pytest.raises(QuantizationError, match=rf"cannot quantize while loading.*quantization='{name}'"):
        quantization_config(name)


@pytest.mark.parametrize("name", ["fp4", "int8-torchao", "float8-torchao"])
def test_base_saves_and_loads_as_quantized(folder: Path, tmp_path: Path, name: str) -> None:
    base = prepare_model(fresh(folder), r=4, quantization=name).unload()
    base.save_pretrained(tmp_path)
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path)), logits(base))


@pytest.mark.parametrize("name", ["int8-quanto", "int4-hqq"])
def test_base_that_would_not_come_back_is_not_saved(folder: Path, tmp_path: Path, name: str) -> None:
    base = prepare_model(fresh(folder), r=4, quantization=name).unload()
    with pytest.raises(ValueError, match="not serializable"):
        base.save_pretrained(tmp_path)


@pytest.mark.parametrize("name", NEW)
def test_counts_and_bytes(folder: Path, name: str) -> None:
    base = fresh(folder)
    linears = {path: m for path, m in base.named_modules() if isinstance(m, nn.Linear) and path != "lm_head"}
    expected = sum(parameter.numel() for parameter in base.parameters())
    weights = sum(linear.weight.numel() for linear in linears.values())
    before = tensor_bytes(base).total
    wrapped = prepare_model(base, r=4, quantization=name, compute_dtype="bfloat16")
    count = count_parameters(wrapped)
    assert count.total - count.trainable == expected
    assert count.quantized == weights
    bits = quantization_of(quantized_layers(wrapped)[0]).quantizer.bits  # type: ignore[union-attr]
    saved = before + 4 * count.trainable - tensor_bytes(wrapped).total
    # Scales and zero points take some of it: at most 4 bytes for each group of 32.
    assert weights * (2 - bits / 8 - 4 / 32) <= saved < weights * (2 - bits / 8)


def test_reports_say_which_loss_is_which_where_there_are_two(folder: Path) -> None:
    with_note = [
        name
        for name in ALL
        if any("evaluation loss" in n for n in make_report(prepare_model(fresh(folder), quantization=name)).notes)
    ]
    assert with_note == ["int8"]


@pytest.mark.parametrize("name", ["nf4", "fp4"])
@pytest.mark.parametrize("loaded", [False, True])
def test_four_bits_are_never_repacked_on_a_cpu_with_avx512_bf16(
    folder: Path, monkeypatch: pytest.MonkeyPatch, name: str, loaded: bool
) -> None:
    """The packed form that bitsandbytes makes in an evaluation there has no backward pass, and nothing unpacks it."""
    # What it asks the CPU; the answer is this one on the machines that are meant.
    monkeypatch.setattr("bitsandbytes.nn.modules.has_avx512bf16", lambda: True)
    import bitsandbytes as bnb

    assert bnb.nn.Linear4bit(64, 64).support_avx512bf16_for_cpu, "bitsandbytes would repack"
    if loaded:
        base = fresh(folder, quantization_config=quantization_config(name))
        assert any(getattr(m, "support_avx512bf16_for_cpu", False) for m in base.modules())
        model = prepare_model(base, r=4)
    else:
        model = prepare_model(fresh(folder), r=4, quantization=name)
    layers: list[Any] = quantized_layers(model)
    assert len(layers) == 14
    assert not any(layer.support_avx512bf16_for_cpu for layer in layers)
    parsed = parse_quantization(name)
    assert parsed is not None
    alone: Any = parsed.quantize(nn.Linear(64, 64, bias=False, dtype=torch.bfloat16))
    assert not alone.support_avx512bf16_for_cpu, "the self-test must see the layer as it will be trained"


# -- activations of another dtype --------------------------------------------------------------


@pytest.mark.parametrize("name", NEW)
@pytest.mark.parametrize("autocast", [False, True])
def test_float32_base_trains_in_bfloat16_and_under_autocast(tmp_path: Path, name: str, autocast: bool) -> None:
    compute_dtype = "auto" if autocast else "bfloat16"
    callback = LoraCallback(r=4, quantization=name, compute_dtype=compute_dtype)
    trainer = tiny.trainer(tmp_path, tiny.llama(), [callback], bf16=autocast, max_steps=2, eval_strategy="no")
    trainer.train()
    norms = [entry["grad_norm"] for entry in trainer.state.log_history if "grad_norm" in entry]
    assert len(norms) == 2
    assert min(norms) > 0
    adapters = {p.dtype for n, p in trainer.model.named_parameters() if "lora_" in n}
    assert adapters == {torch.float32}


@pytest.mark.parametrize("name", ["int8-torchao", "int8-quanto", "int4-hqq"])
def test_layer_computes_in_the_dtype_of_the_activations_unless_told(name: str) -> None:
    model = prepare_model(tiny.llama(), r=4, quantization=name, compute_dtype="bfloat16")
    told = prepare_model(tiny.llama(), r=4, quantization={"name": name, "compute_dtype": "float32"})
    for wrapped, dtype in ((model, torch.bfloat16), (told, torch.float32)):
        layers: list[Any] = quantized_layers(wrapped)
        assert {layer.computes_in() for layer in layers} == {dtype}
        for activations in (torch.float32, torch.bfloat16):
            assert layers[0](torch.ones(2, 32, dtype=activations)).dtype == activations


def test_compute_dtype_that_is_none_is_refused() -> None:
    with pytest.raises(QuantizationError, match="not 'int7'"):
        parse_quantization({"name": "nf4", "compute_dtype": "int7"})


# -- one adapter everywhere --------------------------------------------------------------------


@pytest.mark.parametrize("name", ALL)
def test_adapter_file_does_not_depend_on_the_backend(folder: Path, adapter: Path, tmp_path: Path, name: str) -> None:
    """Files from every backend hold the same, and the one from the float base goes onto every backend: all pairs."""
    made = randomized(prepare_model(fresh(folder), r=4, lora_dropout=0.0, quantization=name))
    made.save_pretrained(tmp_path)
    stored, reference = (load_file(path / "adapter_model.safetensors") for path in (tmp_path, adapter))
    assert stored.keys() == reference.keys()
    for key, tensor in reference.items():
        assert stored[key].dtype == tensor.dtype == torch.float32
        # PEFT rounds the first A to the dtype of the layer under it, which not every backend has.
        assert torch.allclose(stored[key], tensor, rtol=0.01, atol=0)
    assert (tmp_path / "adapter_config.json").read_text() == (adapter / "adapter_config.json").read_text()

    again = prepare_model(fresh(folder), adapter=adapter, quantization=name)
    assert len(quantized_layers(again)) == 14
    loaded = {key: value for key, value in again.named_parameters() if "lora_" in key}
    assert {key.replace(".default", ""): value for key, value in loaded.items()}.keys() == reference.keys()
    assert all(torch.equal(value, reference[key.replace(".default", "")]) for key, value in loaded.items())
    with_adapter, made_here = logits(again), logits(made)
    without = logits(again.unload())
    effect = torch.linalg.vector_norm(without - with_adapter)
    assert effect > 0
    assert torch.linalg.vector_norm(made_here - with_adapter) < 0.05 * effect


@pytest.mark.parametrize("name", ALL)
def test_plain_peft_loads_onto_a_base_that_was_quantized_here(folder: Path, adapter: Path, name: str) -> None:
    ours = prepare_model(fresh(folder), adapter=adapter, quantization=name)
    expected = logits(ours)
    plain = peft.PeftModel.from_pretrained(ours.unload(), str(adapter))
    # PEFT's layers over bitsandbytes round once more.
    assert torch.allclose(logits(plain), expected, atol=0.02)
    # Recognized again: with layers that cannot lose the adapter in a merge, and the very same predictions.
    prepare_model(plain)
    assert torch.equal(logits(plain), expected)
    lora = [m for m in plain.modules() if isinstance(m, peft.tuners.lora.LoraLayer)]
    assert {type(m) for m in lora} == {QuantizedLoraLinear}


def test_second_adapter_loads_beside_the_first(folder: Path, adapter: Path) -> None:
    model = prepare_model(fresh(folder), r=4, lora_dropout=0.0, quantization="int4-hqq")
    model.load_adapter(str(adapter), "second")
    model.set_adapter("second")
    assert torch.equal(logits(model), logits(prepare_model(fresh(folder), adapter=adapter, quantization="int4-hqq")))


class Halves(nn.Module):
    """A linear layer in float16 that is no ``nn.Linear``: PEFT alone would refuse it."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.stored = nn.Parameter(linear.weight.detach().half(), requires_grad=False)
        self.bias = linear.bias

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.linear(x, self.stored.to(x.dtype), self.bias)


class InHalves(Quantizer):
    name, bits = "in-halves", 16

    def available(self, device: torch.device, dtype: torch.dtype, options: Mapping[str, Any]) -> str | None:
        return None

    def quantize_linear(self, linear: nn.Linear, options: Mapping[str, Any]) -> nn.Module:
        return Halves(linear)

    def owns(self, module: nn.Module) -> bool:
        return isinstance(module, Halves)

    def dequantize(self, module: Any) -> torch.Tensor:
        return module.stored.float()


@pytest.mark.filterwarnings("ignore:Unsupported layer type")
def test_backend_of_four_methods_reloads_and_merges(folder: Path, adapter: Path) -> None:
    model = prepare_model(fresh(folder), adapter=adapter, quantization=InHalves())
    assert sum(isinstance(m, Halves) for m in model.modules()) == 14
    adapted = logits(model)
    with model.disable_adapter():
        effect = torch.linalg.vector_norm(logits(model) - adapted)
    merged = model.merge_and_unload()
    assert sum(isinstance(m, Halves) for m in merged.modules()) == 14
    assert torch.linalg.vector_norm(logits(merged) - adapted) < 0.1 * effect


# -- merging -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", EIGHT_BITS)
def test_merge_into_eight_bits_keeps_the_adapter_and_unmerge_is_exact(folder: Path, adapter: Path, name: str) -> None:
    model = prepare_model(fresh(folder), adapter=adapter, quantization=name)
    adapted = logits(model)
    with model.disable_adapter():
        bare = logits(model)
    model.merge_adapter()
    merged = logits(model)
    assert torch.linalg.vector_norm(merged - adapted) < 0.2 * torch.linalg.vector_norm(bare - adapted)
    model.unmerge_adapter()
    assert torch.equal(logits(model), adapted)


@pytest.mark.parametrize("name", ["nf4", "fp4", "int4-quanto", "int4-hqq"])
def test_merge_into_four_bits_is_refused_and_dequantizing_is_the_way(folder: Path, adapter: Path, name: str) -> None:
    model = prepare_model(fresh(folder), adapter=adapter, quantization=name)
    adapted = logits(model)
    with model.disable_adapter():
        effect = torch.linalg.vector_norm(logits(model) - adapted)
    for merge in (model.merge_adapter, model.merge_and_unload):
        with pytest.raises(MergeError, match=r"4-bit.*dequantize_model.*lora-plugins merge"):
            merge()
    assert torch.equal(logits(model), adapted), "a refused merge changes nothing"
    assert len(dequantize_model(model)) == 14
    merged = model.merge_and_unload()
    assert {type(m) for m in merged.modules() if isinstance(m, nn.Linear)} == {nn.Linear}
    assert torch.linalg.vector_norm(logits(merged) - adapted) < 0.1 * effect
    assert not getattr(merged, "is_quantized", False)


def test_dequantized_model_is_an_ordinary_one(folder: Path, tmp_path: Path) -> None:
    base = prepare_model(fresh(folder), quantization="int4-hqq", compute_dtype="bfloat16").unload()
    expected = logits(base)
    dequantize_model(base)
    base.save_pretrained(tmp_path)
    assert torch.equal(logits(fresh(tmp_path)), logits(base))
    assert torch.allclose(logits(base), expected, atol=0.05)
    with pytest.raises(QuantizationError, match="nothing to dequantize"):
        dequantize_model(base)


def test_conv1d_is_a_conv1d_again(tmp_path: Path) -> None:
    from transformers.pytorch_utils import Conv1D

    model = prepare_model(tiny.gpt2(), r=4, quantization="int8-torchao", compute_dtype="float32", lora_dropout=0.0)
    expected = logits(randomized(model))
    dequantize_model(model)
    assert torch.allclose(logits(model), expected, atol=1e-4)
    merged = model.merge_and_unload()
    assert type(merged.transformer.h[0].attn.c_attn) is Conv1D
    merged.save_pretrained(tmp_path)
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path)), logits(merged))
    assert torch.allclose(logits(merged), expected, atol=1e-4)


# -- what is refused ---------------------------------------------------------------------------


def test_dynamic_activations_are_refused_because_they_have_no_gradient() -> None:
    from torchao.quantization import Int8DynamicActivationInt8WeightConfig

    config = Int8DynamicActivationInt8WeightConfig(set_inductor_config=False)
    with pytest.raises(QuantizerSelfTestFailed, match="no grad_fn in training"):
        prepare_model(tiny.llama(), quantization={"name": "int8-torchao", "config": config})


class Int4Opaque(Int8Torchao):
    """int4 weights packed for the CPU, as a plugin might add them."""

    name, bits = "int4-opaque", 4

    def settings(self, options: Mapping[str, Any]) -> Any:
        from torchao.prototype.quantization.int4 import PrototypeInt4WeightOnlyConfig

        return PrototypeInt4WeightOnlyConfig(group_size=64, set_inductor_config=False)

    def owns(self, module: Any) -> bool:
        return type(module.weight).__name__ == "Int4OpaqueTensor"


def test_opaque_int4_is_refused_because_it_has_no_derivative() -> None:
    parsed = parse_quantization(Int4Opaque())
    assert parsed is not None
    with pytest.raises(QuantizerSelfTestFailed, match=r"derivative.*not implemented"):
        check_usable(parsed, CPU, torch.bfloat16)


def test_other_settings_of_torchao_are_used() -> None:
    from torchao.quantization import Int8WeightOnlyConfig, PerGroup

    config = Int8WeightOnlyConfig(granularity=PerGroup(16), set_inductor_config=False)
    model = prepare_model(tiny.llama(), quantization={"name": "int8-torchao", "config": config})
    layers: Any = quantized_layers(model)
    assert layers[0].weight.scale.shape == (32, 2)


class Lazy(InHalves):
    name = "lazy"

    def quantize_linear(self, linear: nn.Linear, options: Mapping[str, Any]) -> nn.Module:
        return Halves(linear) if linear.in_features > 32 else linear


def test_layer_left_in_float_without_a_word_is_found() -> None:
    with pytest.raises(QuantizationError, match="left a layer of shape 32 -> 32 unquantized"):
        quantize_in_place(tiny.llama(), parse_quantization(Lazy()))  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["int8-quanto", "int4-quanto"])
def test_dora_over_quanto_is_refused(name: str) -> None:
    with pytest.raises(PreparationError, match=rf"use_dora=True cannot be combined with quantization='{name}'"):
        prepare_model(tiny.llama(), r=4, quantization=name, use_dora=True)


# -- odd shapes --------------------------------------------------------------------------------


class Odd(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.even = nn.Linear(64, 64, dtype=torch.bfloat16)
        self.odd = nn.Linear(width, 64, dtype=torch.bfloat16)


@pytest.mark.parametrize(
    ("quantization", "width", "reason"),
    [
        # Not skipping this one ends the process: its kernel reads past the end of the weight.
        ("int8-quanto", 100, "100 input features are not a multiple of 16"),
        ("int8-hqq", 100, "100 input features cannot be parted in groups"),
        ({"name": "int4-hqq", "group_size": 64}, 96, "96 input features cannot be parted in groups of 64"),
    ],
)
def test_layer_that_does_not_fit_stays_in_float_with_the_reason(quantization: Any, width: int, reason: str) -> None:
    model = Odd(width)
    layers = quantize_in_place(model, parse_quantization(quantization))  # type: ignore[arg-type]
    assert layers.quantized == ["even"]
    assert reason in layers.skipped["odd"]
    assert type(model.odd) is nn.Linear


def test_report_says_which_layers_stay_in_float() -> None:
    model = prepare_model(tiny.llama(intermediate_size=100), r=4, quantization="int8-quanto")
    notes = make_report(model).notes
    assert [note for note in notes if "stay in float" in note] == [
        "2 linear layers stay in float: 100 input features are not a multiple of 16, as its bfloat16 kernel needs"
    ]


def test_model_loaded_with_a_layer_that_does_not_fit_is_refused(tmp_path: Path) -> None:
    tiny.llama(intermediate_size=100).save_pretrained(tmp_path)
    loaded = fresh(tmp_path, quantization_config=quantization_config("int8-quanto"))
    with pytest.raises(QuantizationError, match=r"mlp\.down_proj was loaded quantized and 'int8-quanto' cannot"):
        prepare_model(loaded, r=4)


def test_model_where_no_layer_fits_is_an_error() -> None:
    with pytest.raises(NothingQuantized, match="parted in groups of 48"):
        quantize_in_place(tiny.llama(), parse_quantization({"name": "int4-hqq", "group_size": 48}))  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["fp4", "int8-torchao", "float8-torchao", "int4-quanto"])
def test_other_backends_take_odd_widths(name: str) -> None:
    model = Odd(100)
    quantize_in_place(model, parse_quantization(name))  # type: ignore[arg-type]
    x = torch.randn(3, 100, dtype=torch.bfloat16, requires_grad=True)
    model.odd(x).sum().backward()
    owner = owner_of(model.odd)
    assert owner is not None
    expected = owner.dequantize(model.odd).float().sum(0)
    assert x.grad is not None
    assert torch.allclose(x.grad[0].float(), expected, atol=0.05)


@pytest.mark.parametrize("width", [104, 96, 40])
def test_group_sizes_of_hqq_divide_the_rows(width: int) -> None:
    model = Odd(width)
    quantize_in_place(model, parse_quantization("int4-hqq"))  # type: ignore[arg-type]
    odd: Any = model.odd
    assert odd.meta["group_size"] in (8, 32)
    assert width % odd.meta["group_size"] == 0


def test_group_size_is_a_multiple_of_eight() -> None:
    with pytest.raises(QuantizerUnavailable, match="group_size must be a multiple of 8, not 12"):
        prepare_model(
            tiny.llama(hidden_size=48, num_attention_heads=4), quantization={"name": "int4-hqq", "group_size": 12}
        )


# -- installation ------------------------------------------------------------------------------


def test_missing_and_old_packages_name_the_command() -> None:
    assert missing_package("torch", "1.0") is None
    assert missing_package("no-such-thing", "1.2") == (
        "no-such-thing is not installed; run `pip install 'no-such-thing>=1.2'`"
    )
    old = missing_package("torch", "99.0")
    assert old is not None
    assert "is installed and >=99.0 is needed; run `pip install 'torch>=99.0'`" in old


def test_requirements_of_a_backend_are_checked_before_it_is_asked() -> None:
    class Needy(InHalves):
        name, requires = "needy", ("torch>=1.0", "torch<2", "no-such-thing[extra]>=1.2", "old; python_version < '3'")

        def available(self, device: torch.device, dtype: torch.dtype, options: Mapping[str, Any]) -> str | None:
            raise AssertionError("asked although a package is missing")

    with pytest.raises(QuantizerUnavailable) as error:
        check_usable(parse_quantization(Needy()), CPU, torch.float32)  # type: ignore[arg-type]
    assert str(error.value).endswith(
        f"torch {importlib.metadata.version('torch')} is installed and <2 is needed and "
        "no-such-thing is not installed; "
        "run `pip install 'torch<2' 'no-such-thing[extra]>=1.2'`"
    )


@pytest.mark.parametrize(
    ("name", "command"),
    [
        ("int4-hqq", "pip install 'hqq>="),
        ("float8-torchao", "pip install 'torchao>="),
        ("int4-quanto", "pip install 'optimum-quanto>="),
    ],
)
def test_backend_without_its_package(monkeypatch: pytest.MonkeyPatch, name: str, command: str) -> None:
    def nothing(name: str) -> str:
        raise PackageNotFoundError(name)

    monkeypatch.setattr("importlib.metadata.version", nothing)
    with pytest.raises(QuantizerUnavailable) as error:
        check_usable(parse_quantization(name), CPU, torch.float32)  # type: ignore[arg-type]
    assert command in str(error.value)


def test_quanto_needs_a_compiler_where_it_was_never_compiled(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(quanto, "_build_folder", lambda: tmp_path)
    backend = quanto.Int4Quanto()
    assert backend.available(CPU, torch.float32, {}) is None
    monkeypatch.setenv("CXX", "no-such-compiler -O2")
    reason = backend.available(CPU, torch.float32, {})
    assert reason is not None
    assert "compiler 'no-such-compiler' is not installed" in reason
    (tmp_path / "quanto_cpp.so").touch()
    assert backend.available(CPU, torch.float32, {}) is None


def test_lock_of_a_killed_compilation_is_taken_away(tmp_path: Path) -> None:
    lock = tmp_path / "lock"
    lock.touch()
    for path in (lock, tmp_path):
        os.utime(path, (time.time() - 1000,) * 2)
    quanto.wait_for_build(tmp_path)
    assert not lock.exists()


def test_lock_of_a_running_compilation_is_waited_for(tmp_path: Path) -> None:
    lock = tmp_path / "lock"
    lock.touch()
    threading.Timer(0.3, lock.unlink).start()
    start = time.monotonic()
    quanto.wait_for_build(tmp_path)
    assert time.monotonic() - start > 0.2


# -- the page of measurements ------------------------------------------------------------------


def test_page_shows_the_committed_measurements_of_every_backend() -> None:
    path = Path(__file__).parent.parent / "benchmarks" / "backends.py"
    spec = importlib.util.spec_from_file_location("backends_benchmark", path)
    assert spec is not None
    assert spec.loader is not None
    benchmark = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = benchmark
    spec.loader.exec_module(benchmark)
    snapshot = json.loads(benchmark.SNAPSHOT.read_text(encoding="utf-8"))
    assert benchmark.page(snapshot) == benchmark.PAGE.read_text(encoding="utf-8"), "run benchmarks/backends.py --page"
    assert [row["name"] for row in snapshot["rows"]] == list(benchmark.CASES)
    assert set(ALL) <= set(benchmark.CASES)
    for row in snapshot["rows"]:
        assert row["gradient"] > 0
        assert row["reload"] == 0
        assert row["merge"] < 0.2

"""Layers whose input a model casts to the dtype of their weight stay in float where that is one of integers."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn
from transformers import (
    AutoModelForSeq2SeqLM,
    BitsAndBytesConfig,
    LongT5Config,
    SwitchTransformersConfig,
    T5Config,
)

from lora_plugins import plan, prepare_model
from lora_plugins.adapters.report import make_report
from lora_plugins.errors import QuantizationError
from lora_plugins.models.casts import find_cast_inputs
from lora_plugins.quantization import selftest
from lora_plugins.quantization.counting import tensor_bytes

SIZES: dict[str, Any] = {
    "vocab_size": 64, "d_model": 32, "d_kv": 16, "d_ff": 64, "num_layers": 2, "num_decoder_layers": 2, "num_heads": 2,
    "decoder_start_token_id": 0, "tie_word_embeddings": False,
}  # fmt: skip
SWITCH = SwitchTransformersConfig(
    **SIZES, num_experts=2, expert_capacity=16, num_sparse_encoder_layers=1, num_sparse_decoder_layers=1
)
LONG_T5 = LongT5Config(**SIZES)
IDS = torch.randint(1, 64, (2, 7), generator=torch.Generator().manual_seed(0))


class Casting(nn.Module):
    """A block as others may write it."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.inner = nn.Linear(64, 64), nn.ModuleDict({"down": nn.Linear(64, 64)})
        self.gate = nn.Linear(64, 64)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.up(x)
        if self.gate.weight.dtype != torch.uint8:
            x = self.gate(x.to(self.gate.weight.dtype))
        return self.inner.down(x.to(self.inner.down.weight.dtype))  # type: ignore[operator,union-attr]


def make(config: Any) -> Any:
    torch.manual_seed(0)
    return AutoModelForSeq2SeqLM.from_config(copy.deepcopy(config))


def losses(model: Any, steps: int = 6) -> list[float]:
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=0.02)
    found = []
    model.train()
    for _ in range(steps):
        loss = model(input_ids=IDS, labels=IDS).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        found.append(float(loss.detach()))
    return found


@pytest.mark.parametrize("config", [SWITCH, LONG_T5], ids=["switch", "longt5"])
@pytest.mark.parametrize("backend", ["nf4", "fp4"])
def test_every_adapter_below_such_a_layer_gets_a_gradient_and_the_plan_knows(config: Any, backend: str) -> None:
    wanted: dict[str, Any] = {"quantization": backend, "target_modules": "all-linear", "r": 2}
    wanted |= {"experts": "routed"} if config is SWITCH else {}
    model = prepare_model(make(config), lora_dropout=0.0, **wanted)
    said = "casts its input to the dtype of its weight, which is uint8 where it is quantized"
    assert said in " ".join(make_report(model).notes)
    for path, module in model.named_modules():
        if path.endswith((".wo", ".wi", ".wi_0")):
            stored = module.get_base_layer().weight.dtype
            assert stored == (torch.float32 if path.endswith(".wo") else torch.uint8)
    model.train()(input_ids=IDS, labels=IDS).loss.backward()
    grads = {name: p.grad for name, p in model.named_parameters() if ".wi.lora_B" in name or ".wi_0.lora_B" in name}
    assert grads
    assert any(grad is not None and grad.any() for grad in grads.values())
    found = losses(model)
    assert found[-1] < found[0]
    planned = plan(make(config), length=8, **wanted)
    assert planned.chosen.memory.weights == tensor_bytes(model).total


@pytest.mark.parametrize("backend", ["int8", "int8-torchao"])
def test_a_dtype_that_the_model_leaves_alone_is_quantized(backend: str) -> None:
    model = prepare_model(make(SWITCH), quantization=backend, r=2)
    assert "casts its input" not in " ".join(make_report(model).notes)


@pytest.mark.parametrize("backend", ["int8", "nf4"])
def test_a_block_of_ones_own_is_read_too(backend: str) -> None:
    casts = find_cast_inputs(nn.ModuleDict({"block": Casting()}))
    assert casts == {"block.gate": frozenset({"uint8"}), "block.inner.down": frozenset()}
    model = prepare_model(nn.Sequential(Casting()), quantization=backend, target_modules=["up"], r=2)
    block = model.base_model.model[0]
    assert block.inner.down.weight.dtype == torch.float32
    assert (block.gate.weight.dtype == torch.float32) == (backend == "int8")
    model(torch.randn(3, 64)).sum().backward()
    assert block.up.lora_B.default.weight.grad.any()


def test_a_class_without_source_is_left_alone() -> None:
    space: dict[str, Any] = {"nn": nn}
    exec("class Made(nn.Module):\n    def forward(self, x):\n        return x.to(self.up.weight.dtype)", space)
    assert find_cast_inputs(space["Made"]()) == {}


def test_a_model_that_was_loaded_so_is_refused_with_the_way_out(tmp_path: Any) -> None:
    make(SWITCH).save_pretrained(tmp_path)
    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    loaded = AutoModelForSeq2SeqLM.from_pretrained(tmp_path, quantization_config=config)
    with pytest.raises(QuantizationError, match=r"\.wo was loaded quantized .*dtype of its weight, .*skip_modules"):
        prepare_model(loaded, r=2)


def test_layers_that_a_model_keeps_in_float32_are_as_before() -> None:
    model = prepare_model(make(T5Config(**SIZES)), quantization="nf4", r=2)
    assert "casts its input" not in " ".join(make_report(model).notes)


class _Callable:
    """A forward that is neither a function nor hashable."""

    __hash__ = None  # type: ignore[assignment]

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return x


class Unusual(nn.Module):
    forward = _Callable()


@pytest.mark.parametrize("kind", ["scripted", "callable"])
def test_modules_without_a_function_as_forward_are_passed_over(kind: str) -> None:
    activation: Any = torch.jit.script(nn.SiLU()) if kind == "scripted" else Unusual()
    model = nn.ModuleDict({"activation": activation, "block": Casting()})
    assert find_cast_inputs(model) == {"block.gate": frozenset({"uint8"}), "block.inner.down": frozenset()}
    base = make(LONG_T5)
    base.encoder.block[0].layer[-1].DenseReluDense.act = activation
    assert prepare_model(base, quantization="int8", r=2).get_base_model().config.model_type == "longt5"


@pytest.mark.parametrize(
    ("stored", "spoils"),
    [(torch.float8_e4m3fn, True), (torch.float8_e5m2, True), (torch.bfloat16, False), (torch.float32, False)],
    ids=str,
)
def test_eight_bits_of_float_spoil_an_input_as_integers_do(
    stored: torch.dtype, spoils: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(selftest, "_read_weight_dtype", lambda case: stored)
    model = prepare_model(nn.Sequential(Casting()), quantization="int8", target_modules=["up"], r=2)
    block = model.base_model.model[0]
    assert (block.inner.down.weight.dtype == torch.float32) is spoils
    assert block.up.get_base_layer().weight.dtype == torch.int8


class Keyword(nn.Module):
    """The same casts by keyword, as in BLIP-2, and beside a device."""

    def __init__(self) -> None:
        super().__init__()
        self.named, self.beside = nn.Linear(64, 64), nn.Linear(64, 64)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.named(x.to(dtype=self.named.weight.dtype))
        return self.beside(x.to(device=x.device, dtype=self.beside.weight.dtype))


@pytest.mark.parametrize("backend", ["int8", "nf4"])
def test_a_cast_by_keyword_is_found(backend: str) -> None:
    assert find_cast_inputs(Keyword()) == {"named": frozenset(), "beside": frozenset()}
    model = prepare_model(nn.Sequential(Keyword(), nn.Linear(64, 64)), quantization=backend, target_modules=["1"], r=2)
    block = model.base_model.model[0]
    assert block.named.weight.dtype == block.beside.weight.dtype == torch.float32

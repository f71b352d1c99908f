"""The 4-bit layer whose packed weight, scales and tables are one parameter that an engine can divide."""

from __future__ import annotations

import copy
from typing import Any

import bitsandbytes as bnb
import peft
import pytest
import tiny
import torch
from torch import nn

from lora_plugins import plan, prepare_model
from lora_plugins.builtin.quantizers.bitsandbytes import Nf4
from lora_plugins.plugins.host import plugin_host
from lora_plugins.quantization.counting import count_parameters, tensor_bytes
from lora_plugins.quantization.division import divide_layers, undivide_layers
from lora_plugins.quantization.request import owner_of, parse_quantization
from lora_plugins.testing import check_quantizer

DOUBLE = {"name": "nf4", "double_quant": True}
KINDS = {"nf4": "nf4", "fp4": "fp4", "double": DOUBLE}
#: Columns and rows, also such that blocks of 64 and words of 16 bytes are not filled.
SHAPES = [(32, 16), (64, 48), (320, 1000), (30, 50)]


def make_layer(kind: str, columns: int = 64, rows: int = 48, *, bias: bool = False) -> Any:
    torch.manual_seed(0)
    quantization = parse_quantization(KINDS[kind])
    assert quantization is not None
    return quantization.quantize(nn.Linear(columns, rows, bias=bias).requires_grad_(False))


def divided(layer: Any) -> Any:
    found = copy.deepcopy(layer)
    owner = owner_of(found)
    assert owner is not None
    assert owner.divide(found)
    return found


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_products_and_gradients_are_those_of_the_undivided_layer(kind: str, bias: bool) -> None:
    one = make_layer(kind, bias=bias)
    other = divided(one)
    for layer in (one, other):
        if bias:
            layer.bias.requires_grad_(True)
    inputs = [torch.randn(2, 5, 64, generator=torch.Generator().manual_seed(1)).requires_grad_() for _ in range(2)]
    outputs = [layer(x) for layer, x in zip((one, other), inputs, strict=True)]
    assert outputs[0].equal(outputs[1])
    for output in outputs:
        output.square().sum().backward()
    assert inputs[0].grad is not None
    assert inputs[0].grad.equal(inputs[1].grad)  # type: ignore[arg-type]
    if bias:
        assert torch.allclose(one.bias.grad.reshape(-1, 48).sum(0), other.bias.grad)
    assert owner_of(other) is owner_of(one)
    owner: Any = owner_of(one)
    assert owner.dequantize(one).equal(owner.dequantize(other))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("kind", KINDS)
def test_nothing_is_left_beside_the_parameter_and_its_bytes_are_those_of_the_plan(
    kind: str, shape: tuple[int, int]
) -> None:
    layer = divided(make_layer(kind, *shape))
    quantization = parse_quantization(KINDS[kind])
    assert quantization is not None
    assert [name for name, _ in layer.named_parameters()] == ["weight"]
    assert layer.weight.dtype == torch.uint8
    assert not layer.weight.requires_grad
    assert tensor_bytes(layer).total == layer.weight.nbytes
    assert quantization.quantizer.divided_bytes(*shape, quantization.options) == layer.weight.nbytes
    state = vars(layer.quant_state)
    assert not any(isinstance(value, torch.Tensor) for value in state.values())


@pytest.mark.parametrize("storage", [torch.uint8, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("kind", KINDS)
def test_undoing_gives_the_layer_back_bit_by_bit(kind: str, storage: torch.dtype) -> None:
    one = bnb.nn.Linear4bit(
        64, 48, bias=False, compress_statistics=kind == "double", quant_type="nf4", quant_storage=storage
    )
    one = one.to("cpu").requires_grad_(False)
    again = divided(one)
    owner: Any = owner_of(again)
    owner.divide(again)
    owner.undivide(again)
    owner.undivide(again)
    assert type(again) is type(one)
    assert type(again.weight) is type(one.weight)
    assert again.weight.dtype == storage
    assert again.quant_state is again.weight.quant_state
    assert again.state_dict().keys() == one.state_dict().keys()
    for name, value in one.state_dict().items():
        assert value.shape == again.state_dict()[name].shape
        # Packed bits may be a NaN of the float dtype that holds them.
        assert value.reshape(-1).view(torch.uint8).equal(again.state_dict()[name].reshape(-1).view(torch.uint8))
    x = torch.randn(3, 64)
    assert again(x).equal(one(x))


def test_a_float_dtype_that_the_model_is_cast_to_does_not_reach_the_bits() -> None:
    one = make_layer("nf4")
    other = divided(one)
    owner: Any = owner_of(one)
    assert owner.dequantize(other.to(torch.bfloat16)).equal(owner.dequantize(one))


def test_a_parameter_at_any_place_of_a_buffer_is_read() -> None:
    """DeepSpeed gathers parameters of bytes into one buffer, one behind the other."""
    one = make_layer("nf4")
    other = divided(one)
    buffer = torch.zeros(other.weight.numel() + 3, dtype=torch.uint8)
    buffer[3:] = other.weight.detach()
    other.weight.data = buffer[3:]
    x = torch.randn(3, 64)
    assert other(x).equal(one(x))


def test_nothing_of_the_weight_is_kept_between_forward_and_backward_pass() -> None:
    """An engine frees the gathered parameter after the forward pass and gathers it again for the backward pass."""
    layer = divided(make_layer("nf4"))
    expected = torch.ones(3, 48) @ owner_of(layer).dequantize(layer)  # type: ignore[union-attr]
    x = torch.randn(3, 64, requires_grad=True)
    output = layer(x)
    gathered = layer.weight.data
    again = gathered.clone()
    gathered.zero_()
    layer.weight.data = again
    output.sum().backward()
    assert x.grad is not None
    assert x.grad.equal(expected)


def test_layers_that_an_adapter_reads_are_not_divided() -> None:
    plain: Any = prepare_model(tiny.llama(), quantization="nf4", r=4)
    assert divide_layers(plain) == []
    dora: Any = prepare_model(tiny.llama(), quantization="nf4", r=4, use_dora=True)
    whole = divide_layers(dora)
    adapted = [m for m in dora.modules() if isinstance(m, peft.tuners.lora.layer.Linear)]
    assert {id(module) for module in whole} == {id(module.get_base_layer()) for module in adapted}
    int8: Any = prepare_model(tiny.llama(), quantization="int8", r=4)
    assert len(divide_layers(int8)) == 14


def test_a_divided_model_counts_and_computes_as_before_and_comes_back() -> None:
    model: Any = prepare_model(tiny.llama(), quantization=DOUBLE, r=4).eval()
    ids = torch.arange(1, 13)[None]
    before, count = model(input_ids=ids).logits, count_parameters(model)
    names = [name for name, _ in model.named_parameters()]
    divide_layers(model)
    assert model(input_ids=ids).logits.equal(before)
    assert count_parameters(model) == count
    undivide_layers(model)
    assert model(input_ids=ids).logits.equal(before)
    assert [name for name, _ in model.named_parameters()] == names


@pytest.mark.parametrize(("kind", "strategy"), [("nf4", "fsdp"), ("double", "zero3")])
def test_plan_of_a_base_that_is_quantized_already_is_that_of_the_float_base(kind: str, strategy: str) -> None:
    settings: dict[str, Any] = {"strategy": strategy, "devices": 2, "length": 8}
    live = prepare_model(tiny.llama(), quantization=KINDS[kind], r=8)
    planned = plan(tiny.llama(), quantization=KINDS[kind], **settings).chosen.memory
    assert plan(live, **settings).chosen.memory.weights == planned.weights
    whole = plan(tiny.llama(), quantization=KINDS[kind], length=8).chosen.memory.weights
    assert planned.weights / whole == pytest.approx(0.5, abs=0.01)


@pytest.mark.parametrize("kind", KINDS)
def test_the_kit_for_backends_checks_division(kind: str) -> None:
    asked = parse_quantization(KINDS[kind])
    assert asked is not None
    check_quantizer(asked.quantizer, {"double_quant": kind == "double"})


def test_the_kit_finds_a_backend_that_states_other_bytes_than_it_divides() -> None:
    class Wrong(Nf4):
        def divided_bytes(self, in_features: int, out_features: int, options: Any) -> int:
            return in_features * out_features // 2

    with pytest.raises(AssertionError, match=r"divided_bytes\(\) says 24576 bytes and the parameter has 27712"):
        check_quantizer(Wrong())


def test_the_kit_finds_a_backend_that_divides_a_float_parameter() -> None:
    class Wrong(Nf4):
        def divide(self, module: Any) -> bool:
            module.weight = nn.Parameter(module.weight.data.flatten().view(torch.float32), requires_grad=False)
            return True

    with pytest.raises(AssertionError, match=r"in torch\.float32, which mixed precision casts"):
        check_quantizer(Wrong())


def test_other_backends_say_that_they_do_not_divide() -> None:
    for quantizer in plugin_host().quantizers():
        if quantizer.name not in ("nf4", "fp4"):
            assert quantizer.divided_bytes(64, 64, {}) is None
            assert not quantizer.divide(nn.Linear(2, 2))

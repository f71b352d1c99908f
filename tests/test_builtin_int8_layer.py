"""The int8 layer's training pass on a CPU against bitsandbytes' own: the same values, less kept."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import bitsandbytes as bnb
import pytest
import tiny
import torch
import torch.utils.checkpoint
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from lora_plugins import prepare_model
from lora_plugins.builtin.quantizers import int8_layer
from lora_plugins.builtin.quantizers.bitsandbytes import Int8
from lora_plugins.builtin.quantizers.int8_layer import (
    Int8Linear,
    _Int8Product,
    dequantize_rows,
    dequantize_weight,
    quantize_rows,
)
from lora_plugins.quantization.counting import tensor_bytes


def layers(dtype: torch.dtype, *, bias: bool = True) -> tuple[Any, Any]:
    """The same quantized layer in our class and in bitsandbytes' own."""
    torch.manual_seed(0)
    linear = nn.Linear(24, 40, bias=bias, dtype=dtype).requires_grad_(False)
    ours: Any = Int8().quantize_linear(linear, {})
    theirs: Any = Int8().quantize_linear(linear, {})
    theirs.__class__ = bnb.nn.Linear8bitLt
    return ours, theirs


def run(layer: Any, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    x = x.detach().clone().requires_grad_(True)
    output = layer(x)
    torch.manual_seed(1)
    output.backward(torch.randn(output.shape).to(output.dtype))
    assert x.grad is not None
    return output.detach(), x.grad


@pytest.mark.parametrize("block", [1 << 20, 50])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_equals_bitsandbytes_to_the_bit(
    dtype: torch.dtype, bias: bool, block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(int8_layer, "_BLOCK", block)
    ours, theirs = layers(dtype, bias=bias)
    x = torch.randn(2, 7, 24, dtype=dtype)
    for found, expected in zip(run(ours, x), run(theirs, x), strict=True):
        assert found.dtype == expected.dtype == dtype
        assert torch.equal(found, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_under_autocast(dtype: torch.dtype) -> None:
    ours, theirs = layers(dtype)
    x = torch.randn(2, 7, 24, dtype=dtype)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found, expected = run(ours, x), run(theirs, x)
    for one, other in zip(found, expected, strict=True):
        assert one.dtype == other.dtype
        torch.testing.assert_close(one, other, rtol=2e-2, atol=2e-2)


def test_nothing_is_kept_but_what_the_layer_holds() -> None:
    ours, _ = layers(torch.bfloat16)
    x = torch.randn(2, 7, 24, dtype=torch.bfloat16, requires_grad=True)
    kept: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        output = ours(x)
    assert kept == []
    own = [tensor.data_ptr() for tensor in output.grad_fn.kept]
    assert own == [ours.weight.data_ptr(), ours.state.SCB.data_ptr()]


def test_partitioned_weight_is_not_held_between_the_passes() -> None:
    ours, theirs = layers(torch.float32)
    x = torch.randn(7, 24)
    ours.weight.ds_id = 0
    kept: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        output = ours(x.requires_grad_(True))
    assert {tensor.dtype for tensor in kept} == {torch.int8, torch.float32}
    assert not hasattr(output.grad_fn, "kept")
    assert all(map(torch.equal, run(ours, x), run(theirs, x)))


def test_checkpointing_does_not_repeat_the_last_product(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its result is not needed a second time, and in a transformer block it is a large part of what is repeated."""
    first, second = (layers(torch.float32)[0] for _ in range(2))
    calls = []

    def counted(*args: Any) -> torch.Tensor:
        calls.append(args)
        return dequantize_rows(*args)

    monkeypatch.setattr(int8_layer, "dequantize_rows", counted)
    x = torch.randn(7, 24, requires_grad=True)
    back = torch.randn(24, 40) / 40

    def block(x: torch.Tensor) -> torch.Tensor:
        return second(nn.functional.silu(first(x) @ back.T))

    expected = torch.autograd.grad(block(x).sum(), x)[0]
    assert len(calls) == 4
    calls.clear()
    output = torch.utils.checkpoint.checkpoint(block, x, use_reentrant=False)
    assert len(calls) == 2
    assert torch.equal(torch.autograd.grad(output.sum(), x)[0], expected)
    assert len(calls) == 2 + 1 + 2, "forward, the first product once more, backward"


def test_trainable_bias_gets_its_gradient() -> None:
    ours, theirs = layers(torch.float32)
    for layer in (ours, theirs):
        layer.bias = nn.Parameter(layer.bias.detach().clone())
    x = torch.randn(7, 24)
    run(ours, x)
    run(theirs, x)
    torch.testing.assert_close(ours.bias.grad, theirs.bias.grad)


def test_evaluation_is_bitsandbytes_own_and_changes_nothing() -> None:
    ours, theirs = layers(torch.float32)
    x = torch.randn(2, 7, 24)
    before = run(ours, x)
    with torch.no_grad():
        assert torch.equal(ours.eval()(x), theirs.eval()(x))
    for one, other in zip(run(ours.train(), x), before, strict=True):
        assert torch.equal(one, other)


def test_dequantized_values_are_rounded_once() -> None:
    ours, _ = layers(torch.float32)
    weight, scale = ours.weight.data, ours.weight.SCB
    wide = dequantize_rows(weight, scale, torch.float32)
    torch.testing.assert_close(wide.double(), weight.double() * scale.double()[:, None] / 127)
    assert torch.equal(dequantize_rows(weight, scale, torch.bfloat16), wide.to(torch.bfloat16))
    assert type(ours) is Int8Linear


@pytest.mark.parametrize("block", [1 << 20, 50])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_quantized_values_are_those_of_bitsandbytes(
    dtype: torch.dtype, block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(int8_layer, "_BLOCK", block)
    torch.manual_seed(0)
    weight = torch.randn(40, 24).to(dtype)
    weight[3] *= 1e-5
    weight[5, 1] = -30
    expected = bnb.nn.Int8Params(weight, requires_grad=False, has_fp16_weights=False).to("cpu")
    values, scale = quantize_rows(weight)
    assert torch.equal(values, expected.data)
    assert torch.equal(scale, expected.SCB)


# -- on other devices ----------------------------------------------------------------------------


class Refused(Exception):
    """bitsandbytes' own pass was taken."""


def refuse_bitsandbytes(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: Any, **kwargs: Any) -> None:
        raise Refused

    monkeypatch.setattr(bnb.nn.Linear8bitLt, "forward", refuse)


def move(layer: Any, device: str) -> None:
    """Put a layer's tensors on a device, without values."""
    layer.weight = nn.Parameter(torch.empty(40, 24, dtype=torch.int8, device=device), requires_grad=False)
    layer.weight.CB, layer.weight.SCB = None, None
    layer.state.SCB = torch.empty(40, device=device)
    layer.bias = nn.Parameter(torch.empty(40, device=device), requires_grad=False)


@pytest.mark.parametrize("device", ["cpu", "cuda", "xpu", "meta"])
@pytest.mark.parametrize("lean", [None, True, False])
def test_the_lean_pass_is_taken_on_a_cpu_or_as_asked(
    device: str, lean: bool | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No default of another device changes. Tensors are fake, since there is no such device."""
    refuse_bitsandbytes(monkeypatch)
    layer: Any = Int8().quantize_linear(nn.Linear(24, 40), {} if lean is None else {"lean": lean})
    with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():
        move(layer, device)
        x = torch.empty(2, 7, 24, device=device)
        if not (device == "cpu" if lean is None else lean):
            with pytest.raises(Refused):
                layer(x)
            return
        output = layer(x)
        # torch without CUDA cannot run its engine for such tensors: the backward pass is called itself.
        context = SimpleNamespace(
            saved_tensors=(), kept=(layer.weight.data, layer.state.SCB), needs_input_grad=(True, False, False, True)
        )
        of_input, _, _, of_bias, _ = _Int8Product.backward(context, output)
    assert (output.device.type, output.shape) == (device, (2, 7, 40))
    assert of_input is not None
    assert of_bias is not None
    assert (of_input.device.type, of_input.shape) == (device, x.shape)
    assert (of_bias.device.type, of_bias.shape) == (device, (40,))


def test_the_whole_lean_pass_runs_where_the_weight_is() -> None:
    layer: Any = Int8().quantize_linear(nn.Linear(24, 40), {"lean": True})
    move(layer, "meta")
    x = torch.empty(2, 7, 24, device="meta", requires_grad=True)
    layer(x).sum().backward()
    assert x.grad is not None
    assert x.grad.device.type == "meta"


def test_bitsandbytes_own_pass_can_be_asked_for_on_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    refuse_bitsandbytes(monkeypatch)
    layer = Int8().quantize_linear(nn.Linear(24, 40), {"lean": False})
    with pytest.raises(Refused):
        layer(torch.randn(2, 24))


def test_a_layer_that_was_loaded_quantized_takes_the_pass_as_asked() -> None:
    """transformers makes bitsandbytes' own class."""
    layer: Any = layers(torch.float32)[1]
    model = nn.Sequential(layer)
    Int8().after_quantize(model, {"lean": True})
    assert type(model[0]) is Int8Linear
    assert model[0].lean is True


@pytest.mark.parametrize("passed", [False, True])
def test_a_moved_layer_holds_its_weight_once(passed: bool) -> None:
    model: Any = prepare_model(tiny.llama(), quantization="int8")
    layers = [module for module in model.modules() if isinstance(module, Int8Linear)]
    assert layers
    if passed:
        model.train()(input_ids=torch.tensor([[1, 2]]))
    expected = [layer.weight.data.clone() for layer in layers]
    before = [layer.weight.data_ptr() for layer in layers]
    size = tensor_bytes(model)
    model.to("cpu:0")  # a device of another name: torch copies
    assert all(layer.weight.data_ptr() != pointer for layer, pointer in zip(layers, before, strict=True))
    for layer, weight in zip(layers, expected, strict=True):
        assert torch.equal(layer.weight, weight)
        again = layer.state.CB if passed else layer.weight.CB
        assert again.data_ptr() == layer.weight.data_ptr()
    assert tensor_bytes(model) == size


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(40, 24), (1, 7), (7, 1), (300, 512)])
def test_dequantized_weight_has_the_values_of_bitsandbytes(shape: tuple[int, int], dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    weight, scale = quantize_rows(torch.randn(shape) * torch.logspace(-3, 2, shape[0]).unsqueeze(1))
    expected = bnb.functional.int8_vectorwise_dequant(weight, scale)
    assert torch.equal(dequantize_weight(weight, scale), expected)
    assert torch.equal(dequantize_weight(weight, scale, dtype), expected.to(dtype))

"""The int8 layer's training pass on a CPU against bitsandbytes' own: the same values, less kept."""

from __future__ import annotations

from typing import Any

import bitsandbytes as bnb
import pytest
import torch
import torch.utils.checkpoint
from torch import nn

from lora_plugins.builtin.quantizers import int8_layer
from lora_plugins.builtin.quantizers.bitsandbytes import Int8
from lora_plugins.builtin.quantizers.int8_layer import Int8Linear, dequantize_rows, quantize_rows


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

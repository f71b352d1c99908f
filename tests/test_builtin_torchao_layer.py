"""Dequantizing torchao's weights: torchao's own values, in the memory of the result."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch

from lora_plugins import prepare_model, quantization_config
from lora_plugins.builtin.quantizers import torchao_layer
from lora_plugins.builtin.quantizers.torchao_layer import dequantize_weight
from lora_plugins.quantization.request import parse_quantization

torchao = pytest.importorskip("torchao.quantization")

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SHAPES = [(64, 96), (96, 64), (52, 46), (1, 32), (32, 2), (7, 13), (300, 512)]


def draw(shape: tuple[int, int], dtype: torch.dtype) -> torch.Tensor:
    """A weight with rows of very different sizes, one of them of zeros."""
    torch.manual_seed(0)
    weight = torch.randn(shape) * torch.logspace(-4, 2, shape[0]).unsqueeze(1)
    weight[shape[0] // 2] = 0
    return weight.to(dtype)


def assert_same_bits(weight: Any) -> None:
    expected = weight.dequantize()
    found = dequantize_weight(weight)
    assert found.dtype == expected.dtype == weight.dtype
    # torchao 0.18 gives NaN for a row of zeros in float8.
    torch.testing.assert_close(found, expected, rtol=0, atol=0, equal_nan=True)
    assert torch.equal(torch.signbit(found[~found.isnan()]), torch.signbit(expected[~expected.isnan()]))
    again = dequantize_weight(weight)
    torch.testing.assert_close(again, expected, rtol=0, atol=0, equal_nan=True, msg="the stored weight was changed")


@pytest.mark.parametrize("block", [1 << 16, 100])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_a_scale_for_every_row(
    shape: tuple[int, int], dtype: torch.dtype, block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torchao_layer, "_BLOCK", block)
    for make in (torchao.Int8Tensor, torchao.Float8Tensor):
        assert_same_bits(make.from_hp(draw(shape, dtype), granularity=torchao.PerRow()))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "granularity",
    [
        torchao.PerTensor(),
        torchao.PerGroup(16),
        torchao.PerGroup(64),
        torchao.granularity.PerAxis(0),
        torchao.granularity.PerAxis(1),
        torchao.granularity.PerBlock((16, 32)),
    ],
    ids=repr,
)
def test_scales_of_other_parts_of_a_weight(granularity: Any, dtype: torch.dtype) -> None:
    assert_same_bits(torchao.Int8Tensor.from_hp(draw((96, 64), dtype), granularity=granularity))
    if not isinstance(granularity, torchao.PerGroup):
        assert_same_bits(torchao.Float8Tensor.from_hp(draw((96, 64), dtype), granularity=granularity))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("granularity", [torchao.PerRow(), torchao.PerGroup(16), torchao.PerTensor()], ids=repr)
def test_zero_points(granularity: Any, dtype: torch.dtype) -> None:
    # Values of one sign have the zero points that are farthest from zero.
    weight = draw((40, 48), dtype).abs()
    made = torchao.Int8Tensor.from_hp(weight, granularity=granularity, mapping_type=torchao.MappingType.ASYMMETRIC)
    assert made.zero_point.any()
    assert_same_bits(made)


def test_the_other_form_of_float8() -> None:
    for dtype in DTYPES:
        weight = draw((40, 48), dtype)
        assert_same_bits(torchao.Float8Tensor.from_hp(weight, float8_dtype=torch.float8_e5m2))


def count_peak(function: Callable[[], Any]) -> int:
    """Most bytes that the CPU's allocator had given out at once, in operators too, while a function ran."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as found:
        function()
    live = peak = 0
    for event in found.profiler.kineto_results.events():
        if event.name() == "[memory]":
            live += event.nbytes()
            peak = max(peak, live)
    return peak


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ["Int8Tensor", "Float8Tensor"])
def test_takes_the_memory_of_the_result(name: str, dtype: torch.dtype) -> None:
    weight = getattr(torchao, name).from_hp(draw((1024, 1024), dtype), granularity=torchao.PerRow())
    size = 1024 * 1024 * dtype.itemsize
    assert count_peak(weight.dequantize) >= 2 * size
    assert count_peak(lambda: dequantize_weight(weight)) < 1.4 * size


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2], ids=str)
@pytest.mark.parametrize("rows", [slice(3, 5), slice(None)], ids=["rows", "all"])
def test_zeros_stay_zeros(dtype: torch.dtype, rows: slice) -> None:
    linear = torch.nn.Linear(64, 96, bias=False).requires_grad_(False)
    linear.weight[rows] = 0
    expected = linear.weight.clone()
    config = torchao.Float8WeightOnlyConfig(weight_dtype=dtype)
    base = torch.nn.Sequential(linear)
    model = prepare_model(base, quantization={"name": "float8-torchao", "config": config}, target_modules=["0"], r=2)
    layer = model.base_model.model[0].get_base_layer()
    assert type(layer.weight).__name__ == "Float8Tensor"
    weight = dequantize_weight(layer.weight)
    assert not weight[rows].any()
    torch.testing.assert_close(weight, expected, rtol=0.13, atol=1e-2)
    assert model(torch.randn(2, 64)).isfinite().all()


def test_zeros_of_a_model_that_is_loaded_quantized_stay_zeros(tmp_path: Path) -> None:
    base = tiny.llama()
    with torch.no_grad():
        base.model.layers[1].mlp.down_proj.weight.zero_()
    base.save_pretrained(tmp_path)
    config = quantization_config("float8-torchao")
    loaded = tiny.LlamaForCausalLM.from_pretrained(tmp_path, quantization_config=config)
    model = prepare_model(loaded, r=2)
    loss = model(input_ids=torch.arange(1, 9)[None], labels=torch.arange(1, 9)[None]).loss
    assert loss.isfinite()


@pytest.mark.parametrize("name", ["int8-torchao", "float8-torchao"])
def test_a_layer_without_values_can_be_quantized(name: str) -> None:
    asked = parse_quantization(name)
    assert asked is not None
    layer: Any = asked.quantize(torch.nn.Linear(64, 32, bias=False, device="meta").requires_grad_(False))
    assert layer.weight.qdata.is_meta

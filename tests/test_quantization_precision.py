"""Which dtype a base computes in when nobody says: the one that the hardware is fast at."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import tiny
import torch

from lora_plugins import LoraCallback, plan, prepare_model
from lora_plugins.adapters.report import make_report
from lora_plugins.quantization import precision
from lora_plugins.quantization.request import owner_of

NOTE = "many times slower than float32"


@pytest.fixture
def slow(monkeypatch: pytest.MonkeyPatch) -> None:
    """A CPU without 16-bit products, such as one with AVX2 alone."""
    monkeypatch.setattr(precision, "slow_dtype", lambda dtype, device: dtype in (torch.bfloat16, torch.float16))
    monkeypatch.setattr(precision, "fast_bfloat16", lambda device: False)


@pytest.fixture
def fast(monkeypatch: pytest.MonkeyPatch) -> None:
    """A CPU with AVX512-BF16."""
    monkeypatch.setattr(precision, "slow_dtype", lambda dtype, device: False)
    monkeypatch.setattr(precision, "fast_bfloat16", lambda device: True)


def floats(model: Any) -> set[torch.dtype]:
    """Dtypes of the frozen weights that are not quantized."""
    return {
        parameter.dtype
        for module in model.modules()
        if owner_of(module) is None
        for parameter in module.parameters(recurse=False)
        if not parameter.requires_grad and parameter.is_floating_point()
    }


def has_note(model: Any) -> bool:
    return any(NOTE in note for note in make_report(model).notes)


@pytest.mark.usefixtures("slow")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("quantization", ["int8", "nf4", "int8-torchao"])
def test_slow_cpu_computes_a_quantized_base_in_float32(quantization: str, dtype: torch.dtype) -> None:
    model = prepare_model(tiny.llama().to(dtype), quantization=quantization)
    assert floats(model) == {torch.float32}
    layer = next(module for module in model.modules() if owner_of(module) is not None)
    seen: list[torch.dtype] = []
    layer.register_forward_hook(lambda module, args, output: seen.append(output.dtype))
    model(torch.arange(1, 9)[None])
    assert seen == [torch.float32]
    assert not has_note(model)


@pytest.mark.usefixtures("slow")
def test_slow_cpu_takes_bfloat16_when_told(tmp_path: Path) -> None:
    model = prepare_model(tiny.llama().to(torch.bfloat16), quantization="int8", compute_dtype="bfloat16")
    assert floats(model) == {torch.bfloat16}
    assert has_note(model)


@pytest.mark.usefixtures("slow")
def test_slow_cpu_leaves_a_float_base_and_says_so() -> None:
    model = prepare_model(tiny.llama().to(torch.bfloat16))
    assert floats(model) == {torch.bfloat16}
    assert has_note(model)
    assert not has_note(prepare_model(tiny.llama()))


@pytest.mark.usefixtures("slow")
def test_autocast_on_a_slow_cpu_is_left_and_said(tmp_path: Path) -> None:
    callback = LoraCallback(r=4, quantization="int8")
    trainer = tiny.trainer(tmp_path, tiny.llama(), [callback], bf16=True, max_steps=1)
    trainer.train()
    assert any("train without autocast" in note for note in make_report(trainer.model).notes)


@pytest.mark.usefixtures("fast")
def test_fast_cpu_computes_in_bfloat16() -> None:
    for dtype in (torch.bfloat16, torch.float32):
        model = prepare_model(tiny.llama().to(dtype), quantization="int8")
        assert floats(model) == {torch.bfloat16}
        assert not has_note(model)


@pytest.mark.usefixtures("slow")
def test_plan_knows_what_a_slow_cpu_will_do() -> None:
    planned = plan(tiny.llama().to(torch.bfloat16), quantization="int8", length=8)
    told = plan(tiny.llama().to(torch.bfloat16), quantization="int8", compute_dtype="float32", length=8)
    kept = plan(tiny.llama().to(torch.bfloat16), quantization="int8", compute_dtype="bfloat16", length=8)
    weights = [each.chosen.memory.weights for each in (planned, told, kept)]
    assert weights[0] == weights[1] > weights[2]
    assert [any("slow at bfloat16" in note for note in each.notes) for each in (planned, told, kept)] == [
        True,
        False,
        False,
    ]


def test_dtype_is_slow_only_on_a_cpu_that_has_no_product_for_it() -> None:
    for dtype, name in ((torch.bfloat16, "bf16"), (torch.float16, "fp16")):
        supported = getattr(torch.ops.mkldnn, f"_is_mkldnn_{name}_supported")()
        assert precision.slow_dtype(dtype, torch.device("cpu")) is not supported
        assert not precision.slow_dtype(dtype, torch.device("cuda"))
    assert not precision.slow_dtype(torch.float32, torch.device("cpu"))
    fast = precision.loading_dtype() == torch.bfloat16
    assert fast or precision.slow_dtype(torch.bfloat16, torch.device("cpu"))

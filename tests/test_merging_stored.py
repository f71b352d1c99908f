"""An adapter is merged into the dequantized weights of a quantized base, and the release says so."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import stored_bases
import torch
from transformers import AutoModelForCausalLM

from lora_plugins import merge_and_save, prepare_model
from lora_plugins.errors import MergeError
from registry.publishing import training_facts

W4 = {"num_bits": 4, "group_size": 32, "strategy": "group", "symmetric": True, "type": "int"}


def adapter_on(base: Path, folder: Path) -> Any:
    model = prepare_model(AutoModelForCausalLM.from_pretrained(base), r=4, lora_dropout=0.0, compute_dtype="float32")
    torch.manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1)
    model.save_pretrained(folder)
    return model


@pytest.mark.parametrize("make", [lambda folder: stored_bases.compressed(folder, **W4), stored_bases.fp8])
def test_the_merged_model_computes_what_was_trained(make: Callable[[Path], Path], tmp_path: Path) -> None:
    base = make(tmp_path / "base")
    model = adapter_on(base, tmp_path / "adapter")
    merge_and_save(tmp_path / "adapter", tmp_path / "merged", base=str(base))
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    assert getattr(merged.config, "quantization_config", None) is None
    ids = torch.arange(12)[None]
    with torch.no_grad():
        expected, found = model.eval()(ids).logits, merged.eval()(ids).logits
        with model.disable_adapter():
            bare = model(ids).logits
    assert (found - expected).norm() < 0.1 * (bare - expected).norm()


@pytest.mark.parametrize("method", ["awq", "bitnet", "higgs", "somethingnew"])
def test_a_base_that_nothing_dequantizes_is_refused_before_it_is_loaded(method: str, tmp_path: Path) -> None:
    base = tmp_path / "base"
    stored_bases.llama().save_pretrained(base)
    adapter_on(base, tmp_path / "adapter")
    stored_bases.declare(base, {"quant_method": method})
    with pytest.raises(MergeError, match=rf"stored quantized.*quant_method '{method}'.*--base"):
        merge_and_save(tmp_path / "adapter", tmp_path / "merged", base=str(base))


def test_a_release_says_what_format_the_base_s_files_have(tmp_path: Path) -> None:
    model = adapter_on(stored_bases.fp8(tmp_path / "base"), tmp_path / "adapter")
    assert training_facts.read_quantization(model) == "none"
    assert training_facts.read_base_format(model) == "fp8"
    assert training_facts.read_base_format(prepare_model(stored_bases.llama())) is None

"""Adapters that PEFT loses on loading: refused before training, and put back by name where they exist."""

from __future__ import annotations

import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from lora_plugins import prepare_model
from lora_plugins.adapters.files import adapter_state, copy_adapter
from lora_plugins.adapters.reloading import renamed_on_loading
from lora_plugins.errors import PreparationWarning, UnloadableAdapter
from lora_plugins.merging.job import read_job
from lora_plugins.merging.weights import wrap
from registry import pull_adapter, push_adapter

sys.path.insert(0, str(Path(__file__).parent.parent / "tools"))

import small_models
from small_models import Case

OCR = [
    Case("image-text-to-text", "deepseek_ocr2", "DeepseekOcr2ForConditionalGeneration"),
    Case("image-text-to-text", "unlimited_ocr", "UnlimitedOcrForConditionalGeneration"),
]
LAGUNA = Case("causal LM", "laguna", "LagunaForCausalLM")

pytestmark = pytest.mark.filterwarnings("ignore:Found missing adapter keys")


def base(case: Case) -> Any:
    if case.model_type not in CONFIG_MAPPING:
        pytest.skip(f"{case.model_type} is newer than this transformers")
    return small_models.build(case, "cpu", small_only=True).eval()


def trained(case: Case, folder: Path) -> Any:
    """A model whose adapters are not zero any more, in memory and in a folder."""
    with pytest.warns(PreparationWarning, match="PEFT would not find 16 of the 16 tensors"):
        model = prepare_model(base(case), r=2, lora_dropout=0.0, strict=False)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_()
    model.save_pretrained(folder)
    return model.eval()


def adapters_equal(one: Any, other: Any) -> bool:
    first, second = adapter_state(one, "default"), adapter_state(other, "default")
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("case", OCR, ids=lambda case: case.model_type)
def test_adapter_that_peft_would_lose_is_refused(case: Case) -> None:
    with pytest.raises(UnloadableAdapter, match=r"16 of the 16 tensors.*looks under .*language_model\.language_model"):
        prepare_model(base(case), r=2)


def test_targets_outside_of_what_is_lost_are_fine() -> None:
    """The shared experts of this type are renamed, its attention is not."""
    assert renamed_on_loading(prepare_model(base(LAGUNA), r=2), "default") == {}
    with pytest.raises(UnloadableAdapter, match="shared_experts"):
        prepare_model(base(LAGUNA), r=2, experts="shared", lora_dropout=0.0)


@pytest.mark.parametrize("case", OCR, ids=lambda case: case.model_type)
def test_peft_alone_loses_it(case: Case, tmp_path: Path) -> None:
    """Once this fails, a release of PEFT or transformers has made the refusal needless."""
    model = trained(case, tmp_path)
    assert not adapters_equal(PeftModel.from_pretrained(base(case), tmp_path), model)


@pytest.mark.parametrize("case", OCR, ids=lambda case: case.model_type)
def test_our_ways_of_loading_put_it_back(case: Case, tmp_path: Path) -> None:
    model = trained(case, tmp_path / "adapter")
    with pytest.warns(PreparationWarning):
        again = prepare_model(base(case), adapter=tmp_path / "adapter", strict=False)
    assert adapters_equal(again, model)
    hub = f"file://{tmp_path / 'registry'}"
    push_adapter(model, "org/ocr", version="1.0.0", hub=hub)
    loaded = pull_adapter("org/ocr", hub=hub).load(base(case))
    assert adapters_equal(loaded, model)
    job = read_job(tmp_path / "adapter", "org/ocr-base", None, None)
    assert adapters_equal(wrap(base(case), job).model, model)
    copy_adapter(again, "default", "reference", seed=0)
    copied = adapter_state(again, "reference")
    assert all(torch.equal(copied[name], tensor) for name, tensor in adapter_state(model, "default").items())


@pytest.mark.parametrize(
    ("model_type", "options"),
    [("mixtral", {"experts": "routed", "lora_dropout": 0.0}), ("llama", {"use_dora": True}), ("bert", {})],
)
def test_what_peft_finds_is_not_refused(model_type: str, options: dict[str, Any]) -> None:
    case = next(case for case in small_models.cases() if case.model_type == model_type)
    with warnings.catch_warnings():
        warnings.simplefilter("error", PreparationWarning)
        model = prepare_model(base(case), r=2, **options)
    assert renamed_on_loading(model, "default") == {}

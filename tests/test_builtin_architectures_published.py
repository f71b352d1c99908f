"""Every architecture and head: published, pulled, checked, loaded and merged, on small random models."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from lora_plugins import merge_and_save, prepare_model
from registry import pull_adapter, push_adapter
from registry.testing import LoopbackHub

sys.path.insert(0, str(Path(__file__).parent.parent / "tools"))

import small_models
from small_models import NOT_MERGED, NOT_PUBLISHED, NOT_TRAINED, Case

#: One type of each kind for the fast tests: a decoder, experts, a classifier, encoder-decoder, image and text, speech.
FAST = (
    ("causal LM", "qwen2"),
    ("causal LM", "mixtral"),
    ("sequence classification", "distilbert"),
    ("seq2seq LM", "t5"),
    ("image-text-to-text", "smolvlm"),
    ("speech seq2seq", "whisper"),
    ("question answering", "bert"),
    # Its attention reads weights without calling the layers.
    ("speech recognition", "wavlm"),
)
#: Heads that are new on a base without one: the way to a classifier. Fast tests of a text and an image model.
NEW_HEADS = ("sequence classification", "token classification", "image classification", *small_models.HEADS)
FAST_NEW_HEADS = (("sequence classification", "qwen2"), ("token classification", "roberta"))

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Small models are faster so, and other runs on the machine are not slowed down."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def parameters(*without: dict[str, str]) -> Iterator[Any]:
    """Every case that has a small model, without those that are listed with a reason."""
    left_out = set().union(NOT_TRAINED, *without)
    for case in [*small_models.cases(), *small_models.head_cases()]:
        if case.model_type not in left_out:
            marks = () if (case.task, case.model_type) in FAST else pytest.mark.slow
            yield pytest.param(case, marks=marks, id=f"{case.model_type}-{case.task.replace(' ', '-')}")


def read(case: Case, folder: Path) -> Any:
    return settle(case, getattr(transformers, case.class_name).from_pretrained(folder))


def settle(case: Case, model: Any) -> Any:
    """Set the mode in which a small model gives the same output each time, and passes a signal on."""
    small_models.settle(model, case.model_type)
    return model


def new_heads() -> Iterator[Any]:
    """Every head of the families that can be new on a base without one."""
    for case in [*small_models.cases(), *small_models.head_cases()]:
        if case.task in NEW_HEADS and case.model_type in small_models.HEAD_FAMILIES:
            marks = () if (case.task, case.model_type) in FAST_NEW_HEADS else pytest.mark.slow
            yield pytest.param(case, marks=marks, id=f"{case.model_type}-{case.task.replace(' ', '-')}")


def trained(case: Case, folder: Path, *, headless: bool = False) -> tuple[Any, Path, Path]:
    """A model whose adapters, at their default, have values as after training; the folders of its base and adapter."""
    whole: Any = small_models.build(case, "cpu", small_only=True)
    small_models.measure_statistics(whole)
    (whole.base_model if headless else whole).save_pretrained(folder / "base")
    torch.manual_seed(2)
    model = prepare_model(read(case, folder / "base"), r=2, lora_dropout=0.0)
    generator = torch.Generator().manual_seed(1)
    # Frozen statistics do not follow a change: over many norms it grows until it overflows.
    size = 0.002 if small_models.has_statistics(whole) else 0.1
    for name, parameter in model.named_parameters():
        if "lora_B" in name or "modules_to_save" in name:
            parameter.data = size * torch.randn(parameter.shape, generator=generator)
    model.save_pretrained(folder / "adapter")
    return settle(case, model), folder / "base", folder / "adapter"


def output(model: Any, batch: dict[str, Any]) -> torch.Tensor:
    with torch.no_grad():
        torch.manual_seed(0)
        return small_models.objective(model(**batch))


def publish_and_load(case: Case, folder: Path, hub: LoopbackHub, *, headless: bool = False) -> None:
    """Published as a folder and as a live model, pulled, checked in three ways, and loaded with PEFT's output."""
    model, base, adapter = trained(case, folder, headless=headless)
    batch = small_models.inputs(model.get_base_model())
    expected = output(model, batch)
    with model.disable_adapter():
        assert not torch.equal(expected, output(model, batch)), "the adapter changes nothing"
    name = f"org/{case.model_type}"
    hub.create_repo(name)
    hub.commit(name, {file.name: file.read_bytes() for file in base.iterdir()})
    where = folder / "registry"
    for version, source in (("1.0.0", adapter), ("2.0.0", model)):
        push_adapter(source, "org/adapter", version=version, hub=where, base_model=name)
        pulled = pull_adapter(f"org/adapter@{version}", hub=where, cache_dir=folder / "cache")
        live = read(case, base)
        for given in (live, base, name):
            result = pulled.check(given, base_hub=hub.endpoint, token=hub.token)
            assert result.tensors == len(pulled.manifest.tensors)
        again = pulled.load(base if source is adapter else live, is_trainable=True, trust_identity=True)
        assert type(again.get_base_model()).__name__ == case.class_name
        assert torch.equal(output(settle(case, again), batch), expected), f"loaded from {version}"


def merge_and_compare(case: Case, folder: Path, *, headless: bool = False) -> None:
    """Merged and loaded by transformers: the outputs of base and adapter."""
    model, base, adapter = trained(case, folder, headless=headless)
    batch = small_models.inputs(model.get_base_model())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        result = merge_and_save(adapter, folder / "merged", "same", base=base, quantization="none")
    assert result.class_name == case.class_name
    found = output(read(case, folder / "merged"), batch)
    torch.testing.assert_close(found, output(model, batch), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("case", list(parameters(NOT_PUBLISHED)))
def test_every_type_is_published_and_loaded(case: Case, loopback_hub: LoopbackHub, tmp_path: Path) -> None:
    publish_and_load(case, tmp_path, loopback_hub)


@pytest.mark.parametrize("case", list(parameters(NOT_MERGED)))
def test_every_type_is_merged(case: Case, tmp_path: Path) -> None:
    merge_and_compare(case, tmp_path)


@pytest.mark.parametrize("case", list(new_heads()))
def test_a_head_that_the_base_lacks_is_published_loaded_and_merged(
    case: Case, loopback_hub: LoopbackHub, tmp_path: Path
) -> None:
    publish_and_load(case, tmp_path / "published", loopback_hub, headless=True)
    merge_and_compare(case, tmp_path / "merged", headless=True)


def test_the_families_have_every_head() -> None:
    heads = small_models.head_cases()
    assert {case.task for case in heads} == {*small_models.HEADS}
    assert {case.model_type for case in heads} == {*small_models.HEAD_FAMILIES}

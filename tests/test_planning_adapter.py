"""`plan(adapter=…)`: the run that trains on from an adapter, which must fit the base."""

from __future__ import annotations

import json
import warnings
from pathlib import Path

import pytest
import tiny
from adapters import adapted, pulled, saved
from transformers import BertConfig, BertForMaskedLM

from lora_plugins import plan, prepare_model
from lora_plugins.commands.cli import main
from lora_plugins.errors import AdapterMismatch, PlanError, PreparationError
from lora_plugins.quantization.counting import count_parameters
from registry import BaseMismatch


def test_an_adapter_is_planned_as_it_is_prepared(tmp_path: Path) -> None:
    tiny.llama().save_pretrained(tmp_path / "base")
    fields = {"r": 3, "target_modules": r".*\.(q|down)_proj", "rank_pattern": {"down_proj": 5}, "bias": "lora_only"}
    release = pulled(adapted(tiny.llama(), **fields), tmp_path / "release")
    expected = count_parameters(prepare_model(tiny.llama(), adapter=release)).trainable
    for base in (tiny.llama(), tmp_path / "base", tmp_path / "base" / "config.json", tiny.llama().config):
        for adapter in (release, Path(release.path)):
            made = plan(base, adapter=adapter, length=8)
            assert made.trainable == expected
            assert any(note.startswith("adapter and base are compatible") for note in made.notes)


def test_a_base_in_a_folder_is_no_reason_for_a_warning(tmp_path: Path) -> None:
    """PEFT warns that the base has another name than in the adapter's configuration."""
    tiny.llama().save_pretrained(tmp_path / "base")
    model = adapted(tiny.llama())
    model.peft_config["default"].base_model_name_or_path = "org/base"
    model.save_pretrained(tmp_path / "adapter")
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="The PEFT config's `base_model_name_or_path`")
        plan(tmp_path / "base", adapter=tmp_path / "adapter", length=8)


def test_another_base_is_refused_with_the_reason_of_every_other_way(tmp_path: Path) -> None:
    release = pulled(adapted(tiny.llama()), tmp_path / "release")
    tiny.llama(seed=1).save_pretrained(tmp_path / "other")
    for base in (tiny.llama(seed=1), tmp_path / "other"):
        with pytest.raises(BaseMismatch, match="same shapes and other weights"):
            plan(base, adapter=release, length=8)
    with pytest.raises(AdapterMismatch, match="num_hidden_layers is 1, was 2"):
        plan(tiny.llama(layers=1).config, adapter=release, length=8)


def test_what_contradicts_an_adapter_is_refused(tmp_path: Path) -> None:
    folder = saved(tiny.llama(), tmp_path / "adapter")
    with pytest.raises(PreparationError, match="adapter and r were given together"):
        plan(tiny.llama(), adapter=folder, r=4)
    with pytest.raises(PlanError, match="has its adapters already"):
        plan(adapted(tiny.llama()), adapter=folder)
    with pytest.raises(PreparationError, match=r"has no adapter_config\.json"):
        plan(tiny.llama(), adapter=tmp_path)


def test_the_head_of_a_classifier_is_planned(tmp_path: Path) -> None:
    """The base is a masked LM; the adapter brings the classifier."""
    model = tiny.bert_classifier()
    folder = saved(model, tmp_path / "adapter", target_modules=["query"], task_type="SEQ_CLS")
    small = {"vocab_size": tiny.VOCABULARY, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    BertForMaskedLM(BertConfig(**small, intermediate_size=64)).save_pretrained(tmp_path / "base")
    made = plan(tmp_path / "base", adapter=folder, length=8)
    assert made.model == "BertForSequenceClassification"
    assert "classifier" in made.heads


def test_the_command_takes_an_adapter(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tiny.llama().save_pretrained(tmp_path / "base")
    folder = saved(tiny.llama(), tmp_path / "adapter", r=3)
    asked = ["plan", str(tmp_path / "base"), "--adapter", str(folder), "--length", "8"]
    with pytest.raises(SystemExit) as end:
        main([*asked, "--json"])
    assert not end.value.code
    expected = count_parameters(prepare_model(tiny.llama(), adapter=folder)).trainable
    assert json.loads(capsys.readouterr().out)["trainable"] == expected
    tiny.llama(layers=1).save_pretrained(tmp_path / "base")
    with pytest.raises(SystemExit) as end:
        main(asked)
    assert end.value.code
    assert "does not fit" in capsys.readouterr().err

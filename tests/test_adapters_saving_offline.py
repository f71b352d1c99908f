"""Adapters are saved without a network, with the rows of a grown vocabulary."""

from __future__ import annotations

import copy
import pickle
import warnings
from pathlib import Path
from typing import Any

import pytest
import tiny
from huggingface_hub import constants
from safetensors.torch import load_file
from transformers import LlamaForCausalLM

from lora_plugins import LoraCallback, prepare_model

COMMIT = "1" * 40


@pytest.fixture
def cached(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A base in the Hub's cache of this machine."""
    cache = tmp_path / "hub"
    snapshot = cache / "models--org--base" / "snapshots" / COMMIT
    tiny.llama().save_pretrained(snapshot)
    refs = cache / "models--org--base" / "refs"
    refs.mkdir()
    (refs / "main").write_text(COMMIT)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    return str(cache)


def save(model: Any, folder: Path) -> set[str]:
    with warnings.catch_warnings():
        # PEFT says that it has asked, and got no answer.
        warnings.simplefilter("error")
        model.save_pretrained(folder)
    return set(load_file(folder / "adapter_model.safetensors"))


def embeddings(names: set[str]) -> set[str]:
    return {name for name in names if "embed_tokens" in name or "lm_head" in name}


def test_saving_asks_nobody_about_a_base_of_the_hub(cached: str, tmp_path: Path) -> None:
    model = prepare_model(LlamaForCausalLM.from_pretrained("org/base", cache_dir=cached))
    assert not embeddings(save(model, tmp_path / "same"))
    elsewhere = tiny.llama()
    elsewhere.name_or_path = elsewhere.config.name_or_path = "org/never-seen"
    assert not embeddings(save(prepare_model(elsewhere), tmp_path / "unknown"))


@pytest.mark.parametrize("quantization", [None, "int8"])
def test_the_rows_of_a_resized_embedding_are_in_the_file(cached: str, tmp_path: Path, quantization: str | None) -> None:
    base = LlamaForCausalLM.from_pretrained("org/base", cache_dir=cached)
    base.resize_token_embeddings(tiny.VOCABULARY + 4, mean_resizing=False)
    model = prepare_model(base, quantization=quantization, strict=False)
    names = embeddings(save(model, tmp_path / "adapter"))
    assert any("embed_tokens" in name for name in names)


def test_a_shrunk_vocabulary_is_saved_too(cached: str, tmp_path: Path) -> None:
    base = LlamaForCausalLM.from_pretrained("org/base", cache_dir=cached)
    base.resize_token_embeddings(tiny.VOCABULARY - 8)
    assert embeddings(save(prepare_model(base, strict=False), tmp_path / "adapter"))


def test_a_base_in_a_folder_is_compared_with_its_folder(tmp_path: Path) -> None:
    tiny.llama().save_pretrained(tmp_path / "base")
    same = LlamaForCausalLM.from_pretrained(tmp_path / "base")
    assert not embeddings(save(prepare_model(same), tmp_path / "same"))
    grown = LlamaForCausalLM.from_pretrained(tmp_path / "base")
    grown.resize_token_embeddings(tiny.VOCABULARY + 4, mean_resizing=False)
    assert embeddings(save(prepare_model(grown, strict=False), tmp_path / "grown"))


def test_what_the_caller_says_about_embeddings_stays(cached: str, tmp_path: Path) -> None:
    model = prepare_model(LlamaForCausalLM.from_pretrained("org/base", cache_dir=cached))
    model.save_pretrained(str(tmp_path), save_embedding_layers=True)
    assert embeddings(set(load_file(tmp_path / "adapter_model.safetensors")))


def test_copies_and_pickles_of_a_model_save_themselves(tmp_path: Path) -> None:
    model: Any = prepare_model(tiny.llama())
    assert copy.deepcopy(model).save_pretrained.__self__ is not model
    thawed = pickle.loads(pickle.dumps(model))
    assert save(thawed, tmp_path / "thawed") == save(model, tmp_path / "model")


def test_checkpoints_of_a_trainer_are_saved_so(cached: str, tmp_path: Path) -> None:
    base = LlamaForCausalLM.from_pretrained("org/base", cache_dir=cached)
    trainer = tiny.trainer(tmp_path / "run", base, [LoraCallback()], max_steps=1, save_steps=1, save_strategy="steps")
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        trainer.train()
    assert not [str(warning.message) for warning in seen if "Could not find a config file" in str(warning.message)]

"""Tokens that fit into a vocabulary's spare rows: nothing is resized, and nobody has trained their rows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import BertConfig, BertForMaskedLM, LlamaForCausalLM, PreTrainedTokenizerFast

from lora_plugins import Int8PreparationCallback, LoraCallback, attach, prepare_model
from lora_plugins.errors import FrozenHead
from lora_plugins.models import tokens
from lora_plugins.models.tokens import find_new_tokens

#: Tokens of the base's own tokenizer; its vocabulary is padded to `tiny.VOCABULARY` rows.
OWN = 90


def tokenizer() -> PreTrainedTokenizerFast:
    words = {"<pad>": 0, "<end>": 1, "<unk>": 2, **{f"w{number}": number for number in range(3, OWN)}}
    core = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<end>", pad_token="<pad>", unk_token="<unk>")


def larger() -> PreTrainedTokenizerFast:
    grown = tokenizer()
    grown.add_special_tokens({"additional_special_tokens": ["<|user|>", "<|end|>"]})
    return grown


@pytest.fixture(params=[True, False], ids=["tied", "untied"])
def base(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    folder = tmp_path / "base"
    tiny.llama(tie_word_embeddings=request.param).save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder


def make(folder: Path, model: Any, callbacks: list[Any] | None, processor: Any, **arguments: Any) -> Any:
    own = {"processing_class": processor}
    return tiny.trainer(folder, model, callbacks, trainer_arguments=own, **{"max_steps": 2, **arguments})


def wanted(model: Any, rows: list[int]) -> dict[str, list[int]]:
    tied = model.config.tie_word_embeddings
    return {"embed_tokens": rows} if tied else {"embed_tokens": rows, "lm_head": rows}


@pytest.mark.parametrize("quantization", [None, "int8"])
def test_tokens_in_spare_rows_are_trained_saved_and_reloaded(
    tmp_path: Path, base: Path, quantization: str | None
) -> None:
    model = LlamaForCausalLM.from_pretrained(base)
    callback = LoraCallback(r=2, lora_dropout=0.0, quantization=quantization, compute_dtype="float32")
    trainer = make(tmp_path, model, [callback], larger())
    rows = [OWN, OWN + 1]
    assert trainer.model.peft_config["default"].trainable_token_indices == wanted(model, rows)
    before = tiny.adapter_tensors(trainer.model, "trainable_tokens_delta")
    trainer.train()
    after = tiny.adapter_tensors(trainer.model, "trainable_tokens_delta")
    assert any(not torch.equal(value, before[name]) for name, value in after.items())
    trainer.save_model(str(tmp_path / "adapter"))
    again = PeftModel.from_pretrained(LlamaForCausalLM.from_pretrained(base), tmp_path / "adapter").eval()
    ids = torch.tensor([[1, OWN, 5, OWN + 1]])
    with torch.no_grad():
        now, then = trainer.model.eval()(input_ids=ids).logits, again(input_ids=ids).logits
    if quantization is None:
        assert torch.equal(now, then)
    else:
        assert (now - then).abs().mean() < 0.05 * then.abs().mean()


def test_tokens_in_spare_rows_are_seen_by_attach_and_in_a_processor(tmp_path: Path, base: Path) -> None:
    class Processor:
        """What a multimodal processor looks like from here; it is never called."""

        tokenizer = larger()

    model = LlamaForCausalLM.from_pretrained(base)
    assert find_new_tokens(model, Processor()) == {OWN: "<|user|>", OWN + 1: "<|end|>"}
    trainer = make(tmp_path, model, None, larger())
    attach(trainer, r=2)
    assert trainer.model.peft_config["default"].trainable_token_indices == wanted(model, [OWN, OWN + 1])


@pytest.mark.parametrize("how", ["prepare_model", "ready", "int8", "later"])
def test_frozen_spare_rows_of_new_tokens_are_refused_by_name(tmp_path: Path, base: Path, how: str) -> None:
    model: Any = LlamaForCausalLM.from_pretrained(base)
    callback: Any = LoraCallback() if how != "int8" else Int8PreparationCallback()
    processor = larger()
    if how == "later":
        processor, callback = tokenizer(), LoraCallback(r=2)
    elif how == "prepare_model":
        model = prepare_model(model, r=2)
    else:
        model = get_peft_model(model, LoraConfig(target_modules=["q_proj"]))
    trainer = make(tmp_path, model, [callback], processor)
    if how == "later":
        processor.add_tokens(["<|user|>", "<|end|>"])
    with pytest.raises(FrozenHead, match=r"2 tokens.*'<\|user\|>', '<\|end\|>'.*'embed_tokens': \[90, 91\]"):
        trainer.train()


def test_the_cure_that_the_refusal_names_works(tmp_path: Path, base: Path) -> None:
    model = LlamaForCausalLM.from_pretrained(base)
    rows = wanted(model, [OWN, OWN + 1])
    make(tmp_path, prepare_model(model, r=2, trainable_token_indices=rows), [LoraCallback()], larger()).train()
    model = LlamaForCausalLM.from_pretrained(base)
    left = make(tmp_path, model, [LoraCallback(r=2, frozen=list(rows))], larger())
    assert left.model.peft_config["default"].trainable_token_indices is None
    left.train()


def test_a_tokenizer_without_new_tokens_sets_nothing_off(tmp_path: Path, base: Path) -> None:
    padded = tokenizer()
    padded.add_special_tokens({"pad_token": "<|pad|>"})
    renamed = tokenizer()
    renamed.add_special_tokens({"additional_special_tokens": ["w5"]})
    for processor in (tokenizer(), padded, renamed, None):
        model = LlamaForCausalLM.from_pretrained(base)
        trainer = make(tmp_path, model, [LoraCallback(r=2)], processor)
        assert trainer.model.peft_config["default"].trainable_token_indices is None
        trainer.train()


def test_placeholders_that_the_configuration_knows_are_not_new(base: Path) -> None:
    model = LlamaForCausalLM.from_pretrained(base)
    model.config.image_token_id = OWN
    assert find_new_tokens(model, larger()) == {OWN + 1: "<|end|>"}


def test_without_the_bases_own_tokenizer_nothing_is_claimed(tmp_path: Path) -> None:
    tiny.llama().save_pretrained(tmp_path / "base")
    model = LlamaForCausalLM.from_pretrained(tmp_path / "base")
    assert find_new_tokens(model, larger()) == {}
    assert find_new_tokens(tiny.llama(), larger()) == {}
    (tmp_path / "base" / "tokenizer.json").write_text("{")
    assert find_new_tokens(model, larger()) == {}


def test_tokens_that_fill_spare_rows_and_add_rows_are_trained_alike(tmp_path: Path, base: Path) -> None:
    processor = tokenizer()
    processor.add_tokens([f"<|{number}|>" for number in range(10)])
    model = LlamaForCausalLM.from_pretrained(base)
    model.resize_token_embeddings(len(processor))
    trainer = make(tmp_path, model, [LoraCallback(r=2)], processor, max_steps=1)
    assert trainer.model.peft_config["default"].trainable_token_indices == wanted(model, list(range(OWN, 100)))
    trainer.train()


def test_spare_rows_of_a_masked_language_model_come_with_their_bias(tmp_path: Path) -> None:
    config = BertConfig(
        vocab_size=tiny.VOCABULARY,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=64,
    )
    BertForMaskedLM(config).save_pretrained(tmp_path / "bert")
    tokenizer().save_pretrained(tmp_path / "bert")
    model = BertForMaskedLM.from_pretrained(tmp_path / "bert")
    trainer = make(tmp_path, model, [LoraCallback(r=2)], larger(), max_steps=1)
    assert trainer.model.peft_config["default"].trainable_token_indices == {"word_embeddings": [OWN, OWN + 1]}
    trainer.train()


@pytest.mark.parametrize("how", ["callback", "attach", "ready", "twice"])
def test_the_bases_own_tokenizer_is_read_once_for_each_base(
    tmp_path: Path, base: Path, how: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[Path] = []
    load = tokens._load_tokenizer
    monkeypatch.setattr(tokens, "_load_tokenizer", lambda folder: read.append(folder) or load(folder))
    model = LlamaForCausalLM.from_pretrained(base)
    rows = wanted(model, [OWN, OWN + 1])
    if how == "ready":
        config = LoraConfig(r=2, target_modules=["q_proj"], trainable_token_indices=rows)
        trainer = make(tmp_path, get_peft_model(model, config), [LoraCallback()], larger())
    else:
        callbacks = [LoraCallback(r=2)] if how != "attach" else None
        trainer = make(tmp_path, model, callbacks, larger())
    if how == "attach":
        attach(trainer, r=2)
    trainer.train()
    if how == "twice":
        trainer.train()
    assert trainer.model.peft_config["default"].trainable_token_indices == rows
    assert len(read) == 1
    assert find_new_tokens(LlamaForCausalLM.from_pretrained(base), larger())
    assert len(read) == 2, "another base has another tokenizer"

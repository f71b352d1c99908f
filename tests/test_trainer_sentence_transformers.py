"""The Trainer of sentence-transformers through the callback: trained, resumed, saved, reloaded onto the same model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from datasets import Dataset
from peft import PeftModel
from safetensors.torch import load_file
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import nn
from transformers import BertModel, PreTrainedTokenizerFast, Trainer

from lora_plugins import LoraCallback, prepare_model
from lora_plugins.errors import AdapterNotMoving

sentence_transformers = pytest.importorskip(
    "sentence_transformers", reason="sentence-transformers is not installed: its Trainer is not tested"
)
LOSSES: Any = pytest.importorskip("sentence_transformers.sentence_transformer.losses")
Transformer = pytest.importorskip("sentence_transformers.base.modules.transformer").Transformer
Dense = pytest.importorskip("sentence_transformers.base.modules.dense").Dense
Pooling = pytest.importorskip("sentence_transformers.sentence_transformer.modules.pooling").Pooling


def tokenizer() -> PreTrainedTokenizerFast:
    words = {"<pad>": 0, "<unk>": 1, **{f"w{number}": number for number in range(2, tiny.VOCABULARY)}}
    core = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=core, pad_token="<pad>", unk_token="<unk>")


def texts(seed: int) -> list[str]:
    rows = torch.randint(2, tiny.VOCABULARY, (16, 6), generator=torch.Generator().manual_seed(seed)).tolist()
    return [" ".join(f"w{number}" for number in row) for row in rows]


@pytest.fixture(params=["plain", "dense"])
def base(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A bare encoder, or a whole model of the library with a layer of its own after the pooling."""
    bert = tmp_path / "bert"
    BertModel(tiny.bert_classifier().config).save_pretrained(bert)
    tokenizer().save_pretrained(bert)
    if request.param == "plain":
        return bert
    encoder = Transformer(str(bert))
    pooling = Pooling(32)
    dense = Dense(in_features=32, out_features=8, activation_function=nn.Tanh())
    sentence_transformers.SentenceTransformer(modules=[encoder, pooling, dense], device="cpu").save_pretrained(
        str(tmp_path / "whole")
    )
    return tmp_path / "whole"


def load(base: Path) -> Any:
    return sentence_transformers.SentenceTransformer(str(base), device="cpu")


def make(folder: Path, model: Any, quantization: str | None) -> Trainer:
    callback = LoraCallback(r=4, lora_dropout=0.0, quantization=quantization, compute_dtype="float32")
    trainer: Trainer = sentence_transformers.SentenceTransformerTrainer(
        model=model,
        args=sentence_transformers.SentenceTransformerTrainingArguments(
            output_dir=str(folder),
            max_steps=4,
            per_device_train_batch_size=4,
            learning_rate=1e-2,
            lr_scheduler_type="constant",
            save_strategy="steps",
            save_steps=2,
            logging_steps=1,
            report_to=[],
            use_cpu=True,
            disable_tqdm=True,
            seed=3,
        ),
        train_dataset=Dataset.from_dict({"anchor": texts(1), "positive": texts(2)}),
        loss=LOSSES.MultipleNegativesRankingLoss(model),
        callbacks=[callback],
    )
    return trainer


def embed(model: Any) -> torch.Tensor:
    return torch.as_tensor(model.eval().encode(texts(5), show_progress_bar=False)).float()


@pytest.mark.parametrize("quantization", [None, "int8"])
def test_embeddings_are_those_of_the_trained_model_after_a_reload(
    tmp_path: Path, base: Path, quantization: str | None
) -> None:
    trainer = make(tmp_path / "first", load(base), quantization)
    before = embed(load(base))
    trainer.train()
    trained = {name for name, p in trainer.model.named_parameters() if p.requires_grad}
    assert sum("lora_B" in name for name in trained) == 4
    trainer.save_model(str(tmp_path / "adapter"))
    after = embed(trainer.model)
    assert not torch.allclose(after, before, atol=1e-3)
    again = embed(PeftModel.from_pretrained(load(base), str(tmp_path / "adapter")))
    if quantization is None:
        assert torch.equal(again, after)
    else:
        assert (again - after).abs().mean() < 0.1 * after.abs().mean()
        ours = embed(
            prepare_model(load(base), adapter=tmp_path / "adapter", quantization="int8", compute_dtype="float32")
        )
        torch.testing.assert_close(ours, after, rtol=1e-3, atol=1e-3)


def test_a_run_of_sentence_transformers_resumes_to_the_same_end(tmp_path: Path, base: Path) -> None:
    make(tmp_path / "first", load(base), None).train()
    make(tmp_path / "again", load(base), None).train(resume_from_checkpoint=str(tmp_path / "first" / "checkpoint-2"))
    ends = [load_file(tmp_path / name / "checkpoint-4" / "adapter_model.safetensors") for name in ("first", "again")]
    assert ends[0].keys() == ends[1].keys()
    assert all(torch.equal(value, ends[1][name]) for name, value in ends[0].items())


def test_a_layer_that_is_passed_by_is_found_in_sentence_transformers(tmp_path: Path, base: Path) -> None:
    trainer = make(tmp_path, load(base), None)
    layer = next(m for name, m in trainer.model.named_modules() if name.endswith("layer.1.attention.self.value"))
    layer.forward = layer.base_layer.forward
    with pytest.raises(AdapterNotMoving, match=r"layer\.1\.attention\.self\.value\.lora_B"):
        trainer.train()

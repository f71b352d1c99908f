"""Small real models, data and Trainers that the tests share."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    BloomConfig,
    BloomForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    PreTrainedModel,
    Trainer,
    TrainingArguments,
)

VOCABULARY = 96
LENGTH = 12


def llama(layers: int = 2, seed: int = 0, **config: Any) -> LlamaForCausalLM:
    """A Llama of 2 layers and hidden size 32 with random float32 weights."""
    torch.manual_seed(seed)
    fields: dict[str, Any] = {
        "vocab_size": VOCABULARY,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
        "pad_token_id": 0,
    }
    return LlamaForCausalLM(LlamaConfig(**{**fields, **config}))


def mixtral(seed: int = 0) -> MixtralForCausalLM:
    """A Mixtral of 2 layers, whose 4 experts are stacks; a token reaches 2 of them."""
    torch.manual_seed(seed)
    return MixtralForCausalLM(
        MixtralConfig(
            vocab_size=VOCABULARY,
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            num_local_experts=4,
            max_position_embeddings=64,
            pad_token_id=0,
        )
    )


def bloom(seed: int = 0) -> BloomForCausalLM:
    """A BLOOM of 2 layers and hidden size 32."""
    torch.manual_seed(seed)
    return BloomForCausalLM(BloomConfig(vocab_size=VOCABULARY, hidden_size=32, n_layer=2, n_head=4))


def gpt2(seed: int = 0) -> GPT2LMHeadModel:
    """A GPT-2 of 2 layers, whose linears are transformers' Conv1D."""
    torch.manual_seed(seed)
    return GPT2LMHeadModel(
        GPT2Config(
            vocab_size=VOCABULARY,
            n_embd=32,
            n_layer=2,
            n_head=4,
            n_positions=64,
            attn_pdrop=0,
            resid_pdrop=0,
            embd_pdrop=0,
        )
    )


def bert_classifier(seed: int = 0) -> BertForSequenceClassification:
    """A BERT of 2 layers with a new head for two classes."""
    torch.manual_seed(seed)
    return BertForSequenceClassification(
        BertConfig(
            vocab_size=VOCABULARY,
            hidden_size=32,
            num_hidden_layers=2,
            num_attention_heads=4,
            intermediate_size=64,
            num_labels=2,
        )
    )


def rows(count: int = 32, seed: int = 1) -> Dataset:
    """Token rows for a causal model; the labels leave out an unequal number of tokens per row."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(1, VOCABULARY, (count, LENGTH), generator=generator)
    labels = ids.clone()
    for index in range(count):
        labels[index, : index % 7] = -100
    return Dataset.from_dict({"input_ids": ids.tolist(), "labels": labels.tolist()})


def classes(count: int = 16, seed: int = 1) -> Dataset:
    """Token rows with one of two classes."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(1, VOCABULARY, (count, LENGTH), generator=generator)
    return Dataset.from_dict({"input_ids": ids.tolist(), "labels": (ids[:, 0] % 2).tolist()})


def trainer(
    folder: Path,
    model: PreTrainedModel | None = None,
    callbacks: list[Any] | None = None,
    *,
    data: Dataset | None = None,
    cls: type[Trainer] = Trainer,
    trainer_arguments: dict[str, Any] | None = None,
    **arguments: Any,
) -> Trainer:
    """A Trainer of four quiet CPU steps, learning rate 1e-2, batch 4; ``arguments`` override."""
    defaults: dict[str, Any] = {
        "output_dir": str(folder),
        "max_steps": 4,
        "per_device_train_batch_size": 4,
        "learning_rate": 1e-2,
        "save_strategy": "no",
        "report_to": [],
        "logging_steps": 1,
        "disable_tqdm": True,
        "use_cpu": True,
        "seed": 7,
    }
    extra = dict(trainer_arguments or {})
    if "model_init" not in extra:
        extra["model"] = model if model is not None else llama()
    return cls(
        args=TrainingArguments(**{**defaults, **arguments}),
        train_dataset=rows() if data is None else data,
        callbacks=callbacks,
        **extra,
    )


def adapter_tensors(model: Any, part: str = "lora_") -> dict[str, torch.Tensor]:
    """Copies of the adapter's tensors whose name holds ``part``."""
    return {name: p.detach().clone() for name, p in model.named_parameters() if part in name}

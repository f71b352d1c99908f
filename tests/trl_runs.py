"""TRL's Trainers on small models and data, as the tests of several files use them."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import peft
import tiny
import torch
import trl
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForSequenceClassification, PreTrainedTokenizerFast, Trainer


def tokenizer() -> PreTrainedTokenizerFast:
    words = {"<pad>": 0, "<end>": 1, "<unk>": 2, **{f"w{number}": number for number in range(3, tiny.VOCABULARY)}}
    core = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    made = PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<end>", pad_token="<pad>", unk_token="<unk>")
    made.chat_template = (
        "{% for message in messages %}{{ message['content'] }} {% if message['role'] == 'assistant' %}<end> {% endif %}"
        "{% endfor %}"
    )
    return made


def sentences(count: int, words: int, seed: int) -> list[str]:
    generator = torch.Generator().manual_seed(seed)
    numbers = torch.randint(3, tiny.VOCABULARY, (count, words), generator=generator)
    return [" ".join(f"w{number}" for number in row) for row in numbers.tolist()]


def prompts() -> list[str]:
    return [text + " " for text in sentences(16, 4, 1)]


def pairs() -> Dataset:
    return Dataset.from_dict({"prompt": prompts(), "chosen": sentences(16, 5, 2), "rejected": sentences(16, 3, 3)})


def rated() -> Dataset:
    completions = sentences(16, 5, 2)
    return Dataset.from_dict(
        {"prompt": prompts(), "completion": completions, "label": [number % 2 == 0 for number in range(16)]}
    )


def reward_model() -> LlamaForSequenceClassification:
    torch.manual_seed(0)
    return LlamaForSequenceClassification(
        LlamaConfig(
            vocab_size=tiny.VOCABULARY,
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            pad_token_id=0,
            num_labels=1,
        )
    )


def chats() -> Dataset:
    rows = zip(prompts(), sentences(16, 5, 2), strict=True)
    return Dataset.from_dict(
        {
            "messages": [
                [{"role": "user", "content": prompt.strip()}, {"role": "assistant", "content": answer}]
                for prompt, answer in rows
            ]
        }
    )


def questions() -> Dataset:
    return Dataset.from_dict({"prompt": prompts()})


KINDS: dict[str, tuple[str, str, Any]] = {
    "sft": ("SFTTrainer", "SFTConfig", lambda: Dataset.from_dict({"text": sentences(16, 9, 4)})),
    "dpo": ("DPOTrainer", "DPOConfig", pairs),
    "kto": ("KTOTrainer", "KTOConfig", rated),
    "reward": ("RewardTrainer", "RewardConfig", pairs),
}
#: Trainers that generate: what they learn from is the reward of what they have written.
ONLINE: dict[str, tuple[str, str, Any]] = {
    "grpo": ("GRPOTrainer", "GRPOConfig", questions),
    "rloo": ("RLOOTrainer", "RLOOConfig", questions),
}
#: Trainers of ``trl.experimental``, each in a module of its own.
EXPERIMENTAL: dict[str, tuple[str, str, Any]] = {
    "orpo": ("ORPOTrainer", "ORPOConfig", pairs),
    "cpo": ("CPOTrainer", "CPOConfig", pairs),
    "gkd": ("GKDTrainer", "GKDConfig", chats),
    "online_dpo": ("OnlineDPOTrainer", "OnlineDPOConfig", questions),
}
#: What a configuration needs beside the defaults of `make`.
ARGUMENTS: dict[str, dict[str, Any]] = {
    # With a beta, TRL loads the reference by the model's name, and models made here have none.
    **{kind: {"num_generations": 2, "max_completion_length": 6, "beta": 0.0} for kind in ONLINE},
    # Half of the steps are on what the student writes.
    "gkd": {"max_length": 16, "max_new_tokens": 6, "lmbda": 0.5},
    "online_dpo": {"max_length": 24, "max_new_tokens": 6},
}


def count_small_words(completions: list[str], **kwargs: Any) -> list[float]:
    """A reward that a small model can learn to get."""
    numbers = [[int(word[1:]) for word in text.split() if word.startswith("w")] for text in completions]
    return [sum(number < tiny.VOCABULARY // 2 for number in row) / 6 for row in numbers]


def make(kind: str, folder: Path, model: Any = None, callbacks: list[Any] | None = None, **arguments: Any) -> Trainer:
    """A Trainer of TRL with four quiet steps; ``arguments`` go to its configuration, but for some of its own."""
    trainer, config, data = {**KINDS, **ONLINE, **EXPERIMENTAL}[kind]
    module = importlib.import_module(f"trl.experimental.{kind}") if kind in EXPERIMENTAL else trl
    names = ("peft_config", "ref_model", "teacher_model", "eval_dataset", "reward_funcs", "train_dataset")
    own = {name: arguments.pop(name) for name in names if name in arguments}
    if model is None:
        model = reward_model() if kind == "reward" else tiny.llama()
    defaults: dict[str, Any] = {
        "output_dir": str(folder),
        "max_steps": 4,
        "per_device_train_batch_size": 4,
        "learning_rate": 1e-2,
        "lr_scheduler_type": "constant",
        "save_strategy": "no",
        "report_to": [],
        "logging_steps": 1,
        "disable_tqdm": True,
        "use_cpu": True,
        "bf16": False,
        "seed": 7,
        **ARGUMENTS.get(kind, {"max_length": 16}),
    }
    if kind in (*ONLINE, "online_dpo"):
        own.setdefault("reward_funcs", count_small_words)
    if kind == "gkd":
        own.setdefault("teacher_model", tiny.llama(seed=1))
    own.setdefault("train_dataset", data())
    return getattr(module, trainer)(
        model=model,
        args=getattr(module, config)(**{**defaults, **arguments}),
        processing_class=tokenizer(),
        callbacks=callbacks,
        **own,
    )


def losses(trainer: Trainer) -> list[float]:
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def assert_trained(trainer: Trainer, name: str = "default") -> None:
    """The optimizer holds the one adapter (and trained heads), the adapter has moved."""
    assert isinstance(trainer.model, peft.PeftModel)
    held = {id(p) for group in trainer.optimizer.param_groups for p in group["params"]}
    trained = {n: p for n, p in trainer.model.named_parameters() if p.requires_grad}
    assert held == {id(p) for p in trained.values()}
    assert all(f".{name}." in n for n in trained)
    moved = tiny.adapter_tensors(trainer.model, f"lora_B.{name}")
    assert len(moved) == 4
    assert all(tensor.any() for tensor in moved.values())

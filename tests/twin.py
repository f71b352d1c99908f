"""A small BLOOM with its own tokenizer, and dialogues with summaries in the format of the samsum data set."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import bitsandbytes as bnb
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import BloomConfig, BloomForCausalLM, PreTrainedTokenizerFast

NAMES = ("Amanda", "Jerry", "Olivia", "Tim", "Kim", "Leo")
THINGS = ("cookies", "tickets", "the car", "a book", "the keys", "lunch")
TIMES = ("tomorrow", "tonight", "on Monday", "at six", "next week")

PROMPT = "Summarize the chat dialogue:\n{dialogue}\n---\nSummary:\n"

CHAT_TEMPLATE = (
    "{% for message in messages %}<s>{{ message['role'] }}\n{{ message['content'] }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<s>assistant\n{% endif %}"
)


def dialogues(count: int, seed: int = 0) -> list[dict[str, str]]:
    """Rows of id, dialogue and summary; the summary can be read off the dialogue."""
    generator = random.Random(seed)
    rows = []
    for index in range(count):
        first, second = generator.sample(NAMES, 2)
        thing, time = generator.choice(THINGS), generator.choice(TIMES)
        lines = [f"{first}: Hi {second}! Do you want {thing}?", f"{second}: Sure, thanks!"]
        if generator.random() < 0.5:
            lines.append(f"{first}: Great, is it fine to wait?")
        lines.append(f"{first}: I'll bring you {thing} {time} :-)")
        summary = f"{first} will bring {second} {thing} {time}."
        rows.append({"id": str(13_818_513 + index), "dialogue": "\n".join(lines), "summary": summary})
    return rows


def write_jsonl(path: Path, rows: list[dict[str, str]]) -> Path:
    """Write rows as one JSON object a line."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def make_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE as BLOOM's, of 320 tokens, trained on the dialogues."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<unk>", "<s>", "</s>", "<pad>"]
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    texts = [PROMPT.format(**row) + row["summary"] for row in dialogues(60)]
    tokenizer.train_from_iterator(texts, trainer)
    names = dict(zip(("unk_token", "bos_token", "eos_token", "pad_token"), special, strict=True))
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names)


def make_base(folder: Path, *, steps: int = 60) -> Path:
    """Write a BLOOM of 2 layers and hidden size 64, trained for some steps on dialogues without their summaries."""
    tokenizer = make_tokenizer()
    torch.manual_seed(0)
    config = BloomConfig(
        vocab_size=len(tokenizer), hidden_size=64, n_layer=2, n_head=4, bos_token_id=1, eos_token_id=2, pad_token_id=3
    )
    model = BloomForCausalLM(config)
    text = "\n".join(row["dialogue"] for row in dialogues(60, seed=9))
    tokens = torch.tensor(tokenizer(text)["input_ids"])
    rows = tokens[: len(tokens) // 64 * 64].view(-1, 64)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for step in range(steps):
        batch = rows[torch.arange(step * 8, step * 8 + 8) % len(rows)]
        model(input_ids=batch, labels=batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def held_out_loss(model: Any, tokenizer: Any, count: int = 20, *, training_kernels: bool = False) -> float:
    """Mean negative log-likelihood of unseen dialogues with their summaries, in nats a token.

    With ``training_kernels`` int8 layers multiply by their dequantized weight, as in training and in a merged model;
    otherwise they quantize the activations too.
    """
    model.eval()
    for module in model.modules():
        if training_kernels and isinstance(module, bnb.nn.Linear8bitLt):
            module.training = True
    total, tokens = 0.0, 0
    for row in dialogues(count, seed=2):
        text = PROMPT.format(**row) + row["summary"] + tokenizer.eos_token
        ids = tokenizer(text, return_tensors="pt")["input_ids"]
        with torch.no_grad():
            total += float(model(input_ids=ids, labels=ids).loss) * (ids.shape[1] - 1)
        tokens += ids.shape[1] - 1
    return total / tokens

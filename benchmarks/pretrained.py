"""Small models for `defaults.py` where no Hub can be reached: a converted GGUF file, or one that is trained here.

A model that is trained here is a weak one: a million weights, and a minute or so of one core on the Python files of the
installed torch. It stands for its architecture, not for what a published model of it can do.

    python benchmarks/pretrained.py gguf model.gguf FOLDER    a GGUF file of a causal model, in bfloat16
    python benchmarks/pretrained.py gpt2 FOLDER               one fused projection in attention
    python benchmarks/pretrained.py qwen3 FOLDER              grouped queries, gated MLP
"""

from __future__ import annotations

import argparse
import importlib.util
import math
import statistics
import sys
import time
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

WIDTH, LAYERS, HEADS, VOCABULARY = 128, 4, 4, 2048
ROWS, LENGTH = 8, 128
END = "<|endoftext|>"


def convert(file: Path, folder: Path) -> None:
    """Write the dequantized model of a GGUF file and its tokenizer into a folder."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from lora_plugins.quantization.marks import untag_dequantized

    model = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.bfloat16)
    untag_dequantized(model)
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name).save_pretrained(folder)


def read_texts() -> Iterator[str]:
    """Yield Python files of the installed torch, in an order that is the same everywhere."""
    spec = importlib.util.find_spec("torch")
    root = Path(str(spec.origin)).parent  # type: ignore[union-attr]
    for path in sorted(root.rglob("*.py"), key=lambda path: path.relative_to(root).as_posix()[::-1]):
        yield path.read_text(encoding="utf-8", errors="ignore")


def train_tokenizer(texts: list[str]) -> Any:
    """Train a byte-level tokenizer with a small vocabulary."""
    from tokenizers import ByteLevelBPETokenizer
    from transformers import PreTrainedTokenizerFast

    trained = ByteLevelBPETokenizer()
    trained.train_from_iterator(texts, vocab_size=VOCABULARY, special_tokens=[END], show_progress=False)
    return PreTrainedTokenizerFast(tokenizer_object=trained._tokenizer, eos_token=END)


def make_model(kind: str, end: int) -> Any:
    """Return a model with random weights; ``end`` is the token that ends a text."""
    from transformers import GPT2Config, GPT2LMHeadModel, Qwen3Config, Qwen3ForCausalLM

    special = {"vocab_size": VOCABULARY, "eos_token_id": end, "bos_token_id": None}
    if kind == "gpt2":
        return GPT2LMHeadModel(GPT2Config(n_embd=WIDTH, n_layer=LAYERS, n_head=HEADS, n_positions=512, **special))
    shape = {"hidden_size": WIDTH, "intermediate_size": 3 * WIDTH, "num_hidden_layers": LAYERS, "head_dim": 32}
    heads = {"num_attention_heads": HEADS, "num_key_value_heads": HEADS // 2, "max_position_embeddings": 512}
    return Qwen3ForCausalLM(Qwen3Config(**shape, **heads, tie_word_embeddings=True, **special))


def pretrain(kind: str, folder: Path, seconds: float) -> None:
    """Train a small model for some CPU seconds and write it into a folder."""
    import torch

    texts: list[str] = []
    for text in read_texts():
        texts.append(text)
        if sum(map(len, texts)) > 3_000_000:
            break
    tokenizer = train_tokenizer(texts[::3])
    ids = torch.tensor([one for row in tokenizer(texts)["input_ids"] for one in [*row, tokenizer.eos_token_id]])
    rows = ids[: len(ids) // LENGTH * LENGTH].view(-1, LENGTH)
    torch.manual_seed(0)
    rows = rows[torch.randperm(len(rows))]
    model = make_model(kind, tokenizer.eos_token_id)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.01)
    start, losses = time.process_time(), []
    for step, (first, last) in enumerate(pairwise(range(0, len(rows), ROWS))):
        share = min(1.0, (time.process_time() - start) / seconds)
        if share == 1 and losses:
            break
        # Warm-up, then down to a tenth.
        optimizer.param_groups[0]["lr"] = 2e-3 * min(1.0, (step + 1) / 30) * (1 - 0.9 * share)
        loss = model(input_ids=rows[first:last], labels=rows[first:last]).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        if step % 50 == 49:
            print(f"step {step + 1}: loss {statistics.fmean(losses[-50:]):.3f}", file=sys.stderr, flush=True)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    print(describe(sum(p.numel() for p in model.parameters()), losses))


def describe(weights: int, losses: list[float]) -> str:
    """Return a line on what a model was trained for, with its loss in nats a token."""
    last = losses[-50:]
    steps = f"{len(losses)} steps of {ROWS} x {LENGTH} tokens"
    return f"{weights:,} weights, {steps}, loss of the last {len(last)} steps {statistics.fmean(last):.3f}"


def read_seconds(word: str) -> float:
    """Return a number of seconds above zero.

    Raises:
        argparse.ArgumentTypeError: It is not one.
    """
    try:
        seconds = float(word)
    except ValueError:
        seconds = math.nan
    if not 0 < seconds < math.inf:
        raise argparse.ArgumentTypeError(f"must be a number above zero, not {word!r}")
    return seconds


def main() -> None:
    """Make one model."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    gguf = commands.add_parser("gguf")
    gguf.add_argument("file", type=Path)
    made = [commands.add_parser(kind) for kind in ("gpt2", "qwen3")]
    for command in made:
        command.add_argument("--seconds", type=read_seconds, default=60, help="CPU seconds of training")
    for command in (gguf, *made):
        command.add_argument("folder", type=Path)
    options = parser.parse_args()
    if options.command == "gguf":
        convert(options.file, options.folder)
    else:
        pretrain(options.command, options.folder, options.seconds)


if __name__ == "__main__":
    main()

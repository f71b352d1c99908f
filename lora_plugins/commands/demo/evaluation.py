"""Measure the demo's model: held-out loss and generated answers."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING

from lora_plugins.commands.demo.dataset import Example, collator, prompt_text

if TYPE_CHECKING:
    from datasets import Dataset
    from torch import nn
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

__all__ = ["TELL_SECONDS", "answers", "held_out_loss"]

#: Seconds after which a measurement says how far it is.
TELL_SECONDS = 5.0


def held_out_loss(
    model: nn.Module,
    dataset: Dataset,
    tokenizer: PreTrainedTokenizerBase,
    batch_size: int = 8,
    say: Callable[[str], None] | None = None,
) -> float:
    """Return the mean negative log-likelihood of the answers' tokens, in nats a token.

    In evaluation mode, each token weighing the same, whatever batch it is in. Rows of similar length share a batch, so
    that little is computed for padding.

    Args:
        model: A causal language model.
        dataset: Rows with ``input_ids`` and ``labels``.
        tokenizer: Its padding token fills the rows of a batch.
        batch_size: Rows in a batch.
        say: Takes a line about every `TELL_SECONDS` with the number of rows that are done.
    """
    import torch

    collate = collator(tokenizer)
    device = next(model.parameters()).device
    total, tokens, told = 0.0, 0, time.perf_counter()
    was_training = model.training
    model.eval()
    rows = sorted(dataset, key=lambda row: len(row["input_ids"]))
    with torch.inference_mode():
        for start in range(0, len(rows), batch_size):
            if say is not None and start and time.perf_counter() - told >= TELL_SECONDS:
                told = time.perf_counter()
                say(f"  {start} of {len(rows)} functions")
            batch = {name: tensor.to(device) for name, tensor in collate(rows[start : start + batch_size]).items()}
            # The first token of a row has nothing before it to be predicted from.
            count = int((batch["labels"][:, 1:] != -100).sum())
            total += float(model(**batch).loss) * count
            tokens += count
    model.train(was_training)
    return total / tokens


def answers(
    model: PreTrainedModel, examples: Sequence[Example], tokenizer: PreTrainedTokenizerBase, max_new_tokens: int = 24
) -> Iterator[str]:
    """Yield the model's answers by greedy decoding, one prompt at a time, so that none depends on padding."""
    import torch

    device = next(model.parameters()).device
    for example in examples:
        prompt = tokenizer(
            prompt_text(example, tokenizer), return_tensors="pt", add_special_tokens=not tokenizer.chat_template
        ).to(device)
        was_training = model.training
        model.eval()
        with torch.inference_mode():
            output = model.generate(
                **prompt, max_new_tokens=max_new_tokens, do_sample=False, pad_token_id=tokenizer.pad_token_id
            )
        model.train(was_training)
        new = output[0, prompt["input_ids"].shape[1] :]
        yield " ".join(tokenizer.decode(new, skip_special_tokens=True).split())

"""Let a model generate text before and after training, for the page."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from lora_plugins.recipe.templates import Template, encode_rows

__all__ = ["Samples"]

_NEW_TOKENS = 64
_LONGEST_PROMPT = 512
#: Rows that are looked at for each one that can be shown.
_TRIES = 10


@dataclass(frozen=True)
class Samples:
    """Prompts from rows of a data set, and how to ask a model.

    Attributes:
        titles: Where each prompt is from.
        prompts: Token ids of each prompt.
        tokenizer: The model's tokenizer.
    """

    titles: Sequence[str]
    prompts: Sequence[Sequence[int]]
    tokenizer: PreTrainedTokenizerBase

    @classmethod
    def choose(cls, count: int, rows: Dataset, name: str, template: Template, tokenizer: Any) -> Samples:
        """Choose the first rows; of an example whose text is all to be learned, its first third is the prompt.

        Args:
            count: Number of rows.
            rows: The data set as it was read.
            name: What it is called in the page.
            template: Text of an example.
            tokenizer: The model's tokenizer.
        """
        titles, prompts = [], []
        for index in range(min(len(rows), count * _TRIES)):
            # Rows in which a column of the template is empty give nothing.
            found = encode_rows(rows[index : index + 1], template, tokenizer, completion_only=tokenizer.is_fast)
            for ids, labels in zip(found["input_ids"], found["labels"], strict=True):
                start = next((place for place, label in enumerate(labels) if label != -100), 0)
                titles.append(f"{name}, row {index + 1}")
                prompts.append(ids[: start or max(1, len(ids) // 3)])
            if len(prompts) == count:
                break
        return cls(titles, prompts, tokenizer)

    def ask(self, model: Any) -> list[str]:
        """Return the model's text after each prompt, by greedy decoding; random numbers are not drawn."""
        training = model.training
        model.eval()
        try:
            with torch.no_grad():
                return [self._generate(model, ids) for ids in self.prompts]
        finally:
            model.train(training)

    def make_rows(self, before: Sequence[str], after: Sequence[str]) -> list[Mapping[str, str]]:
        """Return what the page shows of each prompt."""
        shown = [self.tokenizer.decode(ids, skip_special_tokens=True) for ids in self.prompts]
        parts = zip(self.titles, shown, before, after, strict=True)
        return [{"title": title, "prompt": prompt, "before": old, "after": new} for title, prompt, old, new in parts]

    def _generate(self, model: Any, ids: Sequence[int]) -> str:
        limit = getattr(model.config, "max_position_embeddings", None) or _LONGEST_PROMPT + _NEW_TOKENS
        new = min(_NEW_TOKENS, limit // 2)
        prompt = torch.tensor([ids[-min(_LONGEST_PROMPT, limit - new) :]], device=model.device)
        output = model.generate(
            input_ids=prompt,
            attention_mask=torch.ones_like(prompt),
            max_new_tokens=new,
            do_sample=False,
            use_cache=True,
            pad_token_id=self.tokenizer.pad_token_id,
        )
        return str(self.tokenizer.decode(output[0, prompt.shape[1] :], skip_special_tokens=True))

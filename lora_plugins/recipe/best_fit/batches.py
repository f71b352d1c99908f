"""Make batches of packed examples that don't see each other."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from lora_plugins.models.isolation import Isolation, find_isolation
from lora_plugins.recipe.packing import IGNORED

__all__ = ["BestFitCollator", "best_fit_collator"]


def best_fit_collator(model: nn.Module) -> BestFitCollator:
    """Return a data collator that keeps the examples of a row apart in a causal language model, for any Trainer.

    The model is run on a few tokens to find out how; it must be on the device and have the attention implementation
    that it is trained with.

    Args:
        model: The very model that is going to be trained, before or after adapters are put in.

    Raises:
        UnsupportedPacking: The examples cannot be kept apart in this model, as in recurrent ones.
    """
    return BestFitCollator(find_isolation(model))


@dataclass(frozen=True)
class BestFitCollator:
    """Turns rows of examples into a batch: tokens, labels, position ids, and a mask where the model needs one.

    A row's ``input_ids`` are a list of examples, as `pack_best_fit` makes them, or one example. Rows are filled up to
    the longest of their batch by tokens that no example sees and the loss ignores; with flash attention a batch is one
    row, without any. The first label of an example is ignored, since the last token of the one before would predict it.

    Attributes:
        isolation: How the model keeps examples apart.
    """

    isolation: Isolation

    def __call__(self, features: list[dict[str, Any]]) -> dict[str, Any]:
        """Return a batch of shape (rows, tokens): ``input_ids``, ``labels`` and what the model needs besides."""
        rows = [_read_row(feature) for feature in features]
        if self.isolation.one_row:
            rows = [[example for row in rows for example in row]]
        length = max(sum(len(ids) for ids, _ in row) for row in rows)
        # int64 as everywhere; what is not written is the filling, an example of its own.
        shape = (len(rows), length)
        ids = torch.zeros(shape, dtype=torch.long)
        labels = torch.full(shape, IGNORED)
        positions = torch.zeros(shape, dtype=torch.long)
        for number, row in enumerate(rows):
            begin = 0
            for tokens, wanted in row:
                end = begin + len(tokens)
                ids[number, begin:end] = torch.as_tensor(tokens)
                labels[number, begin + 1 : end] = torch.as_tensor(wanted)[1:]
                positions[number, begin:end] = torch.arange(len(tokens))
                begin = end
            positions[number, begin:] = torch.arange(length - begin)
        return {"input_ids": ids, "labels": labels, **self.isolation.make_inputs(positions)}


def _read_row(feature: dict[str, Any]) -> list[tuple[Any, Any]]:
    """Return the examples of a row: pairs of tokens and labels; empty ones are left out."""
    ids = feature["input_ids"]
    labels = feature["labels"] if feature.get("labels") is not None else ids
    if not len(ids) or not hasattr(ids[0], "__len__") or getattr(ids[0], "ndim", 1) == 0:
        ids, labels = [ids], [labels]
    return [(tokens, wanted) for tokens, wanted in zip(ids, labels, strict=True) if len(tokens)]

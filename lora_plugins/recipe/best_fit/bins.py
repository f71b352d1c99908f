"""Pack whole examples into rows of a limited length, best fit first.

A packed row is a list of examples, so that where each begins is known without a column that a Trainer would remove.
Examples are placed by falling length, each into the row whose free space it fills best (best-fit decreasing, as in
"Fewer Truncations Improve Language Modeling", arXiv 2404.10830).
"""

from __future__ import annotations

import bisect
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import pyarrow.compute as pc
from datasets import Dataset, Features, List
from datasets.fingerprint import Hasher

from lora_plugins.errors import DataError
from lora_plugins.recipe.packing import IGNORED, TOKEN_COLUMNS, token_offsets

__all__ = ["BestFitCounts", "OverLong", "fit_lengths", "pack_best_fit"]

OverLong = Literal["drop", "cut"]


@dataclass(frozen=True)
class BestFitCounts:
    """Counts of examples that were packed whole.

    Attributes:
        examples: Examples that went in.
        kept: Examples that came out.
        tokens: Tokens that came out.
        loss_tokens: How many of them count in the loss.
        chunks: Rows that came out.
        chunk_length: Tokens that a row may have.
        cut: Kept examples that were cut to ``chunk_length``.
        tokens_cut: Tokens that this cost.
        too_long: Examples left out because they are longer than ``chunk_length``.
        without_loss: Examples left out because none of their tokens counts in the loss.
    """

    examples: int
    kept: int
    tokens: int
    loss_tokens: int
    chunks: int
    chunk_length: int
    cut: int
    tokens_cut: int
    too_long: int
    without_loss: int

    @property
    def fill(self) -> float:
        """The share of the rows' room that tokens take, 0 to 1."""
        return self.tokens / (self.chunks * self.chunk_length)

    def line(self) -> str:
        """Return the counts as a sentence."""
        text = (
            f"{self.examples:,} examples -> {self.kept:,} kept whole in {self.chunks:,} chunks of up to "
            f"{self.chunk_length:,}, {self.fill:.1%} full; {self.tokens:,} tokens, {self.loss_tokens:,} of them in the "
            f"loss"
        )
        more = {
            f"{self.cut:,} cut, which loses {self.tokens_cut:,} tokens": self.cut,
            f"{self.too_long:,} left out as longer than {self.chunk_length:,} tokens": self.too_long,
            f"{self.without_loss:,} left out without a token for the loss": self.without_loss,
        }
        return "; ".join([text, *(part for part, count in more.items() if count)])


def pack_best_fit(
    tokenised: Dataset,
    chunk_length: int,
    *,
    over_long: OverLong = "drop",
    num_proc: int | None = None,
    batch_size: int = 1000,
) -> tuple[Dataset, BestFitCounts]:
    """Pack whole examples into rows of at most ``chunk_length`` tokens.

    Use it with `best_fit_collator`. The result depends on the data, the chunk length and ``over_long`` only, not on
    processes and batch size. It is cached beside the data set's own files, if it has any.

    Args:
        tokenised: Rows of ``input_ids``, and ``labels`` of the same lengths where not every token counts in the loss.
            Other columns are dropped.
        chunk_length: Tokens that a row may have.
        over_long: What becomes of a longer example: ``"drop"`` leaves it out, ``"cut"`` keeps its beginning.
        num_proc: Worker processes; ``None`` works in this one.
        batch_size: Rows per batch.

    Returns:
        Rows of ``input_ids`` and ``labels``, each a list of examples in their order, and the counts. Rows are in the
        order of their first examples. Without ``labels`` in the input, ``labels`` are the ``input_ids``.

    Raises:
        DataError: The chunk length is below 1, the columns have different lengths, or no example is left.
    """
    if chunk_length < 1:
        raise DataError(f"The chunk length must be at least 1, not {chunk_length!r}")
    if over_long not in ("drop", "cut"):
        raise DataError(f"over_long must be 'drop' or 'cut', not {over_long!r}")
    whole = np.diff(token_offsets(tokenised))
    names = [name for name in TOKEN_COLUMNS if name in tokenised.column_names]
    lengths = np.minimum(whole, chunk_length) if over_long == "cut" else whole
    in_loss = _count_in_loss(tokenised, names[-1], chunk_length, num_proc)
    fits, alive = lengths <= chunk_length, in_loss > 0
    kept = np.flatnonzero(fits & alive)
    bins = fit_lengths(lengths[kept], chunk_length)
    shortened = kept[whole[kept] > chunk_length]
    counts = BestFitCounts(
        examples=len(tokenised),
        kept=len(kept),
        tokens=int(lengths[kept].sum()),
        loss_tokens=int(in_loss[kept].sum()),
        chunks=len(bins),
        chunk_length=chunk_length,
        cut=len(shortened),
        tokens_cut=int((whole[shortened] - chunk_length).sum()),
        too_long=int((~fits).sum()),
        without_loss=int((fits & ~alive).sum()),
    )
    if not bins:
        why = f"{counts.too_long:,} are longer than {chunk_length:,} tokens, {counts.without_loss:,} have no label"
        raise DataError(f"No example of {counts.examples:,} is left to train on: {why}. Raise the chunk length.")
    features = Features(
        {name: List(tokenised.features[names[-1] if name in names else names[0]]) for name in TOKEN_COLUMNS}
    )
    packed = tokenised.map(
        _RowsOfExamples(tokenised, names, [kept[members] for members in bins], chunk_length),
        with_indices=True,
        batched=True,
        batch_size=batch_size,
        num_proc=num_proc,
        remove_columns=tokenised.column_names,
        features=features,
        # The function holds the data set, whose hash would differ each time.
        new_fingerprint=_make_fingerprint(tokenised, chunk_length, over_long),
        desc="Packing",
    )
    return packed, counts


def fit_lengths(lengths: npt.NDArray[np.int64], room: int) -> list[npt.NDArray[np.int64]]:
    """Return which lengths share a bin of ``room``: positions in rising order, bins by their first one.

    Args:
        lengths: Each from 0 to ``room``.
        room: The most that a bin's lengths may sum to.
    """
    bins: list[list[int]] = []
    # Free space -> bins that have it; the free spaces in order.
    by_space: dict[int, list[int]] = {}
    spaces: list[int] = []
    for index in np.argsort(-lengths, kind="stable").tolist():
        length = int(lengths[index])
        place = bisect.bisect_left(spaces, length)
        if place == len(spaces):
            space, chosen = room, len(bins)
            bins.append([])
        else:
            space = spaces[place]
            chosen = by_space[space].pop()
            if not by_space[space]:
                del by_space[space], spaces[place]
        bins[chosen].append(index)
        left = space - length
        if left not in by_space:
            bisect.insort(spaces, left)
        by_space.setdefault(left, []).append(chosen)
    return [np.asarray(sorted(members)) for members in sorted(bins, key=min)]


class _RowsOfExamples:
    """Makes the packed rows whose first example is among given rows; the other examples are read from the data set."""

    def __init__(
        self, tokenised: Dataset, columns: list[str], bins: list[npt.NDArray[np.int64]], chunk_length: int
    ) -> None:
        self.rows = tokenised.with_format("arrow", columns=columns)
        self.columns = columns
        self.bins = {int(members[0]): members for members in bins}
        self.length = chunk_length

    def __call__(self, batch: Any, indices: list[int]) -> dict[str, Any]:
        bins = [self.bins[index] for index in indices if index in self.bins]
        made = {name: [] for name in self.columns} if not bins else self._read(bins)
        return {"input_ids": made["input_ids"], "labels": made.get("labels", made["input_ids"])}

    def _read(self, bins: list[npt.NDArray[np.int64]]) -> dict[str, Any]:
        table = self.rows[np.concatenate(bins)]
        ends = np.cumsum([len(members) for members in bins])
        made = {}
        for name in self.columns:
            examples = pc.list_slice(table.column(name), 0, self.length).to_numpy()
            made[name] = [list(part) for part in np.split(examples, ends[:-1])]
        return made


def _count_in_loss(tokenised: Dataset, name: str, chunk_length: int, num_proc: int | None) -> npt.NDArray[np.int64]:
    """Return how many tokens of each example count in the loss, its first ``chunk_length`` tokens being kept."""

    def count(batch: dict[str, list[Any]]) -> dict[str, list[int]]:
        # The first label of a row predicts nothing: labels are shifted by one.
        return {"loss_tokens": [sum(label != IGNORED for label in row[1:chunk_length]) for row in batch[name]]}

    # Without its columns, or the whole data set would be written again.
    columns = tokenised.column_names
    counted = tokenised.map(count, batched=True, num_proc=num_proc, remove_columns=columns, desc="Counting")
    return np.asarray(counted.with_format("numpy")["loss_tokens"][:], dtype=np.int64)


def _make_fingerprint(tokenised: Dataset, chunk_length: int, over_long: str) -> str:
    return str(Hasher.hash(("lora_plugins.recipe.best_fit", 1, tokenised._fingerprint, chunk_length, over_long)))

"""Cut tokenised examples into chunks of equal length, or pad them.

Packing takes two steps. The first records where each example begins in the stream of all tokens; the second
cuts the stream at multiples of the chunk length. A chunk belongs to the example that its first token comes from,
so which process or batch meets that example makes no difference to any chunk.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
from datasets import Dataset, Features
from datasets.fingerprint import Hasher

from lora_plugins.errors import DataError

__all__ = ["IGNORED", "TOKEN_COLUMNS", "PackingCounts", "PaddedCounts", "keep_apart", "pack", "token_offsets"]


#: Columns that have one value for each token.
TOKEN_COLUMNS = ("input_ids", "labels")

#: The label that the loss ignores.
IGNORED = -100


@dataclass(frozen=True)
class PackingCounts:
    """Counts of examples that were packed.

    Attributes:
        examples: Examples that went in.
        tokens: Their tokens.
        chunks: Chunks that came out, each of ``chunk_length`` tokens.
        chunk_length: Tokens in a chunk.
        left_over: Tokens at the end that fill no chunk and are not trained on.
    """

    examples: int
    tokens: int
    chunks: int
    chunk_length: int
    left_over: int

    def line(self) -> str:
        """Return the counts as a sentence."""
        return (
            f"{self.examples:,} examples, {self.tokens:,} tokens -> {self.chunks:,} chunks of {self.chunk_length:,}; "
            f"{self.left_over:,} tokens left over"
        )


@dataclass(frozen=True)
class PaddedCounts:
    """Counts of examples that were not packed.

    Attributes:
        examples: Examples that went in.
        kept: Examples that came out.
        tokens: Tokens of the kept examples, before padding.
        loss_tokens: How many of them count in the loss.
        too_long: Examples left out because they are longer than ``max_length``.
        without_loss: Examples left out because none of their tokens counts in the loss.
        max_length: Tokens that an example may have.
    """

    examples: int
    kept: int
    tokens: int
    loss_tokens: int
    too_long: int
    without_loss: int
    max_length: int

    def line(self) -> str:
        """Return the counts as a sentence."""
        text = (
            f"{self.examples:,} examples -> {self.kept:,} kept with {self.tokens:,} tokens, {self.loss_tokens:,} of "
            f"them in the loss; {self.too_long:,} left out as longer than {self.max_length:,} tokens"
        )
        return text + (f", {self.without_loss:,} without a token for the loss" if self.without_loss else "")


def pack(
    tokenised: Dataset,
    chunk_length: int,
    *,
    num_proc: int | None = None,
    batch_size: int = 1000,
) -> tuple[Dataset, PackingCounts]:
    """Cut the concatenated tokens of a data set into chunks of equal length.

    The result depends on the data and the chunk length only, not on processes and batch size. It is cached
    beside the data set's own files, if it has any.

    Args:
        tokenised: Rows of ``input_ids``, and ``labels`` of the same lengths where not every token counts in
            the loss. Other columns are dropped.
        chunk_length: Tokens in a chunk.
        num_proc: Worker processes; ``None`` works in this one.
        batch_size: Rows per batch.

    Returns:
        Rows of ``input_ids`` and ``labels``, each exactly ``chunk_length`` long, and the counts. Without
        ``labels`` in the input, ``labels`` are the ``input_ids``.

    Raises:
        DataError: The chunk length is below 1, the columns have different lengths, or there are fewer
            tokens than one chunk takes.
    """
    if chunk_length < 1:
        raise DataError(f"The chunk length must be at least 1, not {chunk_length!r}")
    columns = _find_token_columns(tokenised)
    offsets = token_offsets(tokenised)
    total = int(offsets[-1])
    counts = PackingCounts(len(tokenised), total, total // chunk_length, chunk_length, total % chunk_length)
    if not counts.chunks:
        raise DataError(
            f"{len(tokenised):,} examples have {total:,} tokens, fewer than one chunk of {chunk_length:,}. "
            f"Use a chunk length of at most {max(total, 1):,}, more data, or no packing."
        )
    chunks = tokenised.map(
        _ChunksOfRows(tokenised, columns, offsets, chunk_length),
        with_indices=True,
        batched=True,
        batch_size=batch_size,
        num_proc=num_proc,
        remove_columns=tokenised.column_names,
        # A batch in which no chunk begins would have no type.
        features=_make_features(tokenised, columns),
        # The function holds the data set, whose hash would differ each time.
        new_fingerprint=_make_fingerprint(tokenised, chunk_length),
        desc="Packing",
    )
    return chunks, counts


def token_offsets(tokenised: Dataset) -> npt.NDArray[np.int64]:
    """Return where each row begins in the stream of all tokens, and the stream's end: ``len(rows) + 1`` numbers.

    Raises:
        DataError: ``labels`` and ``input_ids`` of a row have different lengths.
    """
    lengths = [_measure_rows(tokenised, name) for name in _find_token_columns(tokenised)]
    for other in lengths[1:]:
        different = np.flatnonzero(lengths[0] != other)
        if len(different):
            row = int(different[0])
            raise DataError(f"Row {row} has {lengths[0][row]} input_ids and {other[row]} labels")
    return np.concatenate([np.zeros(1, dtype=np.int64), np.cumsum(lengths[0], dtype=np.int64)])


def keep_apart(
    tokenised: Dataset, max_length: int, *, num_proc: int | None = None, batch_size: int = 1000
) -> tuple[Dataset, PaddedCounts]:
    """Leave examples as they are, for batches that are padded to their longest row.

    An example that is too long is left out rather than cut, because the end that would be lost is the answer.

    Args:
        tokenised: Rows of ``input_ids`` and ``labels``.
        max_length: Tokens that an example may have.
        num_proc: Worker processes; ``None`` works in this one.
        batch_size: Rows per batch.

    Raises:
        DataError: No example is left.
    """
    lengths = np.diff(token_offsets(tokenised))
    counted = tokenised.map(_count_loss_tokens, batched=True, batch_size=batch_size, num_proc=num_proc, desc="Counting")
    in_loss = np.asarray(counted.with_format("numpy")["loss_tokens"][:], dtype=np.int64)
    short, alive = lengths <= max_length, in_loss > 0
    kept = np.flatnonzero(short & alive)
    counts = PaddedCounts(
        examples=len(tokenised),
        kept=len(kept),
        tokens=int(lengths[kept].sum()),
        loss_tokens=int(in_loss[kept].sum()),
        too_long=int((~short).sum()),
        without_loss=int((short & ~alive).sum()),
        max_length=max_length,
    )
    if not counts.kept:
        raise DataError(f"No example is left to train on: {counts.line()}. Raise the length, or look at the template.")
    return tokenised.select(kept).select_columns(list(TOKEN_COLUMNS)), counts


def _count_loss_tokens(batch: dict[str, list[Any]]) -> dict[str, list[int]]:
    # The first label of a row predicts nothing: labels are shifted by one.
    return {"loss_tokens": [sum(label != IGNORED for label in row[1:]) for row in batch["labels"]]}


class _ChunksOfRows:
    """Makes the chunks that begin in given rows; tokens beyond those rows are read from the data set."""

    def __init__(
        self, tokenised: Dataset, columns: list[str], offsets: npt.NDArray[np.int64], chunk_length: int
    ) -> None:
        # Without formatting, rows come as Arrow buffers instead of Python lists.
        self.rows = tokenised.with_format("arrow", columns=columns)
        self.columns = columns
        self.offsets = offsets
        self.length = chunk_length

    def __call__(self, batch: Any, indices: list[int]) -> dict[str, Any]:
        first, last = self._find_chunks(indices[0], indices[-1] + 1)
        made = self._cut(first, last)
        return {"input_ids": made["input_ids"], "labels": made.get("labels", made["input_ids"])}

    def _find_chunks(self, start: int, stop: int) -> tuple[int, int]:
        """Return the range of chunks whose first token is in rows ``start`` to ``stop``, without the remainder."""
        whole = int(self.offsets[-1]) // self.length
        first, last = (-(-int(self.offsets[row]) // self.length) for row in (start, stop))
        return min(first, whole), min(last, whole)

    def _cut(self, first: int, last: int) -> dict[str, Any]:
        if first == last:
            return {name: [] for name in self.columns}
        begin, end = first * self.length, last * self.length
        # "right" passes over empty rows that begin at the same place.
        start = int(np.searchsorted(self.offsets, begin, side="right")) - 1
        stop = int(np.searchsorted(self.offsets, end, side="left"))
        table = self.rows[start:stop]
        skip = begin - int(self.offsets[start])
        made = {}
        for name in self.columns:
            stream = _flatten(table.column(name)).to_numpy()
            made[name] = list(stream[skip : skip + end - begin].reshape(last - first, self.length))
        return made


def _find_token_columns(tokenised: Dataset) -> list[str]:
    columns = [name for name in TOKEN_COLUMNS if name in tokenised.column_names]
    if TOKEN_COLUMNS[0] not in columns:
        raise DataError(f"A tokenised data set has the column 'input_ids'; there are {tokenised.column_names}")
    return columns


def _make_features(tokenised: Dataset, columns: list[str]) -> Any:
    return Features({name: tokenised.features[name if name in columns else "input_ids"] for name in TOKEN_COLUMNS})


def _measure_rows(tokenised: Dataset, name: str) -> npt.NDArray[np.int64]:
    rows = tokenised.with_format("arrow", columns=[name])
    step = 10_000
    parts = [
        pc.list_value_length(rows[start : start + step].column(name)).to_numpy() for start in range(0, len(rows), step)
    ]
    return np.concatenate(parts).astype(np.int64) if parts else np.zeros(0, dtype=np.int64)


def _flatten(column: pa.ChunkedArray) -> pa.ChunkedArray:
    """Return the concatenated values of a column of lists; ``flatten`` respects slices, ``values`` would not."""
    return pa.chunked_array([part.flatten() for part in column.chunks], type=column.type.value_type)


def _make_fingerprint(tokenised: Dataset, chunk_length: int) -> str:
    return str(Hasher.hash(("lora_plugins.recipe.packing", 1, tokenised._fingerprint, chunk_length)))

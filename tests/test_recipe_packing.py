"""Packing: nothing lost or doubled but the reported remainder, whatever the lengths, batches and processes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset, Features, List, Value, load_dataset
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lora_plugins.errors import DataError
from lora_plugins.recipe.packing import keep_apart, pack, token_offsets

FEATURES = Features({"input_ids": List(Value("int32")), "labels": List(Value("int64"))})


def rows_of(lengths: list[int], *, labels: bool = False) -> Dataset:
    """Rows in which every token of the whole data set is another number."""
    rows, position = [], 0
    for length in lengths:
        rows.append(list(range(position, position + length)))
        position += length
    data: dict[str, Any] = {"input_ids": rows}
    if labels:
        # A label that cannot be mistaken for its token, and ignored ones among them.
        data["labels"] = [[-100 if token % 3 == 0 else -token - 1 for token in row] for row in rows]
        return Dataset.from_dict(data, features=FEATURES)
    return Dataset.from_dict(data, features=Features({"input_ids": FEATURES["input_ids"]}))


def flat(rows: list[list[int]]) -> list[int]:
    return [token for row in rows for token in row]


LENGTHS = st.lists(st.integers(0, 40), min_size=1, max_size=60).filter(any)


@settings(max_examples=80, deadline=None)
@given(lengths=LENGTHS, chunk=st.integers(1, 50), batch_size=st.integers(1, 70), labels=st.booleans())
def test_chunks_are_the_stream_cut_at_multiples(lengths: list[int], chunk: int, batch_size: int, labels: bool) -> None:
    rows = rows_of(lengths, labels=labels)
    total = sum(lengths)
    if total < chunk:
        with pytest.raises(DataError, match="fewer than one chunk"):
            pack(rows, chunk, batch_size=batch_size)
        return
    packed, counts = pack(rows, chunk, batch_size=batch_size)
    assert (counts.examples, counts.tokens) == (len(lengths), total)
    assert (counts.chunks, counts.left_over) == (total // chunk, total % chunk)
    assert len(packed) == counts.chunks
    assert all(len(row) == chunk for row in packed["input_ids"])
    assert flat(packed["input_ids"]) == list(range(total - counts.left_over))
    source = rows["labels"] if labels else rows["input_ids"]
    assert flat(packed["labels"]) == flat(source)[: total - counts.left_over]


@settings(max_examples=6, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(lengths=LENGTHS.filter(lambda found: sum(found) >= 7 and len(found) >= 4), batch_size=st.integers(1, 20))
def test_processes_change_nothing(lengths: list[int], batch_size: int) -> None:
    rows = rows_of(lengths, labels=True)
    alone, counts = pack(rows, 7, batch_size=1000)
    for processes in (2, 3):
        several, same = pack(rows, 7, num_proc=processes, batch_size=batch_size)
        assert several[:] == alone[:]
        assert same == counts


@settings(max_examples=20, deadline=None)
@given(lengths=LENGTHS.filter(lambda found: sum(found) >= 5), seed=st.integers(0, 9))
def test_shuffled_rows_are_packed_in_their_new_order(lengths: list[int], seed: int) -> None:
    rows = rows_of(lengths).shuffle(seed=seed)
    packed, counts = pack(rows, 5, batch_size=3)
    assert flat(packed["input_ids"]) == flat(rows["input_ids"])[: counts.tokens - counts.left_over]


def test_first_batch_shorter_than_a_chunk() -> None:
    """The chunker that people copy fails here: it has no chunk yet when its first batch ends."""
    packed, counts = pack(rows_of([3, 3, 3, 3]), 10, batch_size=1)
    assert packed["input_ids"][:] == [list(range(10))]
    assert counts.line() == "4 examples, 12 tokens -> 1 chunks of 10; 2 tokens left over"


def test_packing_twice_gives_the_same_and_carries_nothing_over() -> None:
    first, _ = pack(rows_of([5, 6]), 4)
    second, _ = pack(rows_of([5, 6]), 4)
    assert first[:] == second[:]


def test_packing_a_file_is_cached_by_chunk_length(tmp_path: Path) -> None:
    (tmp_path / "data.jsonl").write_text("".join(f'{{"input_ids": [{n}, {n + 1}, {n + 2}]}}\n' for n in range(9)))
    rows = load_dataset("json", data_files=str(tmp_path / "data.jsonl"), split="train", cache_dir=str(tmp_path))
    first, _ = pack(rows, 4, batch_size=2)
    files = set(tmp_path.rglob("*.arrow"))
    again, _ = pack(rows, 4, batch_size=5)
    assert set(tmp_path.rglob("*.arrow")) == files
    assert [entry["filename"] for entry in again.cache_files] == [entry["filename"] for entry in first.cache_files]
    other, _ = pack(rows, 6)
    assert len(other["input_ids"][0]) == 6
    assert set(tmp_path.rglob("*.arrow")) > files


@pytest.mark.parametrize("length", [0, -3])
def test_chunk_length_below_one_is_refused(length: int) -> None:
    with pytest.raises(DataError, match=str(length)):
        pack(rows_of([5]), length)


def test_labels_of_another_length_are_refused() -> None:
    rows = Dataset.from_dict({"input_ids": [[1, 2], [3, 4]], "labels": [[1, 2], [3]]})
    with pytest.raises(DataError, match="Row 1 has 2 input_ids and 1 labels"):
        pack(rows, 2)


def test_offsets_begin_at_zero_and_end_at_the_total() -> None:
    assert token_offsets(rows_of([2, 0, 3])).tolist() == [0, 2, 2, 5]


def test_examples_kept_apart_are_never_cut() -> None:
    rows = Dataset.from_dict(
        {
            "input_ids": [[1, 2, 3], [1, 2, 3, 4, 5], [7, 8], [9]],
            # The second is too long; the third has no label; the fourth has one that nothing predicts.
            "labels": [[-100, 2, 3], [-100, 2, 3, 4, 5], [-100, -100], [9]],
        }
    )
    kept, counts = keep_apart(rows, 4)
    assert kept["input_ids"][:] == [[1, 2, 3]]
    assert kept["labels"][:] == [[-100, 2, 3]]
    assert (counts.kept, counts.tokens, counts.loss_tokens, counts.too_long, counts.without_loss) == (1, 3, 2, 1, 2)


def test_no_example_left_is_an_error_with_the_counts() -> None:
    with pytest.raises(DataError, match="1 left out as longer than 2"):
        keep_apart(rows_of([3], labels=True), 2)

"""Hostile safetensors files are refused before the library sees them, and values that no adapter can have."""

from __future__ import annotations

import io
import json
import pickle
import resource
import time
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from adapters import safetensors
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError
from safetensors.torch import load, save, save_file

from registry.errors import InvalidAdapter, UnsafeFile
from registry.formats.weights import MAX_HEADER, check_values, read_file_header, read_header

ENTRY = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}
NOTHING = {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}
DATA = b"\0" * 8


def header_of(data: bytes) -> Any:
    return read_header(lambda start, length: data[start : start + length], len(data), "adapter_model.safetensors")


def zipped() -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("data.pkl", pickle.dumps({"a": 1}))
    return buffer.getvalue()


HOSTILE: dict[str, bytes] = {
    "empty": b"",
    "seven bytes": b"\0" * 7,
    "pickle": pickle.dumps({"a": [1, 2, 3]}),
    "zip": zipped(),
    "header of 2^63": safetensors({"a": ENTRY}, DATA, length=2**63),
    "header longer than the file": safetensors({"a": ENTRY}, DATA, length=1000),
    "header is a list": safetensors([1]),
    "header is no JSON": safetensors(b"not JSON"),
    "name twice": safetensors(b'{"a": %b, "a": %b}' % ((json.dumps(ENTRY).encode(),) * 2), DATA),
    "key twice": safetensors(b'{"a": {"dtype": "F32", "dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}', DATA),
    "path as name": safetensors({"../../x": ENTRY}, DATA),
    "dunder as name": safetensors({"__class__": ENTRY}, DATA),
    "name of 1 MB": safetensors({"a" * 1_000_000: ENTRY}, DATA),
    "trailing bytes": safetensors({"a": ENTRY}, DATA + b"more"),
    "missing bytes": safetensors({"a": ENTRY}, DATA[:4]),
    "hole": safetensors({"a": {**ENTRY, "data_offsets": [4, 12]}}, DATA + b"\0" * 4),
    "overlap": safetensors({"a": ENTRY, "b": ENTRY}, DATA),
    "empty tensors at one offset": safetensors(
        {"b": {**ENTRY, "shape": [0], "data_offsets": [0, 0]}, "a": ENTRY}, DATA
    ),
    "shape that overflows": safetensors({"a": {**ENTRY, "shape": [2**33, 2**33]}}, DATA),
    "shape that does not fit": safetensors({"a": {**ENTRY, "shape": [3]}}, DATA),
    "negative shape": safetensors({"a": {**ENTRY, "shape": [-2]}}, DATA),
    "truth as shape": safetensors({"a": {**ENTRY, "shape": [True, 2]}}, DATA),
    "offsets backwards": safetensors({"a": {**ENTRY, "data_offsets": [8, 0]}}, DATA),
    "strange dtype": safetensors({"a": {**ENTRY, "dtype": "Q4"}}, DATA),
    "dtype is a list": safetensors({"a": {**ENTRY, "dtype": []}}, DATA),
    "more keys": safetensors({"a": {**ENTRY, "code": "x"}}, DATA),
    "metadata of numbers": safetensors({"__metadata__": {"a": 1}, "a": ENTRY}, DATA),
    "metadata of 2 MB": safetensors({"__metadata__": {"a": "x" * 2_000_000}, "a": ENTRY}, DATA),
    "deep": safetensors(b'{"a": ' + b"[" * 100_000 + b"]" * 100_000 + b"}"),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_files_are_refused(case: str) -> None:
    with pytest.raises(
        UnsafeFile, match=r"^adapter_model\.safetensors is not a safetensors file that can be read"
    ) as caught:
        header_of(HOSTILE[case])
    assert len(str(caught.value)) < 400


def test_a_million_empty_tensors_are_refused_before_they_are_parsed() -> None:
    names = ",".join(f'"t{i}":{{"dtype":"F32","shape":[0],"data_offsets":[0,0]}}' for i in range(1_000_000))
    data = safetensors(f"{{{names}}}".encode())
    before, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
    with pytest.raises(UnsafeFile, match=f"header has .* and may have {MAX_HEADER:,}"):
        header_of(data)
    assert time.process_time() - start < 0.5
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 50_000


def test_a_hundred_thousand_tensors_in_a_small_header_are_refused() -> None:
    # Short names keep the header below its limit; the number of tensors is limited, too.
    names = ",".join(f'"t{i:x}":{{"dtype":"U8","shape":[1],"data_offsets":[{i},{i + 1}]}}' for i in range(100_000))
    with pytest.raises(UnsafeFile, match="100,000 tensors"):
        header_of(safetensors(f"{{{names}}}".encode(), b"\0" * 100_000))


def test_what_the_library_accepts_of_these() -> None:
    """Why the header is read here first: the library takes a name twice, and paths as names."""
    assert load(HOSTILE["name twice"]).keys() == {"a"}
    assert load(HOSTILE["path as name"]).keys() == {"../../x"}
    with pytest.raises(SafetensorError):
        load(HOSTILE["overlap"])


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_every_file_of_the_library_is_read_as_the_library_reads_it(data: st.DataObject) -> None:
    names = data.draw(
        st.lists(st.from_regex(r"[a-z]{1,3}(\.[a-z0-9]{1,3}){0,2}", fullmatch=True), unique=True, min_size=1)
    )
    shapes = st.lists(st.integers(1, 3), max_size=3)
    kinds = st.sampled_from([torch.float32, torch.bfloat16, torch.float16, torch.int64])
    tensors = {name: torch.zeros(data.draw(shapes), dtype=data.draw(kinds)) for name in names}
    content = save(tensors, metadata={"format": "pt"})
    header = header_of(content)
    assert {name: record.shape for name, record in header.tensors.items()} == {
        n: tuple(t.shape) for n, t in tensors.items()
    }
    assert header.metadata == {"format": "pt"}
    flipped = data.draw(st.integers(0, len(content) - 1))
    spoilt = bytes(byte ^ (0x20 if index == flipped else 0) for index, byte in enumerate(content))
    try:
        accepted = header_of(spoilt)
    except UnsafeFile:
        return
    assert set(accepted.tensors) == set(load(spoilt))


def values(folder: Path, *, double: bool = False, **tensors: torch.Tensor) -> set[str]:
    file = folder / "adapter_model.safetensors"
    save_file(tensors, file)
    return check_values(file, read_file_header(file), double=double)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_values_that_are_not_finite_are_refused(tmp_path: Path, dtype: torch.dtype, bad: float) -> None:
    tensor = torch.ones(3, 5, dtype=dtype)
    tensor[2, 4] = bad
    with pytest.raises(InvalidAdapter, match=r"^broken holds NaN or infinite values"):
        values(tmp_path, fine=torch.ones(2), broken=tensor)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("large", [1e38, -1e38, 65_600.0])
def test_values_beyond_float16_are_refused(tmp_path: Path, dtype: torch.dtype, large: float) -> None:
    fine = torch.tensor([65_504.0, -65_504.0, 0.0], dtype=dtype if dtype != torch.bfloat16 else torch.float32)
    assert values(tmp_path, double=True, a=fine) == set()
    with pytest.raises(InvalidAdapter, match=r"^a holds values above 65,504"):
        values(tmp_path, double=True, a=torch.tensor([0.5, 1.01 * large], dtype=dtype))


@pytest.mark.parametrize("dtype", [torch.float64, torch.int64, torch.int8, torch.bool])
def test_other_dtypes_are_refused(tmp_path: Path, dtype: torch.dtype) -> None:
    with pytest.raises(InvalidAdapter, match=r"^a has dtype .*F32, BF16 or F16"):
        values(tmp_path, a=torch.ones(2, dtype=dtype))


def test_zeros_and_denormals_are_told(tmp_path: Path) -> None:
    found = values(
        tmp_path,
        zero=torch.zeros(4),
        negative=-torch.zeros(4, dtype=torch.bfloat16),
        denormal=torch.full((4,), 1e-42),
        small_half=torch.full((4,), 1e-7, dtype=torch.float16),
        one=torch.tensor([0.0, 1e-30]),
    )
    assert found == {"zero", "negative", "denormal"}


def test_a_file_larger_than_one_chunk_is_read_to_its_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("registry.formats.weights._CHUNK", 64)
    tensor = torch.zeros(1000)
    tensor[999] = 1
    assert values(tmp_path, a=tensor, b=torch.zeros(1000)) == {"b"}
    tensor[999] = float("nan")
    with pytest.raises(InvalidAdapter, match="a holds NaN"):
        values(tmp_path, a=tensor)


def test_the_counter_of_batch_norm_is_the_one_integer(tmp_path: Path) -> None:
    file = tmp_path / "adapter_model.safetensors"
    name = "base_model.model.decode_head.batch_norm.num_batches_tracked"
    save_file({name: torch.tensor(4), "a": torch.zeros(2)}, str(file))
    assert check_values(file, read_file_header(file)) == {"a"}
    for other in ({name: torch.tensor([4])}, {name: torch.tensor(4, dtype=torch.int32)}, {"a.weight": torch.tensor(4)}):
        save_file(other, str(file))
        with pytest.raises(InvalidAdapter, match="dtype I"):
            check_values(file, read_file_header(file))

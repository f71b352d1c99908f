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
from registry.formats.records import TensorRecord
from registry.formats.weights import (
    MAX_HEADER,
    bits_of,
    check_values,
    describe_dtype,
    read_file_header,
    read_header,
    read_open_header,
    read_values,
    scan_values,
)

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
    "no tensors and a longer header": safetensors({}, length=1000),
    "header that ends with the file and says more": safetensors(b"{} ", length=4),
    "bytes behind no tensors": safetensors({}, DATA),
    "entry is a number": safetensors({"a": 5}, DATA),
    "entry is a list of the keys": safetensors({"a": list(ENTRY)}, DATA),
    "no dtype": safetensors({"a": {"shape": [2], "data_offsets": [0, 8]}}, DATA),
    "nine dimensions": safetensors({"a": {**ENTRY, "shape": [1] * 8 + [2]}}, DATA),
    "shape is an object": safetensors({"a": {**ENTRY, "shape": {}, "data_offsets": [0, 4]}}, DATA[:4]),
    "shape is null": safetensors({"a": {**ENTRY, "shape": None}}, DATA),
    "shape is a text": safetensors({"a": {**ENTRY, "shape": "2"}}, DATA),
    "fraction as shape": safetensors({"a": {**ENTRY, "shape": [2.0]}}, DATA),
    "fractions as offsets": safetensors({"a": {**ENTRY, "data_offsets": [0.0, 8.0]}}, DATA),
    "text as offsets": safetensors({"a": {**ENTRY, "data_offsets": "08"}}, DATA),
    "negative offsets": safetensors({"a": {**ENTRY, "data_offsets": [-8, 0]}}, DATA),
    "one offset": safetensors({"a": {**ENTRY, "data_offsets": [8]}}, DATA),
    "three offsets": safetensors({"a": {**ENTRY, "data_offsets": [0, 8, 8]}}, DATA),
    "an empty tensor at the end": safetensors({"a": ENTRY, "b": {**NOTHING, "data_offsets": [8, 8]}}, DATA),
    "metadata is a list": safetensors({"__metadata__": [], "a": ENTRY}, DATA),
}

#: What is said of each, so that no check stands in for another one.
REASONS: dict[str, str] = {
    **dict.fromkeys(["empty", "seven bytes", "pickle", "zip", "header of 2^63"], "its header should have .+ bytes"),
    "header longer than the file": "its header should have 1,000 bytes, and the file has 77",
    "no tensors and a longer header": "its header should have 1,000 bytes, and the file has 10",
    "header that ends with the file and says more": "its header should have 4 bytes, and the file has 11",
    "header is a list": "its header is not an object",
    "header is no JSON": "it is not JSON",
    "name twice": "it has the key 'a' twice",
    "key twice": "it has the key 'dtype' twice",
    **dict.fromkeys(["path as name", "dunder as name", "name of 1 MB"], "is not the name of a tensor"),
    **dict.fromkeys(["trailing bytes", "missing bytes"], r"its tensors end at byte 77, and the file has (81|73)"),
    "bytes behind no tensors": "its tensors end at byte 10, and the file has 18",
    **dict.fromkeys(
        ["hole", "overlap", "empty tensors at one offset", "an empty tensor at the end"],
        "are not behind those of the tensor before, or there are none",
    ),
    **dict.fromkeys(["shape that overflows", "shape that does not fit"], "of shape .* has 8 bytes"),
    "offsets backwards": "of shape .* has -8 bytes",
    **dict.fromkeys(
        ["negative shape", "truth as shape", "nine dimensions", "fraction as shape", "shape is a text",
         "shape is an object", "shape is null",
         "fractions as offsets", "text as offsets", "negative offsets", "one offset", "three offsets"],
        "has the shape .* and the offsets",
    ),
    **dict.fromkeys(["strange dtype", "dtype is a list"], "has the dtype"),
    **dict.fromkeys(
        ["more keys", "entry is a number", "entry is a list of the keys", "no dtype"],
        "is not described by dtype, shape and data_offsets",
    ),
    **dict.fromkeys(["metadata of numbers", "metadata is a list"], "its metadata is not text"),
    "metadata of 2 MB": "its metadata have more than 1,048,576 characters",
    "deep": "it is nested too deeply",
}  # fmt: skip


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_files_are_refused(case: str) -> None:
    says = rf"^adapter_model\.safetensors is not a safetensors file that can be read safely: .*{REASONS[case]}"
    with pytest.raises(UnsafeFile, match=says) as caught:
        header_of(HOSTILE[case])
    assert len(str(caught.value)) < 400


def test_a_header_beyond_the_limit_is_not_read() -> None:
    read = []

    def answer(start: int, length: int) -> bytes:
        read.append(length)
        return (MAX_HEADER + 1).to_bytes(8, "little") if start == 0 else b"{}".ljust(length)

    with pytest.raises(UnsafeFile, match=f"its header has {MAX_HEADER + 1:,} bytes, and may have {MAX_HEADER:,}"):
        read_header(answer, MAX_HEADER + 9, "a")
    assert read == [8]


def test_the_limits_themselves_are_accepted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("registry.formats.weights.MAX_TENSORS", 2)
    monkeypatch.setattr("registry.formats.weights._MAX_METADATA", 10)
    two = {"a": ENTRY, "b": {**ENTRY, "data_offsets": [8, 16]}}
    assert list(header_of(safetensors({**two, "__metadata__": {"12345": "67890"}}, 2 * DATA)).tensors) == ["a", "b"]
    with pytest.raises(UnsafeFile, match="it has 3 tensors, and may have 2"):
        header_of(safetensors({**two, "c": {**ENTRY, "data_offsets": [16, 24]}}, 3 * DATA))
    with pytest.raises(UnsafeFile, match="more than 10 characters"):
        header_of(safetensors({**two, "__metadata__": {"12345": "678901"}}, 2 * DATA))
    eight = safetensors({"a": {**ENTRY, "shape": [1] * 7 + [2]}}, DATA)
    assert header_of(eight).tensors["a"].shape == (1, 1, 1, 1, 1, 1, 1, 2)
    assert header_of(safetensors({})).tensors == {}


def test_tensors_without_values_are_accepted_where_they_are_asked_for() -> None:
    data = safetensors({"a": NOTHING, "b": ENTRY, "c": {**NOTHING, "data_offsets": [8, 8]}}, DATA)
    found = read_header(lambda start, size: data[start : start + size], len(data), "a", empty=True)
    assert list(found.tensors) == ["a", "b", "c"]
    start = len(data) - 8
    assert found.offsets == {"a": (start, start), "b": (start, start + 8), "c": (start + 8, start + 8)}
    for other in ("hole", "overlap", "trailing bytes"):
        data = HOSTILE[other]
        with pytest.raises(UnsafeFile, match=REASONS[other]):
            read_header(lambda start, size, data=data: data[start : start + size], len(data), "a", empty=True)  # type: ignore[misc]


def test_a_header_is_read_from_the_start_of_an_open_file(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    path.write_bytes(safetensors({"a": ENTRY}, DATA))
    with open(path, "rb") as file:
        file.seek(20)
        assert read_open_header(file, "a.safetensors").tensors == read_file_header(path).tensors
    path.write_bytes(safetensors({"a": NOTHING}))
    with open(path, "rb") as file:
        assert list(read_open_header(file, "a.safetensors", empty=True).tensors) == ["a"]
        with pytest.raises(UnsafeFile, match=r"^a\.safetensors is not .* or there are none"):
            read_open_header(file, "a.safetensors")


def test_bits_of_a_dtype() -> None:
    assert [bits_of(dtype) for dtype in ("F8_E4M3", "BF16", "F32", "I64")] == [8, 16, 32, 64]
    with pytest.raises(UnsafeFile, match=r"^'Q4' is not a dtype that a tensor of an adapter can have"):
        bits_of("Q4")


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


def test_what_a_scan_finds_in_each_tensor(tmp_path: Path) -> None:
    file = tmp_path / "adapter_model.safetensors"
    tensors = {
        "fine": torch.ones(2),
        "largest": torch.tensor([65_504.0]),
        "smallest": torch.tensor([2.0**-126]),
        "zero": torch.zeros(2, 3),
        "denormal": torch.tensor([2.0**-127]),
        "half": torch.tensor([2.0**-24], dtype=torch.float16),
        "excess": torch.tensor([0.0, 65_536.0]),
        "infinite": torch.tensor([float("inf")]),
        "whole": torch.zeros(2, dtype=torch.int32),
        "nothing": torch.zeros(0),
    }
    save_file(tensors, file)
    with open(file, "rb") as opened:
        found = scan_values(file, read_open_header(opened, file.name, empty=True))
    assert found.zeros == {"zero", "denormal"}
    assert {name: text.partition(":")[0] for name, text in found.problems.items()} == {
        "excess": "excess holds values above 65,504, the largest of F16",
        "infinite": "infinite holds NaN or infinite values",
    }


def test_a_file_that_was_cut_after_its_header_was_read_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("registry.formats.weights._CHUNK", 8)
    file = tmp_path / "adapter_model.safetensors"
    tensor = torch.ones(10)
    save_file({"a": tensor}, file)
    header = read_file_header(file)
    file.write_bytes(file.read_bytes()[:-12])
    with pytest.raises(InvalidAdapter, match=r"adapter_model\.safetensors ends within a"):
        scan_values(file, header)
    tensor[1] = float("nan")  # it is refused without a look at the rest
    save_file({"a": tensor}, file)
    file.write_bytes(file.read_bytes()[:-12])
    with pytest.raises(InvalidAdapter, match="a holds NaN"):
        check_values(file, header)


def test_values_are_read_in_their_shape(tmp_path: Path) -> None:
    file = tmp_path / "adapter_model.safetensors"
    rows = [[1.5, -2.0, 0.25], [65_504.0, 2.0**-14, -0.0]]
    kinds = {"F64": torch.float64, "F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
    tensors = {name: torch.tensor(rows).to(kind) for name, kind in kinds.items()}
    save_file(tensors, file)
    header = read_file_header(file)
    for name, tensor in tensors.items():
        values = read_values(file, header, name)
        assert values.shape == (2, 3)
        assert values.tolist() == tensor.double().tolist()


def test_which_dtypes_an_adapter_can_have() -> None:
    def kinds(**options: Any) -> list[str]:
        every = ("F64", "F32", "BF16", "F16", "I64", "U8", "BOOL", "F8_E4M3")
        return [dtype for dtype in every if describe_dtype("a", TensorRecord(dtype, (2,)), **options) is None]

    assert kinds() == ["F64", "F32", "BF16", "F16"]
    assert kinds(double=False) == ["F32", "BF16", "F16"]
    assert "a has dtype I64. Adapters are published in F32, BF16 or F16" in str(
        describe_dtype("a", TensorRecord("I64", (2,)))
    )

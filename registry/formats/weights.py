"""Read header and values of untrusted safetensors files.

Unlike safetensors 0.8.0, this module refuses a million empty tensors, duplicate names and values that are not finite.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

from registry.errors import InvalidAdapter, UnsafeFile
from registry.formats.records import MAX_TENSORS, TensorRecord, is_tensor_name
from registry.formats.strict_json import JsonRefused, parse, shown

if TYPE_CHECKING:
    import numpy

__all__ = [
    "MAX_HEADER",
    "Header",
    "Values",
    "bits_of",
    "check_values",
    "describe_dtype",
    "read_file_header",
    "read_header",
    "read_open_header",
    "read_values",
    "scan_values",
]

#: Maximum bytes of a header; one with 50,000 tensors has about 7 MB.
MAX_HEADER = 8 * 1024 * 1024
_MAX_METADATA = 1024 * 1024
#: Bits per value, by dtype.
_BITS = {
    "BOOL": 8, "U8": 8, "I8": 8, "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8, "I16": 16, "U16": 16, "F16": 16,
    "BF16": 16, "I32": 32, "U32": 32, "F32": 32, "I64": 64, "U64": 64, "F64": 64,
}  # fmt: skip
_CHUNK = 16 * 1024 * 1024


@dataclass(frozen=True)
class Header:
    """The header of a safetensors file.

    Attributes:
        tensors: Dtype and shape by name.
        offsets: Begin and end (exclusive) in bytes from the start of the file, by name.
        metadata: Strings added by the writer of the file.
    """

    tensors: Mapping[str, TensorRecord]
    offsets: Mapping[str, tuple[int, int]]
    metadata: Mapping[str, str]


def read_header(read: Callable[[int, int], bytes], size: int, name: str, *, empty: bool = False) -> Header:
    """Read a header, and check that it describes each byte of the file exactly once.

    Args:
        read: Returns at most the given number of bytes from a position on.
        size: Size of the whole file in bytes.
        name: The file's name, for messages.
        empty: Accept tensors without values.

    Raises:
        UnsafeFile: The file is not a safetensors file, or a malicious one.
    """
    try:
        length = int.from_bytes(read(0, 8), "little")
        if length > size - 8:
            raise JsonRefused(f"its header should have {length:,} bytes, and the file has {size:,}")
        if length > MAX_HEADER:
            raise JsonRefused(f"its header has {length:,} bytes, and may have {MAX_HEADER:,}")
        return _parse_header(parse(read(8, length), MAX_HEADER, depth=4), 8 + length, size, empty)
    except JsonRefused as reason:
        raise UnsafeFile(f"{name} is not a safetensors file that can be read safely: {reason}") from None


def read_file_header(path: Path) -> Header:
    """Read the header of a file; see `read_header`."""
    with open(path, "rb") as file:
        return read_open_header(file, path.name)


def read_open_header(file: BinaryIO, name: str, *, empty: bool = False) -> Header:
    """Read the header of an open file; see `read_header`."""

    def read(start: int, length: int) -> bytes:
        file.seek(start)
        return file.read(length)

    return read_header(read, os.fstat(file.fileno()).st_size, name, empty=empty)


def bits_of(dtype: str) -> int:
    """Return the bits per value of a dtype.

    Raises:
        UnsafeFile: The dtype is unknown.
    """
    if dtype not in _BITS:
        raise UnsafeFile(f"{shown(dtype)} is not a dtype that a tensor of an adapter can have")
    return _BITS[dtype]


def _parse_header(document: object, start: int, size: int, empty: bool) -> Header:
    if not isinstance(document, dict):
        raise JsonRefused("its header is not an object")
    metadata = _parse_metadata(document.pop("__metadata__", {}))
    if len(document) > MAX_TENSORS:
        raise JsonRefused(f"it has {len(document):,} tensors, and may have {MAX_TENSORS:,}")
    tensors: dict[str, TensorRecord] = {}
    offsets: dict[str, tuple[int, int]] = {}
    for name, entry in document.items():
        if not is_tensor_name(name):
            raise JsonRefused(f"{shown(name)} is not the name of a tensor")
        tensors[name], begin, end = _parse_entry(name, entry)
        offsets[name] = (start + begin, start + end)
    position = start
    for name, (begin, end) in sorted(offsets.items(), key=lambda item: item[1]):
        if begin != position or (end == begin and not empty):
            raise JsonRefused(
                f"the bytes of {shown(name)} are not behind those of the tensor before, or there are none"
            )
        position = end
    if position != size:
        raise JsonRefused(f"its tensors end at byte {position:,}, and the file has {size:,}")
    return Header(tensors, offsets, metadata)


def _parse_entry(name: str, entry: object) -> tuple[TensorRecord, int, int]:
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise JsonRefused(f"{shown(name)} is not described by dtype, shape and data_offsets")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    bits = _BITS.get(dtype) if isinstance(dtype, str) else None
    if bits is None:
        raise JsonRefused(f"{shown(name)} has the dtype {shown(dtype)}")
    if not _are_sizes(shape) or len(shape) > 8 or not _are_sizes(offsets) or len(offsets) != 2:
        raise JsonRefused(f"{shown(name)} has the shape {shown(shape)} and the offsets {shown(offsets)}")
    begin, end = offsets
    if end - begin != prod(shape) * bits // 8:
        raise JsonRefused(f"{shown(name)} of shape {shown(shape)} has {end - begin:,} bytes")
    return TensorRecord(dtype, tuple(shape)), begin, end


def _are_sizes(value: object) -> bool:
    return isinstance(value, list) and all(type(size) is int and size >= 0 for size in value)


def _parse_metadata(value: object) -> dict[str, str]:
    if not isinstance(value, dict) or not all(isinstance(text, str) for text in value.values()):
        raise JsonRefused("its metadata is not text")
    if sum(len(key) + len(text) for key, text in value.items()) > _MAX_METADATA:
        raise JsonRefused(f"its metadata have more than {_MAX_METADATA:,} characters")
    return value


@dataclass(frozen=True)
class Values:
    """What reading all values of an adapter showed.

    Attributes:
        zeros: The names of the tensors that hold only zeros; denormal numbers count as zero, except those of float16.
        problems: What is wrong with tensors that hold NaN, infinity or a magnitude above float16's maximum, by name.
    """

    zeros: frozenset[str] = frozenset()
    problems: Mapping[str, str] = field(default_factory=dict)


def scan_values(path: Path, header: Header) -> Values:
    """Read all values of an adapter's weight file once, in chunks; tensors that are not floating-point are left out.

    Raises:
        InvalidAdapter: The file ends within a tensor.
    """
    zeros, problems = set(), {}
    with open(path, "rb") as file:
        for name, (begin, end) in header.offsets.items():
            kind = _FLOATS.get(header.tensors[name].dtype)
            if kind is None or begin == end:
                continue
            largest = _find_largest(file, begin, end, name, kind)
            if largest > kind.limit:
                problems[name] = _describe_excess(name, kind, largest)
            elif largest < kind.smallest:
                zeros.add(name)
    return Values(frozenset(zeros), problems)


def check_values(path: Path, header: Header, *, double: bool = False) -> set[str]:
    """Read and check all values of an adapter's weight file once, in chunks.

    Args:
        path: The file.
        header: Its header.
        double: Accept float64 besides float32, bfloat16 and float16.

    Returns:
        The names of the tensors that hold only zeros; denormal numbers count as zero, except those of float16.

    Raises:
        InvalidAdapter: A tensor holds NaN, infinity or a magnitude above float16's maximum, or has another dtype.
    """
    for name, record in header.tensors.items():
        reason = describe_dtype(name, record, double=double)
        if reason is not None:
            raise InvalidAdapter(reason)
    found = scan_values(path, header)
    for problem in found.problems.values():
        raise InvalidAdapter(problem)
    return set(found.zeros)


def describe_dtype(name: str, record: TensorRecord, *, double: bool = True) -> str | None:
    """Return why a tensor's dtype cannot be an adapter's; ``None`` if it can be."""
    if (record.dtype in _FLOATS and (double or record.dtype != "F64")) or _is_counter(name, record):
        return None
    return (
        f"{name} has dtype {record.dtype}. Adapters are published in F32, BF16 or F16: convert it, for example with "
        "model.float(), and save it again."
    )


def read_values(path: Path, header: Header, name: str) -> numpy.ndarray:
    """Return the values of a tensor in its shape; bfloat16 is returned as float32."""
    begin, end = header.offsets[name]
    with open(path, "rb") as file:
        file.seek(begin)
        values = _read_floats(file.read(end - begin), header.tensors[name].dtype)
    return values.reshape(header.tensors[name].shape)


def _is_counter(name: str, record: TensorRecord) -> bool:
    """Whether a tensor is the step counter that batch norm in a trained head keeps, the one integer in an adapter."""
    return name.endswith(".num_batches_tracked") and record.dtype == "I64" and record.shape == ()


def _find_largest(file: BinaryIO, begin: int, end: int, name: str, kind: _Float) -> int:
    """Return the bits of the largest magnitude in a tensor; reading stops at one that is not finite."""
    file.seek(begin)
    largest, left = 0, end - begin
    while left and largest < kind.infinity:
        chunk = file.read(min(left, _CHUNK))
        if not chunk:
            raise InvalidAdapter(f"{file.name} ends within {name}")
        left -= len(chunk)
        largest = max(largest, kind.largest(chunk))
    return largest


def _describe_excess(name: str, kind: _Float, largest: int) -> str:
    what = "NaN or infinite values" if largest >= kind.infinity else "values above 65,504, the largest of F16"
    return f"{name} holds {what}: the training has diverged, or the file is damaged."


@dataclass(frozen=True)
class _Float:
    """A floating-point format. Without the sign bit, its bit patterns sort like the magnitudes they represent.

    Attributes:
        bits: numpy's name of the unsigned integer type of that size.
        limit: Bits of 65,504.
        infinity: Bits of infinity; those of NaN are greater.
        smallest: Bits of the smallest magnitude that counts as nonzero.
    """

    bits: str
    limit: int
    infinity: int
    smallest: int

    @property
    def magnitude(self) -> int:
        """All bits but the sign."""
        return (1 << 8 * int(self.bits[-1]) - 1) - 1

    def largest(self, chunk: bytes) -> int:
        """Return the bits of the largest magnitude in a chunk."""
        import numpy

        values = numpy.frombuffer(chunk, self.bits)
        return int((values & self.magnitude).max(initial=0))


#: Values of bfloat16, float32 and float64 below 2**-126 count as zero, as on most processors; float16 denormals do not.
_FLOATS = {
    "F16": _Float("<u2", 0x7BFF, 0x7C00, 1),
    "BF16": _Float("<u2", 0x477F, 0x7F80, 0x0080),
    "F32": _Float("<u4", 0x477FE000, 0x7F800000, 0x00800000),
    "F64": _Float("<u8", 0x40EFFC0000000000, 0x7FF0000000000000, 0x3810000000000000),
}


def _read_floats(chunk: bytes, dtype: str) -> numpy.ndarray:
    import numpy

    if dtype == "BF16":
        # A bfloat16 is the upper half of a float32.
        return (numpy.frombuffer(chunk, "<u2").astype("<u4") << 16).view("<f4")
    return numpy.frombuffer(chunk, {"F16": "<f2", "F64": "<f8"}.get(dtype, "<f4"))

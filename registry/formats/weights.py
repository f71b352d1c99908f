"""Reading safetensors files from strangers: the header before any library parses it, and the values.

The library accepts a million empty tensors, a name given twice and values that are not finite; this module does not.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING

from registry.errors import InvalidAdapter, UnsafeFile
from registry.formats.manifest import MAX_TENSORS, is_tensor_name
from registry.formats.records import TensorRecord
from registry.formats.strict_json import JsonRefused, parse, shown

if TYPE_CHECKING:
    import numpy

__all__ = ["Header", "check_values", "read_file_header", "read_header", "read_values"]

#: Bytes that a header may have; one with 50,000 tensors has about 7 MB.
MAX_HEADER = 8 * 1024 * 1024
_MAX_METADATA = 1024 * 1024
#: Bits of one value, by dtype.
_BITS = {
    "BOOL": 8, "U8": 8, "I8": 8, "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8, "I16": 16, "U16": 16, "F16": 16,
    "BF16": 16, "I32": 32, "U32": 32, "F32": 32, "I64": 64, "U64": 64, "F64": 64,
}  # fmt: skip
#: The product of two values above this is infinite in float32 and bfloat16.
_LARGEST = 1e18
_CHUNK = 16 * 1024 * 1024


@dataclass(frozen=True)
class Header:
    """The header of a safetensors file.

    Attributes:
        tensors: Dtype and shape by name.
        offsets: First byte and the one after the last, from the beginning of the file, by name.
        metadata: Texts that whoever wrote the file added.
    """

    tensors: Mapping[str, TensorRecord]
    offsets: Mapping[str, tuple[int, int]]
    metadata: Mapping[str, str]


def read_header(read: Callable[[int, int], bytes], size: int, name: str) -> Header:
    """Read a header, and check that it describes each byte of the file once.

    Args:
        read: Returns the bytes from a position on, at most as many as asked for.
        size: Of the whole file, in bytes.
        name: The file's name, for messages.

    Raises:
        UnsafeFile: The file is no safetensors file, or one that was made to do harm.
    """
    try:
        length = int.from_bytes(read(0, 8), "little")
        if size < 8 or length > size - 8:
            raise JsonRefused(f"its header should have {length:,} bytes, and the file has {size:,}")
        if length > MAX_HEADER:
            raise JsonRefused(f"its header has {length:,} bytes, and may have {MAX_HEADER:,}")
        return _header(parse(read(8, length), MAX_HEADER, depth=4), 8 + length, size)
    except JsonRefused as reason:
        raise UnsafeFile(f"{name} is no safetensors file that can be read safely: {reason}") from None


def read_file_header(path: Path) -> Header:
    """Read the header of a file; see `read_header`."""
    with open(path, "rb") as file:

        def read(start: int, length: int) -> bytes:
            file.seek(start)
            return file.read(length)

        return read_header(read, os.fstat(file.fileno()).st_size, path.name)


def _header(document: object, start: int, size: int) -> Header:
    if not isinstance(document, dict):
        raise JsonRefused("its header is no object")
    metadata = _metadata(document.pop("__metadata__", {}))
    if len(document) > MAX_TENSORS:
        raise JsonRefused(f"it has {len(document):,} tensors, and may have {MAX_TENSORS:,}")
    tensors: dict[str, TensorRecord] = {}
    offsets: dict[str, tuple[int, int]] = {}
    for name, entry in document.items():
        if not is_tensor_name(name):
            raise JsonRefused(f"{shown(name)} is no name of a tensor")
        tensors[name], begin, end = _entry(name, entry)
        offsets[name] = (start + begin, start + end)
    position = start
    for name, (begin, end) in sorted(offsets.items(), key=lambda item: item[1]):
        if begin != position or end <= begin:
            raise JsonRefused(
                f"the bytes of {shown(name)} are not behind those of the tensor before, or there are none"
            )
        position = end
    if position != size:
        raise JsonRefused(f"its tensors end at byte {position:,}, and the file has {size:,}")
    return Header(tensors, offsets, metadata)


def _entry(name: str, entry: object) -> tuple[TensorRecord, int, int]:
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise JsonRefused(f"{shown(name)} is not described by dtype, shape and data_offsets")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    bits = _BITS.get(dtype) if isinstance(dtype, str) else None
    if bits is None:
        raise JsonRefused(f"{shown(name)} has the dtype {shown(dtype)}")
    if not _sizes(shape) or len(shape) > 8 or not _sizes(offsets) or len(offsets) != 2:
        raise JsonRefused(f"{shown(name)} has the shape {shown(shape)} and the offsets {shown(offsets)}")
    begin, end = offsets
    if end - begin != prod(shape) * bits // 8:
        raise JsonRefused(f"{shown(name)} of shape {shown(shape)} has {end - begin:,} bytes")
    return TensorRecord(dtype, tuple(shape)), begin, end


def _sizes(value: object) -> bool:
    return isinstance(value, list) and all(type(size) is int and size >= 0 for size in value)


def _metadata(value: object) -> dict[str, str]:
    if not isinstance(value, dict) or not all(isinstance(text, str) for text in value.values()):
        raise JsonRefused("its metadata are not texts")
    if sum(len(key) + len(text) for key, text in value.items()) > _MAX_METADATA:
        raise JsonRefused(f"its metadata have more than {_MAX_METADATA:,} characters")
    return value


def check_values(path: Path, header: Header) -> set[str]:
    """Read all values of a file of adapter weights once.

    Returns:
        The names of the tensors that hold nothing but zeros; in float32 and bfloat16 denormal numbers count as zero.

    Raises:
        InvalidAdapter: A tensor holds NaN, an infinity or values above 1e18, or its dtype is not float32, bfloat16 or
            float16.
    """
    zeros = set()
    with open(path, "rb") as file:
        for name, (begin, end) in header.offsets.items():
            dtype = header.tensors[name].dtype
            if dtype not in ("F32", "BF16", "F16"):
                raise InvalidAdapter(
                    f"{name} has dtype {dtype}. Adapters are published in F32, BF16 or F16: convert it, for example "
                    "with model.float(), and save it again."
                )
            file.seek(begin)
            zero, left = True, end - begin
            while left:
                chunk = file.read(min(left, _CHUNK))
                if not chunk:
                    raise InvalidAdapter(f"{path.name} ends within {name}")
                left -= len(chunk)
                zero &= _check_chunk(chunk, dtype, name)
            if zero:
                zeros.add(name)
    return zeros


def read_values(path: Path, header: Header, name: str) -> numpy.ndarray:
    """The values of a tensor in float32 or float16, in its shape."""
    begin, end = header.offsets[name]
    with open(path, "rb") as file:
        file.seek(begin)
        values = _floats(file.read(end - begin), header.tensors[name].dtype)
    return values.reshape(header.tensors[name].shape)


def _check_chunk(chunk: bytes, dtype: str, name: str) -> bool:
    """Whether all values are zero."""
    values = _floats(chunk, dtype)
    # The comparison is false for NaN, too.
    # As a Python number: numpy would compare in float16, where 1e18 is infinite.
    largest = float(abs(values).max(initial=0.0))
    if not largest <= _LARGEST:
        kind = "values above 1e18" if largest > _LARGEST and largest != float("inf") else "NaN or infinite values"
        raise InvalidAdapter(f"{name} holds {kind}: the training has diverged, or the file is damaged.")
    return largest < (2.0**-126 if dtype != "F16" else 2.0**-24)


def _floats(chunk: bytes, dtype: str) -> numpy.ndarray:
    import numpy

    if dtype == "BF16":
        # A bfloat16 is the first half of a float32.
        return (numpy.frombuffer(chunk, "<u2").astype("<u4") << 16).view("<f4")
    return numpy.frombuffer(chunk, "<f2" if dtype == "F16" else "<f4")

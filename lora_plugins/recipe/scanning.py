"""Reject data files that would make the loaders crash or hang."""

from __future__ import annotations

import codecs
import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from lora_plugins.errors import DataError
from lora_plugins.text import one_line

__all__ = ["check_rows"]


_CHUNK = 1 << 20
#: Most nested brackets; the JSON reader is recursive.
_DEEPEST = 200
_MOST_COLUMNS = 10_000

_ESCAPED = re.compile(rb"\\.", re.DOTALL)


def check_rows(path: Path) -> None:
    """Reject a data file that is empty, not text, nested too deeply or too wide.

    Args:
        path: A regular file, not a pipe, of JSON, JSON lines, CSV or Parquet.

    Raises:
        DataError: The file is rejected; the message names it and, for text, the line.
    """
    try:
        if not path.stat().st_size:
            raise DataError(f"The data set {path} cannot be read: the file is empty")
        if path.suffix == ".parquet":
            _check_columns(path, 1, pq.ParquetFile(path).metadata.num_columns)
        else:
            _check_text(path)
    except (OSError, ValueError, pa.ArrowException) as error:
        if isinstance(error, DataError):
            raise
        raise DataError(f"The data set {path} cannot be read: {one_line(error)}") from error


def _check_columns(path: Path, line: int, count: int) -> None:
    if count > _MOST_COLUMNS:
        raise DataError(f"{path}, line {line}: the row has {count:,} columns, and {_MOST_COLUMNS:,} are read at most")


def _check_text(path: Path) -> None:
    decoder = codecs.getincrementaldecoder("utf-8")()
    scan = _Nesting(path) if path.suffix in (".json", ".jsonl") else None
    line, blank = 1, True
    for chunk in _read_chunks(path):
        zero = chunk.find(b"\0")
        if zero >= 0:
            raise DataError(f"{path}, line {line + chunk.count(10, 0, zero)}: a NUL byte is not text")
        try:
            decoder.decode(chunk)
        except UnicodeDecodeError as error:
            at = line + error.object.count(b"\n", 0, error.start)
            raise DataError(f"{path}, line {at} is not UTF-8: {error.reason}") from error
        if scan is not None:
            scan.add(chunk, line)
        elif line == 1 and blank:
            _check_columns(path, 1, chunk.partition(b"\n")[0].count(b",") + 1)
        blank = blank and not chunk.strip()
        line += chunk.count(b"\n")
    if blank:
        raise DataError(f"The data set {path} cannot be read: the file has no rows")


def _read_chunks(path: Path) -> Iterator[bytes]:
    with open(path, "rb") as file:
        while chunk := file.read(_CHUNK):
            yield chunk


class _Nesting:
    """Counts nested brackets, and the names in the first row, chunk by chunk, outside quoted text."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.depth = 0
        self.quoted = 0
        self.escaped = b""
        self.names: int | None = 0

    def add(self, chunk: bytes, line: int) -> None:
        """Scan the next chunk, which begins in ``line``."""
        chunk = self.escaped + chunk
        ends = len(chunk) - len(chunk.rstrip(b"\\"))
        self.escaped = b"\\" if ends % 2 else b""
        text = np.frombuffer(_ESCAPED.sub(b"__", chunk[: len(chunk) - ends % 2]), dtype=np.uint8)
        quotes = (np.cumsum(text == ord('"')) + self.quoted) % 2
        plain = quotes == 0
        opens = ((text == ord("[")) | (text == ord("{"))) & plain
        closes = ((text == ord("]")) | (text == ord("}"))) & plain
        depth = np.cumsum(opens.astype(np.int64) - closes) + self.depth
        deep = np.flatnonzero(depth > _DEEPEST)
        if len(deep):
            at = line + int((text[: deep[0]] == ord("\n")).sum())
            raise DataError(f"{self.path}, line {at}: the values are nested more than {_DEEPEST} deep")
        self._count_names(plain & (text == ord(":")), closes & (text == ord("}")), line)
        if len(text):
            self.depth, self.quoted = int(depth[-1]), int(quotes[-1])

    def _count_names(self, colons: np.ndarray, ends: np.ndarray, line: int) -> None:
        if self.names is None:
            return
        end = np.flatnonzero(ends)
        self.names += int(colons[: end[0]].sum() if len(end) else colons.sum())
        _check_columns(self.path, line, self.names)
        if len(end):
            self.names = None

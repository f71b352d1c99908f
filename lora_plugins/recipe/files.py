"""Read small text files; reject pipes, and report the line of an error."""

from __future__ import annotations

import json
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

__all__ = ["check_regular", "read_json", "read_text"]


def check_regular(path: Path) -> None:
    """Reject anything but a regular file: opening a pipe would block until somebody writes to it.

    Raises:
        OSError: The file does not exist.
        ValueError: It is a folder, a pipe, a socket or a device.
    """
    kind = path.stat().st_mode
    if not stat.S_ISREG(kind):
        names = {stat.S_IFDIR: "a folder", stat.S_IFIFO: "a pipe", stat.S_IFSOCK: "a socket"}
        raise ValueError(f"it is {names.get(stat.S_IFMT(kind), 'a device')}, not a file")


def read_text(path: Path, most_bytes: int) -> str:
    """Read a file of UTF-8 text.

    Raises:
        OSError: It cannot be opened.
        ValueError: It is not a regular file, larger than ``most_bytes``, or not UTF-8; the message has the line.
    """
    check_regular(path)
    size = path.stat().st_size
    if size > most_bytes:
        raise ValueError(f"it has {size:,} bytes, more than the {most_bytes:,} that are read")
    content = path.read_bytes()
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise ValueError(f"line {line} is not UTF-8: {error.reason}") from error


def read_json(path: Path, error: Callable[[str], Exception], most_bytes: int = 64 << 20) -> dict[str, Any]:
    """Read a JSON object.

    Args:
        path: The file.
        error: Makes the exception that is raised, from the reason.
        most_bytes: Larger files are refused.

    Raises:
        FileNotFoundError: The file does not exist.
    """
    try:
        content = json.loads(read_text(path, most_bytes))
    except FileNotFoundError:
        raise
    except RecursionError:
        raise error("it is nested too deeply") from None
    except (OSError, ValueError) as reason:
        raise error(str(reason)) from reason
    if not isinstance(content, dict):
        raise error(f"it must hold a JSON object, not a {type(content).__name__}")
    return content

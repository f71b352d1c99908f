"""A lock file in a folder, for processes on several hosts.

The lock is a small file that names its holder. Creating it is atomic even on file systems that do not share ``flock``
between hosts. A dead holder is detected by its process id on this host, and by the age of the file on other hosts.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from registry.disk.files import create_exclusively, read_small, temporary_file
from registry.disk.owners import host, is_alive, started, sweep
from registry.text import visible

__all__ = ["LockTimeout", "clear", "exclude", "folder_lock"]

#: Seconds after which a lock of another host is stale. A holder renames a few files, which takes milliseconds.
LEASE = 60.0
_NAME = "lock"


class LockTimeout(Exception):
    """The lock was not released in time; the message names its holder."""


@contextmanager
def folder_lock(folder: Path, timeout: float = 30.0, *, name: str = _NAME) -> Iterator[None]:
    """Hold a lock on ``folder``; acquiring it removes what dead processes left there.

    Args:
        folder: The folder of the lock file.
        timeout: Seconds to wait.
        name: Name of the lock file.

    Raises:
        LockTimeout: The lock was not released in time.
        PlantedLink: The lock file is not a regular file.
    """
    lock, mine = folder / name, _describe_owner()
    end, delay = time.monotonic() + timeout, 0.002
    while not create_exclusively(lock, mine):
        if _is_stale(lock):
            _break(lock)
            continue
        if time.monotonic() > end:
            raise LockTimeout(
                f"{lock} is held by {visible(_read_owner(lock), 200) or 'an unknown process'} for more than "
                f"{timeout:.0f} seconds. If nobody is working there, delete that file"
            )
        time.sleep(delay)
        delay = min(delay * 1.5, 0.05)
    try:
        sweep(folder)
        yield
    finally:
        # A process that judged this lock stale has put its own there.
        if _read_content(lock) == mine:
            with contextlib.suppress(FileNotFoundError):
                lock.unlink()


def clear(folder: Path, *, name: str = _NAME) -> None:
    """Remove what dead processes left in a folder, a lock of theirs included; a read-only folder is left as it is."""
    with contextlib.suppress(OSError):
        if _is_stale(folder / name):
            _break(folder / name)
        sweep(folder)


def _describe_owner() -> bytes:
    owner = {"host": host(), "pid": os.getpid(), "started": started(os.getpid()), "nonce": secrets.token_hex(8)}
    return json.dumps(owner, sort_keys=True).encode()


def _is_stale(lock: Path) -> bool:
    content = _read_content(lock)
    if content is None:
        return False
    try:
        owner = json.loads(content)
        where, pid, began = str(owner["host"]), int(owner["pid"]), owner["started"]
    except (ValueError, KeyError, TypeError, OverflowError, RecursionError):
        return _measure_age(lock) > LEASE  # names no holder
    if where != host():
        return _measure_age(lock) > LEASE
    # A reused process id has another start time.
    return not is_alive(pid) or started(pid) != began


def _break(lock: Path) -> None:
    """Remove a stale lock, but not a fresh one that another process has just put in its place."""
    with exclude(lock.with_name(f"{lock.name}.guard")):
        if _is_stale(lock):
            with contextlib.suppress(FileNotFoundError):
                lock.unlink()


@contextmanager
def exclude(guard: Path) -> Iterator[None]:
    """Exclude other processes of this host where the system supports it; the kernel releases it when a process dies.

    Raises:
        OSError: The guard file cannot be created.
    """
    try:
        import fcntl
    except ImportError:
        yield
        return
    descriptor = os.open(guard, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, 0o666)
    try:
        with contextlib.suppress(OSError):  # file systems without flock
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _read_content(lock: Path) -> bytes | None:
    try:
        return read_small(lock)
    except FileNotFoundError:
        return None


def _read_owner(lock: Path) -> str:
    return (_read_content(lock) or b"").decode("utf-8", "replace")


def _measure_age(lock: Path) -> float:
    """Return the age of the lock in seconds by the file system's clock, which other hosts share.

    The difference is absolute, so that a lock dated in the future expires too.
    """
    try:
        made = lock.lstat().st_mtime
    except FileNotFoundError:
        return 0.0
    probe = temporary_file(lock.parent, b"")
    try:
        return abs(probe.stat().st_mtime - made)
    finally:
        probe.unlink()

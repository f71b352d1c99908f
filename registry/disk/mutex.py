"""A lock file in a folder, for processes of several hosts.

The lock is a small file that says who holds it. Creating it is atomic even where ``flock`` is not passed on to other
hosts. An owner that died is recognised: on this host because its process is gone, elsewhere by the age of the file.
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

__all__ = ["LockTimeout", "exclude", "folder_lock"]

#: Who holds the lock renames a few files, which takes milliseconds; after this many seconds another host's is dead.
LEASE = 60.0
_NAME = "lock"


class LockTimeout(Exception):
    """Somebody held the lock for too long; the message says who."""


@contextmanager
def folder_lock(folder: Path, timeout: float = 30.0, *, name: str = _NAME) -> Iterator[None]:
    """Hold a lock of ``folder``; who gets it removes what dead processes left there.

    Args:
        folder: Where the file of the lock is.
        timeout: Seconds to wait.
        name: Of that file.

    Raises:
        LockTimeout: It was not free in time.
        PlantedLink: Something else than a file has its name.
    """
    lock, mine = folder / name, _description()
    end, delay = time.monotonic() + timeout, 0.002
    while not create_exclusively(lock, mine):
        if _stale(lock):
            _break(lock)
            continue
        if time.monotonic() > end:
            raise LockTimeout(
                f"{lock} is held by {visible(_owner(lock), 200) or 'an unknown process'} for more than {timeout:.0f} "
                "seconds. If nobody is working there, delete that file"
            )
        time.sleep(delay)
        delay = min(delay * 1.5, 0.05)
    try:
        sweep(folder)
        yield
    finally:
        # Whoever took it for stale has put a lock of its own there.
        if _content(lock) == mine:
            with contextlib.suppress(FileNotFoundError):
                lock.unlink()


def _description() -> bytes:
    owner = {"host": host(), "pid": os.getpid(), "started": started(os.getpid()), "nonce": secrets.token_hex(8)}
    return json.dumps(owner, sort_keys=True).encode()


def _stale(lock: Path) -> bool:
    content = _content(lock)
    if content is None:
        return False
    try:
        owner = json.loads(content)
        where, pid, began = str(owner["host"]), int(owner["pid"]), owner["started"]
    except (ValueError, KeyError, TypeError, OverflowError, RecursionError):
        return _age(lock) > LEASE  # nothing that says who
    if where != host():
        return _age(lock) > LEASE
    # A process id that has been given to another process has another time of start.
    return not is_alive(pid) or started(pid) != began


def _break(lock: Path) -> None:
    """Remove a stale lock, and not the fresh one that somebody else puts into its place at this moment."""
    with exclude(lock.with_name(f"{lock.name}.guard")):
        if _stale(lock):
            with contextlib.suppress(FileNotFoundError):
                lock.unlink()


@contextmanager
def exclude(guard: Path) -> Iterator[None]:
    """Exclude other processes of this host where the system can; the kernel lets go when a process dies.

    Raises:
        OSError: The guard's file cannot be made.
    """
    try:
        import fcntl
    except ImportError:
        yield
        return
    descriptor = os.open(guard, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, 0o666)
    try:
        with contextlib.suppress(OSError):  # file systems without it
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _content(lock: Path) -> bytes | None:
    try:
        return read_small(lock)
    except FileNotFoundError:
        return None


def _owner(lock: Path) -> str:
    return (_content(lock) or b"").decode("utf-8", "replace")


def _age(lock: Path) -> float:
    """Return seconds between now and the lock's time, by the clock of the file system: another host's may differ.

    A time that lies ahead counts as one that has passed, or a lock from tomorrow would be held until then.
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

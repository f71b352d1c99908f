"""A lock in a folder, for processes of this host and of others that share the file system.

The lock is a small file that says who holds it. Creating it is atomic even where ``flock`` is not passed on to other
hosts. An owner that died is recognised: on this host because its process is gone, elsewhere by the age of the file.
"""

from __future__ import annotations

import contextlib
import json
import os
import platform
import secrets
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from registry.disk.files import create_exclusively, read_small, temporary_file

__all__ = ["LockTimeout", "folder_lock"]

#: Who holds the lock renames a few files, which takes milliseconds; after this many seconds another host's is dead.
LEASE = 60.0
_NAME = "lock"


class LockTimeout(Exception):
    """Somebody held the lock for too long; the message says who."""


@contextmanager
def folder_lock(folder: Path, timeout: float = 30.0) -> Iterator[None]:
    """Hold the lock of ``folder``.

    Raises:
        LockTimeout: It wasn't free in time.
    """
    lock, mine = folder / _NAME, _description()
    end, delay = time.monotonic() + timeout, 0.002
    while not create_exclusively(lock, mine):
        if _stale(lock):
            _break(lock)
            continue
        if time.monotonic() > end:
            raise LockTimeout(f"{lock} is held by {_owner(lock) or 'nobody known'} for more than {timeout:.0f} seconds")
        time.sleep(delay)
        delay = min(delay * 1.5, 0.05)
    try:
        yield
    finally:
        # Whoever took it for stale has put a lock of its own there.
        if _content(lock) == mine:
            with contextlib.suppress(FileNotFoundError):
                lock.unlink()


def _description() -> bytes:
    owner = {"host": _host(), "pid": os.getpid(), "started": _started(os.getpid()), "nonce": secrets.token_hex(8)}
    return json.dumps(owner, sort_keys=True).encode()


def _stale(lock: Path) -> bool:
    content = _content(lock)
    if content is None:
        return False
    try:
        owner = json.loads(content)
        host, pid, started = str(owner["host"]), int(owner["pid"]), owner["started"]
    except (ValueError, KeyError, TypeError):
        return _age(lock) > LEASE  # nothing that says who
    if host != _host():
        return _age(lock) > LEASE
    # A process id that has been given to another process has another time of start.
    return not _alive(pid) or _started(pid) != started


def _break(lock: Path) -> None:
    """Remove a stale lock, and not the fresh one that somebody else puts into its place at this moment."""
    with _alone(lock.with_name("lock.guard")):
        if _stale(lock):
            with contextlib.suppress(FileNotFoundError):
                lock.unlink()


@contextmanager
def _alone(guard: Path) -> Iterator[None]:
    """Exclude other processes of this host where the system can; the kernel lets go when a process dies."""
    try:
        import fcntl
    except ImportError:
        yield
        return
    descriptor = os.open(guard, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)
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
    """Seconds since the lock was made, by the clock of the file system: that of another host may differ from ours."""
    try:
        made = lock.stat().st_mtime
    except FileNotFoundError:
        return 0.0
    probe = temporary_file(lock.parent, b"")
    try:
        return probe.stat().st_mtime - made
    finally:
        probe.unlink()


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:
        pass  # it belongs to somebody else
    return True


def _host() -> str:
    """This machine since it was started; process ids mean something only within one such."""
    parts = [platform.node()]
    with contextlib.suppress(OSError):
        parts.append(Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip())
        parts.append(os.readlink("/proc/self/ns/pid"))
    return " ".join(parts)


def _started(pid: int) -> str:
    try:
        stat = Path(f"/proc/{pid}/stat").read_bytes()
    except OSError:
        return ""
    # The name, in brackets, may hold spaces; the 22nd field counts from the one after it.
    return stat.rpartition(b")")[2].split()[19].decode("ascii")

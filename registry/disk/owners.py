"""Temporary names that identify their owner, and cleanup after dead ones.

A killed process cannot clean up. Its temporary files carry its host, process id and start time in their names, so the
next call in the same folder recognizes them as abandoned and removes them.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import os
import platform
import re
import secrets
import shutil
import stat
import time
from collections.abc import Iterator
from pathlib import Path

__all__ = ["delete", "find_leftovers", "host", "is_alive", "is_old", "is_temporary", "new_name", "started", "sweep"]

#: Seconds after which temporary files of another host or an earlier release of this package count as abandoned.
_ABANDONED = 24 * 3600.0
_PREFIXES = (".tmp-", "tmp-", "lora-plugins-")
_NAME = re.compile(
    r"(?:\.tmp|tmp|lora-plugins)-(?P<host>[0-9a-f]{8})-(?P<pid>\d{1,10})-(?P<started>\d{0,20})-[0-9a-f]{16}"
)
#: Temporary names of earlier releases.
_FORMER = re.compile(r"\.?tmp-[0-9a-f]{16}")


def new_name(prefix: str = ".tmp-") -> str:
    """Return a name for a temporary file or folder of this process."""
    pid = os.getpid()
    return f"{prefix}{_hash_host()}-{pid}-{started(pid)}-{secrets.token_hex(8)}"


def is_temporary(name: str) -> bool:
    """Whether a name is one that `new_name` makes."""
    return _NAME.fullmatch(name) is not None


def find_leftovers(folder: Path) -> list[Path]:
    """Return the temporary files and folders that dead processes left in a folder, without its subfolders."""
    try:
        names = [name for name in os.listdir(folder) if name.startswith(_PREFIXES)]
    except (FileNotFoundError, NotADirectoryError):
        return []
    return sorted(folder / name for name in names if _is_abandoned(folder / name))


def sweep(folder: Path) -> None:
    """Remove the temporary files and folders that dead processes left in a folder."""
    for path in find_leftovers(folder):
        with contextlib.suppress(OSError):
            delete(path)


def delete(path: Path) -> None:
    """Remove a file, a link or a folder, read-only folders included; links are not followed."""
    if path.is_symlink() or not path.is_dir():
        path.unlink(missing_ok=True)
        return
    with contextlib.suppress(OSError):
        os.chmod(path, stat.S_IRWXU)
    shutil.rmtree(path, ignore_errors=True)


def _is_abandoned(path: Path) -> bool:
    match = _NAME.fullmatch(path.name)
    if match is None or match["host"] != _hash_host():
        return (match or _FORMER.fullmatch(path.name)) is not None and is_old(path)
    pid = int(match["pid"])
    return not is_alive(pid) or started(pid) != match["started"]


def is_old(path: Path) -> bool:
    """Whether a path's modification time is more than a day in the past or the future."""
    try:
        return abs(time.time() - os.lstat(path).st_mtime) > _ABANDONED
    except FileNotFoundError:
        return False


def is_alive(pid: int) -> bool:
    """Whether a process of this host is alive; invalid ids count as dead."""
    try:
        if pid <= 0:
            return False  # kill() takes these for process groups
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except OSError:
        pass  # the process belongs to another user
    return True


def started(pid: int) -> str:
    """Return the start time of a process in clock ticks of the system; empty where it is not known."""
    with contextlib.suppress(OSError, IndexError, OverflowError):
        content = Path(f"/proc/{pid}/stat").read_bytes()
        # The second field, the name in parentheses, may hold spaces; the start time is the 22nd field.
        return content.rpartition(b")")[2].split()[19].decode("ascii")
    return ""


def host() -> str:
    """Return an id of this machine's boot and process namespace, within which process ids are comparable."""
    return " ".join(_read_host_parts())


def _read_host_parts() -> Iterator[str]:
    yield platform.node()
    with contextlib.suppress(OSError):
        yield Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        yield os.readlink("/proc/self/ns/pid")


@functools.cache
def _hash_host() -> str:
    return hashlib.sha256(host().encode()).hexdigest()[:8]

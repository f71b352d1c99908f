"""Temporary names that say who made them, and leftovers of the dead.

A killed process cannot tidy up. What it was writing carries its host, process id and start time in its name, so the
next call in the same folder sees that nobody is working on it any more, and removes it.
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

__all__ = ["delete", "find_leftovers", "host", "is_alive", "is_old", "new_name", "started", "sweep"]

#: Seconds after which what another host was writing, or an earlier release of this package, is taken for abandoned.
_ABANDONED = 24 * 3600.0
_PREFIXES = (".tmp-", "tmp-", "lora-plugins-")
_NAME = re.compile(
    r"(?:\.tmp|tmp|lora-plugins)-(?P<host>[0-9a-f]{8})-(?P<pid>\d{1,10})-(?P<started>\d{0,20})-[0-9a-f]{16}"
)
#: Names that earlier releases gave.
_FORMER = re.compile(r"\.?tmp-[0-9a-f]{16}")


def new_name(prefix: str = ".tmp-") -> str:
    """Return a name for something temporary of this process."""
    pid = os.getpid()
    return f"{prefix}{_short_host()}-{pid}-{started(pid)}-{secrets.token_hex(8)}"


def find_leftovers(folder: Path) -> list[Path]:
    """Find what dead processes were writing in a folder; its subfolders are not looked at."""
    try:
        names = [name for name in os.listdir(folder) if name.startswith(_PREFIXES)]
    except (FileNotFoundError, NotADirectoryError):
        return []
    return sorted(folder / name for name in names if _is_abandoned(folder / name))


def sweep(folder: Path) -> None:
    """Remove what dead processes were writing in a folder."""
    for path in find_leftovers(folder):
        with contextlib.suppress(OSError):
            delete(path)


def delete(path: Path) -> None:
    """Remove a folder that may be read-only, or a file or link in its place; a link is not followed."""
    if path.is_symlink() or not path.is_dir():
        path.unlink(missing_ok=True)
        return
    with contextlib.suppress(OSError):
        os.chmod(path, stat.S_IRWXU)
    shutil.rmtree(path, ignore_errors=True)


def _is_abandoned(path: Path) -> bool:
    match = _NAME.fullmatch(path.name)
    if match is None or match["host"] != _short_host():
        return (match or _FORMER.fullmatch(path.name)) is not None and is_old(path)
    pid = int(match["pid"])
    return not is_alive(pid) or started(pid) != match["started"]


def is_old(path: Path) -> bool:
    """Whether something was changed more than a day ago, or has a time that far ahead."""
    try:
        return abs(time.time() - os.lstat(path).st_mtime) > _ABANDONED
    except FileNotFoundError:
        return False


def is_alive(pid: int) -> bool:
    """Whether a process of this host lives. Ids that no process can have are dead."""
    try:
        if pid <= 0:
            return False  # to kill(), groups of processes
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except OSError:
        pass  # it belongs to somebody else
    return True


def started(pid: int) -> str:
    """When a process was started, in a unit of the system; empty where that is not known."""
    with contextlib.suppress(OSError, IndexError, OverflowError):
        content = Path(f"/proc/{pid}/stat").read_bytes()
        # The name, in brackets, may hold spaces; the 22nd field counts from the one after it.
        return content.rpartition(b")")[2].split()[19].decode("ascii")
    return ""


def host() -> str:
    """Return this machine since it was started; process ids mean something only within one such."""
    return " ".join(_host_parts())


def _host_parts() -> Iterator[str]:
    yield platform.node()
    with contextlib.suppress(OSError):
        yield Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        yield os.readlink("/proc/self/ns/pid")


@functools.cache
def _short_host() -> str:
    return hashlib.sha256(host().encode()).hexdigest()[:8]

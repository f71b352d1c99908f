"""Write files atomically and read them without following links."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

from registry.disk.owners import new_name

__all__ = [
    "PlantedLink",
    "create_exclusively",
    "entries",
    "fsync_folder",
    "inside",
    "open_regular",
    "read_small",
    "replace_file",
    "temporary_file",
    "write_file",
]

_NO_FOLLOW = getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_BINARY", 0)
#: Files of the registry's own (refs, locks, descriptions) are smaller.
_SMALL = 1_000_000


class PlantedLink(OSError):
    """Something in a registry's folder is a symbolic link or no regular file, where the registry made neither."""


def inside(root: Path, path: Path) -> Path:
    """``path``, which lies below ``root``, if no part of it below ``root`` is a symbolic link.

    Raises:
        PlantedLink: One is.
    """
    current = root
    for part in path.relative_to(root).parts:
        current = current / part
        try:
            mode = os.lstat(current).st_mode
        except FileNotFoundError:
            break
        if stat.S_ISLNK(mode):
            raise PlantedLink(f"{current} is a symbolic link")
    return path


def open_regular(path: Path) -> int:
    """A file descriptor for reading a regular file.

    Raises:
        PlantedLink: It is something else.
        FileNotFoundError: There is nothing.
    """
    try:
        # Not blocking, because opening a FIFO would wait for its writer.
        descriptor = os.open(path, os.O_RDONLY | _NO_FOLLOW | getattr(os, "O_NONBLOCK", 0))
    except FileNotFoundError:
        raise
    except OSError as error:
        if path.is_symlink():
            raise PlantedLink(f"{path} is a symbolic link") from error
        raise
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise PlantedLink(f"{path} is not a regular file")
    return descriptor


def read_small(path: Path, limit: int = _SMALL) -> bytes:
    """The first ``limit`` bytes of a regular file: all of it, for the registry's own."""
    with os.fdopen(open_regular(path), "rb") as file:
        return file.read(limit)


def entries(folder: Path) -> Iterator[tuple[str, int]]:
    """The regular files below a folder with their sizes, by relative path with slashes.

    Raises:
        PlantedLink: There is something else than files and folders.
    """
    for parent, folders, files in os.walk(folder, followlinks=False):
        for name in [*folders, *files]:
            path = Path(parent, name)
            status = os.lstat(path)
            if name in folders and stat.S_ISDIR(status.st_mode):
                continue
            if not stat.S_ISREG(status.st_mode):
                raise PlantedLink(f"{path} is not a regular file")
            yield PurePosixPath(path.relative_to(folder)).as_posix(), status.st_size


def write_file(path: Path, content: bytes) -> None:
    """Write a new file, and wait until it is on disk."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | _NO_FOLLOW, 0o666)
    with os.fdopen(descriptor, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def temporary_file(folder: Path, content: bytes) -> Path:
    """Write a new file in ``folder`` under a name that nobody looks for; nothing is left of it when that fails."""
    path = folder / new_name("tmp-")
    try:
        write_file(path, content)
    except OSError:
        path.unlink(missing_ok=True)
        raise
    return path


def create_exclusively(path: Path, content: bytes) -> bool:
    """Create a file with all of its content at once; whether it was created, which it isn't when it exists."""
    temporary = temporary_file(path.parent, content)
    try:
        os.link(temporary, path, follow_symlinks=False)
    except FileExistsError:
        return False
    except (OSError, NotImplementedError):
        return _create_without_links(path, content)  # exFAT, some network file systems
    finally:
        temporary.unlink()
    fsync_folder(path.parent)
    return True


def _create_without_links(path: Path, content: bytes) -> bool:
    # The content comes a moment after the name. Readers take an empty file for one that isn't there yet.
    try:
        write_file(path, content)
    except FileExistsError:
        return False
    fsync_folder(path.parent)
    return True


def replace_file(path: Path, content: bytes) -> None:
    """Let a file have other content; whoever reads it finds the old or the new one."""
    temporary = temporary_file(path.parent, content)
    try:
        os.replace(temporary, path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise
    fsync_folder(path.parent)


def fsync_folder(folder: Path) -> None:
    """Wait until the names in a folder are on disk."""
    if os.name == "nt":
        return  # folders can't be opened there
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)

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
#: Bytes; the registry's own small files (refs, locks, descriptions) stay below.
_SMALL = 1_000_000


class PlantedLink(OSError):
    """A registry's folder contains a symbolic link or a special file; the registry creates neither."""


def inside(root: Path, path: Path) -> Path:
    """Return ``path`` after checking that none of its parts below ``root`` is a symbolic link.

    Raises:
        PlantedLink: One is.
    """
    # As a text: making a path of each part takes longer than looking at it.
    current = os.fspath(root)
    for part in path.relative_to(root).parts:
        current = os.path.join(current, part)
        try:
            mode = os.lstat(current).st_mode
        except FileNotFoundError:
            break
        if stat.S_ISLNK(mode):
            raise PlantedLink(f"{current} is a symbolic link")
    return path


def open_regular(path: Path) -> int:
    """Return a file descriptor for reading a regular file.

    Raises:
        PlantedLink: It is not a regular file.
        FileNotFoundError: It does not exist.
    """
    try:
        # Non-blocking, because opening a FIFO would wait for its writer.
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
    """Return at most the first ``limit`` bytes of a regular file."""
    with os.fdopen(open_regular(path), "rb") as file:
        return file.read(limit)


def entries(folder: Path) -> Iterator[tuple[str, int]]:
    """Yield the files below a folder: relative path with slashes, and size in bytes.

    Raises:
        PlantedLink: It contains something other than regular files and folders.
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


def write_file(path: Path, content: bytes, *, durable: bool = True) -> None:
    """Write a new file, and wait until it is on disk unless it need not be ``durable``."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | _NO_FOLLOW, 0o666)
    with os.fdopen(descriptor, "wb") as file:
        file.write(content)
        if durable:
            file.flush()
            os.fsync(file.fileno())


def temporary_file(folder: Path, content: bytes, *, durable: bool = True) -> Path:
    """Write a new file in ``folder`` under a temporary name; a failed write leaves nothing behind."""
    path = folder / new_name("tmp-")
    try:
        write_file(path, content, durable=durable)
    except OSError:
        path.unlink(missing_ok=True)
        raise
    return path


def create_exclusively(path: Path, content: bytes) -> bool:
    """Create a file with all of its content atomically; return ``False`` if it exists already."""
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
    # The name appears before the content. Readers treat an empty file as missing.
    try:
        write_file(path, content)
    except FileExistsError:
        return False
    fsync_folder(path.parent)
    return True


def replace_file(path: Path, content: bytes, *, durable: bool = True) -> None:
    """Replace a file's content atomically: readers see the old or the new content.

    Args:
        path: The file; a link there is replaced, not followed.
        content: All of its content.
        durable: Whether to wait until it is on disk, which takes most of the time for many small files.
    """
    temporary = temporary_file(path.parent, content, durable=durable)
    try:
        os.replace(temporary, path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise
    if durable:
        fsync_folder(path.parent)


def fsync_folder(folder: Path) -> None:
    """Wait until the folder's entries are on disk."""
    if os.name == "nt":
        return  # Windows cannot open folders
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)

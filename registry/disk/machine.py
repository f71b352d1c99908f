"""Errors of this machine, told apart from those of a hub or a release."""

from __future__ import annotations

import errno
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from registry.disk.owners import delete, new_name, sweep
from registry.errors import CacheError, MachineError, RegistryError

__all__ = ["READ_ONLY", "CheckedSink", "find_home", "lacks_something", "temporary_folder"]

#: What a folder answers that may be read and not written.
READ_ONLY = frozenset({errno.EACCES, errno.EPERM, errno.EROFS})
_LACKING = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.EFBIG, errno.EROFS})
_PREFIX = "lora-plugins-"


def lacks_something(error: BaseException) -> OSError | None:
    """Return the error, or the one that led to it, that says this machine ran out of something."""
    chain: BaseException | None = error
    seen: set[int] = set()
    while chain is not None and id(chain) not in seen:
        seen.add(id(chain))
        if isinstance(chain, OSError) and chain.errno in _LACKING:
            return chain
        if isinstance(chain, MemoryError):
            return OSError(errno.ENOMEM, os.strerror(errno.ENOMEM))
        chain = chain.__cause__ or chain.__context__
    return None


@contextmanager
def temporary_folder() -> Iterator[Path]:
    """Make a private folder for as long as the block runs, and remove those that killed processes left.

    Raises:
        MachineError: There is no place for temporary files, or it is full.
    """
    try:
        parent = Path(tempfile.gettempdir())
        sweep(parent)
        folder = parent / new_name(_PREFIX)
        folder.mkdir(0o700)
    except OSError as error:
        raise _no_room(error) from error
    try:
        yield folder
    except RegistryError:
        raise
    except OSError as error:
        if lacks_something(error) is None:
            raise
        raise _no_room(error) from error
    except Exception as error:
        # safetensors writes in Rust, and has an error of its own for a full disk.
        if f"(os error {errno.ENOSPC})" not in str(error):
            raise
        raise _no_room(OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))) from error
    finally:
        delete(folder)


def _no_room(error: OSError) -> MachineError:
    return MachineError(
        f"Temporary files cannot be written ({error.strerror or error}). Set TMPDIR to a folder with enough space; it "
        f"is {os.environ.get('TMPDIR') or 'not set'}"
    )


class CheckedSink:
    """A file that is written to, whose errors are this machine's and not the hub's that the bytes come from."""

    def __init__(self, path: Path) -> None:
        self._path = path
        try:
            self._file = open(path, "xb")  # noqa: SIM115
        except OSError as error:
            raise self._error(error) from error

    def __enter__(self) -> CheckedSink:
        return self

    def __exit__(self, *_: object) -> None:
        try:
            self._file.close()
        except OSError as error:
            raise self._error(error) from error

    def write(self, data: bytes) -> int:
        """Write bytes.

        Raises:
            CacheError: The disk is full, or cannot be written.
        """
        try:
            return self._file.write(data)
        except OSError as error:
            raise self._error(error) from error

    def tell(self) -> int:
        """Return the position."""
        return self._file.tell()

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        """Go to a position; buffered bytes are written."""
        try:
            return self._file.seek(offset, whence)
        except OSError as error:
            raise self._error(error) from error

    def truncate(self, size: int | None = None) -> int:
        """Cut the file off; buffered bytes are written."""
        try:
            return self._file.truncate(size)
        except OSError as error:
            raise self._error(error) from error

    def _error(self, error: OSError) -> CacheError:
        return CacheError(f"{self._path} cannot be written: {error.strerror or error}")


def find_home(path: str | os.PathLike[str], variable: str) -> Path:
    """Return a path with ``~`` replaced by the user's folder, as a whole path.

    Raises:
        MachineError: Nobody knows that folder: the user has no entry in the list of users, and ``HOME`` is not set.
    """
    try:
        return Path(path).expanduser().absolute()
    except (RuntimeError, OSError) as error:
        raise MachineError(
            f"{os.fspath(path)!r} cannot be found: this user has no home folder ({error}). Set {variable} to a folder "
            "that can be written, or set HOME"
        ) from None

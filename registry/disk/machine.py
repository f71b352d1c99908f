"""Separate errors of this machine from those of a hub or a release."""

from __future__ import annotations

import errno
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from registry.disk.owners import delete, new_name, sweep
from registry.errors import CacheError, MachineError, RegistryError

__all__ = ["READ_ONLY", "CheckedSink", "lacks_something", "temporary_folder"]

#: Error numbers of writing to a read-only folder.
READ_ONLY = frozenset({errno.EACCES, errno.EPERM, errno.EROFS})
_LACKING = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.EFBIG, errno.EROFS})
_PREFIX = "lora-plugins-"


def lacks_something(error: BaseException) -> OSError | None:
    """Return the error in the chain that says this machine ran out of a resource; ``None`` without one."""
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
    """Create a private folder for the duration of the block, and remove those that killed processes left.

    Raises:
        MachineError: There is no folder for temporary files, or its disk is full.
    """
    try:
        parent = Path(tempfile.gettempdir())
        sweep(parent)
        folder = parent / new_name(_PREFIX)
        folder.mkdir(0o700)
    except OSError as error:
        raise _explain_no_room(error) from error
    try:
        yield folder
    except RegistryError:
        raise
    except OSError as error:
        if lacks_something(error) is None:
            raise
        raise _explain_no_room(error) from error
    except Exception as error:
        # safetensors 0.8.0 reports a full disk as its own exception from Rust.
        if f"(os error {errno.ENOSPC})" not in str(error):
            raise
        raise _explain_no_room(OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))) from error
    finally:
        delete(folder)


def _explain_no_room(error: OSError) -> MachineError:
    return MachineError(
        f"Temporary files cannot be written ({error.strerror or error}). Set TMPDIR to a folder with enough space; it "
        f"is {os.environ.get('TMPDIR') or 'not set'}"
    )


class CheckedSink:
    """A file open for writing whose errors are reported as this machine's, not as the hub's."""

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
        """Move to a position; buffered bytes are written first."""
        try:
            return self._file.seek(offset, whence)
        except OSError as error:
            raise self._error(error) from error

    def truncate(self, size: int | None = None) -> int:
        """Truncate the file; buffered bytes are written first."""
        try:
            return self._file.truncate(size)
        except OSError as error:
            raise self._error(error) from error

    def _error(self, error: OSError) -> CacheError:
        return CacheError(f"{self._path} cannot be written: {error.strerror or error}")

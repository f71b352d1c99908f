"""Run the conversion of a pickle in a process of its own, with limits."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from registry.errors import UnsafeFile
from registry.text import visible

__all__ = ["convert"]

#: What the process gets of the environment: no tokens, no settings of libraries.
_PASSED = ("PATH", "PYTHONPATH", "LD_LIBRARY_PATH", "DYLD_LIBRARY_PATH", "SYSTEMROOT", "LANG", "OMP_NUM_THREADS")
#: Run by its path, not imported: it loads torch.
_SCRIPT = Path(__file__).with_name("unpickle.py")
#: How a pickle begins.
_PICKLE = b"\x80"
_SECONDS = 120
_BYTES_PER_SECOND = 10_000_000


def convert(source: Path, target: Path, title: str) -> None:
    """Convert a pickle to a safetensors file.

    The process has no token, an empty home folder, and limits on time, memory and the size of what it writes. It is
    not a sandbox: what protects is that ``weights_only=True`` calls nothing that a file names.

    Args:
        source: The pickle.
        target: The file to write.
        title: What messages call the pickle.

    Raises:
        UnsafeFile: It is not a pickle of tensors by name, or breaks a limit.
    """
    size = source.stat().st_size
    _refuse_others(source, size, title)
    with tempfile.TemporaryDirectory() as home:
        environment = {key: os.environ[key] for key in _PASSED if key in os.environ}
        environment |= {"HOME": home, "TMPDIR": home, "CUDA_VISIBLE_DEVICES": ""}
        command = [
            sys.executable,
            "-P",
            "-B",
            str(_SCRIPT),
            str(source.absolute()),
            str(target.absolute()),
        ]
        try:
            done = subprocess.run(  # noqa: S603 - our own file, with paths of our own
                command,
                env=environment,
                cwd=home,
                stdin=subprocess.DEVNULL,
                capture_output=True,
                timeout=_SECONDS + size // _BYTES_PER_SECOND,
                check=False,
            )
        except subprocess.TimeoutExpired:
            raise UnsafeFile(f"{title} is not converted within {_SECONDS} seconds") from None
    if done.returncode != 0:
        target.unlink(missing_ok=True)
        told = done.stdout.decode("utf-8", "replace") or done.stderr.decode("utf-8", "replace")[-300:]
        reason = visible(told, 400) or f"the process ended with {done.returncode}"
        raise UnsafeFile(
            f"{title} cannot be converted: {reason}. Load it where you trust it, and save it with save_pretrained"
        )


def _refuse_others(source: Path, size: int, title: str) -> None:
    """Refuse what torch does not write; a small zip file with compressed entries can hold any amount."""
    if not zipfile.is_zipfile(source):
        with open(source, "rb") as file:
            if file.read(1) == _PICKLE:
                return  # the format before torch 1.6
        raise UnsafeFile(f"{title} cannot be converted: it is not a file that torch.save writes")
    try:
        with zipfile.ZipFile(source) as archive:
            entries = archive.infolist()
    except (zipfile.BadZipFile, OSError, ValueError) as error:
        raise UnsafeFile(f"{title} cannot be converted: {visible(error, 200)}") from None
    if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries) or sum(e.file_size for e in entries) > size:
        raise UnsafeFile(f"{title} cannot be converted: it is a compressed archive, which torch.save does not write")

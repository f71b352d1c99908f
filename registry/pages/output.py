"""Write a page's file, whole or not at all."""

from __future__ import annotations

import os
from pathlib import Path

from registry.disk.files import replace_file
from registry.errors import PageError

__all__ = ["write_page"]


def write_page(content: str, path: Path, usual: str = "page.html") -> Path:
    """Write a page, whole or not at all, and return its path.

    Args:
        content: The page.
        path: Its file.
        usual: Name of the file that is proposed where ``path`` is a folder.

    Raises:
        PageError: The path is a folder, or the file cannot be written.
    """
    if os.path.isdir(path):
        raise PageError(f"{path} is a folder: give the page's file, such as {path / usual}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        # A page can be made again, so it need not outlive a power cut.
        replace_file(path, content.encode("utf-8", "replace"), durable=False)
    except OSError as error:
        raise PageError(f"The page {path} cannot be written: {error.strerror}") from error
    return path

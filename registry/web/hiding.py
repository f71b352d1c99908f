"""Keep the path of a registry's folder out of what others read."""

from __future__ import annotations

import os
import re
from functools import lru_cache
from pathlib import Path
from urllib.parse import urlsplit
from urllib.request import url2pathname

from registry.text import visible

__all__ = ["hide_folder"]


def hide_folder(text: str, location: str) -> str:
    """Return a text in which the folder of a registry, a path of this machine, is written as its last name only.

    Args:
        text: Such as the message of an error.
        location: The registry's address; a text about one that is not in a folder stays as it is.
    """
    pattern, name = _compile(location)
    return pattern.sub(lambda _: name, text) if pattern else text


@lru_cache(maxsize=8)
def _compile(location: str) -> tuple[re.Pattern[str] | None, str]:
    parts = urlsplit(location)
    folder = Path(url2pathname(parts.path))
    if parts.scheme != "file" or not folder.name:
        return None, ""
    paths = {location, str(folder), os.path.realpath(folder)}
    # Errors show their message on one line.
    written = sorted(paths | {visible(path) for path in paths}, key=len, reverse=True)
    return re.compile(rf"(?<![\w./-])(?:{'|'.join(map(re.escape, written))})(?![\w-])"), folder.name

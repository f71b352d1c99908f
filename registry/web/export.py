"""Export the pages of a registry as files."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from registry.disk.files import PlantedLink, read_small
from registry.errors import ExportConflict, PageError
from registry.hubs import open_hub
from registry.hubs.protocol import Hub
from registry.pages.output import write_page
from registry.web.site import MARK, Site

__all__ = ["Exported", "export_pages"]

_FIRST = "index.html"
#: Bytes in which a page is recognized.
_HEAD = 1024


@dataclass(frozen=True)
class Exported:
    """What was written: the first page, the number of pages, and of those that were removed because they are stale."""

    first: Path
    pages: int
    removed: int


def export_pages(
    hub: Hub | str | os.PathLike[str] | None = None,
    folder: str | os.PathLike[str] = "registry-pages",
    *,
    title: str = "Registry",
    token: str | bool | None = None,
) -> Exported:
    """Write the pages of a registry into a folder, to be opened as files or put on any web server.

    Pages of an earlier export are replaced, or removed if they are stale; files of others are left alone.

    Args:
        hub: The registry.
        folder: The folder; it is created if it does not exist.
        title: Heading of the first page.
        token: For the registry.

    Raises:
        ExportConflict: A file of others has the name of a page, or two adapters' pages would be one file here.
        PageError: A page cannot be written.
        RegistryError: The registry cannot be read.
    """
    place, token = open_hub(hub, token), None
    root = Path(folder)
    if root.exists() and not root.is_dir():
        raise ExportConflict(f"{root} is a file: give a folder")
    old = _find_own(root)
    written: dict[str, str] = {}
    for path, content in Site(place, title, served=False).list_pages():
        twin = written.setdefault(path.lower(), path)
        if twin != path:
            raise ExportConflict(f"{twin} and {path} are one file on many systems, so both cannot be exported")
        write_page(content, root / path)
    stale = [path for path in old if path.relative_to(root).as_posix() not in written.values()]
    return Exported(root / _FIRST, len(written), _remove(root, stale))


def _find_own(root: Path) -> list[Path]:
    """Return the pages of an earlier export.

    Raises:
        ExportConflict: Something else is where pages go.
    """
    found = list(_find_places(root))
    foreign = [path for path in found if not _is_own(path)]
    if foreign:
        more = f" and {len(foreign) - 1:,} more" if len(foreign) > 1 else ""
        raise ExportConflict(
            f"{foreign[0]}{more} was not written by an export, and would be in the way: choose another folder, or move "
            "it away"
        )
    return found


def _find_places(root: Path) -> Iterator[Path]:
    """Yield what is at the places of pages: the list's, and everything below ``a/``."""
    try:
        for path in root.iterdir() if root.is_dir() else ():
            if path.name == _FIRST or (path.name.startswith("page-") and path.suffix == ".html"):
                yield path
        top = root / "a"
        if top.is_symlink() or (top.exists() and not top.is_dir()):
            yield top
            return
        for folder, folders, files in os.walk(top):
            yield from (Path(folder, name) for name in files)
            yield from (Path(folder, name) for name in folders if Path(folder, name).is_symlink())
    except OSError as error:
        raise PageError(f"The folder {root} cannot be read: {error.strerror}") from error


def _is_own(path: Path) -> bool:
    if path.name.endswith(".html.partial"):
        return not path.is_symlink()
    try:
        return MARK.encode() in read_small(path, _HEAD)
    except (OSError, PlantedLink):
        return False


def _remove(root: Path, stale: list[Path]) -> int:
    """Delete stale pages, and the folders that are empty then."""
    for path in stale:
        with contextlib.suppress(FileNotFoundError):
            path.unlink()
        for parent in path.parents:
            if parent == root:
                break
            with contextlib.suppress(OSError):
                parent.rmdir()
    return len(stale)

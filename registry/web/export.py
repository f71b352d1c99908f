"""Export the pages of a registry as files."""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from registry.disk.files import PlantedLink, read_small
from registry.disk.owners import find_leftovers, is_temporary
from registry.errors import ExportConflict, PageError
from registry.hubs import open_hub
from registry.hubs.protocol import Hub
from registry.pages.output import write_page
from registry.web.site import MARK, Site

__all__ = ["Exported", "export_pages"]

_FIRST = "index.html"
#: Where pages are below the folder.
_PAGE = re.compile(
    r"(?:a/[^/]+/[^/]+/)?(?:index|page-[1-9]\d*)\.html|a/[^/]+/[^/]+/(?:v|diff)/[^/]+\.html", re.ASCII | re.IGNORECASE
)
#: Bytes in which a page is recognized.
_HEAD = 1024


@dataclass(frozen=True)
class Exported:
    """What was written.

    Attributes:
        first: The first page.
        pages: Number of pages.
        removed: Number of pages that were removed because they are stale.
        unread: Adapters (``org/name``) and versions (``org/name@1.0.0``) that could not be read, and why. Their pages
            say so, without paths of this machine.
    """

    first: Path
    pages: int
    removed: int
    unread: Mapping[str, str] = field(default_factory=dict)


def export_pages(
    hub: Hub | str | os.PathLike[str] | None = None,
    folder: str | os.PathLike[str] = "registry-pages",
    *,
    title: str = "Registry",
    token: str | bool | None = None,
) -> Exported:
    """Write the pages of a registry into a folder, to be opened as files or put on any web server.

    Pages of an earlier export are replaced, or removed if they are stale; files of others are left alone. An adapter
    that cannot be read has a page that says so, and is in ``unread`` of what is returned: it stops no other.

    Args:
        hub: The registry.
        folder: The folder; it is created if it does not exist.
        title: Heading of the first page.
        token: For the registry.

    Raises:
        ExportConflict: A file of others has the name of a page, or two adapters' pages would be one file here.
        PageError: A page cannot be written.
        RegistryError: The registry as a whole cannot be read.
    """
    site = Site(open_hub(hub, token), title, served=False)
    root = Path(folder)
    if root.exists() and not root.is_dir():
        raise ExportConflict(f"{root} is a file: give a folder")
    old = _find_own(root)
    names = site.read_names()
    _refuse_twins(names)
    written: set[str] = set()
    unread: dict[str, str] = {}
    for page in site.list_pages(names):
        write_page(page.content, root / page.path)
        written.add(page.path)
        if page.unread:
            unread.setdefault(page.unread, page.problem)
    stale = [path for path in old if path.relative_to(root).as_posix() not in written]
    _remove(root, _find_torn(root))
    return Exported(root / _FIRST, len(written), _remove(root, stale), unread)


def _refuse_twins(names: list[str]) -> None:
    """Refuse adapters whose names differ only in case; of all else in the address of a page there is one spelling.

    Raises:
        ExportConflict: There are some.
    """
    seen: dict[str, str] = {}
    twins = [(first, name) for name in names if (first := seen.setdefault(name.lower(), name)) != name]
    if twins:
        first, second = twins[0]
        more = f" ({len(twins) - 1:,} more such names)" if len(twins) > 1 else ""
        raise ExportConflict(
            f"The pages of {first} and {second} are the same files on many systems{more}, so nothing was exported. "
            "lora-plugins registry serve shows both"
        )


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
            f"{_describe(foreign[0])}{more} was not written by an export, and would be in the way: choose another "
            "folder, or move it away"
        )
    return found


def _find_places(root: Path) -> Iterator[Path]:
    """Yield what is at the places of pages: the list's, and below ``a/`` every file and link, and folders there."""
    try:
        for path in root.iterdir() if root.is_dir() else ():
            if path.name == _FIRST or (path.name.startswith("page-") and path.suffix == ".html"):
                yield path
        top = root / "a"
        if not top.is_dir() or top.is_symlink():
            yield from [top] if os.path.lexists(top) else []
            return
        for folder, folders, files in os.walk(top, onerror=_raise):
            yield from (Path(folder, name) for name in files if not is_temporary(name))
            paths = (Path(folder, name) for name in folders)
            yield from (p for p in paths if p.is_symlink() or _PAGE.fullmatch(p.relative_to(root).as_posix()))
    except OSError as error:
        raise PageError(f"The folder {root} cannot be read: {error.strerror}") from error


def _find_torn(root: Path) -> list[Path]:
    """Return what exports that were killed have left of pages; their names say so."""
    folders = [root, *(Path(folder) for folder, _, _ in os.walk(root / "a"))]
    return [path for folder in folders for path in find_leftovers(folder) if path.name.startswith("tmp-")
            and is_temporary(path.name) and not path.is_dir()]  # fmt: skip


def _raise(error: OSError) -> None:
    raise error


def _describe(path: Path) -> str:
    kind = "link " if path.is_symlink() else "folder " if path.is_dir() else ""
    return f"The {kind}{path}" if kind else str(path)


def _is_own(path: Path) -> bool:
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

"""Pulled releases on this machine: read-only folders named by the digest of their manifest, and what hubs said.

::

    <cache>/releases/<digest>/…              a release, complete, checked again at every pull
            seen/<hub>/<org>/<name>.json     commit and digest of each version pulled, to notice when they change
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import secrets
import shutil
import stat
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import BinaryIO

from registry.catalog.state import State
from registry.disk import files as folder_files
from registry.disk.mutex import LockTimeout, folder_lock
from registry.errors import CacheError, HostileAnswer, IntegrityError, InvalidManifest
from registry.formats.fields import COMMIT, SHA256, Fields
from registry.formats.manifest import MANIFEST_FILE, MAX_MANIFEST, Manifest
from registry.formats.records import FileRecord
from registry.formats.strict_json import JsonRefused, canonical, parse

__all__ = ["VARIABLE", "Cache", "Pulled", "Seen", "check_file", "check_files"]

#: The folder, where ``cache_dir=`` names none.
VARIABLE = "LORA_REGISTRY_CACHE"
_STAGE = ".tmp-"
_CHUNK = 1024 * 1024
_SEEN_LIMIT = 64 * 1024 * 1024


@dataclass(frozen=True)
class Pulled:
    """The commit and the manifest's digest that a version had when it was pulled first."""

    commit: str
    manifest: str


@dataclass(frozen=True)
class Seen:
    """What is remembered of a repository: its identity, what was pulled, and its state at one commit of it."""

    identity: str | None = None
    versions: Mapping[str, Pulled] = field(default_factory=dict)
    state: State = field(default_factory=State)
    state_commit: str | None = None


class Cache:
    """A folder of pulled releases; several processes may use it at once.

    Args:
        folder: ``None`` is ``LORA_REGISTRY_CACHE``, else ``lora-plugins/registry`` in the user's cache folder.
    """

    def __init__(self, folder: str | os.PathLike[str] | None = None) -> None:
        self.folder = Path(folder or os.environ.get(VARIABLE) or _default()).expanduser().absolute()

    def __repr__(self) -> str:
        return f"Cache({str(self.folder)!r})"

    # -- releases ------------------------------------------------------------------------------------------------

    def path(self, digest: str) -> Path:
        """Where a release is, or would be."""
        return self.folder / "releases" / digest

    def manifest(self, digest: str) -> Manifest | None:
        """The manifest of a release that is there, undamaged; its files have not been looked at."""
        try:
            path = folder_files.inside(self.folder, self.path(digest) / MANIFEST_FILE)
            data = folder_files.read_small(path, MAX_MANIFEST + 1)
        except OSError:
            return None
        try:
            return Manifest.parse(data) if hashlib.sha256(data).hexdigest() == digest else None
        except InvalidManifest:
            return None

    def check(self, manifest: Manifest) -> None:
        """Hash every file of a release.

        Raises:
            IntegrityError: One is missing, differs, is a link, or is not of the release.
        """
        check_files(self.path(manifest.digest), manifest)

    def add(self, manifest: Manifest, download: Callable[[str, FileRecord, BinaryIO], None]) -> Path:
        """Put a release there; what was there, damaged, makes room.

        Args:
            manifest: Of the release.
            download: Writes the content of one of its files.

        Raises:
            IntegrityError: What was downloaded is not what the manifest says. Nothing is left of it.
            CacheError: The folder can't be written.
        """
        target = self.path(manifest.digest)
        with _errors(self.folder), self._stage() as stage:
            for name, record in manifest.files.items():
                with open(stage / name, "xb") as sink:
                    download(name, record, sink)
            (stage / MANIFEST_FILE).write_bytes(manifest.to_bytes())
            check_files(stage, manifest)
            for path in stage.iterdir():
                path.chmod(0o444)
            stage.chmod(0o555)
            self._place(stage, target, manifest)
        return target

    def remove(self, digest: str) -> None:
        """Delete a release."""
        with _errors(self.folder):
            _delete(self.path(digest))

    def digests(self) -> list[str]:
        """The releases that are there."""
        folder = self.folder / "releases"
        if not folder.is_dir():
            return []
        return sorted(path.name for path in folder.iterdir() if SHA256.fullmatch(path.name))

    def abandoned(self) -> list[Path]:
        """Halves of downloads that nobody is working on any more."""
        return [path for path in (self.folder / "releases").glob(f"{_STAGE}*") if folder_files.is_old(path)]

    # -- what was seen -------------------------------------------------------------------------------------------

    def seen(self, location: str, name: str) -> Seen:
        """What is remembered of a repository; nothing, if that is damaged."""
        try:
            data = folder_files.read_small(self.record_path(location, name), _SEEN_LIMIT)
            return _seen(Fields(parse(data, _SEEN_LIMIT)))
        except (OSError, JsonRefused, HostileAnswer):
            return Seen()

    def remember(self, location: str, name: str, change: Callable[[Seen], Seen]) -> None:
        """Change what is remembered of a repository."""
        path = self.record_path(location, name)
        with _errors(self.folder):
            if change(self.seen(location, name)) == self.seen(location, name):
                return
            path.parent.mkdir(parents=True, exist_ok=True)
            with folder_lock(path.parent):
                folder_files.replace_file(path, _written(change(self.seen(location, name))))

    def record_path(self, location: str, name: str) -> Path:
        """The file in which it is remembered."""
        hub = hashlib.sha256(location.encode()).hexdigest()[:16]
        org, _, repository = name.partition("/")
        return self.folder / "seen" / hub / org / f"{repository}.json"

    def records(self) -> Iterator[Seen]:
        """Everything that is remembered."""
        for path in sorted((self.folder / "seen").glob("*/*/*.json")):
            with contextlib.suppress(OSError, JsonRefused, HostileAnswer):
                yield _seen(Fields(parse(folder_files.read_small(path, _SEEN_LIMIT), _SEEN_LIMIT)))

    # -- how -----------------------------------------------------------------------------------------------------

    @contextmanager
    def _stage(self) -> Iterator[Path]:
        parent = self.folder / "releases"
        parent.mkdir(parents=True, exist_ok=True)
        stage = parent / f"{_STAGE}{secrets.token_hex(8)}"
        stage.mkdir(0o700)
        try:
            yield stage
        finally:
            _delete(stage)

    def _place(self, stage: Path, target: Path, manifest: Manifest) -> None:
        for _ in range(5):
            try:
                return os.rename(stage, target)
            except OSError:
                if not os.path.lexists(target):
                    raise
            try:
                return check_files(target, manifest)  # another process was faster
            except IntegrityError:
                aside = target.with_name(f"{_STAGE}{secrets.token_hex(8)}")
                with contextlib.suppress(FileNotFoundError):
                    os.rename(target, aside)
                    _delete(aside)
        raise IntegrityError(f"{target} is damaged again and again")


def check_files(folder: Path, manifest: Manifest) -> None:
    """Hash every file of a folder that should hold a release and nothing else.

    Raises:
        IntegrityError: It doesn't; the message names the file.
    """
    try:
        if folder.is_symlink():
            raise folder_files.PlantedLink(f"{folder} is a symbolic link")
        there = dict(folder_files.entries(folder))
        data = manifest.to_bytes()
        check_file(folder, MANIFEST_FILE, FileRecord(len(data), manifest.digest))
        for name, record in manifest.files.items():
            check_file(folder, name, record)
    except folder_files.PlantedLink as error:
        raise IntegrityError(f"{error}, where a release has files only") from None
    except OSError as error:
        raise IntegrityError(f"{folder} can't be read: {error.strerror or error}") from error
    extra = set(there) - {*manifest.files, MANIFEST_FILE}
    if extra:
        raise IntegrityError(f"{folder} holds {min(extra)!a}, which is not in the manifest")


def check_file(folder: Path, name: str, record: FileRecord) -> None:
    """Compare a file with what the manifest says.

    Raises:
        IntegrityError: It differs.
    """
    try:
        size = os.lstat(folder / name).st_size
    except FileNotFoundError:
        raise IntegrityError(f"{name} of {folder} is missing") from None
    if size != record.size:
        raise IntegrityError(f"{name} has {size:,} bytes where the manifest says {record.size:,}")
    found = _sha256(folder / name)
    if found != record.sha256:
        raise IntegrityError(f"{name} has the sha256 {found} where the manifest says {record.sha256}")


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with os.fdopen(folder_files.open_regular(path), "rb", buffering=0) as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def _seen(fields: Fields) -> Seen:
    return Seen(
        identity=fields.optional("identity", fields.text),
        versions={
            version: Pulled(entry.text("commit", COMMIT), entry.text("manifest", SHA256))
            for version, entry in fields.table("versions", 1_000_000)
        },
        state=State.parse(json.dumps(fields.json_table("state")).encode()) if fields.has("state") else State(),
        state_commit=fields.optional("state_commit", lambda key: fields.text(key, COMMIT)),
    )


def _written(seen: Seen) -> bytes:
    versions = {version: asdict(pulled) for version, pulled in seen.versions.items()}
    plain = {"identity": seen.identity, "versions": versions, "state_commit": seen.state_commit}
    return canonical({"format": 1, **plain, "state": json.loads(seen.state.to_bytes())})


def _delete(folder: Path) -> None:
    """Remove a folder that may be read-only, or what somebody has put into its place."""
    if folder.is_symlink() or folder.is_file():
        folder.unlink()
        return
    with contextlib.suppress(OSError):
        os.chmod(folder, stat.S_IRWXU)
    shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def _errors(folder: Path) -> Iterator[None]:
    try:
        yield
    except (CacheError, LockTimeout) as error:
        raise CacheError(str(error)) from None
    except OSError as error:
        from registry.errors import RegistryError

        if isinstance(error, RegistryError):
            raise
        raise CacheError(
            f"The cache {folder} can't be written: {error.strerror or error}. cache_dir= or {VARIABLE} name another one"
        ) from error


def _default() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "lora-plugins" / "registry"

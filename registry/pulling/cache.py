"""The cache: pulled releases in read-only folders, and records of hubs.

::

    <cache>/releases/<digest>/…              a complete release, hashed again at every pull
            checked/<digest>.json            results of the content check; modified at every pull
            signatures/<digest>/…            signatures of the release, one for each repository that has it
            seen/<hub>/<org>/<name>.json     what was seen of a repository, to detect a rollback
"""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO, cast

from registry.catalog.memory import MAX_RECORD, Seen, parse_record, write_record
from registry.disk import files as folder_files
from registry.disk.machine import READ_ONLY, CheckedSink
from registry.disk.mutex import LockTimeout, exclude, folder_lock
from registry.disk.owners import delete, find_leftovers, is_old, new_name, sweep
from registry.errors import CacheError, HostileAnswer, IntegrityError, InvalidManifest, RegistryError
from registry.formats.fields import SHA256, Fields
from registry.formats.manifest import MANIFEST_FILE, MAX_MANIFEST, Manifest
from registry.formats.records import FileRecord
from registry.formats.references import expand_path
from registry.formats.strict_json import JsonRefused, canonical, parse

__all__ = ["VARIABLE", "Cache", "check_file", "check_files"]

#: Environment variable that names the folder for calls without ``cache_dir=``.
VARIABLE = "LORA_REGISTRY_CACHE"
_CHUNK = 1024 * 1024
#: Version of the content check; content checked by an earlier version is checked again.
_CHECKS = 1
_MAX_NOTES = 1024 * 1024


class Cache:
    """A folder of pulled releases; several processes may use it concurrently.

    Args:
        folder: ``None`` is ``LORA_REGISTRY_CACHE``, else ``lora-plugins/registry`` in ``HF_ASSETS_CACHE``, which by
            default is ``assets`` in ``HF_HOME``. If only ``~/.cache/lora-plugins/registry`` of version 0.1.0 exists,
            that folder is used.

    Raises:
        MachineError: The path is in the user's home folder, which is unknown.
    """

    def __init__(self, folder: str | os.PathLike[str] | None = None) -> None:
        self.folder = expand_path(folder or os.environ.get(VARIABLE) or _find_default(), VARIABLE).absolute()

    def __repr__(self) -> str:
        return f"Cache({str(self.folder)!r})"

    # -- releases ------------------------------------------------------------------------------------------------

    def path(self, digest: str) -> Path:
        """Return the folder of a release, whether it exists or not."""
        return self.folder / "releases" / digest

    def manifest(self, digest: str) -> Manifest | None:
        """Return the manifest of a cached release, whose files are not checked; ``None`` if missing or damaged."""
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
            IntegrityError: A file is missing, differs, is a link, or does not belong to the release.
        """
        check_files(self.path(manifest.digest), manifest)

    def use(self, manifest: Manifest) -> tuple[str, ...] | None:
        """Use a cached release: hash every file, and keep it from garbage collection for a day.

        Returns:
            The warnings about its content; ``None`` if the content has not been checked yet.

        Raises:
            IntegrityError: A file is missing, differs, is a link, or does not belong to the release.
        """
        with contextlib.suppress(OSError), exclude(self._make_guard()):  # the cache may be read-only
            if os.path.lexists(self.path(manifest.digest)):
                self._touch(manifest.digest)
        self.check(manifest)
        return self._read_notes(manifest.digest)

    def add(
        self,
        manifest: Manifest,
        download: Callable[[str, FileRecord, BinaryIO], None],
        examine: Callable[[Path], tuple[str, ...]],
    ) -> tuple[str, ...]:
        """Add a release, replacing a damaged copy.

        Args:
            manifest: Manifest of the release.
            download: Writes the content of one of its files.
            examine: Checks the files in a temporary folder and returns warnings; files that it refuses do not enter the
                cache.

        Returns:
            The warnings.

        Raises:
            IntegrityError: The downloaded files differ from the manifest; they are deleted.
            CacheError: The folder cannot be written.
        """
        with _translate_errors(self.folder), self._stage() as stage:
            for name, record in manifest.files.items():
                with CheckedSink(stage / name) as sink:
                    download(name, record, cast("BinaryIO", sink))
            (stage / MANIFEST_FILE).write_bytes(manifest.to_bytes())
            check_files(stage, manifest)
            warnings = examine(stage)
            for path in stage.iterdir():
                path.chmod(0o444)
            stage.chmod(0o555)
            with exclude(self._make_guard()):
                self._write_notes(manifest.digest, warnings)
            try:
                self._place(stage, self.path(manifest.digest), manifest)
            except OSError:
                self._drop_notes(manifest.digest)
                raise
        return warnings

    def note(self, digest: str, warnings: tuple[str, ...]) -> None:
        """Store the warnings about a release's content; a read-only cache is left unchanged."""
        with contextlib.suppress(OSError):
            self._write_notes(digest, warnings)

    def remove(self, digest: str) -> bool:
        """Delete a release unless it was used less than a day ago; return whether it was deleted."""
        aside = self.folder / "releases" / new_name()
        with _translate_errors(self.folder):
            with exclude(self._make_guard()):
                if self.is_leased(digest):
                    return False
                with contextlib.suppress(FileNotFoundError):
                    os.rename(folder_files.inside(self.folder, self.path(digest)), aside)
                self._find_notes(digest).unlink(missing_ok=True)
            delete(aside)
            delete(folder_files.inside(self.folder, self.folder / "signatures" / digest))
        return True

    def is_leased(self, digest: str) -> bool:
        """Whether a release was used or added less than a day ago."""
        with _translate_errors(self.folder):
            path = self._find_notes(digest)
        return os.path.lexists(path) and not is_old(path)

    def digests(self) -> list[str]:
        """Return the digests of the cached releases."""
        with _translate_errors(self.folder):
            folder = folder_files.inside(self.folder, self.folder / "releases")
            names = os.listdir(folder) if folder.is_dir() else []
        return sorted(filter(SHA256.fullmatch, names))

    def leftovers(self) -> list[Path]:
        """Return abandoned partial downloads."""
        with _translate_errors(self.folder):
            return find_leftovers(folder_files.inside(self.folder, self.folder / "releases"))

    # -- what was seen -------------------------------------------------------------------------------------------

    def seen(self, location: str, name: str) -> Seen:
        """Return the record of a repository.

        Raises:
            CacheError: The record is damaged or cannot be read. It is not reset, because losses would go unnoticed.
        """
        return self._read_record(self.record_path(location, name), name)

    def remember(self, location: str, name: str, change: Callable[[Seen], Seen]) -> None:
        """Change the record of a repository; a read-only cache is left unchanged."""
        path = self.record_path(location, name)
        before = self.seen(location, name)
        if change(before) == before:
            return
        with _translate_errors(self.folder):
            try:
                folder_files.inside(self.folder, path).parent.mkdir(parents=True, exist_ok=True)
                # On one machine the kernel lets waiting processes in by turns; the lock file alone lets some starve.
                with exclude(self._make_guard()), folder_lock(path.parent):
                    folder_files.replace_file(path, write_record(change(self.seen(location, name))))
            except OSError as error:
                if error.errno not in READ_ONLY:
                    raise

    def record_path(self, location: str, name: str) -> Path:
        """Return the file with the record of a repository."""
        hub = hashlib.sha256(location.encode()).hexdigest()[:16]
        org, _, repository = name.partition("/")
        return self.folder / "seen" / hub / org / f"{repository}.json"

    def records(self) -> Iterator[Seen]:
        """Yield all records.

        Raises:
            CacheError: A record is damaged.
        """
        with _translate_errors(self.folder):
            paths = sorted(folder_files.inside(self.folder, self.folder / "seen").glob("*/*/*.json"))
        for path in paths:
            yield self._read_record(path, path.stem)

    # -- how -----------------------------------------------------------------------------------------------------

    def _read_record(self, path: Path, name: str) -> Seen:
        try:
            return parse_record(folder_files.read_small(folder_files.inside(self.folder, path), MAX_RECORD + 1))
        except FileNotFoundError:
            return Seen()
        except (JsonRefused, HostileAnswer, folder_files.PlantedLink) as reason:
            raise CacheError(
                f"What this machine remembers of {name} is damaged ({path}: {reason}). To take what the registry says "
                "now without comparing it, delete that file"
            ) from None
        except OSError as error:
            raise _explain_failure(self.folder, "read", error) from error

    def _make_guard(self) -> Path:
        self.folder.mkdir(parents=True, exist_ok=True)
        return self.folder / "guard"

    def _find_notes(self, digest: str) -> Path:
        return folder_files.inside(self.folder, self.folder / "checked" / f"{digest}.json")

    def _read_notes(self, digest: str) -> tuple[str, ...] | None:
        try:
            fields = Fields(parse(folder_files.read_small(self._find_notes(digest), _MAX_NOTES), _MAX_NOTES))
            return fields.texts("warnings") if fields.integer("checks", 2**31) == _CHECKS else None
        except (OSError, JsonRefused):
            return None

    def _write_notes(self, digest: str, warnings: tuple[str, ...]) -> None:
        path = self._find_notes(digest)
        path.parent.mkdir(parents=True, exist_ok=True)
        sweep(path.parent)
        folder_files.replace_file(path, canonical({"checks": _CHECKS, "warnings": list(warnings)}))

    def _drop_notes(self, digest: str) -> None:
        """Remove the notes of a release that was not added."""
        with contextlib.suppress(OSError), exclude(self._make_guard()):
            if not os.path.lexists(self.path(digest)):
                self._find_notes(digest).unlink(missing_ok=True)

    def _touch(self, digest: str) -> None:
        path = self._find_notes(digest)
        try:
            os.utime(path, follow_symlinks=False)
        except FileNotFoundError:
            path.parent.mkdir(parents=True, exist_ok=True)
            folder_files.replace_file(path, canonical({"checks": 0, "warnings": []}))

    @contextmanager
    def _stage(self) -> Iterator[Path]:
        parent = folder_files.inside(self.folder, self.folder / "releases")
        parent.mkdir(parents=True, exist_ok=True)
        sweep(parent)
        stage = parent / new_name()
        stage.mkdir(0o700)
        try:
            yield stage
        finally:
            delete(stage)

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
                aside = target.with_name(new_name())
                with contextlib.suppress(FileNotFoundError):
                    os.rename(target, aside)
                    delete(aside)
        raise IntegrityError(f"{target} is damaged again and again")


def check_files(folder: Path, manifest: Manifest) -> None:
    """Hash every file of a folder that must hold exactly one release.

    Raises:
        IntegrityError: It does not; the message names the file.
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
        raise IntegrityError(f"{folder} cannot be read: {error.strerror or error}") from error
    extra = set(there) - {*manifest.files, MANIFEST_FILE}
    if extra:
        raise IntegrityError(f"{folder} holds {min(extra)!a}, which is not in the manifest")


def check_file(folder: Path, name: str, record: FileRecord) -> None:
    """Compare a file with its record in the manifest.

    Raises:
        IntegrityError: It differs.
    """
    try:
        size = os.lstat(folder / name).st_size
    except FileNotFoundError:
        raise IntegrityError(f"{name} of {folder} is missing") from None
    if size != record.size:
        raise IntegrityError(f"{name} has {size:,} bytes where the manifest says {record.size:,}")
    found = _hash_file(folder / name)
    if found != record.sha256:
        raise IntegrityError(f"{name} has the sha256 {found} where the manifest says {record.sha256}")


def _hash_file(path: Path) -> str:
    digest = hashlib.sha256()
    with os.fdopen(folder_files.open_regular(path), "rb", buffering=0) as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


@contextmanager
def _translate_errors(folder: Path) -> Iterator[None]:
    try:
        yield
    except RegistryError:
        raise
    except LockTimeout as error:
        raise CacheError(str(error)) from None
    except OSError as error:
        raise _explain_failure(folder, "written", error) from error


def _explain_failure(folder: Path, what: str, error: OSError) -> CacheError:
    return CacheError(
        f"The cache {folder} cannot be {what}: {error.strerror or error}. cache_dir= or {VARIABLE} name another one"
    )


def _find_default() -> Path:
    """Return huggingface_hub's folder for assets of other packages, without importing it."""
    user = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache")
    home = Path(os.environ.get("HF_HOME") or user / "huggingface")
    assets = Path(os.environ.get("HF_ASSETS_CACHE") or home / "assets") / "lora-plugins" / "registry"
    former = user / "lora-plugins" / "registry"
    with contextlib.suppress(RuntimeError, OSError):
        if former.expanduser().is_dir() and not assets.expanduser().is_dir():
            return former
    return assets

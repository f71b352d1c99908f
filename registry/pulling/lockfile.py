"""``adapters.lock``: the exact release of each adapter of a project."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from packaging.version import Version

from registry.disk.files import PlantedLink, read_small, replace_file
from registry.disk.mutex import LockTimeout, folder_lock
from registry.errors import InvalidLock, InvalidReference, LockEntryNotFound, LockMismatch
from registry.formats.fields import COMMIT, SHA256, Fields
from registry.formats.references import Reference, parse_version, split_key, version_of_commit, version_text
from registry.formats.strict_json import JsonRefused, canonical, parse

__all__ = ["LOCK_FILE", "Lock", "LockEntry"]

#: Default lock file, in the working directory.
LOCK_FILE = "adapters.lock"
_FORMAT = 1
_LIMIT = 16 * 1024 * 1024
_MOST = 100_000


@dataclass(frozen=True)
class LockEntry:
    """One adapter.

    Attributes:
        version: Version of the release; ``0+g<commit>`` for an unversioned adapter.
        commit: Commit holding it.
        manifest: sha256 of the manifest, which covers all files.
        registry: Address of the hub.
        repository: The hub's id for the repository, which another repository of the same name does not have.
        base: Id of the base model, if it has one.
        base_commit: Commit of the base model, if known.
    """

    version: str
    commit: str
    manifest: str
    registry: str
    repository: str
    base: str | None = None
    base_commit: str | None = None

    @property
    def unversioned(self) -> bool:
        """Whether it locks a commit that nobody published as a version."""
        return self.version == version_of_commit(self.commit)


@dataclass(frozen=True)
class Lock:
    """A lock file, which need not exist yet.

    Attributes:
        path: The file; ``None`` to use none.
        write: Whether adapters that are not in it are added.
        frozen: Whether only adapters that are in it may be used.
        renew: Whether its entries are resolved again.
    """

    path: Path | None
    write: bool = False
    frozen: bool = False
    renew: bool = False

    @classmethod
    def choose(cls, lock: bool | str | os.PathLike[str] | None, *, frozen: bool) -> Lock:
        """Choose the lock file.

        Args:
            lock: ``None``: read ``adapters.lock`` if it exists. ``True`` or a path: read and update it. ``False``:
                none.
            frozen: Use only adapters that are in it.

        Raises:
            LockEntryNotFound: ``frozen`` is set, and there is no lock file.
        """
        path = Path(LOCK_FILE if lock is None or isinstance(lock, bool) else lock).absolute()
        exists = os.path.lexists(path)
        used = lock is not False and (bool(lock) or exists)
        if frozen and not (used and exists):
            raise LockEntryNotFound(f"Only locked adapters may be used, and {path} is not there or not to be used")
        return cls(path if used else None, write=bool(lock) and not frozen, frozen=frozen)

    def find(self, reference: Reference) -> LockEntry | None:
        """Return the entry that fixes a reference; ``None`` if there is none.

        Raises:
            InvalidLock: The file is malformed.
            LockMismatch: The entry does not match the reference, and must not be changed.
            LockEntryNotFound: There is no entry, and the lock is frozen.
        """
        entry = None if self.renew else self.entries().get(reference.key)
        if entry is None:
            if self.frozen:
                raise LockEntryNotFound(f"{reference.key} is not in {self.path}, and only locked adapters may be used")
            return None
        if reference.allows(Version(entry.version), entry.commit):
            return entry
        if self.write:
            return None
        raise LockMismatch(
            f"{self.path} has {reference.key} at {entry.version}, which is not {reference}. To change the lock: "
            f"lora-plugins pull {reference} --lock (lock=True in Python)"
        )

    def entries(self) -> Mapping[str, LockEntry]:
        """Return all entries by name.

        Raises:
            InvalidLock: The file is malformed.
        """
        if self.path is None:
            return {}
        try:
            data = read_small(self.path, _LIMIT + 1)
        except FileNotFoundError:
            return {}
        except PlantedLink as error:
            raise InvalidLock(
                f"{error}, and a lock file is a file of its own: delete it, or name another one with lock="
            ) from None
        except OSError as error:
            raise InvalidLock(f"{self.path} cannot be read: {error.strerror or error}") from error
        try:
            fields = Fields(parse(data, _LIMIT))
            if fields.integer("format", 2**31, least=1) > _FORMAT:
                raise fields.refuse("format", f"at most {_FORMAT}; a newer lora-plugins wrote it, and can read it")
            return {_check_key(key): _read_entry(entry) for key, entry in fields.table("adapters", _MOST)}
        except (JsonRefused, InvalidReference) as reason:
            raise InvalidLock(f"{self.path}: {reason}") from None

    def record(self, name: str, entry: LockEntry) -> None:
        """Write an entry if the lock is writable and does not have it yet.

        Several processes may write concurrently: each reads the others' entries while it holds a lock beside the file.

        Raises:
            InvalidLock: The file is malformed, or cannot be written.
        """
        if self.path is None or not self.write or self.entries().get(name) == entry:
            return
        try:
            with folder_lock(self.path.parent, name=f".{self.path.name}.lock"):
                replace_file(self.path, _write({**self.entries(), name: entry}))
        except LockTimeout as error:
            raise InvalidLock(str(error)) from None
        except OSError as error:
            raise InvalidLock(f"{self.path} cannot be written: {error.strerror or error}") from error


def _write(entries: Mapping[str, LockEntry]) -> bytes:
    adapters = {
        name: {key: value for key, value in asdict(entry).items() if value is not None}
        for name, entry in entries.items()
    }
    return canonical({"format": _FORMAT, "adapters": adapters})


def _check_key(key: str) -> str:
    split_key(key)
    return key


def _read_entry(fields: Fields) -> LockEntry:
    version, commit = fields.text("version"), fields.text("commit", COMMIT, "a commit")
    return LockEntry(
        version=version if version == version_of_commit(commit) else version_text(parse_version(version)),
        commit=commit,
        manifest=fields.text("manifest", SHA256, "a sha256"),
        registry=fields.text("registry"),
        repository=fields.text("repository"),
        base=fields.optional("base", fields.text),
        base_commit=fields.optional("base_commit", lambda key: fields.text(key, COMMIT, "a commit")),
    )

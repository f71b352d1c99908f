"""Every error and warning of registry, in one tree.

::

    RegistryError
    ├── InvalidReference (ValueError)
    │   └── ReferenceConflict
    ├── VersionNotFound (LookupError)
    │   ├── AliasNotFound
    │   ├── MetricNotFound
    │   └── NotAdapter
    ├── HubError
    │   ├── HubUnavailable (ConnectionError)
    │   │   └── Offline
    │   ├── HubRefused (PermissionError)
    │   ├── HostileAnswer
    │   ├── RepositoryNotFound (LookupError)
    │   ├── CommitNotFound (LookupError)
    │   └── HubFileNotFound (LookupError)
    ├── PublishError
    │   ├── VersionExists
    │   ├── PublishConflict
    │   │   └── AliasMoved
    │   ├── RepositoryConflict
    │   ├── UnknownBase (ValueError)
    │   ├── InvalidAdapter (ValueError)
    │   ├── UnservedAdapter (ValueError)
    │   └── TooLarge (ValueError)
    ├── UnsafeFile (ValueError)
    ├── InvalidManifest (ValueError)
    ├── BaseMismatch (ValueError)
    ├── IntegrityError
    │   ├── ReleaseMoved
    │   ├── RepositoryReplaced
    │   └── SignatureError
    │       ├── SignatureNotFound (LookupError)
    │       ├── InvalidSignature (ValueError)
    │       ├── UnknownSigner
    │       └── SignatureMismatch (ValueError)
    ├── InvalidKey (ValueError)
    ├── SigningNotInstalled (ImportError)
    ├── ObjectStoreNotInstalled (ImportError)
    ├── MachineError (OSError)
    │   └── CacheError
    ├── PageError
    │   ├── PageNotFound (LookupError)
    │   ├── InvalidAddress (ValueError)
    │   ├── AddressConflict (OSError)
    │   └── ExportConflict
    └── LockError
        ├── InvalidLock (ValueError)
        ├── LockMismatch (ValueError)
        └── LockEntryNotFound (LookupError)

    RegistryWarning (UserWarning)
    ├── YankedWarning
    ├── StaleWarning
    ├── IdentityWarning
    ├── AdapterWarning
    └── PlainTokenWarning
"""

from __future__ import annotations

import warnings

from registry.text import visible


class RegistryError(Exception):
    """Root of all errors that registry raises on purpose."""

    #: A command shows the message alone, in one line and without a traceback.
    says_it_all = True

    def __str__(self) -> str:
        """Return the message on one line, without control characters: it may quote untrusted text."""
        return visible(super().__str__())


class InvalidReference(RegistryError, ValueError):
    """A reference, or a name, version, range or alias in it, is malformed."""


class ReferenceConflict(InvalidReference):
    """A reference names an alias and a branch of the same name."""


class VersionNotFound(RegistryError, LookupError):
    """The repository has no release that matches a reference."""


class AliasNotFound(VersionNotFound):
    """The repository has no such alias."""


class MetricNotFound(VersionNotFound):
    """A release has no metric of this name."""


class NotAdapter(VersionNotFound):
    """The commit that a reference names holds no release of an adapter."""


class HubError(RegistryError):
    """A request to a hub failed."""


class HubUnavailable(HubError, ConnectionError):
    """A hub did not answer in time; the request may have taken effect all the same."""


class Offline(HubUnavailable):
    """The operation needs the network, which is switched off."""


class HubRefused(HubError, PermissionError):
    """A hub does not allow the operation for this token, or for anyone."""


class HostileAnswer(HubError):
    """A hub sent an answer that violates its protocol or a limit."""


class RepositoryNotFound(HubError, LookupError):
    """The repository does not exist, or the token may not see it."""


class CommitNotFound(HubError, LookupError):
    """A repository has no such commit."""


class HubFileNotFound(HubError, LookupError):
    """A commit has no such file."""


class PublishError(RegistryError):
    """Something cannot be published, or not at the moment."""


class VersionExists(PublishError):
    """Other content has been published under this version."""


class PublishConflict(PublishError):
    """Others changed the repository concurrently during every attempt."""


class AliasMoved(PublishConflict):
    """Someone else moved an alias concurrently."""


class RepositoryConflict(PublishError):
    """A repository holds a base model, or foreign files with the names of a release's files."""


class UnknownBase(PublishError, ValueError):
    """The base model is not identified well enough to be found again."""


class InvalidAdapter(PublishError, ValueError):
    """An adapter is unusable: empty, all zero, not finite, wrongly shaped, or with foreign keys."""


class UnservedAdapter(PublishError, ValueError):
    """A server that an adapter is for would not take it."""


class TooLarge(PublishError, ValueError):
    """An adapter is larger than allowed, or holds large tensors that are not LoRA's."""


class UnsafeFile(RegistryError, ValueError):
    """A file does not belong in a release because of its name, kind or content."""


class InvalidManifest(RegistryError, ValueError):
    """A manifest is malformed."""


class BaseMismatch(RegistryError, ValueError):
    """An adapter was not trained on this base model.

    Attributes:
        rename: Prefix of tensor names, and what to rename it to so that the adapter fits; ``None`` if no rename helps.
    """

    rename: tuple[str, str] | None = None


class IntegrityError(RegistryError):
    """Bytes differ from what was published."""


class ReleaseMoved(IntegrityError):
    """A version points to another commit, or other content, than before."""


class RepositoryReplaced(IntegrityError):
    """The repository of this name is not the same one as before."""


class SignatureError(IntegrityError):
    """A release does not have the required signature."""


class SignatureNotFound(SignatureError, LookupError):
    """A release is not signed."""


class InvalidSignature(SignatureError, ValueError):
    """A signature is malformed, or was tampered with."""


class UnknownSigner(SignatureError):
    """A signature was made with a key that is not trusted."""


class SignatureMismatch(SignatureError, ValueError):
    """A signature belongs to another release."""


class InvalidKey(RegistryError, ValueError):
    """A key or certificate cannot be read or used."""


class SigningNotInstalled(RegistryError, ImportError):
    """The package that makes and verifies signatures is not installed."""


class ObjectStoreNotInstalled(RegistryError, ImportError):
    """The package for object stores is not installed."""


class MachineError(RegistryError, OSError):
    """This machine lacks a resource: disk space, memory, open files, a writable folder.

    The error says nothing about a hub or a release, so it triggers no fallback.
    """


class CacheError(MachineError):
    """The cache of pulled adapters cannot be written or read."""


class PageError(RegistryError):
    """A page of a registry or a comparison cannot be made, written or served."""


class PageNotFound(PageError, LookupError):
    """There is no page at an address."""


class InvalidAddress(PageError, ValueError):
    """A host or port to serve pages at is not valid."""


class AddressConflict(PageError, OSError):
    """A port is taken, or may not be used."""


class ExportConflict(PageError):
    """A folder for exported pages holds files of others."""


class LockError(RegistryError):
    """A lock file cannot be used, or does not allow the operation."""


class InvalidLock(LockError, ValueError):
    """A lock file is malformed."""


class LockMismatch(LockError, ValueError):
    """A lock file holds another version than the requested one."""


class LockEntryNotFound(LockError, LookupError):
    """A frozen lock file has no entry for the requested adapter."""


class RegistryWarning(UserWarning):
    """Root of all warnings of registry."""

    def __str__(self) -> str:
        """Return the message on one line, without control characters."""
        return visible(super().__str__())

    #: A command shows the message alone, without the line of code that warned.
    says_it_all = True


class YankedWarning(RegistryWarning):
    """A release in use was withdrawn by its publisher."""


class StaleWarning(RegistryWarning):
    """A hub could not be reached; the cache is used instead."""


class IdentityWarning(RegistryWarning):
    """A base model is compatible, but its identity could not be verified."""


class AdapterWarning(RegistryWarning):
    """An adapter changes nothing, is larger than necessary, or is only part of what was trained; see the message."""


class PlainTokenWarning(RegistryWarning):
    """A token is sent over an unencrypted connection."""


#: Error names of former releases, with their present names.
_RENAMED = {
    "BadAdapter": "InvalidAdapter",
    "BaseUnknown": "UnknownBase",
    "FileMissing": "HubFileNotFound",
    "LockInvalid": "InvalidLock",
    "ManifestInvalid": "InvalidManifest",
    "NotLocked": "LockEntryNotFound",
    "ReferenceInvalid": "InvalidReference",
}


def __getattr__(name: str) -> type[Exception]:
    if name not in _RENAMED:
        raise AttributeError(f"module 'registry.errors' has no attribute {name!r}")
    warnings.warn(f"registry.errors.{name} is now called {_RENAMED[name]}", DeprecationWarning, stacklevel=2)
    return globals()[_RENAMED[name]]

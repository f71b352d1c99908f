"""Every error and warning of registry, in one tree.

::

    RegistryError
    ├── InvalidReference (ValueError)
    ├── VersionNotFound (LookupError)
    │   ├── AliasNotFound
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
    ├── MachineError (OSError)
    │   └── CacheError
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
        """The message on one line, without control characters: it may quote what a stranger wrote."""
        return visible(super().__str__())


class InvalidReference(RegistryError, ValueError):
    """A reference, or a name, version, range or alias in it, that can't be one."""


class VersionNotFound(RegistryError, LookupError):
    """The repository has no release that a reference asks for."""


class AliasNotFound(VersionNotFound):
    """The repository has no such alias."""


class NotAdapter(VersionNotFound):
    """The commit that a reference names holds no release of an adapter."""


class HubError(RegistryError):
    """A hub did not do what it was asked for."""


class HubUnavailable(HubError, ConnectionError):
    """A hub did not answer in time; what was asked for may have happened all the same."""


class Offline(HubUnavailable):
    """The network is switched off, and this needs it."""


class HubRefused(HubError, PermissionError):
    """A hub doesn't let this token, or anybody, do that."""


class HostileAnswer(HubError):
    """A hub answered what no healthy hub answers."""


class RepositoryNotFound(HubError, LookupError):
    """There is no such repository, or the token may not see it."""


class CommitNotFound(HubError, LookupError):
    """A repository has no such commit."""


class HubFileNotFound(HubError, LookupError):
    """A commit has no such file."""


class PublishError(RegistryError):
    """Something can't be published, or not now."""


class VersionExists(PublishError):
    """Other content has been published under this version."""


class PublishConflict(PublishError):
    """Others changed the repository at the same time, again and again."""


class AliasMoved(PublishConflict):
    """Somebody else moved an alias at the same time."""


class RepositoryConflict(PublishError):
    """A repository holds a base model, or files of others where a release's have to go."""


class UnknownBase(PublishError, ValueError):
    """Nobody could find the base model again."""


class InvalidAdapter(PublishError, ValueError):
    """An adapter that would be of no use: empty, all zero, not finite, wrongly shaped, or with foreign keys."""


class TooLarge(PublishError, ValueError):
    """An adapter is larger than allowed, or holds large tensors that are not an adapter's."""


class UnsafeFile(RegistryError, ValueError):
    """A file that does not belong into a release: by its name, its kind or its content."""


class InvalidManifest(RegistryError, ValueError):
    """A manifest that is malformed, or not one."""


class BaseMismatch(RegistryError, ValueError):
    """An adapter was not trained on this base model."""


class IntegrityError(RegistryError):
    """Bytes differ from what was published."""


class ReleaseMoved(IntegrityError):
    """A version stands for another commit, or other content, than before."""


class RepositoryReplaced(IntegrityError):
    """Under the name of a repository there is another one than before."""


class SignatureError(IntegrityError):
    """A release does not have the signature that was required."""


class SignatureNotFound(SignatureError, LookupError):
    """A release is not signed."""


class InvalidSignature(SignatureError, ValueError):
    """A signature is malformed, or was tampered with."""


class UnknownSigner(SignatureError):
    """A signature was made with another key than those that are trusted."""


class SignatureMismatch(SignatureError, ValueError):
    """A signature is that of another release."""


class InvalidKey(RegistryError, ValueError):
    """A key or certificate cannot be read or used."""


class SigningNotInstalled(RegistryError, ImportError):
    """The package that makes and verifies signatures is not installed."""


class MachineError(RegistryError, OSError):
    """This machine lacks something: space on a disk, memory, open files, a folder that can be written.

    It says nothing about a hub or a release, so nothing else is taken in their place.
    """


class CacheError(MachineError):
    """The cache of pulled adapters cannot be written or read."""


class LockError(RegistryError):
    """Something is wrong with a lock file."""


class InvalidLock(LockError, ValueError):
    """A lock file that is malformed."""


class LockMismatch(LockError, ValueError):
    """A lock holds another version than the one that was asked for."""


class LockEntryNotFound(LockError, LookupError):
    """A lock is frozen and does not hold what was asked for."""


class RegistryWarning(UserWarning):
    """Root of all warnings of registry."""

    def __str__(self) -> str:
        """The message on one line, without control characters."""
        return visible(super().__str__())

    #: A command shows the message alone, without the line of code that warned.
    says_it_all = True


class YankedWarning(RegistryWarning):
    """A release is used that its publisher has withdrawn."""


class StaleWarning(RegistryWarning):
    """A hub could not be reached, and what is known of it from before is used."""


class IdentityWarning(RegistryWarning):
    """A base model is compatible, and whether it is the same one could not be verified."""


class AdapterWarning(RegistryWarning):
    """An adapter changes nothing, is larger than it has to be, or is not all that was trained; see its message."""


class PlainTokenWarning(RegistryWarning):
    """A token is sent over a connection that is not encrypted."""


#: Names of former releases, and what they are called now.
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

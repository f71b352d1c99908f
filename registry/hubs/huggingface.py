"""The Hugging Face Hub, or a hub with its protocol, as a `Hub`."""

from __future__ import annotations

import ipaddress
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO
from urllib.parse import urlsplit

from registry.errors import (
    CommitNotFound,
    HostileAnswer,
    HubError,
    HubFileNotFound,
    HubRefused,
    HubUnavailable,
    InvalidReference,
    MachineError,
    Offline,
    PlainTokenWarning,
    RegistryError,
    RepositoryNotFound,
)
from registry.formats.fields import COMMIT
from registry.hubs.http.failures import HubFailed, hostile
from registry.hubs.protocol import Conflict, Refs, TagExists

__all__ = ["HuggingFaceHub"]

#: Seconds that a call with all its retries may take, besides the transfer of its bytes.
TIMEOUT = 30.0
#: The tag on the card of every release, by which the Hub lists them.
_TAG = "lora-plugins"
_KINDS = {"RepoNotFound": RepositoryNotFound, "RevisionNotFound": CommitNotFound, "EntryNotFound": HubFileNotFound}


class HuggingFaceHub:
    """The model repositories of one hub that one token may access.

    Args:
        endpoint: ``https://…``; ``None`` is ``HF_ENDPOINT``, or huggingface.co.
        token: ``None`` is the token that the user logged in with at ``HF_ENDPOINT`` or huggingface.co, and no token
            elsewhere; ``True`` is that token for any endpoint, ``False`` is none.
        timeout: Seconds that a call may take, besides the transfer of its bytes.

    Raises:
        InvalidReference: The endpoint is not a valid address.
    """

    local = False
    location = ""

    def __init__(self, endpoint: str | None = None, token: str | bool | None = None, timeout: float = TIMEOUT) -> None:
        from registry.hubs import client as huggingface

        given, token = (huggingface.Secret(token), None) if isinstance(token, str) else (None, token)
        # From here on no frame holds the token itself, because some traceback printers show local variables.
        own = huggingface.configured_endpoint()
        self.location = _parse_address(own if endpoint is None else endpoint)
        if given is not None:
            secret = given
        elif token is True:
            secret = huggingface.Secret(huggingface.stored_token())
        elif token is None and self.location == own:
            secret = huggingface.Secret(huggingface.implicit_token())
        else:
            secret = huggingface.Secret(None)
        if secret.values():
            _warn_of_plain(self.location)
        self._repositories = huggingface.Repositories(self.location, secret, timeout)

    def __repr__(self) -> str:
        return f"HuggingFaceHub({self.location!r})"

    # -- reading -------------------------------------------------------------------------------------------------

    def refs(self, name: str) -> Refs:
        """Return all branches and tags at one moment."""
        with self._translate_errors(name):
            branches, tags = self._repositories.refs(name)
            if any(COMMIT.fullmatch(commit) is None for commit in (*branches.values(), *tags.values())):
                raise hostile("a tag or branch does not point to a commit")
            return Refs(branches, tags)

    def change_request(self, name: str, ref: str) -> str:
        """Return the commit at the head of a pull request."""
        with self._translate_errors(name):
            commit = self._repositories.info(name, ref).get("sha")
            if not isinstance(commit, str) or COMMIT.fullmatch(commit) is None:
                raise hostile("a pull request does not point to a commit")
            return commit

    def identity(self, name: str) -> str:
        """Return the id that the hub gave the repository, or its creation time on a hub without ids."""
        with self._translate_errors(name):
            found = self._repositories.info(name, "main")
            identity = str(found.get("_id") or found.get("createdAt") or "")
            if len(identity) > 100 or not identity.isprintable():
                raise hostile("the repository has an invalid id")
            return identity

    def files(self, name: str, commit: str) -> Mapping[str, int]:
        """Return the files of a commit with their sizes."""
        with self._translate_errors(name):
            return {path: file.size for path, file in sorted(self._repositories.files(name, commit).items())}

    def hashes(self, name: str, commit: str) -> Mapping[str, str]:
        """Return the files of a commit with their sha256, or git's hash for files outside LFS."""
        with self._translate_errors(name):
            found = self._repositories.files(name, commit)
            return {path: file.sha256 or file.git_sha1 for path, file in sorted(found.items())}

    def read(self, name: str, commit: str, path: str, limit: int) -> bytes:
        """Return the content of a file of at most ``limit`` bytes."""
        with self._translate_errors(name, path):
            return self._repositories.content(name, commit, path, limit)

    def download(self, name: str, commit: str, path: str, sink: BinaryIO, limit: int) -> None:
        """Write a file of at most ``limit`` bytes to ``sink``."""
        with self._translate_errors(name, path):
            self._repositories.download(name, commit, path, sink, limit)

    def read_range(self, name: str, commit: str, path: str, start: int, length: int) -> bytes:
        """Return at most ``length`` bytes of a file from ``start`` on."""
        with self._translate_errors(name, path):
            return self._repositories.part(name, commit, path, start, length)

    def names(self, base: str | None = None) -> Iterator[str]:
        """Yield the models that the hub lists with the registry's tag, for ``base`` if it is given."""
        tags = [f"base_model:adapter:{base}"] if base is not None else []
        with self._translate_errors("the list of adapters"):
            yield from self._repositories.names([_TAG, *tags])

    # -- writing -------------------------------------------------------------------------------------------------

    def create(self, name: str, *, private: bool | None = None) -> None:
        """Create a repository if it does not exist."""
        with self._translate_errors(name):
            self._repositories.create(name, private=private)

    def commit(
        self,
        name: str,
        branch: str,
        files: Mapping[str, Path | bytes],
        *,
        parent: str,
        message: str,
        delete: tuple[str, ...] = (),
    ) -> str:
        """Commit files on top of ``parent``."""
        with self._translate_errors(name):
            try:
                return self._repositories.commit(name, branch, files, parent=parent, message=message, delete=delete)
            except HubFailed as failure:
                if failure.status in (409, 412) or failure.code == "RevisionNotFound":
                    status = failure.status
                else:
                    raise
            head = self._repositories.refs(name)[0].get(branch)
            if head == parent:
                raise HubUnavailable(f"{name} on {self.location}: HTTP {status}, and the branch has not moved")
            raise Conflict(branch, head)

    def propose(self, name: str, files: Mapping[str, Path | bytes], *, parent: str, message: str) -> str:
        """Open a pull request."""
        with self._translate_errors(name):
            return self._repositories.propose(name, files, parent=parent, message=message)

    def create_branch(self, name: str, branch: str, commit: str) -> None:
        """Create a branch, unless it exists."""
        with self._translate_errors(name):
            self._repositories.branch(name, branch, commit)

    def create_tag(self, name: str, tag: str, commit: str) -> None:
        """Create a tag at a commit."""
        with self._translate_errors(name):
            try:
                return self._repositories.tag(name, tag, commit)
            except HubFailed as failure:
                if failure.status != 409:
                    raise
            raise TagExists(tag, self._repositories.refs(name)[1].get(tag))

    # -- how -----------------------------------------------------------------------------------------------------

    @contextmanager
    def _translate_errors(self, name: str, path: str = "") -> Iterator[None]:
        """Raise failed requests as errors of the registry; neither refers to the HTTP client's exception."""
        try:
            yield
        except HubFailed as failure:
            error = self._error(failure, name, path)
        else:
            return
        raise error

    def _error(self, failure: HubFailed, name: str, path: str) -> RegistryError:
        name, path = self._repositories.clean(name), self._repositories.clean(path)
        what = f"{name}: {path[:200]!r} on {self.location}" if path else f"{name} on {self.location}"
        if failure.code == "Offline":
            return Offline(f"{what} cannot be reached: {failure}")
        if failure.code == "Machine":
            return MachineError(f"{what}: {failure}")
        if failure.code == "Hostile":
            return HostileAnswer(f"{what}: {failure}")
        if failure.code in _KINDS:
            hint = " (or the token may not see it)" if failure.code == "RepoNotFound" else ""
            return _KINDS[failure.code](f"{what} does not exist{hint}: {failure}")
        if failure.transient:
            return HubUnavailable(f"{what} did not answer: {failure}")
        if failure.code == "GatedRepo":
            return HubRefused(f"{what} is gated; ask for access on its page, or pass another token: {failure}")
        if failure.status == 401:
            return HubRefused(f"{what} refuses this token, or wants one: {failure}")
        if failure.status == 403:
            return HubRefused(
                f"{what} does not allow that to this token: {failure}. A token for pull requests only can push with "
                "create_pr=True"
            )
        return HubError(f"{what}: {failure}")


def _parse_address(endpoint: str) -> str:
    try:
        parts = urlsplit(endpoint)
        port = parts.port
    except ValueError:
        raise InvalidReference(f"{endpoint[:200]!r} is not the address of a hub") from None
    if parts.username or parts.password:
        raise InvalidReference("The address of a hub must not hold a password; pass token= instead")
    if parts.scheme not in ("http", "https") or not parts.hostname or parts.query or parts.fragment:
        raise InvalidReference(f"{endpoint[:200]!r} is not the address of a hub: give one like https://hub.example")
    host = f"[{parts.hostname}]" if ":" in parts.hostname else parts.hostname
    return f"{parts.scheme}://{host}{f':{port}' if port else ''}{parts.path.rstrip('/')}"


def _warn_of_plain(endpoint: str) -> None:
    parts = urlsplit(endpoint)
    host = parts.hostname or ""
    if parts.scheme == "https" or host == "localhost":
        return
    try:
        if ipaddress.ip_address(host).is_loopback:
            return
    except ValueError:
        pass
    warnings.warn(
        f"The token is sent to {endpoint} unencrypted, for everybody on the way to read. Use https, or token=False.",
        PlainTokenWarning,
        stacklevel=4,
    )

"""Send requests to the Hugging Face Hub through huggingface_hub.

Reads use that package's HTTP client, writes its ``HfApi``. Both have a time limit, because the client (seen in
huggingface_hub 2.4.0) otherwise waits without end or retries for half a minute.
"""

from __future__ import annotations

import hashlib
import io
import logging
import os
import secrets
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, TypeVar
from urllib.parse import quote

from huggingface_hub import (
    CommitOperationAdd,
    CommitOperationDelete,
    HfApi,
    constants,
    get_token,
    try_to_load_from_cache,
)
from huggingface_hub.errors import HTTPError
from huggingface_hub.file_download import repo_folder_name
from huggingface_hub.utils import get_session

from registry.hubs.http.deadline import Deadline, call_within
from registry.hubs.http.failures import HubFailed, cleaner, failure_of, failure_of_network, hostile
from registry.hubs.http.limits import limit_answers
from registry.hubs.http.reading import Reader
from registry.hubs.http.secret import Secret, hide_in_logs

__all__ = [
    "HUGGINGFACE",
    "RemoteFile",
    "Repositories",
    "Secret",
    "cached_folder",
    "configured_endpoint",
    "implicit_token",
    "stored_token",
]

_Result = TypeVar("_Result")

HUGGINGFACE = "https://huggingface.co"


@dataclass(frozen=True)
class RemoteFile:
    """A file as a hub lists it: size, and hashes for comparing local bytes with it."""

    path: str
    size: int
    git_sha1: str
    sha256: str | None


class Repositories:
    """The model repositories at one endpoint that one token may access.

    If a request fails, every method raises ``HubFailed`` and nothing else.
    """

    def __init__(self, endpoint: str, token: Secret, timeout: float) -> None:
        self.endpoint = endpoint
        self._token = token
        self._timeout = timeout
        self.clean = cleaner(token.values)
        self._reader = Reader(endpoint, timeout, _get_session, HTTPError, token, self.clean)

    def __repr__(self) -> str:
        return f"Repositories({self.endpoint})"

    # -- reading -------------------------------------------------------------------------------------------------

    def refs(self, repo: str) -> tuple[dict[str, str], dict[str, str]]:
        """Return the branches and the tags, each with the commit that it points to."""
        found = self._read_document(f"{_make_api_path(repo)}/refs")
        return _read_targets(found, "branches"), _read_targets(found, "tags")

    def info(self, repo: str, revision: str) -> dict[str, Any]:
        """Return the hub's description of a repository: ``id``, ``sha``, ``private``, ``gated``, ``siblings``, …"""
        return self._read_document(f"{_make_api_path(repo)}/revision/{_quote(revision)}")

    def files(self, repo: str, revision: str) -> dict[str, RemoteFile]:
        """Return the files of a commit, by path. The paths are unchecked."""
        files: dict[str, RemoteFile] = {}
        for page in self._reader.pages(f"{_make_api_path(repo)}/tree/{_quote(revision)}?recursive=true"):
            for item in _read_records(page):
                if item.get("type") == "file":
                    file = _read_file(item)
                    files[file.path] = file
        return files

    def content(self, repo: str, revision: str, path: str, limit: int) -> bytes:
        """Return the bytes of a file of at most ``limit`` bytes."""
        return self._reader.content(_resolve(repo, revision, path), limit)

    def download(self, repo: str, revision: str, path: str, sink: BinaryIO, limit: int) -> None:
        """Write the bytes of a file of at most ``limit`` bytes to ``sink``."""
        self._reader.download(_resolve(repo, revision, path), sink, limit)

    def part(self, repo: str, revision: str, path: str, start: int, length: int) -> bytes:
        """Return at most ``length`` bytes of a file from ``start`` on."""
        return self._reader.part(_resolve(repo, revision, path), start, length)

    def names(self, tags: list[str]) -> Iterator[str]:
        """Yield the ids of the models that have all of these tags."""
        query = "&".join(f"filter={_quote(tag)}" for tag in tags)
        pages = self._reader.pages(f"/api/models?{query}")
        yield from (str(item.get("id", "")) for page in pages for item in _read_records(page))

    # -- writing -------------------------------------------------------------------------------------------------

    def create(self, repo: str, *, private: bool | None) -> None:
        """Create a repository; an existing one is left unchanged."""
        self._write(lambda api: api.create_repo(repo, private=private, exist_ok=True), lambda: None)

    def commit(
        self,
        repo: str,
        branch: str,
        files: Mapping[str, Path | bytes],
        *,
        parent: str,
        message: str,
        delete: tuple[str, ...] = (),
    ) -> str:
        """Add, replace and delete files in one commit on top of ``parent``, and return its id.

        If the branch has moved since ``parent``, the hub refuses with status 412. If the answer is lost or wrong, the
        branch is read again: if its head holds these files, the commit has succeeded.
        """

        def send(api: Any) -> str:
            with _make_operations(files, delete, as_objects=self.endpoint != HUGGINGFACE) as operations:
                done = api.create_commit(
                    repo, operations, commit_message=message, revision=branch, parent_commit=parent
                )
                return str(done.oid)

        def landed() -> str | None:
            head = self.refs(repo)[0].get(branch)
            return head if head not in (None, parent) and self._holds(repo, head, files, delete) else None

        return self._write(send, landed, _count_bytes(files))

    def propose(self, repo: str, files: Mapping[str, Path | bytes], *, parent: str, message: str) -> str:
        """Open a pull request with these files and return its address. Not retried: that could open a second one."""

        def send(api: Any) -> str:
            with _make_operations(files, (), as_objects=self.endpoint != HUGGINGFACE) as operations:
                done = api.create_commit(repo, operations, commit_message=message, parent_commit=parent, create_pr=True)
                return str(done.pr_url)

        deadline = Deadline(self._timeout)
        deadline.allow(_count_bytes(files))
        result, failure = self._attempt(deadline, send)
        if failure is not None or result is None:
            raise failure or hostile("the answer names no pull request")
        return result

    def tag(self, repo: str, tag: str, commit: str) -> None:
        """Create ``tag`` at ``commit``; an equal tag is accepted, one at another commit fails with status 409."""

        def landed() -> bool | None:
            return True if self.refs(repo)[1].get(tag) == commit else None

        self._write(lambda api: api.create_tag(repo, tag=tag, revision=commit) or True, landed)

    def branch(self, repo: str, branch: str, commit: str) -> None:
        """Create a branch at ``commit``; an existing one is left unchanged."""

        def landed() -> bool | None:
            return True if branch in self.refs(repo)[0] else None

        self._write(lambda api: api.create_branch(repo, branch=branch, revision=commit) or True, landed)

    # -- how -----------------------------------------------------------------------------------------------------

    def _write(self, action: Callable[[Any], _Result], landed: Callable[[], _Result | None], size: int = 0) -> _Result:
        """Return the result of ``action``; if it failed but took effect all the same, that of ``landed``."""
        deadline, delay = Deadline(self._timeout), 0.25
        deadline.allow(size)
        while True:
            result, failure = self._attempt(deadline, action)
            if failure is None:
                return result  # type: ignore[return-value]
            try:
                found = landed()
            except HubFailed:
                found = None  # the first failure is more informative
            if found is not None:
                return found
            if not failure.transient or not deadline.pause(delay if failure.wait is None else failure.wait):
                raise failure
            delay = min(2 * delay, 4.0)

    def _attempt(self, deadline: Deadline, action: Callable[[Any], _Result]) -> tuple[_Result | None, HubFailed | None]:
        """Return the result of one attempt, or its failure. No exception of the client leaves this function."""

        def work() -> tuple[_Result | None, HubFailed | None]:
            try:
                marker = f"call-{secrets.token_hex(8)}"
                with limit_answers(_get_session(), deadline, marker):
                    return action(self._make_api(marker)), None
            except Exception as error:
                return None, self._explain_failure(error)

        try:
            return call_within(deadline, work)
        except TimeoutError as error:
            return None, HubFailed(str(error), transient=True)

    def _make_api(self, marker: str) -> Any:
        _check_online()
        hide_in_logs()
        # False, not None: with None, huggingface_hub looks up a token itself.
        return HfApi(
            endpoint=self.endpoint,
            token=self._token.reveal() or False,
            library_name="lora-plugins",
            user_agent={"lora-plugins": marker},
        )

    def _explain_failure(self, error: BaseException) -> HubFailed:
        if isinstance(error, HubFailed):
            return error
        chain: BaseException | None = error
        while chain is not None:
            response = getattr(chain, "response", None)
            if response is not None:
                return failure_of(response, self.clean)
            if isinstance(chain, HTTPError):
                return failure_of_network(chain, self.clean)
            chain = chain.__cause__ or chain.__context__
        return HubFailed(self.clean(f"{type(error).__name__}: {error}"))

    def _read_document(self, path: str) -> dict[str, Any]:
        found = self._reader.document(path)
        if not isinstance(found, dict):
            raise hostile(f"the answer to {path} is not an object")
        return found

    def _holds(self, repo: str, commit: str, files: Mapping[str, Path | bytes], delete: tuple[str, ...]) -> bool:
        """Whether a commit has these files with these bytes, and none of the deleted ones."""
        there = self.files(repo, commit)
        if any(path in there for path in delete):
            return False
        return all(path in there and _is_same(there[path], content) for path, content in files.items())


def _get_session() -> Any:
    _check_online()
    hide_in_logs()
    _trust_bundle()
    return get_session()


def _trust_bundle() -> None:
    """Trust the certificates that requests and curl would trust.

    OpenSSL, and thus httpx, reads only SSL_CERT_FILE and SSL_CERT_DIR. huggingface_hub before 1.0 used requests, for
    which users have set the other two variables.
    """
    if os.environ.get("SSL_CERT_FILE") or os.environ.get("SSL_CERT_DIR"):
        return
    bundle = os.environ.get("REQUESTS_CA_BUNDLE") or os.environ.get("CURL_CA_BUNDLE")
    if bundle:
        os.environ["SSL_CERT_DIR" if os.path.isdir(bundle) else "SSL_CERT_FILE"] = bundle


def _check_online() -> None:
    if constants.HF_HUB_OFFLINE:
        raise HubFailed("HF_HUB_OFFLINE is set", code="Offline")


class _Upload(CommitOperationAdd):  # type: ignore[misc]
    """A file to upload, of which every transfer reads its own copy.

    huggingface_hub 2.4.0 sends two files of equal content at the same time from the file object of one of them.
    """

    @contextmanager
    def as_file(self, **options: Any) -> Iterator[Any]:
        """Open the content at its beginning."""
        source = self.path_or_fileobj
        if isinstance(source, io.BytesIO):
            yield io.BytesIO(source.getbuffer())
        elif isinstance(source, io.BufferedReader):
            with open(source.name, "rb") as file:
                yield file
        else:
            with super().as_file(**options) as file:
                yield file


@contextmanager
def _make_operations(
    files: Mapping[str, Path | bytes], delete: tuple[str, ...], *, as_objects: bool
) -> Iterator[list[Any]]:
    """Yield the operations of a commit while its files are open.

    With ``as_objects``, all contents are open file objects, which huggingface_hub (seen in 2.4.0) never uploads through
    xet. Most hubs other than huggingface.co have no xet (https://github.com/huggingface/huggingface_hub/issues/4786),
    and one that names its xet storage can make the client write to any folder of this machine.
    """
    with ExitStack() as stack:
        operations: list[Any] = [CommitOperationDelete(path) for path in delete]
        for path, content in files.items():
            if as_objects:
                source: Any = (
                    io.BytesIO(content) if isinstance(content, bytes) else stack.enter_context(open(content, "rb"))
                )
            else:
                source = content
            operations.append(_Upload(path, source))
        if as_objects:
            stack.enter_context(_silence_advice())
        yield operations


@contextmanager
def _silence_advice() -> Iterator[None]:
    """Silence huggingface_hub's warning that file objects are not uploaded through xet, which is intended here."""

    def unless_advice(record: logging.LogRecord) -> bool:
        return "not supported by Xet" not in str(record.msg)

    logger = logging.getLogger("huggingface_hub._commit_api")
    logger.addFilter(unless_advice)
    try:
        yield
    finally:
        logger.removeFilter(unless_advice)


def configured_endpoint() -> str:
    """Return the hub that huggingface_hub is configured for: ``HF_ENDPOINT``, or huggingface.co."""
    return str(constants.ENDPOINT).rstrip("/")


def stored_token() -> str | None:
    """Return the token that the user logged in with, or that is in ``HF_TOKEN``."""
    return get_token()


def implicit_token() -> str | None:
    """Return the stored token for implicit use; ``None`` if ``HF_HUB_DISABLE_IMPLICIT_TOKEN`` is set."""
    return None if constants.HF_HUB_DISABLE_IMPLICIT_TOKEN else stored_token()


def cached_folder(repo: str, revision: str) -> Path | None:
    """Return the folder of a model revision in the local cache, which may hold only some of its files."""
    try:
        found = try_to_load_from_cache(repo, "config.json", revision=revision)
    except ValueError:
        return None  # not a valid repository name
    return Path(found).parent if isinstance(found, str) else None


def cached_snapshots(repo: str) -> list[Path]:
    """Return the folders of all commits of a model in the local cache."""
    folder = Path(constants.HF_HUB_CACHE, repo_folder_name(repo_id=repo, repo_type="model"), "snapshots")
    return sorted(folder.iterdir()) if folder.is_dir() else []


def _count_bytes(files: Mapping[str, Path | bytes]) -> int:
    return sum(len(file) if isinstance(file, bytes) else file.stat().st_size for file in files.values())


def _is_same(file: RemoteFile, content: Path | bytes) -> bool:
    data = content if isinstance(content, bytes) else content.read_bytes()
    if file.size != len(data):
        return False
    if file.sha256 is not None:
        return file.sha256 == hashlib.sha256(data).hexdigest()
    return file.git_sha1 == hashlib.sha1(b"blob %d\0" % len(data) + data, usedforsecurity=False).hexdigest()


def _quote(text: str) -> str:
    return quote(text, safe="")


def _make_api_path(repo: str) -> str:
    return f"/api/models/{quote(repo)}"


def _resolve(repo: str, revision: str, path: str) -> str:
    return f"/{quote(repo)}/resolve/{_quote(revision)}/{quote(path)}"


def _read_records(value: object) -> list[dict[str, Any]]:
    if not isinstance(value, list) or not all(isinstance(item, dict) for item in value):
        raise hostile("a listing is not a list of objects")
    return value


def _read_file(item: Mapping[str, Any]) -> RemoteFile:
    lfs = item.get("lfs")
    try:
        sha256 = str(lfs["oid"]) if lfs else None
        return RemoteFile(str(item["path"]), int(item["size"]), str(item["oid"]), sha256)
    except (KeyError, TypeError, ValueError):
        raise hostile("an entry of a listing lacks its path, size or hash") from None


def _read_targets(found: Mapping[str, Any], kind: str) -> dict[str, str]:
    try:
        return {str(ref["name"]): str(ref["targetCommit"]) for ref in found[kind]}
    except (KeyError, TypeError):
        raise hostile(f"the list of {kind} lacks names or commits") from None

"""The few operations on an object store that a registry needs."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from typing import Any, BinaryIO

from registry.errors import HostileAnswer, HubRefused, HubUnavailable, InvalidReference, ObjectStoreNotInstalled

__all__ = ["Store"]

_ADDRESS = re.compile(r"s3://(?P<bucket>[a-z0-9][a-z0-9.-]{1,61}[a-z0-9])(?:/(?P<prefix>[A-Za-z0-9._/-]*))?", re.ASCII)
_STATUS = re.compile(r"status code: (\d{3}[ \w]*)")
_CODE = re.compile(r"<Code>(\w{1,64})</Code>")
#: Seconds for one request, and for all attempts at it.
_REQUEST, _WHOLE = 60, timedelta(seconds=60)


class Store:
    """A prefix of a bucket.

    Args:
        address: ``s3://bucket/prefix``.

    Raises:
        InvalidReference: It is malformed.
        ObjectStoreNotInstalled: obstore is not installed.
    """

    def __init__(self, address: str) -> None:
        match = _ADDRESS.fullmatch(address)
        parts = [part for part in (match["prefix"] or "").split("/") if part] if match else [".."]
        if match is None or ".." in parts or "." in parts:
            # What has an @ may hold a secret.
            shown = "An address with @" if "@" in address else repr(address[:200])
            raise InvalidReference(f"{shown} is not an object store: give it as s3://bucket/prefix")
        try:
            import obstore.store
        except ImportError:
            raise ObjectStoreNotInstalled(
                f"{address} needs the package obstore: pip install 'lora-plugins[s3]'"
            ) from None
        self.address = "/".join([f"s3://{match['bucket']}", *parts])
        self._api: Any = obstore
        endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL") or ""
        settings: dict[str, Any] = {"endpoint": endpoint} if endpoint else {}
        self._store: Any = obstore.store.S3Store(
            match["bucket"],
            prefix="/".join(parts) or None,
            client_options={"allow_http": endpoint.startswith("http://"), "timeout": f"{_REQUEST}s"},
            retry_config={"max_retries": 5, "retry_timeout": _WHOLE},
            **settings,
        )

    def read(self, path: str, limit: int) -> tuple[bytes | None, str]:
        """Return an object of at most ``limit`` bytes and the mark of its state; ``None`` if there is none."""
        with self._translate_errors(path):
            try:
                answer = self._api.get(self._store, path)
            except FileNotFoundError:
                return None, ""
            if answer.meta["size"] > limit:
                raise HostileAnswer(f"{self.address}/{path} has more than the {limit} bytes that it may have")
            return bytes(answer.bytes()), answer.meta["e_tag"] or ""

    def find(self, path: str, limit: int) -> bytes | None:
        """Return an object of at most ``limit`` bytes; ``None`` if there is none."""
        return self.read(path, limit)[0]

    def read_range(self, path: str, start: int, length: int) -> bytes | None:
        """Return a part of an object; ``None`` if there is no such object."""
        with self._translate_errors(path):
            try:
                return bytes(self._api.get_range(self._store, path, start=start, length=length))
            except FileNotFoundError:
                return None

    def put(self, path: str, content: BinaryIO) -> None:
        """Write an object, in parts if it is large."""
        with self._translate_errors(path):
            self._api.put(self._store, path, content)

    def create(self, path: str, content: bytes) -> bool:
        """Write an object unless there is one; return whether it was written, as far as the answer tells."""
        with self._translate_errors(path):
            try:
                self._api.put(self._store, path, content, mode="create", use_multipart=False)
            except self._api.exceptions.AlreadyExistsError:
                return False
            return True

    def swap(self, path: str, content: bytes, mark: str) -> bool:
        """Replace an object whose state is still the marked one; return whether it was, as far as the answer tells."""
        errors = self._api.exceptions
        with self._translate_errors(path):
            try:
                self._api.put(self._store, path, content, mode={"e_tag": mark}, use_multipart=False)
            except (errors.PreconditionError, errors.AlreadyExistsError):
                return False
            return True

    def folders(self, path: str) -> list[str]:
        """Return the paths one level below a path that have objects below them."""
        with self._translate_errors(path):
            found = self._api.list_with_delimiter(self._store, path or None)
            return sorted(str(prefix).strip("/") for prefix in found["common_prefixes"])

    def list(self, path: str) -> Iterator[tuple[str, int, timedelta]]:
        """Yield path, size and age of the objects below a path."""
        with self._translate_errors(path):
            now = datetime.now(UTC)
            for batch in self._api.list(self._store, path):
                for item in batch:
                    yield item["path"], item["size"], now - item["last_modified"]

    def delete(self, path: str) -> None:
        """Delete an object."""
        with self._translate_errors(path):
            self._api.delete(self._store, path)

    @contextmanager
    def _translate_errors(self, path: str) -> Iterator[None]:
        """Raise the store's errors as those of a hub. They quote requests, so only status and code are shown."""
        errors = self._api.exceptions
        refused = (errors.PermissionDeniedError, errors.UnauthenticatedError, errors.NotSupportedError)
        try:
            yield
        except refused as error:
            raise HubRefused(f"{self.address}/{path}: the object store refuses it ({_describe(error)})") from None
        except FileNotFoundError as error:
            raise HubRefused(f"{self.address}: the bucket does not exist ({_describe(error)})") from None
        except errors.BaseError as error:
            raise HubUnavailable(f"{self.address}/{path}: it failed ({_describe(error)})") from None


def _describe(error: Exception) -> str:
    text = str(error)
    status, code = _STATUS.search(text), _CODE.search(text)
    found = [match[1].strip() for match in (status, code) if match]
    return ", ".join(found) or type(error).__name__

"""Read from a hub over HTTP within limits of time and size.

The HTTP client is passed in: huggingface_hub's, with its proxies, certificates and offline switch.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, BinaryIO, TypeVar
from urllib.parse import urljoin

from registry.hubs.http.deadline import Deadline, call_within
from registry.hubs.http.failures import HubFailed, failure_of, failure_of_network, hostile
from registry.hubs.http.redirects import RefusedRedirect, next_url, same_origin
from registry.hubs.http.secret import Secret

__all__ = ["Reader"]

_Result = TypeVar("_Result")

_MAX_REDIRECTS = 5
_MAX_PAGES = 1000
USER_AGENT = "lora-plugins-registry"
#: Seconds without a byte after which a connection counts as broken.
_SILENCE = 10.0
#: Listings and other JSON; ten thousand tags are about 1.5 MB.
JSON_LIMIT = 64 * 1024 * 1024


@dataclass(frozen=True)
class Reader:
    """GET requests to one hub.

    ``session`` returns the HTTP client (httpx's interface) and ``network_error`` is the base class of its exceptions.
    ``token`` is sent to the hub itself and to no other host. ``clean`` cleans text from outside for messages.
    """

    endpoint: str
    timeout: float
    session: Callable[[], Any]
    network_error: type[Exception]
    token: Secret
    clean: Callable[[str], str]

    def __repr__(self) -> str:
        return f"Reader({self.endpoint})"

    def document(self, path: str) -> object:
        """Return the JSON document at ``path`` of the hub."""
        return self._read_page(path, JSON_LIMIT, Deadline(self.timeout))[0]

    def pages(self, path: str) -> list[object]:
        """Return the documents of a paginated listing; one time limit and one size limit cover all pages."""
        found: list[object] = []
        deadline, left, url = Deadline(self.timeout), JSON_LIMIT, path
        for _ in range(_MAX_PAGES):
            document, size, following = self._read_page(url, left, deadline)
            found.append(document)
            if following is None:
                return found
            left, url = left - size, following
        raise hostile(f"the listing {path} does not end after {_MAX_PAGES} pages")

    def content(self, path: str, limit: int) -> bytes:
        """Return the content at ``path`` of the hub, at most ``limit`` bytes."""
        return self._read(path, limit, Deadline(self.timeout))[0]

    def download(self, path: str, sink: BinaryIO, limit: int) -> None:
        """Write the content at ``path`` of the hub to ``sink``, resuming after a broken connection."""
        deadline, start = Deadline(self.timeout), sink.tell()

        def attempt() -> None:
            done = sink.tell() - start
            with self._open(path, deadline, {"Range": f"bytes={done}-"} if done else {}) as response:
                if done and not response.headers.get("Content-Range", "").startswith(f"bytes {done}-"):
                    sink.seek(start)
                    sink.truncate()
                    done = 0
                for chunk in self._read_chunks(response, deadline, limit - done, path):
                    sink.write(chunk)

        self._insist(deadline, attempt)

    def part(self, path: str, start: int, length: int) -> bytes:
        """Return at most ``length`` bytes from ``start`` on; if the server ignores ranges, reading stops there."""
        deadline = Deadline(self.timeout)
        asked = {"Range": f"bytes={start}-{start + length - 1}"}

        def attempt() -> bytes:
            received = b""
            with self._open(path, deadline, asked) as response:
                ranged = response.headers.get("Content-Range", "").startswith(f"bytes {start}-")
                skipped = 0 if ranged else start
                for chunk in response.iter_bytes():
                    received += chunk[skipped:]
                    skipped = max(0, skipped - len(chunk))
                    deadline.allow(len(chunk))
                    if len(received) >= length:
                        break
                    if deadline.passed:
                        raise HubFailed(f"{path} comes too slowly", transient=True)
            return received[:length]

        return self._insist(deadline, attempt)

    def _read(self, path: str, limit: int, deadline: Deadline) -> tuple[bytes, str | None]:
        """Return the content at ``path``, and the address of the next page if there is one."""

        def attempt() -> tuple[bytes, str | None]:
            with self._open(path, deadline, {}) as response:
                body = b"".join(self._read_chunks(response, deadline, limit, path))
                return body, response.links.get("next", {}).get("url")

        body, following = self._insist(deadline, attempt)
        return body, following and self._resolve_next_page(path, following)

    def _resolve_next_page(self, path: str, link: str) -> str:
        try:
            url = urljoin(self._make_url(path), link)
            own = same_origin(self.endpoint, url)
        except ValueError:
            own = False
        if not own:
            raise hostile(f"the next page of {path} is said to be on another host")
        return url

    def _insist(self, deadline: Deadline, attempt: Callable[[], _Result]) -> _Result:
        """Return the result of the first attempt that succeeds before the deadline."""
        delay = 0.25
        while True:
            try:
                return call_within(deadline, attempt)
            except HubFailed as error:
                failure = error
            except TimeoutError as error:
                failure = HubFailed(str(error), transient=True)
            except self.network_error as error:
                failure = failure_of_network(error, self.clean)
            if not failure.transient or not deadline.pause(delay if failure.wait is None else failure.wait):
                raise failure
            delay = min(2 * delay, 4.0)

    @contextmanager
    def _open(self, path: str, deadline: Deadline, extra: dict[str, str]) -> Iterator[Any]:
        """Yield the answer to a GET request after redirects, with its body unread."""
        url = self._make_url(path)
        for _ in range(_MAX_REDIRECTS):
            # No compression, so that the size limit applies both to what is sent and to what is kept.
            headers = {"Accept-Encoding": "identity", "User-Agent": USER_AGENT, **extra}
            # The token is added by a function, so that no variable of these frames ever holds it.
            auth = self.token.authorize if same_origin(self.endpoint, url) else None
            silence = max(0.1, min(_SILENCE, deadline.remaining))
            options = {"headers": headers, "auth": auth, "timeout": silence, "follow_redirects": False}
            with self.session().stream("GET", url, **options) as response:
                self._refuse_compressed(response)
                if response.status_code not in (301, 302, 303, 307, 308):
                    if response.status_code not in (200, 206):
                        raise failure_of(response, self.clean)
                    yield response
                    return
                location = response.headers.get("Location", "")
            if self._has_token(location):
                del location
                raise hostile("a redirect repeats the token that was sent")
            try:
                url = next_url(self.endpoint, url, location)
            except RefusedRedirect as reason:
                refusal = str(reason)
            else:
                continue
            raise hostile(self.clean(refusal))
        raise hostile(f"{path} is redirected more than {_MAX_REDIRECTS} times")

    def _refuse_compressed(self, response: Any) -> None:
        encoding = response.headers.get("Content-Encoding", "identity")
        if encoding not in ("", "identity"):
            raise hostile(self.clean(f"an answer is compressed ({encoding}), which was not asked for"))

    def _read_chunks(self, response: Any, deadline: Deadline, limit: int, path: str) -> Iterator[bytes]:
        received = 0
        for chunk in response.iter_bytes():
            received += len(chunk)
            if received > limit:
                raise hostile(f"{path} has more than the {limit} bytes that it may have")
            yield chunk
            # Received bytes extend the deadline: a large file may take long, a stalling one may not.
            deadline.allow(len(chunk))
            if deadline.passed:
                raise HubFailed(f"{path} comes too slowly", transient=True)

    def _make_url(self, path: str) -> str:
        return self.endpoint + path if path.startswith("/") else path

    def _read_page(self, path: str, limit: int, deadline: Deadline) -> tuple[object, int, str | None]:
        """Return a document, its size, and the address of the next page."""
        body, following = self._read(path, limit, deadline)
        size, found = len(body), self._parse(body)
        # A token that the hub repeats as a path, name or id would be shown, stored and logged. No variable of this
        # frame may hold it when the error is raised.
        echoes = self._has_token(body.decode("utf-8", "replace")) or (
            b"\\" in body and self._has_token(json.dumps(found, ensure_ascii=False, default=str))
        )
        del body
        if echoes or (following is not None and self._has_token(following)):
            del found, following
            raise hostile("an answer repeats the token that was sent")
        if found is _NO_JSON:
            raise hostile(f"the answer to {path} is not JSON")
        return found, size, following

    def _parse(self, body: bytes) -> object:
        try:
            return json.loads(body)
        except (ValueError, RecursionError):
            return _NO_JSON

    def _has_token(self, text: str) -> bool:
        return any(value in text for value in self.token.values())


_NO_JSON = object()

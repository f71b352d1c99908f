"""Reading from a hub over HTTP: one way to ask, with a time limit, a size limit and care about where redirects lead.

The HTTP client is handed in (it is the one of huggingface_hub, with its proxies, certificates and offline switch).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, BinaryIO, TypeVar
from urllib.parse import urljoin

from registry.hubs.deadline import Deadline, call_within
from registry.hubs.failures import HubFailed, failure_of, hostile
from registry.hubs.redirects import RefusedRedirect, next_url, same_origin

__all__ = ["Reader"]

_Result = TypeVar("_Result")

_MAX_REDIRECTS = 5
_MAX_PAGES = 1000
USER_AGENT = "lora-plugins-registry"
#: Without a byte for this many seconds, a connection is broken.
_SILENCE = 10.0
#: Listings and other JSON; ten thousand tags are about 1.5 MB.
JSON_LIMIT = 64 * 1024 * 1024


@dataclass(frozen=True)
class Reader:
    """GET requests to one hub.

    ``session`` returns the HTTP client (httpx's interface) and ``network_error`` is the base class of its exceptions.
    ``authorize`` adds the token to a request; it is called for requests to the hub itself and to nobody else. ``clean``
    makes text that came from outside fit to be shown.
    """

    endpoint: str
    timeout: float
    session: Callable[[], Any]
    network_error: type[Exception]
    authorize: Callable[[Any], Any]
    clean: Callable[[str], str]

    def __repr__(self) -> str:
        return f"Reader({self.endpoint})"

    def document(self, path: str) -> object:
        """The JSON document at ``path`` of the hub."""
        return self._parse(self.content(path, JSON_LIMIT), path)

    def pages(self, path: str) -> Iterator[object]:
        """The documents of a listing that comes in pages."""
        url: str | None = path
        for _ in range(_MAX_PAGES):
            if url is None:
                return
            body, links = self._read(url, JSON_LIMIT)
            yield self._parse(body, url)
            url = links
        raise hostile(f"the listing {path} does not end after {_MAX_PAGES} pages")

    def content(self, path: str, limit: int) -> bytes:
        """The content at ``path`` of the hub, if it has no more than ``limit`` bytes."""
        return self._read(path, limit)[0]

    def download(self, path: str, sink: BinaryIO, limit: int) -> None:
        """Write the content at ``path`` of the hub to ``sink``, going on where a broken connection left off."""
        deadline, start = Deadline(self.timeout), sink.tell()

        def attempt() -> None:
            done = sink.tell() - start
            with self._open(path, deadline, {"Range": f"bytes={done}-"} if done else {}) as response:
                if done and not response.headers.get("Content-Range", "").startswith(f"bytes {done}-"):
                    sink.seek(start)
                    sink.truncate()
                    done = 0
                for chunk in self._chunks(response, deadline, limit - done, path):
                    sink.write(chunk)

        self._insist(deadline, attempt)

    def part(self, path: str, start: int, length: int) -> bytes:
        """At most ``length`` bytes from ``start`` on; a server that knows no ranges is read up to there, and not on."""
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

    def _read(self, path: str, limit: int) -> tuple[bytes, str | None]:
        """The content at ``path``, and the address of the next page if there is one."""
        deadline = Deadline(self.timeout)

        def attempt() -> tuple[bytes, str | None]:
            with self._open(path, deadline, {}) as response:
                body = b"".join(self._chunks(response, deadline, limit, path))
                return body, response.links.get("next", {}).get("url")

        body, following = self._insist(deadline, attempt)
        return body, following and self._next_page(path, following)

    def _next_page(self, path: str, link: str) -> str:
        try:
            url = urljoin(self._url(path), link)
            own = same_origin(self.endpoint, url)
        except ValueError:
            own = False
        if not own:
            raise hostile(f"the next page of {path} is said to be on another host")
        return url

    def _insist(self, deadline: Deadline, attempt: Callable[[], _Result]) -> _Result:
        """The result of the first attempt that succeeds before the deadline."""
        delay = 0.25
        while True:
            try:
                return call_within(deadline, attempt)
            except HubFailed as error:
                failure = error
            except TimeoutError as error:
                failure = HubFailed(str(error), transient=True)
            except self.network_error as error:
                failure = HubFailed(self.clean(f"{type(error).__name__}: {error}"), transient=True)
            if not failure.transient or not deadline.pause(delay if failure.wait is None else failure.wait):
                raise failure
            delay = min(2 * delay, 4.0)

    @contextmanager
    def _open(self, path: str, deadline: Deadline, extra: dict[str, str]) -> Iterator[Any]:
        """The answer to a GET request, after redirects, its body not yet read."""
        url = self._url(path)
        for _ in range(_MAX_REDIRECTS):
            # No compression: a size limit that counts what was sent is a limit on what is kept, too.
            headers = {"Accept-Encoding": "identity", "User-Agent": USER_AGENT, **extra}
            # The token is added by a function, so that no variable of these frames ever holds it.
            auth = self.authorize if same_origin(self.endpoint, url) else None
            silence = max(0.1, min(_SILENCE, deadline.remaining))
            options = {"headers": headers, "auth": auth, "timeout": silence, "follow_redirects": False}
            with self.session().stream("GET", url, **options) as response:
                if response.status_code not in (301, 302, 303, 307, 308):
                    if response.status_code not in (200, 206):
                        raise failure_of(response, self.clean)
                    yield response
                    return
                location = response.headers.get("Location", "")
            try:
                url = next_url(self.endpoint, url, location)
            except RefusedRedirect as reason:
                refusal = str(reason)
            else:
                continue
            raise hostile(refusal)
        raise hostile(f"{path} is redirected more than {_MAX_REDIRECTS} times")

    def _chunks(self, response: Any, deadline: Deadline, limit: int, path: str) -> Iterator[bytes]:
        received = 0
        for chunk in response.iter_bytes():
            received += len(chunk)
            if received > limit:
                raise hostile(f"{path} has more than the {limit} bytes that it may have")
            yield chunk
            # Bytes earn time, so that a large file may take long and a dripping one may not.
            deadline.allow(len(chunk))
            if deadline.passed:
                raise HubFailed(f"{path} comes too slowly", transient=True)

    def _url(self, path: str) -> str:
        return self.endpoint + path if path.startswith("/") else path

    def _parse(self, body: bytes, path: str) -> object:
        try:
            return json.loads(body)
        except (ValueError, RecursionError):
            pass
        raise hostile(f"the answer to {path} is not JSON")

"""Faults that a loopback Hub can simulate.

Everything here is off until asked for, and ``clear()`` switches it off again. The names of the routes are the keys of
``registry.testing.routes.ROUTES``: ``"commit"``, ``"tag"``, ``"refs"``, ``"tree"``, ``"resolve"``, ``"storage"``, …
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatch
from urllib.parse import unquote

from registry.testing.wire import Request, Response

__all__ = ["Faults"]

#: The routes that hand out the bytes of files. (``resolve`` only redirects.)
_BYTES = ("resolve_cache", "raw", "storage")


@dataclass
class _Fault:
    routes: tuple[str, ...]
    times: int | None
    pattern: str | None = None
    #: Answers in place of the route, or returns None to let it go on.
    before: Callable[[Request], Response | None] | None = None
    #: Changes the route's answer.
    after: Callable[[Request, Response], Response] | None = None

    def concerns(self, request: Request, path: str | None, response: Response | None) -> bool:
        if self.times == 0 or ("*" not in self.routes and request.route not in self.routes):
            return False
        if self.routes is _BYTES and (response is None or response.status not in (200, 206) or not response.body):
            return False
        return self.pattern is None or fnmatch(path or "", self.pattern)

    def spend(self) -> None:
        if self.times is not None:
            self.times -= 1


class Faults:
    """The faults of one loopback Hub, as methods; each may be called any number of times."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._faults: list[_Fault] = []
        self._listing: list[str] = []
        self._storage_paths: dict[str, str] = {}
        #: Commit even if the branch has moved past ``parentCommit``, as some self-hosted hubs do.
        self.ignores_parent_commit = False
        #: Don't accept a tag where a revision is expected, as some self-hosted hubs do.
        self.resolves_tags = True
        #: Value of ``X-Xet-Cas-Url``; ``None`` means a hub without xet, which answers 404.
        self.xet_cas_url: str | None = None

    def clear(self) -> None:
        """Switch all faults off."""
        with self._lock:
            self._faults.clear()
            self._listing.clear()
        self.ignores_parent_commit = False
        self.resolves_tags = True
        self.xet_cas_url = None

    # -- answers that go wrong -----------------------------------------------------------------------------------

    def lose_response(self, route: str, *, times: int | None = 1, status: int | None = None) -> None:
        """Handle the request, then close the connection without an answer, or answer with ``status`` (a gateway's 503).

        ``times=None`` here and below means: until ``clear()``.
        """

        def lose(request: Request, response: Response) -> Response:
            return Response(drop=True) if status is None else Response.of({"error": "lost"}, status)

        self._add(_Fault((route,), times, after=lose))

    def status(
        self, route: str, status: int, *, times: int | None = 1, headers: Mapping[str, str] | None = None
    ) -> None:
        """Answer with ``status`` instead of handling the request; ``route="*"`` is every route."""

        def refuse(request: Request) -> Response:
            return Response.of({"error": f"{status} on purpose"}, status, **dict(headers or {}))

        self._add(_Fault((route,), times, before=refuse))

    def refuse_connection(self, route: str, *, times: int | None = 1) -> None:
        """Close the connection instead of handling the request."""
        self._add(_Fault((route,), times, before=lambda request: Response(drop=True)))

    def slow(self, route: str, seconds: float, *, times: int | None = None) -> None:
        """Wait before handling the request."""

        def wait(request: Request) -> None:
            time.sleep(seconds)

        self._add(_Fault((route,), times, before=wait))

    def drip(self, route: str, seconds: float, *, times: int | None = None) -> None:
        """Send the answer's body a byte at a time, with ``seconds`` between them."""

        def slowly(request: Request, response: Response) -> Response:
            response.drip = seconds
            return response

        self._add(_Fault((route,), times, after=slowly))

    def answer(self, route: str, body: bytes, *, status: int = 200, times: int | None = 1, **headers: str) -> None:
        """Answer with ``body`` instead of handling the request: an HTML page, nothing, half a JSON document."""
        sent = {name.replace("_", "-"): value for name, value in headers.items()}
        self._add(_Fault((route,), times, before=lambda request: Response(status, body, dict(sent))))

    def redirect(self, route: str, location: str, *, times: int | None = None, path: str | None = None) -> None:
        """Send the client elsewhere (302) instead; ``path`` restricts it to files that match this pattern."""

        def away(request: Request, response: Response) -> Response:
            return Response(302, b"", {**response.headers, "Location": location, "Content-Length": "0"})

        self._add(_Fault((route,), times, path, after=away))

    # -- bytes that go wrong -------------------------------------------------------------------------------------

    def tamper(self, path: str, *, times: int | None = None) -> None:
        """Flip a bit in the middle of each file whose path matches; its size, ETag and headers stay as they were."""

        def flip(request: Request, response: Response) -> Response:
            middle = len(response.body) // 2
            changed = bytes([response.body[middle] ^ 1])
            response.body = response.body[:middle] + changed + response.body[middle + 1 :]
            return response

        self._add(_Fault(_BYTES, times, path, after=flip))

    def truncate(self, path: str, *, times: int | None = None, declared: bool = False) -> None:
        """Send half of each file whose path matches, then hang up; with ``declared`` its size is announced as half."""

        def halve(request: Request, response: Response) -> Response:
            half = len(response.body) // 2
            if declared:
                response.body = response.body[:half]
            else:
                response.cut_at = half
            return response

        self._add(_Fault(_BYTES, times, path, after=halve))

    def replace(self, path: str, content: bytes, *, times: int | None = None) -> None:
        """Send ``content`` for each file whose path matches, under the original's ETag."""

        def exchange(request: Request, response: Response) -> Response:
            response.body = content
            return response

        self._add(_Fault(_BYTES, times, path, after=exchange))

    def hostile_listing(self, paths: Iterable[str]) -> None:
        """List these paths in every repository, besides the real ones; they can be downloaded, too."""
        with self._lock:
            self._listing.extend(paths)

    # -- callbacks -----------------------------------------------------------------------------------------------

    def call_before(self, route: str, function: Callable[[Request], object], *, times: int | None = None) -> None:
        """Call ``function`` with each request before it is handled (to kill the client there, say)."""

        def call(request: Request) -> None:
            function(request)

        self._add(_Fault((route,), times, before=call))

    def call_after(self, route: str, function: Callable[[Request], object], *, times: int | None = None) -> None:
        """Call ``function`` with each request after it was handled and before it is answered."""

        def call(request: Request, response: Response) -> Response:
            function(request)
            return response

        self._add(_Fault((route,), times, after=call))

    # -- for the server ------------------------------------------------------------------------------------------

    @property
    def listing(self) -> tuple[str, ...]:
        """The paths of ``hostile_listing``."""
        return tuple(self._listing)

    def name_storage(self, sha256: str, path: str) -> None:
        """Record the path under which a client asked for a stored object: the storage origin knows only its hash."""
        self._storage_paths[sha256] = path

    def before(self, request: Request) -> Response | None:
        """Return a fault's answer in place of the route's, if a fault has one."""
        for fault in self._find_due(request, None):
            if fault.before is not None and (answer := fault.before(request)) is not None:
                return answer
        return None

    def after(self, request: Request, response: Response) -> Response:
        """Return the route's answer, changed by the faults."""
        for fault in self._find_due(request, response):
            if fault.after is not None:
                response = fault.after(request, response)
        return response

    def _add(self, fault: _Fault) -> None:
        with self._lock:
            self._faults.append(fault)

    def _find_due(self, request: Request, response: Response | None) -> list[_Fault]:
        """Return the faults that apply to this request, before or after its response, and count each as used."""
        path = self._find_path(request)
        with self._lock:
            due = [
                fault
                for fault in self._faults
                if (fault.after if response is not None else fault.before) is not None
                and fault.concerns(request, path, response)
            ]
            for fault in due:
                fault.spend()
            return due

    def _find_path(self, request: Request) -> str | None:
        if request.route == "storage":
            return self._storage_paths.get(request.parts["sha256"])
        path = request.parts.get("path")
        return None if path is None else unquote(path)

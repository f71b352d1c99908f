"""Limit what huggingface_hub's own calls accept from a hub.

Its client (seen in 2.4.0) reads every answer to its end, decompresses it, and retries for half a minute; callers cannot
change that. Hooks of the HTTP client enforce limits during one of the registry's calls, and only for that call.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from registry.hubs.http.deadline import Deadline
from registry.hubs.http.failures import HubFailed, hostile

__all__ = ["ANSWER_LIMIT", "limit_answers"]

#: Bytes of an answer to a write; for a commit of a thousand files it is below 1 MB.
ANSWER_LIMIT = 16 * 1024 * 1024


@contextmanager
def limit_answers(session: Any, deadline: Deadline, marker: str) -> Iterator[None]:
    """Limit size and time of the answers that one call of huggingface_hub gets.

    Args:
        session: The HTTP client with httpx's interface, whose hooks are used.
        deadline: Time limit of the call with all its requests.
        marker: Text in the ``User-Agent`` of the call's requests.
    """
    watch = _Watch(deadline, marker, threading.get_ident())
    hooks = session.event_hooks
    hooks["request"].append(watch.on_request)
    hooks["response"].append(watch.on_response)
    try:
        yield
    finally:
        hooks["request"].remove(watch.on_request)
        hooks["response"].remove(watch.on_response)


class _Watch:
    """The hooks of one call."""

    def __init__(self, deadline: Deadline, marker: str, thread: int) -> None:
        self._deadline, self._marker, self._thread = deadline, marker, thread

    def on_request(self, request: Any) -> None:
        """Ask for an uncompressed answer: a decompressed one could be a thousand times as large."""
        if self._is_ours(request):
            self._check_time()
            request.headers["Accept-Encoding"] = "identity"

    def on_response(self, response: Any) -> None:
        """Limit how much of an answer's body is read."""
        if not self._is_ours(response.request):
            return
        encoding = response.headers.get("Content-Encoding", "identity")
        if encoding not in ("", "identity"):
            raise hostile(f"an answer is compressed ({encoding}), which was not asked for")
        kind = next(base for base in type(response.stream).__mro__ if base.__name__ == "SyncByteStream")
        response.stream = _make_limited(kind)(response.stream, self._check_time)

    def _is_ours(self, request: Any) -> bool:
        # huggingface_hub 2.4 uploads files to storage in other threads, without our User-Agent.
        return (
            threading.get_ident() == self._thread
            or self._marker in request.headers.get("User-Agent", "")
            or request.method == "PUT"
        )

    def _check_time(self) -> None:
        if self._deadline.passed:
            raise HubFailed(f"no answer within {self._deadline.seconds:.0f} seconds", transient=True)


def _make_limited(kind: Any) -> Any:
    """Make a byte stream class that fails above the limit; httpx requires its own base class."""

    class Limited(kind):  # type: ignore[misc]
        def __init__(self, stream: Any, check: Any) -> None:
            self._stream, self._check = stream, check

        def __iter__(self) -> Iterator[bytes]:
            received = 0
            for chunk in self._stream:
                received += len(chunk)
                if received > ANSWER_LIMIT:
                    raise hostile(f"an answer has more than the {ANSWER_LIMIT:,} bytes that it may have")
                self._check()
                yield chunk

        def close(self) -> None:
            self._stream.close()

    return Limited

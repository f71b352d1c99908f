"""Time limits for calls to a hub, with all their retries."""

from __future__ import annotations

import contextvars
import queue
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TypeVar

__all__ = ["OPERATION", "Deadline", "call_within", "limit_operation"]

_Result = TypeVar("_Result")

#: Bytes per second below which a transfer counts as hanging.
SLOWEST_TRANSFER = 100_000
#: Seconds that a pull, a listing or another operation may take with all its calls, besides the transfer of bytes.
OPERATION = 300.0


class Deadline:
    """The time limit of a call with all its retries and redirects.

    The limit of the operation that the call belongs to may end earlier.
    """

    def __init__(self, seconds: float) -> None:
        self._whole = _WHOLE.get()
        self.seconds = seconds if self._whole is None else max(0.0, min(seconds, self._whole.remaining))
        self._end = time.monotonic() + seconds

    def allow(self, size: int) -> None:
        """Extend the limit by the time that a transfer of ``size`` bytes may take."""
        self.seconds += size / SLOWEST_TRANSFER
        self._end += size / SLOWEST_TRANSFER
        if self._whole is not None:
            self._whole.allow(size)

    @property
    def remaining(self) -> float:
        """Seconds left; zero or less if it has passed."""
        own = self._end - time.monotonic()
        return own if self._whole is None else min(own, self._whole.remaining)

    @property
    def passed(self) -> bool:
        """Whether the limit has passed."""
        return self.remaining <= 0

    def pause(self, seconds: float) -> bool:
        """Sleep if that leaves time, and return whether it did."""
        if seconds >= self.remaining:
            return False
        time.sleep(seconds)
        return True


_WHOLE: ContextVar[Deadline | None] = ContextVar("whole operation", default=None)


@contextmanager
def limit_operation(seconds: float = OPERATION) -> Iterator[None]:
    """Give all calls in the block one common deadline; in a nested block, the outer deadline applies."""
    if _WHOLE.get() is not None:
        yield
        return
    token = _WHOLE.set(Deadline(seconds))
    try:
        yield
    finally:
        _WHOLE.reset(token)


def call_within(deadline: Deadline, function: Callable[[], _Result]) -> _Result:
    """Return or raise what ``function`` does, unless it takes too long.

    The function runs in its own thread, because the HTTP client's waits cannot be interrupted. After a timeout it
    continues in the background, so it may still take effect. Its exception is raised here without context.

    Raises:
        TimeoutError: The deadline passed.
    """
    outcome: queue.SimpleQueue[tuple[_Result | None, BaseException | None]] = queue.SimpleQueue()

    def work() -> None:
        try:
            outcome.put((function(), None))
        except BaseException as error:
            outcome.put((None, error))

    context = contextvars.copy_context()
    threading.Thread(target=context.run, args=(work,), name="registry-hub-call", daemon=True).start()
    while True:
        try:
            result, error = outcome.get(timeout=max(0.0, deadline.remaining))
            break
        except queue.Empty:
            # Bytes that arrived meanwhile may have extended it.
            if deadline.passed:
                raise TimeoutError(f"no answer within {deadline.seconds:.0f} seconds") from None
    if error is not None:
        raise error
    return result  # type: ignore[return-value]

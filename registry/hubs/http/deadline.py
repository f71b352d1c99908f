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

#: Transfers may be this slow (bytes per second) before they count as hanging.
SLOWEST_TRANSFER = 100_000
#: Seconds that a pull, a listing or another operation may take with all its calls, besides the transfer of bytes.
OPERATION = 300.0


class Deadline:
    """The moment at which a call is given up, however many retries and redirects it takes.

    The operation that the call is part of may be over earlier.
    """

    def __init__(self, seconds: float) -> None:
        self._whole = _WHOLE.get()
        self.seconds = seconds if self._whole is None else max(0.0, min(seconds, self._whole.remaining))
        self._end = time.monotonic() + seconds

    def allow(self, size: int) -> None:
        """Give the call the time that a transfer of ``size`` more bytes may take."""
        self.seconds += size / SLOWEST_TRANSFER
        self._end += size / SLOWEST_TRANSFER
        if self._whole is not None:
            self._whole.allow(size)

    @property
    def remaining(self) -> float:
        """Seconds left; zero or less when it is over."""
        own = self._end - time.monotonic()
        return own if self._whole is None else min(own, self._whole.remaining)

    @property
    def passed(self) -> bool:
        """Whether it is over."""
        return self.remaining <= 0

    def pause(self, seconds: float) -> bool:
        """Wait, if there is time left afterwards; whether it was waited."""
        if seconds >= self.remaining:
            return False
        time.sleep(seconds)
        return True


_WHOLE: ContextVar[Deadline | None] = ContextVar("whole operation", default=None)


@contextmanager
def limit_operation(seconds: float = OPERATION) -> Iterator[None]:
    """Give all calls within the block one deadline together; within another such block, that one's counts."""
    if _WHOLE.get() is not None:
        yield
        return
    token = _WHOLE.set(Deadline(seconds))
    try:
        yield
    finally:
        _WHOLE.reset(token)


def call_within(deadline: Deadline, function: Callable[[], _Result]) -> _Result:
    """What ``function`` returns or raises, unless it takes too long.

    It runs in a thread of its own, because the client's waits can't be interrupted; a call that is given up goes on in
    the background, so its effect may still happen. What the function raises is raised here without its context.

    Raises:
        TimeoutError: the deadline passed.
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
            # It may have been put off meanwhile, by bytes that arrived.
            if deadline.passed:
                raise TimeoutError(f"no answer within {deadline.seconds:.0f} seconds") from None
    if error is not None:
        raise error
    return result  # type: ignore[return-value]

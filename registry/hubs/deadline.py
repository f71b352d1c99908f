"""Time limits for calls to a hub: one clock for a call with all its retries, and a way to leave a call that hangs."""

from __future__ import annotations

import contextvars
import queue
import threading
import time
from collections.abc import Callable
from typing import TypeVar

__all__ = ["Deadline", "call_within"]

_Result = TypeVar("_Result")

#: Transfers may be this slow (bytes per second) before they count as hanging.
SLOWEST_TRANSFER = 100_000


class Deadline:
    """The moment at which a call is given up, however many retries and redirects it takes."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self._end = time.monotonic() + seconds

    def allow(self, size: int) -> None:
        """Give the call the time that a transfer of ``size`` more bytes may take."""
        self.seconds += size / SLOWEST_TRANSFER
        self._end += size / SLOWEST_TRANSFER

    @property
    def remaining(self) -> float:
        """Seconds left; zero or less when it is over."""
        return self._end - time.monotonic()

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

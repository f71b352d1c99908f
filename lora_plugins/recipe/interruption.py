"""End a run on Ctrl-C or SIGTERM after a whole step, with a checkpoint."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch

# Subclassed here; this module is imported where a run begins, never for the program's help.
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

if TYPE_CHECKING:
    from types import FrameType

__all__ = ["GRACE", "SIGNALS", "Interruption"]


SIGNALS = (signal.SIGINT, signal.SIGTERM)

#: Seconds in which further signals count as the first one: under torchrun, one Ctrl-C reaches a process both from the
#: terminal and from its launcher.
GRACE = 3.0


class Interruption(TrainerCallback):  # type: ignore[misc]
    """Saves a checkpoint and stops training after the step in which the first signal came.

    With several processes it is enough that one of them gets the signal. A second signal, some seconds later, ends
    the program at once.

    Args:
        grace: Seconds in which further signals count as the first one.

    Attributes:
        signal: The signal that came, ``None`` if none did.
        stopped_at: The step after which training was stopped, ``None`` if it was not.
    """

    def __init__(self, grace: float = GRACE) -> None:
        self.grace = grace
        self.signal: int | None = None
        self._came = 0.0
        self.stopped_at: int | None = None

    @contextlib.contextmanager
    def listening(self) -> Iterator[None]:
        """Handle the signals inside the block; outside the main thread, where Python forbids that, do nothing."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {number: signal.signal(number, self._receive) for number in SIGNALS}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if self.signal is not None:
            if time.monotonic() - self._came > self.grace:
                signal.signal(number, signal.SIG_DFL)
                os.kill(os.getpid(), number)
            return
        self.signal = number
        self._came = time.monotonic()
        name = signal.Signals(number).name
        # print() inside a handler can meet a half-finished print(); one write cannot.
        os.write(sys.__stderr__.fileno() if sys.__stderr__ else 2, f"\n{name}: stopping after this step.\n".encode())

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        number = _find_largest(self.signal or 0, args)
        if not number:
            return
        self.signal = number
        if state.global_step < state.max_steps:
            self.stopped_at = state.global_step
            control.should_save = True
            # A spot instance ends within two minutes; the evaluation precedes the checkpoint and may take longer.
            control.should_evaluate = False
            control.should_training_stop = True

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Prevent an evaluation and a second checkpoint: to the Trainer, the interruption is the epoch's end."""
        if self.stopped_at is not None:
            control.should_save = control.should_evaluate = control.should_log = False


def _find_largest(number: int, args: TrainingArguments) -> int:
    """Return the signal that any process got, else 0: a process that stopped alone would leave the others waiting."""
    if args.world_size == 1:
        return number
    import torch.distributed as dist

    shared = torch.tensor([number], device=args.device)
    dist.all_reduce(shared, op=dist.ReduceOp.MAX)
    return int(shared.item())

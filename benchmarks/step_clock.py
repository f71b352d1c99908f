"""The seconds of a Trainer's steps."""

from __future__ import annotations

from typing import Any

from measure import Clock
from transformers import TrainerCallback


class StepClock(TrainerCallback):  # type: ignore[misc]
    """Wall and CPU seconds of each step."""

    def __init__(self) -> None:
        self.seconds: list[tuple[float, float]] = []
        self.clock = Clock()

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        """Note what the step took."""
        self.seconds.append(self.clock.read())
        self.clock = Clock()

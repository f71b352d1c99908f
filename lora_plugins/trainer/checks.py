"""The checks of a run: their names, and how one is switched off."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from lora_plugins.errors import (
    AdapterNotMoving,
    BrokenCheckpoint,
    DeadLoss,
    FrozenHead,
    LivenessError,
    ModelReplaced,
    NonFiniteLoss,
    NothingTrainable,
    OptimizerMismatch,
    ResumeConflict,
    UnknownCheck,
    UnsavedTensors,
)
from lora_plugins.text import did_you_mean

__all__ = ["CHECKS", "Check", "Checks", "check_name"]


@dataclass(frozen=True)
class Check:
    """One check of a run.

    Attributes:
        error: The error it raises; its name gives the check its name, see `check_name`.
        when: The moment of a run at which it looks.
        finds: What it finds, as a clause.
    """

    error: type[LivenessError]
    when: str
    finds: str

    @property
    def name(self) -> str:
        """Name that ``skip_checks`` takes."""
        return check_name(self.error)


def check_name(error: type[LivenessError]) -> str:
    """Return the name of the check that raises an error: ``DeadLoss`` is raised by ``dead-loss``."""
    return re.sub(r"(?<!^)(?=[A-Z])", "-", error.__name__).lower()


#: Every check that can be switched off, in the order in which a run meets them.
CHECKS = (
    Check(ModelReplaced, "training begins", "the model in the Trainer is not the prepared one"),
    Check(NothingTrainable, "training begins", "no parameter requires a gradient"),
    Check(FrozenHead, "training begins", "something newly initialized is neither trained nor saved"),
    Check(UnsavedTensors, "training begins, and at each save", "tensors are trained that no adapter file holds"),
    Check(OptimizerMismatch, "training begins", "the optimizer does not hold exactly the trainable tensors"),
    Check(ResumeConflict, "a run resumes", "the run that resumes differs from the one that wrote the checkpoint"),
    Check(AdapterNotMoving, "first steps, and at the end", "adapter tensors stay as they are"),
    Check(NonFiniteLoss, "each step", "the loss is NaN or infinite"),
    Check(DeadLoss, "each step", "loss and gradients are exactly zero for several steps, although labels count"),
    Check(BrokenCheckpoint, "each save, and when a file is loaded", "the files are not what the model holds"),
)


class Checks:
    """Which checks run, and what their messages say about switching them off.

    Args:
        skip: Names of the checks that are switched off.

    Raises:
        UnknownCheck: A name is not that of a check.
    """

    def __init__(self, skip: Iterable[str] = ()) -> None:
        self.skipped = frozenset([skip] if isinstance(skip, str) else skip)
        known = [check.name for check in CHECKS]
        for name in sorted(self.skipped - set(known)):
            raise UnknownCheck(
                f"skip_checks={name!r} is not the name of a check.{did_you_mean(name, known)} "
                f"The checks are {', '.join(known)}."
            )

    def run(self, error: type[LivenessError]) -> bool:
        """Whether the check that raises an error is switched on."""
        return check_name(error) not in self.skipped

    def describe(self) -> dict[str, list[str]]:
        """Return the names of the checks that are on, and of those that are switched off."""
        names = [check.name for check in CHECKS]
        return {"on": [name for name in names if name not in self.skipped], "switched off": sorted(self.skipped)}

    @contextlib.contextmanager
    def report(self) -> Iterator[None]:
        """Suppress the error of a check that is switched off; add to any other how to switch it off.

        Raises:
            LivenessError: What a check inside has found.
        """
        try:
            yield
        except LivenessError as error:
            name = check_name(type(error))
            if name in self.skipped:
                return
            if name in {check.name for check in CHECKS} and "skip_checks=" not in str(error):
                error.args = (f"{error} To switch this check off, pass skip_checks=[{name!r}].",)
            raise

"""Bounds on a configuration, so that planning always terminates."""

from __future__ import annotations

import re
import time
from collections.abc import Iterator, Mapping
from typing import Any

from torch.overrides import TorchFunctionMode
from transformers import PreTrainedConfig

from lora_plugins.errors import PlanError

__all__ = ["LimitedBuilding", "check_numbers"]


#: Most tensors of a model: the largest have some 70,000, with a module for every expert of every layer.
MOST_TENSORS = 100_000
#: CPU seconds of this thread for building a model without data: the largest take some five.
MOST_SECONDS = 8.0

#: Larger than any number in a real configuration: a rotary base may be some 10⁹.
_LARGEST = 10**10
#: Pattern of a field's name -> largest value. Model code loops over each of these counts in Python.
_COUNTS = (
    (re.compile(r"(^|_)(layers?|depths?|blocks?|stages?)(_|$)"), 2_000),
    (re.compile(r"^(n|num)_|(^|_)(labels?|experts?|heads?|groups?)(_|$)"), 1_000_000),
)


def check_numbers(config: Any, where: str) -> None:
    """Reject a configuration with implausibly large numbers before a model is built from it.

    Args:
        config: A configuration of transformers, or the mapping in a ``config.json``.
        where: Name of the configuration, for messages.

    Raises:
        PlanError: A number is too large; the message has the field, its value and the bound.
    """
    for name, value in _iterate_numbers(config):
        most = next((most for pattern, most in _COUNTS if pattern.search(name)), _LARGEST)
        if abs(value) > most:
            raise PlanError(f"{name}={_shorten(value)} in {where} cannot be planned: the most is {most:,}.")


def _iterate_numbers(config: Any, name: str = "", depth: int = 0) -> Iterator[tuple[str, int]]:
    """Yield each integer of a configuration with the name of its field; integers in a list get the list's name."""
    if isinstance(config, int) and not isinstance(config, bool):
        yield name, config
    elif depth > 20:
        return
    elif isinstance(config, PreTrainedConfig):
        yield from _iterate_numbers(vars(config), name, depth + 1)
    elif isinstance(config, Mapping) and name not in ("id2label", "label2id"):
        for key, value in config.items():
            yield from _iterate_numbers(value, str(key), depth + 1)
    elif isinstance(config, (list, tuple)):
        for value in config:
            yield from _iterate_numbers(value, name, depth + 1)


def _shorten(value: int) -> str:
    # Python refuses to convert very long integers to text.
    return f"{value:,}" if abs(value) < 10**30 else "a number of more than 30 digits"


class LimitedBuilding(TorchFunctionMode):
    """Stops building a model that has too many tensors or takes too long.

    Args:
        most: Most tensors that may be created.
        seconds: CPU time of this thread that building may take.

    Raises:
        PlanError: From within torch's functions.
    """

    def __init__(self, most: int = MOST_TENSORS, seconds: float = MOST_SECONDS) -> None:
        super().__init__()
        self.most = most
        self.seconds = seconds
        self.end = time.thread_time() + seconds
        self.made = 0

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if getattr(function, "__name__", "") == "empty":
            self.made += 1
            if self.made > self.most:
                raise PlanError(f"The configuration asks for a model of more than {self.most:,} tensors.")
        if time.thread_time() > self.end:
            raise PlanError(f"Making this configuration's model without data takes more than {self.seconds:g} seconds.")
        return function(*args, **(kwargs or {}))

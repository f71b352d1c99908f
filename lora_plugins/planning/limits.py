"""Bounds on a configuration, so that planning it always ends."""

from __future__ import annotations

import re
import time
from collections.abc import Iterator, Mapping
from typing import Any

from torch.overrides import TorchFunctionMode
from transformers import PreTrainedConfig

from lora_plugins.errors import PlanError

__all__ = ["LimitedBuilding", "check_numbers"]


#: Tensors of the largest models: some 70,000 where every expert of every layer is a module of its own.
MOST_TENSORS = 100_000
#: Time for making a model without data, on a CPU and by this thread: the largest take some five seconds.
MOST_SECONDS = 8.0

#: Beyond any number in a configuration: a rotary base may be some 10⁹.
_LARGEST = 10**10
#: What a number counts, by the words of its name, and how many there may be. Each is a loop in Python somewhere.
_COUNTS = (
    (re.compile(r"(^|_)(layers?|depths?|blocks?|stages?)(_|$)"), 2_000),
    (re.compile(r"^(n|num)_|(^|_)(labels?|experts?|heads?|groups?)(_|$)"), 1_000_000),
)


def check_numbers(config: Any, where: str) -> None:
    """Refuse numbers that no model has, before anything is built from them.

    Args:
        config: A configuration of transformers, or the mapping in a ``config.json``.
        where: What the configuration is called in a message.

    Raises:
        PlanError: Names the field, its value and the bound.
    """
    for name, value in _iterate_numbers(config):
        most = next((most for pattern, most in _COUNTS if pattern.search(name)), _LARGEST)
        if abs(value) > most:
            raise PlanError(f"{name}={_shorten(value)} in {where} cannot be planned: the most is {most:,}.")


def _iterate_numbers(config: Any, name: str = "", depth: int = 0) -> Iterator[tuple[str, int]]:
    """Every integer of a configuration with the name of its field; those in lists under the name of the list."""
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
    # Python refuses to write out very long integers.
    return f"{value:,}" if abs(value) < 10**30 else "a number of more than 30 digits"


class LimitedBuilding(TorchFunctionMode):
    """Ends the making of a model that has more tensors than any, or takes longer than any.

    Args:
        most: Tensors that may be made.
        seconds: Time of this thread on a CPU that it may take.

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

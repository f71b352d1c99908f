"""What other processes do in the resolver's tests: API servers that share one cache."""

from __future__ import annotations

import os
from multiprocessing.queues import Queue
from multiprocessing.synchronize import Barrier
from typing import Any

from huggingface_hub import constants

from lora_plugins.serving.finder import ReleaseFinder, ServedBase
from lora_plugins.serving.resolver_settings import ResolverSettings

__all__ = ["find_together"]


def find_together(
    barrier: Barrier,
    results: Queue[Any],
    registry: str,
    base: str,
    names: list[str],
    environment: dict[str, str],
    rounds: int,
) -> None:
    """Find some releases at the same moment as the others, several times; put what was found, or the error.

    Args:
        barrier: Where all of them wait before each round.
        results: Takes a list of title, number, folder and digest for each name.
        registry: Address of the registry.
        base: Folder of the served base.
        names: References.
        environment: Variables of this process, whose server was started before the test.
        rounds: How many times, by a new resolver each time.
    """
    os.environ.update(environment)
    os.chdir(base)
    # The server was started offline; loopback is no network.
    constants.HF_HUB_OFFLINE = False
    for _ in range(rounds):
        finder = ReleaseFinder(ResolverSettings(registry, ("org/*",)), "vllm")
        barrier.wait()
        try:
            found = [finder.find(name, ServedBase(base)) for name in names]
            results.put([(one.title, one.number, one.path, one.digest) for one in found])
        except Exception as error:
            results.put(f"{type(error).__name__}: {error}")

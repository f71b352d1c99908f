"""What other processes do in the registry's tests: they publish, and some are killed at it.

The processes are forked from a small server that has everything loaded, so each takes milliseconds.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
from collections.abc import Callable
from multiprocessing.context import ForkServerContext
from multiprocessing.process import BaseProcess
from multiprocessing.queues import Queue
from multiprocessing.synchronize import Barrier
from typing import Any

from huggingface_hub import constants
from releases import NAME, release

from registry.hubs import open_hub
from registry.hubs.object_store import Store
from registry.publishing import publish as publishing
from registry.pulling.lockfile import Lock
from registry.pulling.pull import fetch_adapter

#: What changes something in a folder, as the interpreter reports it to audit hooks.
_CHANGES = frozenset({"open", "os.mkdir", "os.rename", "os.link", "os.remove", "os.rmdir", "os.truncate", "os.chmod"})


#: Python 3.11 does not tell the server where this file is (https://github.com/python/cpython/issues/126631), and leaves
#: out silently what cannot be imported. So each module is named that takes time.
PRELOADED = [
    "huggingface_hub.hf_api", "numpy", "safetensors.numpy", "registry.hubs.client", "registry.hubs.folder",
    "registry.hubs.huggingface", "registry.publishing.publish", "registry.pulling.pull",
]  # fmt: skip


def context() -> ForkServerContext:
    """Where processes are started from."""
    found = multiprocessing.get_context("forkserver")
    found.set_forkserver_preload(PRELOADED)
    return found


def push(
    location: str, token: str | dict[str, str] | None, version: str, seed: int, created: str, **options: Any
) -> str:
    """Publish one release; what came of it, as the name of an error or the commit.

    For an object store, ``token`` holds the environment variables: the server of these processes was started before.
    """
    publishing.PATIENCE = options.pop("patience", 0.2)
    os.fsync = lambda descriptor: None  # see test_registry_processes
    if isinstance(token, dict):
        os.environ.update(token)
        token = None
    if token is not None:
        # The server was started offline; loopback is no network.
        constants.HF_HUB_OFFLINE = False
    try:
        return release(open_hub(location, token), version, seed, created=created, **options).commit
    except Exception as error:
        return type(error).__name__


def push_together(barrier: Barrier, results: Queue[str], arguments: tuple[Any, ...]) -> None:
    """Publish at the same moment as the others."""
    barrier.wait()
    results.put(push(*arguments, patience=60))


def push_and_die(root: str, step: int, arguments: tuple[Any, ...], options: dict[str, Any]) -> None:
    """Publish in a folder, and be killed just before the ``step``-th change in it."""
    _count(root, lambda number: os.kill(os.getpid(), signal.SIGKILL) if number == step else None)
    push(*arguments, **options)


def push_and_count(root: str, results: Queue[int], arguments: tuple[Any, ...], options: dict[str, Any]) -> None:
    """Publish in a folder, and tell how many changes that took."""
    counted = [0]
    _count(root, lambda number: counted.__setitem__(0, number))
    push(*arguments, **options)
    results.put(counted[0])


def push_to_store_and_die(step: int, counts: Queue[int], arguments: tuple[Any, ...]) -> None:
    """Publish in an object store, and be killed just before the ``step``-th write; tell how many there were if not."""
    number = 0

    def watch(write: Callable[..., Any]) -> Callable[..., Any]:
        def count(*args: Any, **options: Any) -> Any:
            nonlocal number
            number += 1
            if number == step:
                os.kill(os.getpid(), signal.SIGKILL)
            return write(*args, **options)

        return count

    for name in ("put", "create", "swap"):
        setattr(Store, name, watch(getattr(Store, name)))
    push(*arguments)
    counts.put(number)


def pull_and_die(root: str, step: int, location: str, cache: str) -> None:
    """Pull the newest release, and be killed just before the ``step``-th change in the cache."""
    _count(root, lambda number: os.kill(os.getpid(), signal.SIGKILL) if number == step else None)
    os.fsync = lambda descriptor: None
    fetch_adapter(NAME, hub=location, token=None, lock=Lock(None), offline=False, cache_dir=cache)


def push_alone(arguments: tuple[Any, ...], options: dict[str, Any]) -> None:
    """Publish."""
    push(*arguments, **options)


def _count(root: str, tell: Callable[[int], object]) -> None:
    number = 0

    def watch(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal number
        if event not in _CHANGES or not any(str(path).startswith(root) for path in arguments):
            return
        if event == "open" and isinstance(arguments[2], int) and not arguments[2] & (os.O_WRONLY | os.O_RDWR):
            return
        number += 1
        tell(number)

    sys.addaudithook(watch)


def finished(process: BaseProcess) -> int | None:
    """Wait for a process; its exit code, negative for the signal that killed it."""
    process.join(300)  # this machine may be busy, and none of them waits for anything
    assert not process.is_alive()
    return process.exitcode

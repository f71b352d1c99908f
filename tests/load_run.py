"""Processes that pull and push for a while, and what each operation took."""

from __future__ import annotations

import os
import random
import time
from dataclasses import dataclass, field
from multiprocessing.queues import Queue
from multiprocessing.synchronize import Barrier
from pathlib import Path
from typing import Any

from huggingface_hub import constants
from releases import NAME, draft, release

from registry.hubs import open_hub
from registry.publishing import publish as publishing
from registry.pulling.lockfile import Lock
from registry.pulling.pull import fetch_adapter

__all__ = ["Log", "pull_for", "push_for"]


@dataclass
class Log:
    """Seconds of each operation that succeeded, and the errors of those that failed."""

    kind: str
    seconds: list[float] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)


def _open(location: str, token: str | None) -> Any:
    os.fsync = lambda descriptor: None  # for power failures, which are not what is measured
    if token is not None:
        constants.HF_HUB_OFFLINE = False  # loopback is no network
    return open_hub(location, token)


def push_for(
    seconds: float, number: int, barrier: Barrier, results: Queue[Log], location: str, token: str | None
) -> None:
    """Publish one version after the other, each once, beside the other pushers."""
    publishing.PATIENCE = 60.0
    hub, log = _open(location, token), Log("push")
    barrier.wait()
    end, made = time.monotonic() + seconds, 0
    while time.monotonic() < end:
        made += 1
        started = time.perf_counter()
        try:
            release(hub, f"1.{made}.{number}", seed=number * 100_000 + made)
        except Exception as error:
            log.failures.append(f"{type(error).__name__}: {error}"[:300])
        else:
            log.seconds.append(time.perf_counter() - started)
    results.put(log)


def pull_for(
    seconds: float, number: int, barrier: Barrier, results: Queue[Log], location: str, token: str | None, cache: str
) -> None:
    """Pull the newest release, one of a range, and one by number, in turns; compare what is handed out."""
    hub, log, chance = _open(location, token), Log("pull"), random.Random(number)
    expected = draft("1.0.0", 0).all_files()
    barrier.wait()
    end, seen = time.monotonic() + seconds, "1.0.0"
    while time.monotonic() < end:
        reference = chance.choice([NAME, f"{NAME}>=1,<2", f"{NAME}@1.0.0", f"{NAME}@{seen}"])
        started = time.perf_counter()
        try:
            fetched = fetch_adapter(reference, hub=hub, token=None, lock=Lock(None), offline=False, cache_dir=cache)
            there = {file.name: file.read_bytes() for file in Path(fetched.path).iterdir()}
            if fetched.release.version == "1.0.0" and there != expected:
                raise AssertionError(f"{reference}: other bytes than were published")
            if set(there) != {*fetched.manifest.files, "adapter_manifest.json"}:
                raise AssertionError(f"{reference}: {sorted(there)}")
        except Exception as error:
            log.failures.append(f"{type(error).__name__}: {error}"[:300])
        else:
            log.seconds.append(time.perf_counter() - started)
            seen = fetched.release.version
    results.put(log)

"""Many processes at one repository: each operation succeeds, or nobody would know which may be relied on."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import load_run
import pytest
from hubs import FolderPlace, LoopbackPlace, Place
from pushers import context, finished
from releases import NAME, release

from registry.catalog.listing import versions
from registry.disk.owners import find_leftovers
from registry.pulling.cache import VARIABLE
from registry.upkeep.verification import verify

#: Seconds of each run; `make test-load` says 60.
SECONDS = float(os.environ.get("LOAD_SECONDS", "5"))
PULLERS, PUSHERS = 32, 8


@pytest.fixture(params=["folder", "loopback"])
def place(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Place]:
    monkeypatch.setenv(VARIABLE, str(tmp_path / "cache"))
    if request.param == "folder":
        yield FolderPlace(tmp_path / "registry")
    else:
        yield LoopbackPlace(request.getfixturevalue("loopback_hub"), timeout=60)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_many_pull_and_push_at_once(place: Place, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    release(place.hub, "1.0.0")
    token = place.loopback.token if isinstance(place, LoopbackPlace) else None
    start = context()
    barrier, results = start.Barrier(PULLERS + PUSHERS), start.Queue()
    processes: list[Any] = []
    for number in range(PUSHERS):
        call = (SECONDS, number, barrier, results, place.hub.location, token)
        processes.append(start.Process(target=load_run.push_for, args=call))
    for number in range(PULLERS):
        # Half of them share a cache, as the processes of one machine do.
        cache = str(tmp_path / ("cache" if number % 2 else f"cache-{number}"))
        call = (SECONDS, number, barrier, results, place.hub.location, token, cache)
        processes.append(start.Process(target=load_run.pull_for, args=call))
    for process in processes:
        process.start()
    logs = [results.get(timeout=SECONDS + 900) for _ in processes]
    assert [finished(process) for process in processes] == [0] * len(processes)
    failures = [failure for log in logs for failure in log.failures]
    with capsys.disabled():
        print(f"\n{PULLERS} pullers and {PUSHERS} pushers for {SECONDS:g} s on a {type(place).__name__}:")
        for kind in ("pull", "push"):
            print(f"  {describe(kind, [log for log in logs if log.kind == kind])}")
    assert not failures, failures[:5]
    check_afterwards(place, tmp_path, sum(len(log.seconds) for log in logs if log.kind == "push"))


def describe(kind: str, logs: list[load_run.Log]) -> str:
    """Operations, failures and how long they took, in one line."""
    times = sorted(seconds for log in logs for seconds in log.seconds)
    if not times:
        return f"{kind}: none succeeded"
    p50, p99 = (times[min(len(times) - 1, int(len(times) * share))] for share in (0.5, 0.99))
    failed = sum(len(log.failures) for log in logs)
    return f"{kind}: {len(times):6,} succeeded, {failed} failed, p50 {p50 * 1000:6.0f} ms, p99 {p99 * 1000:6.0f} ms"


def check_afterwards(place: Place, tmp_path: Path, pushed: int) -> None:
    """Every version that was reported is there, whole, and nothing is left over."""
    there = versions(NAME, hub=place.hub)
    assert len(there) == pushed + 1
    for each in there[:: max(1, len(there) // 20)]:
        assert verify(f"{NAME}@{each.version}", hub=place.hub).ok
    time.sleep(0.1)
    for cache in tmp_path.glob("cache*"):
        for folder in ("releases", "checked"):
            assert find_leftovers(cache / folder) == []
    if isinstance(place, FolderPlace):
        assert find_leftovers(place.root / NAME) == []
        assert not (place.root / NAME / "lock").exists()

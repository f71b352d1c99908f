"""Several processes at one registry, and processes that are killed at any moment of a push."""

from __future__ import annotations

import os
import random
import shutil
import signal
import tempfile
from pathlib import Path
from typing import Any

import pushers
import pytest
from hubs import EVERY_KIND, BucketPlace, FolderPlace, LoopbackPlace, Place, make_place
from pushers import context, finished
from releases import CREATED, NAME, draft, folder_of, release

from registry.catalog.listing import versions
from registry.disk.owners import delete, find_leftovers
from registry.errors import RepositoryNotFound, VersionExists, VersionNotFound
from registry.hubs.protocol import MAIN
from registry.publishing.publish import manifest_at
from registry.pulling.cache import VARIABLE
from registry.pulling.lockfile import Lock
from registry.pulling.pull import fetch_adapter
from registry.testing import LoopbackHub
from registry.upkeep.verification import verify

#: What is published before, and what the process that is killed publishes.
SCENARIOS = {
    "first": ((), "1.0.0"),
    "newer": (("0.9.0",), "1.0.0"),
    "beside": (("0.9.0",), "1.0.0rc1"),
}


@pytest.fixture(autouse=True)
def _settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, str(tmp_path / "cache"))
    monkeypatch.setattr("registry.publishing.publish.PATIENCE", 0.2)
    # Waiting for the disk is for power failures; what a killed process has written, the others see.
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)


@pytest.fixture(params=EVERY_KIND)
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Place:
    return make_place(request, tmp_path, timeout=10)


def arguments(place: Place, version: str, seed: int, created: str = CREATED) -> tuple[Any, ...]:
    token: str | dict[str, str] | None = place.loopback.token if isinstance(place, LoopbackPlace) else None
    if isinstance(place, BucketPlace):
        token = {name: value for name, value in os.environ.items() if name.startswith("AWS_")}
    return (place.hub.location, token, version, seed, created)


def together(calls: list[tuple[Any, ...]]) -> list[str]:
    """What came of several pushes by as many processes at the same moment."""
    start = context()
    barrier, results = start.Barrier(len(calls)), start.Queue()
    processes = [start.Process(target=pushers.push_together, args=(barrier, results, call)) for call in calls]
    for process in processes:
        process.start()
    outcomes = [results.get(timeout=120) for _ in calls]
    assert [finished(process) for process in processes] == [0] * len(calls)
    return outcomes


def test_eight_processes_and_one_version(place: Place) -> None:
    outcomes = together([arguments(place, "1.0.0", seed) for seed in range(8)])
    assert outcomes.count("VersionExists") == 7
    refs = place.hub.refs(NAME)
    winner = next(outcome for outcome in outcomes if outcome != "VersionExists")
    assert (refs.tags, refs.branches) == ({"v1.0.0": winner}, {"main": winner})
    assert verify(NAME, hub=place.hub).ok


def test_eight_processes_and_eight_versions(place: Place) -> None:
    outcomes = together([arguments(place, f"1.{seed}.0", seed) for seed in range(8)])
    assert sorted(outcomes) == sorted(place.hub.refs(NAME).tags.values())
    assert [each.version for each in versions(NAME, hub=place.hub)] == [f"1.{seed}.0" for seed in range(8)]
    assert all(verify(f"{NAME}@1.{seed}", hub=place.hub).ok for seed in range(8))
    held = manifest_at(place.hub, NAME, place.hub.refs(NAME).branches[MAIN])
    assert held is not None
    assert held.version == "1.7.0"


def test_killed_at_every_write_to_an_object_store(bucket: str) -> None:
    start = context()
    counts = start.Queue()
    step, codes = 0, []
    while not codes or codes[-1] == -signal.SIGKILL:
        step += 1
        place = BucketPlace(f"{bucket}/{step}")
        release(place.hub, "0.9.0")
        call = (step, counts, arguments(place, "1.0.0", 1))
        process = start.Process(target=pushers.push_to_store_and_die, args=call)
        process.start()
        codes.append(finished(process))
        check_after_death(place, NAME, "1.0.0", ("0.9.0",), 1, other=step % 2 == 0)
    assert (codes[-1], counts.get(timeout=60)) == (0, step - 1)
    assert step > 6


def scenarios(fast: str) -> list[Any]:
    """All scenarios, of which one runs in every run."""
    return [pytest.param(each, marks=() if each == fast else pytest.mark.slow) for each in SCENARIOS]


# -- killed --------------------------------------------------------------------------------------------------------


def check_after_death(
    place: Place, name: str, version: str, before: tuple[str, ...], seed: int, *, other: bool
) -> None:
    """Whatever is visible is whole; the next push of the same content is right, and one of other content, too."""
    standing = published(place, name)
    assert standing in (list(before), [*before, version])
    for each in standing:
        assert verify(f"{name}@{each}", hub=place.hub).ok
    with_version = f"{name}@{version}"
    if version not in standing:
        with pytest.raises((VersionNotFound, RepositoryNotFound)):
            pull(place, with_version)
    if other and version in standing:
        with pytest.raises(VersionExists):
            release(place.hub, version, seed + 1, name=name)
    elif other:
        seed += 1  # somebody else wants the version
    done = release(place.hub, version, seed, name=name)
    assert published(place, name) == [*before, version]
    assert done.commit == place.hub.refs(name).tags[f"v{version}"]
    assert pull(place, with_version) == draft(version, seed).all_files()
    assert verify(with_version, hub=place.hub).ok
    newest = manifest_at(place.hub, name, place.hub.refs(name).branches[MAIN])
    assert newest is not None
    assert newest.version == (before[0] if "rc" in version else version)


def published(place: Place, name: str) -> list[str]:
    try:
        return [each.version for each in versions(name, hub=place.hub)]
    except RepositoryNotFound:
        return []


def pull(place: Place, reference: str) -> Any:
    fetched = fetch_adapter(reference, hub=place.hub, token=None, lock=Lock(None), offline=False, cache_dir=None)
    return folder_of(fetched.path)


@pytest.mark.parametrize("scenario", scenarios("first"))
def test_killed_at_every_change_in_a_folder(tmp_path: Path, scenario: str) -> None:
    before, version = SCENARIOS[scenario]
    start = context()
    place = FolderPlace(tmp_path / "count")
    for number in before:
        release(place.hub, number)
    counts = start.Queue()
    call = arguments(place, version, 1)
    counting = start.Process(target=pushers.push_and_count, args=(str(place.root), counts, call, {}))
    counting.start()
    steps = counts.get(timeout=60)
    assert finished(counting) == 0
    assert steps > 10
    for step in range(1, steps + 1):
        place = FolderPlace(tmp_path / f"step-{step}")
        for number in before:
            release(place.hub, number)
        call = arguments(place, version, 1)
        process = start.Process(target=pushers.push_and_die, args=(str(place.root), step, call, {}))
        process.start()
        assert finished(process) == -signal.SIGKILL, step
        check_after_death(place, NAME, version, before, 1, other=step % 2 == 0)


@pytest.mark.parametrize("scenario", scenarios("beside"))
def test_killed_at_every_request_to_a_hub(loopback_hub: LoopbackHub, scenario: str) -> None:
    before, version = SCENARIOS[scenario]
    start = context()
    place = LoopbackPlace(loopback_hub, timeout=10)

    def push(name: str, seed: int) -> Any:
        """Other content each time: a hub does not want bytes that it has."""
        call = (arguments(place, version, seed), {"name": name})
        process = start.Process(target=pushers.push_alone, args=call)
        process.start()
        return process

    for number in before:
        release(place.hub, number, name="org/count")
    loopback_hub.requests.clear()
    assert finished(push("org/count", 1)) == 0
    steps = len(loopback_hub.requests)
    assert steps > 8
    # Killed before a request is acted on, or after it and before its answer.
    moments = (loopback_hub.faults.call_before, loopback_hub.faults.call_after)
    for turn, (step, faults) in enumerate((step, moment) for step in range(1, steps + 1) for moment in moments):
        name, seen = f"org/step-{turn}", [0]
        for number in before:
            release(place.hub, number, name=name)
        pid = start.Value("i", 0)

        def kill(request: object, seen: list[int] = seen, step: int = step, pid: Any = pid) -> None:
            seen[0] += 1
            if seen[0] == step:
                while not pid.value:
                    pass
                os.kill(pid.value, signal.SIGKILL)

        faults("*", kill)
        seed = 10 * turn + 100
        process = push(name, seed)
        pid.value = process.pid or 0
        code = finished(process)
        loopback_hub.faults.clear()
        assert code == -signal.SIGKILL, (step, code)
        check_after_death(place, name, version, before, seed, other=turn // 2 % 2 == 1)


#: Processes that are killed at a moment chosen at random, and where chance begins; `make test-kills` says 1,000.
KILLS, SEED = int(os.environ.get("KILLS", "60")), int(os.environ.get("KILLS_SEED", "0"))


@pytest.mark.slow
@pytest.mark.timeout(7200)
def test_killed_at_random_and_nothing_is_left_after_the_next_call(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Half of the processes push and half of them pull; what they leave is gone after the next push or pull."""
    monkeypatch.setenv("TMPDIR", str(tmp_path / "tmp"))
    (tmp_path / "tmp").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", None)
    chance, killed, left = random.Random(SEED), 0, 0
    for turn in range(2 * KILLS):
        if killed == KILLS:
            break
        place, cache = FolderPlace(tmp_path / f"registry-{turn}"), tmp_path / f"cache-{turn}"
        before, version = SCENARIOS[chance.choice(list(SCENARIOS))]
        for number in before:
            release(place.hub, number)
        if turn % 2:
            release(place.hub, version, 1)
            target, call = pushers.pull_and_die, (str(cache), chance.randint(1, 25), place.hub.location, str(cache))
        else:
            target = pushers.push_and_die
            call = (str(place.root), chance.randint(1, 40), arguments(place, version, 1), {})
        process = context().Process(target=target, args=call)
        process.start()
        code = finished(process)
        assert code in (0, -signal.SIGKILL)  # 0: it was done before that moment
        killed += code != 0
        left += bool(find_remains(tmp_path, place, cache))
        done = release(place.hub, version, 1)
        fetched = fetch_adapter(NAME, hub=place.hub, token=None, lock=Lock(None), offline=False, cache_dir=cache)
        stable = (before[0], 0) if "rc" in version else (version, 1)
        assert folder_of(fetched.path) == draft(*stable).all_files()
        assert published(place, NAME) == [*before, version]
        assert done.commit == place.hub.refs(NAME).tags[f"v{version}"]
        assert find_remains(tmp_path, place, cache) == []
        shutil.rmtree(place.root)
        delete(cache)
    with capsys.disabled():
        print(f"\n{killed} processes killed, {left} left something, nothing of it was there after the next call")
    assert killed >= min(KILLS, 20)


def find_remains(tmp_path: Path, place: FolderPlace, cache: Path) -> list[Path]:
    """What dead processes have left: partial files and folders, and locks."""
    folders = [
        tmp_path / "tmp",
        place.root,
        place.root / "org",
        place.root / NAME,
        cache / "releases",
        cache / "checked",
    ]
    folders += cache.glob("seen/*/*")
    return [path for folder in folders for path in find_leftovers(folder)] + [*place.root.rglob("lock")]

"""What somebody has damaged or planted in a folder registry: one clear error, and nobody else is kept from working."""

from __future__ import annotations

import contextlib
import json
import os
import time
from pathlib import Path
from typing import Any

import pytest
from hubs import FolderPlace
from places import fetch, use_own_folders
from releases import NAME, release

from registry.catalog.listing import list_adapters, versions
from registry.errors import HostileAnswer, RegistryError
from registry.upkeep.cleanup import collect_garbage
from registry.upkeep.verification import verify

OTHER = "org/other"


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FolderPlace:
    """A registry with two repositories."""
    use_own_folders(tmp_path, monkeypatch)
    place = FolderPlace(tmp_path / "registry")
    for name in (NAME, OTHER):
        release(place.hub, "1.0.0", name=name)
    return place


def assert_contained(place: FolderPlace, error: type[Exception], says: str) -> None:
    """The damaged repository gives one error that says what to do; the other one works, and so does gc."""
    with pytest.raises(error, match=says) as caught:
        fetch(place)
    assert isinstance(caught.value, RegistryError)
    assert fetch(place, OTHER).release.version == "1.0.0"
    assert [each.name for each in list_adapters(hub=place.hub) if each.name == OTHER] == [OTHER]
    found = collect_garbage(place.hub, dry_run=False)
    assert found.paths == ()


DAMAGED: dict[str, tuple[str, Any]] = {
    "no main": ("refs.json", {"format": 1, "branches": {}, "tags": {}}),
    "no branches": ("refs.json", {"format": 1, "tags": {}}),
    "branches are a list": ("refs.json", {"format": 1, "branches": [], "tags": {}}),
    "deep refs": ("refs.json", b"[" * 100_000),
    "a key twice": ("refs.json", b'{"branches": {"main": "' + b"a" * 40 + b'"}, "tags": {}, "tags": {}}'),
    "empty refs": ("refs.json", b""),
    "half an identity": ("repository.json", {"id": "\ud800"}),
    "no identity": ("repository.json", {"format": 1}),
    "an identity that moves the cursor": ("repository.json", {"id": "\x1b[2J"}),
    "deep identity": ("repository.json", b'{"id":' * 50_000),
    "a number": ("repository.json", {"id": 10**400}),
}


@pytest.mark.parametrize("case", DAMAGED)
def test_damaged_state_is_one_error_that_says_how_to_restore_it(place: FolderPlace, case: str) -> None:
    name, content = DAMAGED[case]
    data = content if isinstance(content, bytes) else json.dumps(content).encode()
    (place.root / NAME / name).write_bytes(data)
    assert_contained(place, HostileAnswer, r"is damaged: .*Restore it")


@pytest.mark.parametrize("kind", ["link", "pipe", "folder", "device"])
@pytest.mark.parametrize("name", ["repository.json", "refs.json", "commits"])
def test_what_is_planted_is_not_followed(place: FolderPlace, name: str, kind: str, tmp_path: Path) -> None:
    if (name, kind) == ("commits", "folder"):
        pytest.skip("that is what it is")
    path, aside = place.root / NAME / name, tmp_path / "aside"
    path.rename(aside)
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    else:
        path.symlink_to(aside if kind == "link" else "/dev/zero")
    before = sorted(aside.rglob("*"))
    for each in before:
        os.utime(each, (0, 0))
    started = time.monotonic()
    with pytest.raises(RegistryError):
        fetch(place)
    with contextlib.suppress(RegistryError):
        assert verify(NAME, hub=place.hub).ok == (name == "repository.json")
    assert fetch(place, OTHER).release.version == "1.0.0"
    collect_garbage(place.hub, dry_run=False)
    assert sorted(aside.rglob("*")) == before
    assert time.monotonic() - started < 20


def test_gc_does_not_follow_a_folder_of_commits_elsewhere(place: FolderPlace, tmp_path: Path) -> None:
    precious = tmp_path / "precious"
    (precious / "thesis").mkdir(parents=True)
    os.utime(precious / "thesis", (0, 0))
    commits = place.root / NAME / "commits"
    commits.rename(tmp_path / "aside")
    commits.symlink_to(precious)
    found = collect_garbage(place.hub, dry_run=False)
    assert (precious / "thesis").is_dir()
    assert found.problems
    assert all("symbolic link" in problem for problem in found.problems)


LOCKS = {
    "a process id beyond any": {"host": "mine", "pid": 2147483648, "started": "1"},
    "a process id of twenty digits": {"host": "mine", "pid": 10**20, "started": "1"},
    "process 0": {"host": "mine", "pid": 0, "started": ""},
    "a group of processes": {"host": "mine", "pid": -1, "started": ""},
    "deep JSON": b"[" * 100_000,
    "no JSON": b"\xff\x00",
    "a list": [],
    "infinity": b'{"host": "x", "pid": Infinity, "started": ""}',
    "from another host, tomorrow": {"host": "elsewhere", "pid": 1, "started": "1"},
}


@pytest.mark.parametrize("case", LOCKS)
def test_a_planted_lock_blocks_nobody_for_good(place: FolderPlace, case: str) -> None:
    from registry.disk.owners import host

    content = LOCKS[case]
    if isinstance(content, dict) and content["host"] == "mine":
        content = {**content, "host": host()}
    lock = place.root / NAME / "lock"
    lock.write_bytes(content if isinstance(content, bytes) else json.dumps(content).encode())
    ahead = 10**7 if "tomorrow" in case else -100
    os.utime(lock, (time.time() + ahead, time.time() + ahead))
    release(place.hub, "1.1.0", 1)
    assert [each.version for each in versions(NAME, hub=place.hub)] == ["1.0.0", "1.1.0"]
    assert not lock.exists()


@pytest.mark.parametrize("kind", ["link", "pipe", "folder"])
def test_a_lock_that_is_no_file_says_to_delete_it(place: FolderPlace, kind: str) -> None:
    lock = place.root / NAME / "lock"
    if kind == "link":
        lock.symlink_to("/dev/zero")
    elif kind == "pipe":
        os.mkfifo(lock)
    else:
        lock.mkdir()
    started = time.monotonic()
    with pytest.raises(HostileAnswer, match="delete it"):
        release(place.hub, "1.1.0", 1)
    assert time.monotonic() - started < 10
    assert fetch(place).release.version == "1.0.0"


def test_who_waits_too_long_is_told_which_file_to_delete(place: FolderPlace) -> None:
    from registry.disk.mutex import LockTimeout, folder_lock

    folder = place.root / NAME
    with folder_lock(folder), pytest.raises(LockTimeout, match="delete that file"), folder_lock(folder, 0.05):
        raise AssertionError

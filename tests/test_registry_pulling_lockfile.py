"""The lock file: which one is meant, what it fixes, and what it says when it can't be read or written."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from registry.errors import InvalidLock, LockEntryNotFound, LockMismatch
from registry.formats.references import Reference
from registry.pulling import lockfile
from registry.pulling.lockfile import Lock, LockEntry

NAME = "org/adapter"
ENTRY = LockEntry("1.0.0", "a" * 40, "d" * 64, "https://hub", "id", "org/base", "b" * 40)


@pytest.fixture(autouse=True)
def _folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)


def write(*names: str, path: str = "adapters.lock", entry: LockEntry = ENTRY) -> Lock:
    lock = Lock(Path(path).absolute(), write=True)
    for name in names:
        lock.record(name, entry)
    return lock


@pytest.mark.parametrize(
    ("lock", "exists", "frozen", "expected"),
    [
        (None, False, False, (None, False)),
        (None, True, False, ("adapters.lock", False)),
        (False, True, False, (None, False)),
        (True, False, False, ("adapters.lock", True)),
        (True, True, True, ("adapters.lock", False)),
        (None, True, True, ("adapters.lock", False)),
        ("other.lock", True, False, ("other.lock", True)),
    ],
)
def test_which_lock_file_is_meant(
    lock: Any, exists: bool, frozen: bool, expected: tuple[str | None, bool], tmp_path: Path
) -> None:
    if exists:
        write(NAME)
    found = Lock.choose(lock, frozen=frozen)
    assert (found.path and found.path.relative_to(tmp_path).name, found.write) == expected
    assert found.frozen == frozen


@pytest.mark.parametrize(("lock", "exists"), [(None, False), (True, False), (False, True), ("other.lock", True)])
def test_frozen_without_a_lock_file_is_an_error(lock: Any, exists: bool) -> None:
    if exists:
        write(NAME)
    with pytest.raises(LockEntryNotFound, match="Only locked adapters may be used"):
        Lock.choose(lock, frozen=True)


def test_what_an_entry_fixes() -> None:
    lock = write(NAME)
    for text in (NAME, f"{NAME}@1.0.0", f"{NAME}>=1", f"{NAME}@{'a' * 40}", f"{NAME}@champion"):
        assert lock.find(Reference.parse(text)) == ENTRY
    assert lock.find(Reference.parse(f"{NAME}@1.1.0")) is None  # to be written anew
    assert replace(lock, renew=True).find(Reference.parse(NAME)) is None
    assert lock.find(Reference.parse("org/other")) is None
    reading = replace(lock, write=False)
    for text in (f"{NAME}@1.1.0", f"{NAME}>=2", f"{NAME}@{'b' * 40}"):
        with pytest.raises(LockMismatch, match=r"To change the lock: lora-plugins pull .* --lock"):
            reading.find(Reference.parse(text))
    with pytest.raises(LockEntryNotFound, match=r"is not in .*adapters\.lock"):
        replace(reading, frozen=True).find(Reference.parse("org/other"))
    assert Lock(None).find(Reference.parse(NAME)) is None


def test_what_is_recorded_is_read_again_and_nothing_else_changes() -> None:
    lock = write(NAME, "org/other")
    assert lock.entries() == {NAME: ENTRY, "org/other": ENTRY}
    newer = LockEntry("1.1.0", "c" * 64, "e" * 64, "file:///x", "id")
    lock.record(NAME, newer)
    assert lock.entries() == {NAME: newer, "org/other": ENTRY}
    before = Path("adapters.lock").stat()
    lock.record(NAME, newer)
    replace(lock, write=False).record("org/third", ENTRY)
    Lock(None, write=True).record("org/third", ENTRY)
    assert Path("adapters.lock").stat() == before
    assert sorted(os.listdir()) == [".adapters.lock.lock.guard", "adapters.lock"] or os.listdir() == ["adapters.lock"]


def test_a_commit_without_a_version_is_told_from_a_release() -> None:
    plain = replace(ENTRY, version=f"0+g{ENTRY.commit}")
    assert plain.unversioned
    assert not ENTRY.unversioned
    assert not replace(plain, commit="c" * 40).unversioned
    assert write(NAME, entry=plain).entries() == {NAME: plain}


DAMAGE: dict[str, Callable[[dict[str, Any]], object]] = {
    "a newer format": lambda r: r.update(format=2),
    "a format of zero": lambda r: r.update(format=0),
    "no format": lambda r: r.pop("format"),
    "a list": lambda r: r.update(adapters=[]),
    "a name that is a path": lambda r: r["adapters"].update({"../x": r["adapters"][NAME]}),
    "an entry that is a text": lambda r: r["adapters"].update({NAME: "1.0.0"}),
    "another way to write a version": lambda r: r["adapters"][NAME].update(version="01.0.0"),
    "a short commit": lambda r: r["adapters"][NAME].update(commit="a" * 39),
    "a short manifest": lambda r: r["adapters"][NAME].update(manifest="d" * 40),
    "no registry": lambda r: r["adapters"][NAME].pop("registry"),
    "no repository": lambda r: r["adapters"][NAME].pop("repository"),
    "a base that is a number": lambda r: r["adapters"][NAME].update(base=1),
    "a base commit that is a branch": lambda r: r["adapters"][NAME].update(base_commit="main"),
}


@pytest.mark.parametrize("case", DAMAGE)
def test_a_damaged_lock_file_is_refused_and_left_as_it_is(case: str) -> None:
    lock = write(NAME)
    document = json.loads(Path("adapters.lock").read_bytes())
    DAMAGE[case](document)
    Path("adapters.lock").write_text(json.dumps(document))
    for action in (lock.entries, lambda: lock.find(Reference.parse(NAME)), lambda: lock.record("org/other", ENTRY)):
        with pytest.raises(InvalidLock, match=r"adapters\.lock"):
            action()
    assert json.loads(Path("adapters.lock").read_bytes()) == document


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"null", b"\xff", b"[" * 100_000])
def test_what_is_no_json_is_refused(content: bytes) -> None:
    Path("adapters.lock").write_bytes(content)
    with pytest.raises(InvalidLock):
        Lock.choose(None, frozen=False).entries()


def test_a_lock_file_has_limits(monkeypatch: pytest.MonkeyPatch) -> None:
    lock = write(NAME, "org/other")
    monkeypatch.setattr(lockfile, "_MOST", 1)
    with pytest.raises(InvalidLock, match="2 entries"):
        lock.entries()
    monkeypatch.setattr(lockfile, "_LIMIT", 10)
    with pytest.raises(InvalidLock):
        lock.entries()


def test_errors_of_the_machine_name_the_file(monkeypatch: pytest.MonkeyPatch) -> None:
    lock = write(NAME)

    def refuse(*_: object, **__: object) -> None:
        raise OSError(28, os.strerror(28))

    monkeypatch.setattr(lockfile, "replace_file", refuse)
    with pytest.raises(InvalidLock, match=r"adapters\.lock cannot be written: No space left"):
        lock.record("org/other", ENTRY)
    monkeypatch.setattr(lockfile, "read_small", refuse)
    with pytest.raises(InvalidLock, match=r"adapters\.lock cannot be read: No space left"):
        lock.entries()
    Path("adapters.lock").unlink()
    Path("adapters.lock").symlink_to("elsewhere")
    monkeypatch.undo()
    with pytest.raises(InvalidLock, match="is a file of its own"):
        lock.entries()


def test_a_lock_that_somebody_holds_is_not_waited_for_without_end(monkeypatch: pytest.MonkeyPatch) -> None:
    from registry.disk.mutex import LockTimeout

    def held(*_: object, **__: object) -> None:
        raise LockTimeout("held by another")

    monkeypatch.setattr(lockfile, "folder_lock", held)
    with pytest.raises(InvalidLock, match="held by another"):
        write(NAME)

"""Files written whole, errors that are this machine's, locks of the dead: what a broken machine does to a registry."""

from __future__ import annotations

import errno
import json
import os
import stat
from pathlib import Path
from typing import Any

import pytest

from registry.disk import files, mutex, owners
from registry.disk.files import PlantedLink
from registry.disk.machine import CheckedSink, lacks_something, temporary_folder
from registry.disk.mutex import LockTimeout, clear, folder_lock
from registry.errors import CacheError, InvalidAdapter, MachineError


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)


def error(number: int) -> OSError:
    return OSError(number, os.strerror(number))


# -- errors of this machine ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EMFILE, errno.ENOMEM, errno.EROFS])
def test_what_a_machine_lacks_is_found_behind_other_errors(number: int) -> None:
    assert lacks_something(error(number)).errno == number  # type: ignore[union-attr]
    outer, beside = ValueError("outer"), ValueError("beside")
    outer.__cause__, beside.__context__ = error(number), error(number)
    for each in (outer, beside):
        assert lacks_something(each).errno == number  # type: ignore[union-attr]


def test_other_errors_are_not_this_machines() -> None:
    assert lacks_something(error(errno.ECONNRESET)) is None
    assert lacks_something(ValueError("x")) is None
    assert lacks_something(MemoryError()).errno == errno.ENOMEM  # type: ignore[union-attr]
    one, other = ValueError("one"), ValueError("other")
    one.__context__, other.__context__ = other, one
    assert lacks_something(one) is None


class Broken:
    """A file on a full disk."""

    def __getattr__(self, name: str) -> Any:
        def refuse(*_: object) -> None:
            raise error(errno.ENOSPC)

        return refuse


def test_a_sink_on_a_full_disk_blames_the_disk(tmp_path: Path) -> None:
    with CheckedSink(tmp_path / "a") as sink:
        assert sink.write(b"1234") == 4
        assert sink.tell() == 4
        sink.seek(2)
        sink.truncate()
    assert (tmp_path / "a").read_bytes() == b"12"
    with pytest.raises(CacheError, match="cannot be written: File exists"):
        CheckedSink(tmp_path / "a")
    with pytest.raises(CacheError, match="No such file"):
        CheckedSink(tmp_path / "nowhere" / "a")
    sink = CheckedSink(tmp_path / "b")
    sink._file.close()
    sink._file = Broken()  # type: ignore[assignment]
    for action in (lambda: sink.write(b"x"), lambda: sink.seek(0), sink.truncate, lambda: sink.__exit__(None)):
        with pytest.raises(CacheError, match="No space left"):
            action()


@pytest.mark.parametrize(
    ("raised", "expected", "says"),
    [
        (error(errno.ENOSPC), MachineError, "Set TMPDIR"),
        (error(errno.ENOENT), FileNotFoundError, "No such file"),
        (RuntimeError(f"I/O error: No space left on device (os error {errno.ENOSPC})"), MachineError, "Set TMPDIR"),
        (RuntimeError("something else"), RuntimeError, "something else"),
        (InvalidAdapter("NaN"), InvalidAdapter, "NaN"),
    ],
)
def test_a_temporary_folder_is_gone_whatever_happens_in_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, raised: Exception, expected: type[Exception], says: str
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))

    def use() -> None:
        with temporary_folder() as folder:
            assert stat.S_IMODE(folder.stat().st_mode) == 0o700
            (folder / "secret").write_bytes(b"x")
            raise raised

    with pytest.raises(expected, match=says):
        use()
    assert os.listdir(tmp_path) == []


# -- files ---------------------------------------------------------------------------------------------------------


def test_only_regular_files_are_read(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"12345")
    assert files.read_small(tmp_path / "file") == b"12345"
    assert files.read_small(tmp_path / "file", 3) == b"123"
    (tmp_path / "link").symlink_to("file")
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "folder").mkdir()
    for name in ("link", "pipe", "folder"):
        with pytest.raises(PlantedLink):
            files.read_small(tmp_path / name)
    with pytest.raises(FileNotFoundError):
        files.read_small(tmp_path / "missing")


@pytest.mark.parametrize("links", [True, False])
def test_of_two_that_create_a_file_one_does(tmp_path: Path, links: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not links:

        def refuse(*_: object, **__: object) -> None:
            raise error(errno.EPERM)

        monkeypatch.setattr(os, "link", refuse)
    assert files.create_exclusively(tmp_path / "a", b"first")
    assert not files.create_exclusively(tmp_path / "a", b"second")
    assert (tmp_path / "a").read_bytes() == b"first"
    assert os.listdir(tmp_path) == ["a"]


def test_a_replacement_that_fails_leaves_the_former_file_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files.replace_file(tmp_path / "a", b"first")

    def refuse(*_: object) -> None:
        raise error(errno.EIO)

    monkeypatch.setattr(os, "replace", refuse)
    with pytest.raises(OSError, match="Input/output"):
        files.replace_file(tmp_path / "a", b"second")
    assert (tmp_path / "a").read_bytes() == b"first"
    assert os.listdir(tmp_path) == ["a"]


# -- locks ---------------------------------------------------------------------------------------------------------


def write_lock(folder: Path, *, age: float = 0.0, **owner: Any) -> Path:
    lock = folder / "lock"
    lock.write_text(json.dumps({"host": owners.host(), "pid": 2**22 + 1, "started": "1", **owner}))
    moment = lock.stat().st_mtime - age
    os.utime(lock, (moment, moment))
    return lock


STALE: dict[str, dict[str, Any]] = {
    "a dead process": {},
    "a process id that is used again": {"pid": os.getpid(), "started": "1"},
    "an id that no process can have": {"pid": 2**31},
    "another host, long ago": {"host": "elsewhere", "age": 100.0},
    "another host, in the future": {"host": "elsewhere", "age": -100.0},
    "nobody, long ago": {"pid": "x", "age": 100.0},
}


@pytest.mark.parametrize("case", STALE)
def test_a_stale_lock_is_broken_and_cleared(tmp_path: Path, case: str) -> None:
    write_lock(tmp_path, **STALE[case])
    with folder_lock(tmp_path, timeout=0.05):
        pass
    lock = write_lock(tmp_path, **STALE[case])
    clear(tmp_path)
    assert not lock.exists()


LIVE: dict[str, dict[str, Any]] = {
    "a living process": {"pid": os.getpid(), "started": owners.started(os.getpid())},
    "another host, just now": {"host": "elsewhere"},
    "nobody, just now": {"pid": "x"},
}


@pytest.mark.parametrize("case", LIVE)
def test_a_live_lock_stands(tmp_path: Path, case: str) -> None:
    lock = write_lock(tmp_path, **LIVE[case])
    clear(tmp_path)
    assert lock.exists()
    with pytest.raises(LockTimeout, match=r"lock is held by .* delete that file"), folder_lock(tmp_path, timeout=0.05):
        pass
    assert lock.exists()


def test_a_lock_that_another_process_took_over_is_left_to_it(tmp_path: Path) -> None:
    with folder_lock(tmp_path):
        write_lock(tmp_path, pid=os.getpid(), started=owners.started(os.getpid()))
    assert (tmp_path / "lock").exists()
    with pytest.raises(LockTimeout), folder_lock(tmp_path, timeout=0.05):
        pass


def test_a_read_only_folder_is_not_cleared_and_no_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lock = write_lock(tmp_path)

    def refuse(*_: object) -> None:
        raise error(errno.EROFS)

    monkeypatch.setattr(mutex, "_break", refuse)
    clear(tmp_path)
    assert lock.exists()
    clear(tmp_path / "nowhere")


@pytest.mark.parametrize("pid", [0, -1, 2**31, 2**70])
def test_ids_that_no_process_has_are_dead(pid: int) -> None:
    assert not owners.is_alive(pid)


def test_a_process_of_another_user_is_alive(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(pid: int, signal: int) -> None:
        raise PermissionError(errno.EPERM, "not yours")

    monkeypatch.setattr(os, "kill", refuse)
    assert owners.is_alive(1)


def test_what_is_deleted_is_not_followed(tmp_path: Path) -> None:
    (tmp_path / "kept").mkdir()
    (tmp_path / "kept" / "file").write_bytes(b"x")
    (tmp_path / "gone").mkdir()
    (tmp_path / "gone" / "link").symlink_to(tmp_path / "kept")
    (tmp_path / "gone").chmod(0o555)
    (tmp_path / "link").symlink_to(tmp_path / "kept")
    for name in ("gone", "link", "missing"):
        owners.delete(tmp_path / name)
    assert (tmp_path / "kept" / "file").exists()
    assert os.listdir(tmp_path) == ["kept"]
    assert not owners.is_old(tmp_path / "missing")

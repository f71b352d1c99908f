"""The cache by itself: what enters it, what is handed out, what is kept, and what a damaged one says."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import pytest
from releases import draft

from registry.catalog.memory import Seen
from registry.disk.files import PlantedLink
from registry.disk.mutex import LockTimeout, folder_lock
from registry.disk.owners import delete
from registry.errors import CacheError, IntegrityError, InvalidAdapter
from registry.formats.records import FileRecord
from registry.pulling import cache as module
from registry.pulling.cache import VARIABLE, Cache, check_file, check_files

DRAFT = draft("1.0.0")
MANIFEST, FILES = DRAFT.manifest, DRAFT.files
DIGEST = MANIFEST.digest
WEIGHTS = "adapter_model.safetensors"


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Cache:
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)
    return Cache(tmp_path / "cache")


def download(name: str, record: FileRecord, sink: BinaryIO) -> None:
    sink.write(FILES[name])  # type: ignore[arg-type]


def add(cache: Cache, *, warnings: tuple[str, ...] = (), fetch: Any = download) -> tuple[str, ...]:
    return cache.add(MANIFEST, fetch, lambda folder: warnings)


def content(cache: Cache) -> list[str]:
    return sorted(str(path.relative_to(cache.folder)) for path in cache.folder.rglob("*") if path.is_file())


def writable(cache: Cache) -> Path:
    folder = cache.path(DIGEST)
    folder.chmod(0o755)
    for path in folder.iterdir():
        path.chmod(0o644)
    return folder


# -- what enters ---------------------------------------------------------------------------------------------------


def test_what_was_added_is_handed_out_and_only_read(cache: Cache) -> None:
    assert cache.manifest(DIGEST) is None
    assert add(cache, warnings=("zeros",)) == ("zeros",)
    assert cache.use(MANIFEST) == ("zeros",)
    assert cache.manifest(DIGEST) == MANIFEST
    assert cache.digests() == [DIGEST]
    folder = cache.path(DIGEST)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == {
        **FILES,
        "adapter_manifest.json": MANIFEST.to_bytes(),
    }
    assert folder.stat().st_mode & 0o777 == 0o555
    assert {path.stat().st_mode & 0o777 for path in folder.iterdir()} == {0o444}


def tampered(name: str, record: FileRecord, sink: BinaryIO) -> None:
    data = bytearray(FILES[name])  # type: ignore[arg-type]
    if name == WEIGHTS:
        data[-1] ^= 1
    sink.write(bytes(data))


def shortened(name: str, record: FileRecord, sink: BinaryIO) -> None:
    sink.write(FILES[name][:-1])  # type: ignore[index]


def broken(name: str, record: FileRecord, sink: BinaryIO) -> None:
    raise InvalidAdapter("the hub broke off")


@pytest.mark.parametrize("fetch", [tampered, shortened, broken])
def test_what_differs_from_the_manifest_does_not_enter(cache: Cache, fetch: Any) -> None:
    with pytest.raises((IntegrityError, InvalidAdapter)):
        add(cache, fetch=fetch)
    assert cache.digests() == []
    assert content(cache) == []


def test_what_the_examination_refuses_does_not_enter(cache: Cache) -> None:
    def refuse(folder: Path) -> tuple[str, ...]:
        assert {path.name for path in folder.iterdir()} == {*FILES, "adapter_manifest.json"}
        raise InvalidAdapter("NaN")

    with pytest.raises(InvalidAdapter):
        cache.add(MANIFEST, download, refuse)
    assert content(cache) == []


def test_a_release_that_cannot_be_placed_leaves_no_notes(cache: Cache, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError(28, os.strerror(28))

    monkeypatch.setattr(Cache, "_place", refuse)
    with pytest.raises(CacheError, match="No space left"):
        add(cache)
    assert content(cache) == ["guard"]


def test_of_two_processes_that_add_one_release_both_have_it(cache: Cache) -> None:
    def meanwhile(folder: Path) -> tuple[str, ...]:
        if not cache.path(DIGEST).exists():
            add(cache)
        return ()

    assert cache.add(MANIFEST, download, meanwhile) == ()
    assert cache.use(MANIFEST) == ()
    assert cache.digests() == [DIGEST]
    assert os.listdir(cache.folder / "releases") == [DIGEST]


def test_a_damaged_copy_is_replaced(cache: Cache) -> None:
    add(cache)
    (writable(cache) / WEIGHTS).write_bytes(b"x")
    add(cache)
    assert cache.use(MANIFEST) == ()
    assert os.listdir(cache.folder / "releases") == [DIGEST]


def test_a_copy_that_is_damaged_again_and_again_is_given_up(cache: Cache, monkeypatch: pytest.MonkeyPatch) -> None:
    add(cache)
    real = check_files

    def differs(folder: Path, manifest: Any) -> None:
        if folder.name == DIGEST:
            raise IntegrityError("differs")
        real(folder, manifest)

    moved = []

    def stays(source: Any, target: Any) -> None:
        if Path(target).name == DIGEST:
            raise OSError(39, "Directory not empty")
        moved.append(source)

    monkeypatch.setattr(module, "check_files", differs)
    monkeypatch.setattr(os, "rename", stays)
    with pytest.raises(IntegrityError, match="damaged again and again"):
        add(cache)
    assert moved == [cache.path(DIGEST)] * 5


def test_a_disk_that_is_full_at_the_last_step_is_said_to_be(cache: Cache, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.rename

    def refuse(source: Any, target: Any) -> None:
        if Path(target).name == DIGEST:
            raise OSError(28, os.strerror(28))
        real(source, target)

    monkeypatch.setattr(os, "rename", refuse)
    with pytest.raises(CacheError, match="No space left"):
        add(cache)
    assert content(cache) == ["guard"]


def test_what_others_have_left_is_swept_when_something_is_added(cache: Cache) -> None:
    for name in ("releases", "checked"):
        (cache.folder / name).mkdir(parents=True)
        old = cache.folder / name / ".tmp-00000000-1--0123456789abcdef"  # another machine's, more than a day old
        old.write_bytes(b"half")
        os.utime(old, (0, 0))
    add(cache)
    assert [path for path in content(cache) if ".tmp-" in path] == []


def test_which_folder_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, str(tmp_path / "named"))
    monkeypatch.setenv("HF_ASSETS_CACHE", str(tmp_path / "assets"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "user"))
    assert Cache("/srv/cache").folder == Path("/srv/cache")
    assert Cache().folder == tmp_path / "named"
    monkeypatch.delenv(VARIABLE)
    assert Cache().folder == tmp_path / "assets" / "lora-plugins" / "registry"
    assert repr(Cache("/srv/cache")) == "Cache('/srv/cache')"
    monkeypatch.delenv("HF_ASSETS_CACHE")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    assert Cache().folder == tmp_path / "hf" / "assets" / "lora-plugins" / "registry"
    (tmp_path / "user" / "lora-plugins" / "registry").mkdir(parents=True)  # the first release's
    assert Cache().folder == tmp_path / "user" / "lora-plugins" / "registry"
    (tmp_path / "hf" / "assets" / "lora-plugins" / "registry").mkdir(parents=True)
    assert Cache().folder == tmp_path / "hf" / "assets" / "lora-plugins" / "registry"
    for variable in ("HF_HOME", "XDG_CACHE_HOME"):
        monkeypatch.delenv(variable)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert Cache().folder == tmp_path / ".cache" / "huggingface" / "assets" / "lora-plugins" / "registry"


def test_a_record_that_another_process_holds_is_not_waited_for_without_end(
    cache: Cache, monkeypatch: pytest.MonkeyPatch
) -> None:
    def held(folder: Path) -> None:
        raise LockTimeout("held by another")

    monkeypatch.setattr(module, "folder_lock", held)
    with pytest.raises(CacheError, match="held by another"):
        cache.remember("https://hub", "org/name", lambda seen: seen.with_tags({"v1.0.0": "a" * 40}))


# -- what is handed out --------------------------------------------------------------------------------------------

DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "a flipped bit": (
        lambda f: (f / WEIGHTS).write_bytes(bytes([FILES[WEIGHTS][0] ^ 1]) + FILES[WEIGHTS][1:]),
        "has the sha256",
    ),
    "a byte more": (lambda f: (f / WEIGHTS).write_bytes(FILES[WEIGHTS] + b"x"), "bytes where the manifest says"),
    "a missing file": (lambda f: (f / "README.md").unlink(), "is missing"),
    "a missing manifest": (lambda f: (f / "adapter_manifest.json").unlink(), "is missing"),
    "another manifest": (
        lambda f: (f / "adapter_manifest.json").write_bytes(MANIFEST.to_bytes() + b" "),
        "adapter_manifest",
    ),
    "a file more": (
        lambda f: (f / "adapter_model.bin").write_bytes(b"x"),
        "adapter_model.bin', which is not in the manifest",
    ),
    "a folder more": (
        lambda f: ((f / "more").mkdir(), (f / "more" / "x.py").write_bytes(b"")),
        "which is not in the manifest",
    ),
    "a link in place of a file": (
        lambda f: ((f / "README.md").unlink(), (f / "README.md").symlink_to("/etc/hostname")),
        "README",
    ),
    "a pipe in place of a file": (
        lambda f: ((f / "README.md").unlink(), os.mkfifo(f / "README.md")),
        "bytes where|regular|files only",
    ),
}


@pytest.mark.parametrize("case", DAMAGE)
def test_what_differs_is_not_handed_out(cache: Cache, case: str) -> None:
    add(cache)
    damage, says = DAMAGE[case]
    damage(writable(cache))
    for action in (lambda: cache.use(MANIFEST), lambda: cache.check(MANIFEST)):
        with pytest.raises(IntegrityError, match=says):
            action()


def test_a_release_that_is_a_link_is_not_handed_out(cache: Cache, tmp_path: Path) -> None:
    add(cache)
    cache.path(DIGEST).chmod(0o755)
    cache.path(DIGEST).rename(tmp_path / "elsewhere")
    cache.path(DIGEST).symlink_to(tmp_path / "elsewhere")
    with pytest.raises(IntegrityError, match="symbolic link"):
        cache.check(MANIFEST)
    assert cache.manifest(DIGEST) is None


def test_a_folder_that_cannot_be_read_is_said_to_be(cache: Cache, monkeypatch: pytest.MonkeyPatch) -> None:
    add(cache)

    def refuse(path: Path) -> int:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("registry.disk.files.open_regular", refuse)
    with pytest.raises(IntegrityError, match="cannot be read: Permission denied"):
        cache.check(MANIFEST)


def test_one_file_is_compared_with_its_record(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"one")
    sound = FileRecord(3, "7692c3ad3540bb803c020b3aee66cd8887123234ea0c6e7143c0add73ff431ed")
    check_file(tmp_path, "a", sound)
    for record in (FileRecord(4, sound.sha256), FileRecord(3, "0" * 64)):
        with pytest.raises(IntegrityError):
            check_file(tmp_path, "a", record)
    with pytest.raises(IntegrityError, match="is missing"):
        check_file(tmp_path, "b", sound)


@pytest.mark.parametrize("damage", [b"", b"{", b"x" * 10])
def test_a_manifest_that_is_damaged_is_none(cache: Cache, damage: bytes) -> None:
    add(cache)
    (writable(cache) / "adapter_manifest.json").write_bytes(damage)
    assert cache.manifest(DIGEST) is None


# -- leases and notes ----------------------------------------------------------------------------------------------


def test_what_was_used_today_stays(cache: Cache) -> None:
    assert not cache.is_leased(DIGEST)
    add(cache)
    assert cache.is_leased(DIGEST)
    assert not cache.remove(DIGEST)
    assert cache.digests() == [DIGEST]
    os.utime(cache.folder / "checked" / f"{DIGEST}.json", (0, 0))
    assert not cache.is_leased(DIGEST)
    cache.use(MANIFEST)
    assert cache.is_leased(DIGEST)
    os.utime(cache.folder / "checked" / f"{DIGEST}.json", (0, 0))
    assert cache.remove(DIGEST)
    assert cache.digests() == []
    assert content(cache) == ["guard"]
    assert cache.remove(DIGEST)  # gone already


def test_what_is_removed_takes_its_signatures_along(cache: Cache) -> None:
    assert cache.remove(DIGEST)  # there is no cache yet
    add(cache)
    (cache.folder / "signatures" / DIGEST).mkdir(parents=True)
    (cache.folder / "signatures" / DIGEST / "a.sig").write_bytes(b"")
    os.utime(cache.folder / "checked" / f"{DIGEST}.json", (0, 0))
    assert cache.remove(DIGEST)
    assert content(cache) == ["guard"]


def test_a_release_beside_lost_notes_gets_its_lease(cache: Cache) -> None:
    add(cache)
    delete(cache.folder / "checked")
    assert cache.use(MANIFEST) is None
    assert cache.is_leased(DIGEST)


def test_a_release_of_the_first_version_is_examined_again(cache: Cache) -> None:
    add(cache, warnings=("zeros",))
    notes = cache.folder / "checked" / f"{DIGEST}.json"
    notes.unlink()
    assert cache.use(MANIFEST) is None
    assert cache.is_leased(DIGEST)
    cache.note(DIGEST, ("float64",))
    assert cache.use(MANIFEST) == ("float64",)
    for damaged in (b"{", b'{"checks": 99, "warnings": []}', b'{"checks": 1, "warnings": 1}'):
        notes.write_bytes(damaged)
        assert cache.use(MANIFEST) is None


def test_a_release_that_is_not_there_gets_no_lease(cache: Cache) -> None:
    with pytest.raises(IntegrityError):
        cache.use(MANIFEST)
    assert not cache.is_leased(DIGEST)


# -- what was seen -------------------------------------------------------------------------------------------------


def test_what_was_seen_is_remembered(cache: Cache) -> None:
    assert cache.seen("https://hub", "org/name") == Seen()
    cache.remember("https://hub", "org/name", lambda seen: seen)  # nothing new: nothing written
    assert not cache.folder.exists()
    cache.remember("https://hub", "org/name", lambda seen: seen.with_tags({"v1.0.0": "a" * 40}))
    cache.remember("https://hub", "org/name", lambda seen: seen.with_tags({"v1.1.0": "b" * 40}))
    assert set(cache.seen("https://hub", "org/name").tags) == {"v1.0.0", "v1.1.0"}
    assert cache.seen("https://other", "org/name") == Seen()
    assert [set(seen.tags) for seen in cache.records()] == [{"v1.0.0", "v1.1.0"}]


def test_of_many_that_remember_at_once_nobody_starves_and_nothing_is_lost(
    cache: Cache, monkeypatch: pytest.MonkeyPatch
) -> None:
    waiting, most, counting = [0], [0], threading.Lock()

    @contextmanager
    def watched(folder: Path) -> Iterator[None]:
        with counting:
            waiting[0] += 1
            most[0] = max(most[0], waiting[0])
        with folder_lock(folder):
            yield
        with counting:
            waiting[0] -= 1

    monkeypatch.setattr(module, "folder_lock", watched)

    def remember(number: int) -> None:
        for turn in range(5):
            tags = {f"v1.{number}.{turn}": "a" * 40}
            cache.remember("https://hub", "org/name", lambda seen, tags=tags: seen.with_tags(tags))  # type: ignore[misc]

    threads = [threading.Thread(target=remember, args=(number,)) for number in range(12)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(cache.seen("https://hub", "org/name").tags) == 60
    assert most[0] == 1  # the others wait where the kernel lets them in by turns


@pytest.mark.parametrize("damage", [b"", b"{", b'{"format": 9}', None])
def test_a_damaged_record_says_which_file_to_delete(cache: Cache, damage: bytes | None) -> None:
    path = cache.record_path("https://hub", "org/name")
    path.parent.mkdir(parents=True)
    if damage is None:
        path.symlink_to("/dev/zero")
    else:
        path.write_bytes(damage)
    actions: list[Callable[[], object]] = [
        lambda: cache.seen("https://hub", "org/name"),
        lambda: list(cache.records()),
        lambda: cache.remember("https://hub", "org/name", lambda seen: seen),
    ]
    for action in actions:
        with pytest.raises(CacheError, match=r"is damaged .*name\.json.* delete that file"):
            action()


@pytest.mark.parametrize(("number", "raises"), [(30, False), (13, False), (28, True)])
def test_a_cache_that_is_only_read_remembers_nothing_and_a_full_one_says_so(
    cache: Cache, monkeypatch: pytest.MonkeyPatch, number: int, raises: bool
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr("registry.disk.files.replace_file", refuse)

    def remember() -> None:
        cache.remember("https://hub", "org/name", lambda seen: seen.with_tags({"v1.0.0": "a" * 40}))

    if raises:
        with pytest.raises(CacheError, match="cannot be written: No space left"):
            remember()
    else:
        remember()
    assert cache.seen("https://hub", "org/name") == Seen()


def test_a_record_that_cannot_be_read_is_an_error(cache: Cache, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("registry.disk.files.read_small", refuse)
    with pytest.raises(CacheError, match="cannot be read: Permission denied"):
        cache.seen("https://hub", "org/name")


def test_a_planted_link_in_the_cache_is_not_followed(cache: Cache, tmp_path: Path) -> None:
    cache.folder.mkdir()
    (tmp_path / "elsewhere").mkdir()
    for name in ("releases", "checked", "seen"):
        (cache.folder / name).symlink_to(tmp_path / "elsewhere")
    actions: list[Callable[[], object]] = [
        lambda: add(cache),
        cache.digests,
        cache.leftovers,
        lambda: cache.is_leased(DIGEST),
        lambda: list(cache.records()),
        lambda: cache.remove(DIGEST),
    ]
    for action in actions:
        with pytest.raises((CacheError, PlantedLink), match="symbolic link"):
            action()
    assert os.listdir(tmp_path / "elsewhere") == []

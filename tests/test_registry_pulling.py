"""What a pull lets into the cache, keeps there and remembers."""

from __future__ import annotations

import contextlib
import json
import os
import random
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy
import pytest
from hubs import KINDS, FolderPlace, LoopbackPlace, Place, make_place
from places import fetch, pair, publish_weights, snapshot, use_own_folders
from releases import MODULE, NAME, draft, release
from safetensors.numpy import save

from registry.catalog.aliases import remove_alias, set_alias
from registry.catalog.state import STATE_BRANCH
from registry.catalog.withdrawal import unyank, yank
from registry.disk.owners import new_name
from registry.errors import (
    AdapterWarning,
    CacheError,
    InvalidAdapter,
    InvalidLock,
    MachineError,
    ReleaseMoved,
    RepositoryNotFound,
    TooLarge,
    UnsafeFile,
    YankedWarning,
)
from registry.formats.records import FileRecord
from registry.hubs.folder import FolderHub
from registry.publishing.snapshot import copy_adapter, copy_tokenizer
from registry.pulling.cache import VARIABLE, Cache
from registry.pulling.content import check_sizes
from registry.testing import LoopbackHub
from registry.upkeep.cleanup import collect_garbage
from registry.upkeep.verification import verify


@pytest.fixture(autouse=True)
def _own_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    use_own_folders(tmp_path, monkeypatch)


@pytest.fixture(params=KINDS)
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Place:
    return make_place(request, tmp_path, timeout=30)  # a busy machine answers late


NAN, INF = float("nan"), float("inf")


def full(value: float, shape: tuple[int, ...] = (2, 8), dtype: str = "f4") -> numpy.ndarray:
    return numpy.full(shape, value, dtype)


# -- content -------------------------------------------------------------------------------------------------------

#: Adapters that hash as their manifest says and are of no use, or do harm.
REFUSED = {
    "NaN": pair(full(NAN)),
    "one infinity": pair(second=numpy.where(numpy.arange(16).reshape(8, 2) == 15, -INF, 1.0).astype("f4")),
    "NaN in float64": pair(full(NAN, dtype="f8")),
    "1e38": pair(full(1e38)),
    "just above float16": pair(full(65_520.0)),
    "infinite float16": pair(full(INF, dtype="f2")),
    "int64": pair(full(1, dtype="i8")),
    "int8": pair(second=full(1, (8, 2), "i1")),
    "bool": pair(full(1, dtype="?")),
    "A without B": {f"{MODULE}.lora_A.weight": full(1)},
    "B without A": {**pair(), "base_model.model.x.lora_B.weight": full(1, (8, 2))},
    "another rank": pair(full(1, (4, 8)), full(1, (8, 4))),
    "ranks that differ": pair(full(1, (2, 8)), full(1, (8, 1))),
    "one dimension": pair(full(1, (2,)), full(1, (8, 2))),
    "A twice": {**pair(), f"{MODULE}.lora_A": full(1)},
    "A of an embedding, B of a layer": {
        f"{MODULE}.lora_embedding_A": full(1), f"{MODULE}.lora_B.weight": full(1, (8, 2)),
    },
    "no LoRA at all": {"base_model.model.model.norm.weight": full(1, (8,))},
    "another prefix": {**pair(), "model.norm.weight": full(1, (8,))},
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_values_and_shapes_are_refused_and_nothing_stays(place: Place, case: str, tmp_path: Path) -> None:
    publish_weights(place, REFUSED[case])
    for _ in range(2):
        with pytest.raises(InvalidAdapter):
            fetch(place)
    assert snapshot(tmp_path / "cache") == []
    found = verify(NAME, hub=place.hub)
    assert not found.ok


HARMFUL = {
    "5 MB of pickle": b"\x80\x04pickle" + b"\0" * 5_000_000,
    "a header of 2**63 bytes": (2**63).to_bytes(8, "little") + b"{}" + b"\0" * 200,
    "zeros": b"\0" * 300,
}


@pytest.mark.parametrize("case", HARMFUL)
def test_a_refused_file_leaves_nothing_in_the_cache(place: Place, case: str, tmp_path: Path) -> None:
    publish_weights(place, HARMFUL[case])
    with pytest.raises(UnsafeFile):
        fetch(place)
    assert snapshot(tmp_path / "cache") == []


def test_a_file_larger_than_its_tensors_is_not_downloaded(loopback_hub: LoopbackHub) -> None:
    place = LoopbackPlace(loopback_hub)
    publish_weights(place, b"\x80\x04pickle" + b"\0" * 9_000_000)
    loopback_hub.requests.clear()
    with pytest.raises(UnsafeFile, match=r"9,000,008 bytes, and the tensors of its manifest take 128"):
        fetch(place)
    assert not any("safetensors" in request.path for request in loopback_hub.requests)


def test_a_card_of_a_terabyte_is_not_downloaded(place: Place) -> None:
    harmless = draft("1.0.0")
    files = {**harmless.manifest.files, "README.md": FileRecord(10**10, "0" * 64)}
    with pytest.raises(TooLarge, match=r"README\.md has 10,000,000,000 bytes"):
        check_sizes(replace(harmless.manifest, files=files))


USELESS = {
    "all zero": (pair(second=full(0, (8, 2))), "changes nothing"),
    "denormal": (pair(second=full(1e-42, (8, 2))), "changes nothing"),
    "A zero": (pair(full(0)), "changes nothing"),
    "float64": (pair(full(1, dtype="f8")), "2 tensors|1 tensors, first .*lora_A"),
}


@pytest.mark.parametrize("case", USELESS)
def test_an_adapter_of_no_use_comes_with_a_warning_each_time(place: Place, case: str) -> None:
    tensors, says = USELESS[case]
    publish_weights(place, tensors)
    for offline in (False, False, True):
        with pytest.warns(AdapterWarning, match=says):
            fetch(place, offline=offline and not place.hub.local)
    assert verify(NAME, hub=place.hub).problems != ()


def test_a_sound_adapter_comes_without_a_warning(place: Place) -> None:
    halves = pair(full(65_504, dtype="f2"), numpy.zeros((8, 2), "f4") + numpy.eye(8, 2, dtype="f4"))
    publish_weights(place, {**halves, **pair(second=full(0, (8, 2)), module=f"{MODULE}_more")})
    with warnings.catch_warnings():
        warnings.simplefilter("error", AdapterWarning)
        fetch(place)
    assert verify(NAME, hub=place.hub).ok


def test_a_warm_pull_reads_values_no_second_time(tmp_path: Path) -> None:
    place = FolderPlace(tmp_path / "registry")
    release(place.hub, "1.0.0")
    fetch(place)
    script = (
        "import sys; from registry.pulling.pull import fetch_adapter; from registry.pulling.lockfile import Lock\n"
        "from pathlib import Path\n"
        f"fetch_adapter({NAME!r}, hub=Path(sys.argv[1]), token=None, lock=Lock(None), offline=False, cache_dir=None)\n"
        "assert 'numpy' not in sys.modules and 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", script, str(tmp_path / "registry")], check=True, timeout=60)


def test_what_an_earlier_release_put_into_the_cache_is_examined(place: Place) -> None:
    publish_weights(place, REFUSED["NaN"])
    with pytest.raises(InvalidAdapter):
        fetch(place)
    publish_weights(place, pair(), "1.1.0")
    fetched = fetch(place)
    # As 0.1.0 left it: no notes, and content that nobody has looked at.
    [notes] = (Cache().folder / "checked").iterdir()
    notes.unlink()
    weights = fetched.path / "adapter_model.safetensors"
    assert fetch(place).path == fetched.path
    assert json.loads(notes.read_bytes())["checks"] == 1
    assert weights.is_file()


# -- gc and pulls --------------------------------------------------------------------------------------------------


def expire(folder: Path) -> None:
    for path in (folder / "checked").glob("*.json"):
        os.utime(path, (0, 0))


def test_gc_leaves_what_was_handed_out_today(place: Place) -> None:
    release(place.hub, "1.0.0")
    path = fetch(place).path
    record = Cache().record_path(place.hub.location, NAME)
    record.unlink()
    assert collect_garbage(place.hub, dry_run=False).paths == ()
    assert path.is_dir()
    expire(Cache().folder)
    assert collect_garbage(place.hub, dry_run=True).paths == (path,)
    fetch(place)  # a lease begins anew, and the record is written again
    record.unlink()
    assert collect_garbage(place.hub, dry_run=False).paths == ()
    expire(Cache().folder)
    assert collect_garbage(place.hub, dry_run=False).paths == (path,)
    assert snapshot(Cache().folder) == []


def test_gc_that_was_about_to_delete_finds_the_lease(tmp_path: Path) -> None:
    """A pull comes between gc's look and its deleting."""
    place = FolderPlace(tmp_path / "registry")
    release(place.hub, "1.0.0")
    digest = fetch(place).manifest.digest
    expire(Cache().folder)
    assert not Cache().is_leased(digest)
    fetch(place)
    assert Cache().remove(digest) is False
    assert Cache().path(digest).is_dir()


@pytest.mark.parametrize("what", ["half a pull", "a file of one", "a release", "a commit"])
def test_gc_goes_on_when_another_process_is_faster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str) -> None:
    """A pull sweeps what a dead one has left, and a second gc deletes the same: what gc has found is gone meanwhile."""
    place, cache = FolderPlace(tmp_path / "registry"), Cache()
    release(place.hub, "1.0.0")
    gone = cache.folder / "releases" / ("f" * 64)
    if what == "half a pull":
        monkeypatch.setattr(Cache, "leftovers", lambda self: [gone])
    elif what == "a release":
        monkeypatch.setattr(Cache, "digests", lambda self: [gone.name])
    elif what == "a commit":
        monkeypatch.setattr(FolderHub, "unreachable", lambda self, name: [self.root / name / "commits" / ("f" * 64)])
    else:
        half, lstat = leave_half(cache.folder / "releases"), os.lstat
        readme = half / "README.md"

        def vanish(path: Any, **options: Any) -> os.stat_result:
            if Path(path) == readme:
                Path(path).unlink(missing_ok=True)
            return lstat(path, **options)

        monkeypatch.setattr(os, "lstat", vanish)
        monkeypatch.setattr(Path, "lstat", lambda self: vanish(self))
        gone = half
    for dry_run in (True, False):
        collect_garbage(place.hub, dry_run=dry_run)
    assert not gone.exists()


def test_a_damaged_record_deletes_nothing(place: Place) -> None:
    release(place.hub, "1.0.0")
    path = fetch(place).path
    expire(Cache().folder)
    Cache().record_path(place.hub.location, NAME).write_bytes(b'{"form')
    found = collect_garbage(place.hub, dry_run=False)
    assert (found.paths, len(found.problems)) == ((), 1)
    assert path.is_dir()


@pytest.mark.parametrize("seconds", [2, pytest.param(60, marks=pytest.mark.slow)])
def test_sixteen_pullers_and_gc_on_one_cache(tmp_path: Path, seconds: int, capsys: pytest.CaptureFixture[str]) -> None:
    """No pull fails, and nothing that was handed out is gone, while gc deletes whatever nobody has in use."""
    place, shelf = FolderPlace(tmp_path / "registry"), Shelf(32)
    shelf.digests = [release(place.hub, f"1.{number}.0", number).manifest.digest for number in range(32)]
    end, limit = time.monotonic() + seconds, time.monotonic() + seconds + 120

    def is_over() -> bool:
        """After these seconds, on a busy machine not before both sides have done something."""
        now, few = time.monotonic(), shelf.pulls < 50 or len(shelf.deleted) < 10
        return bool(shelf.failures) or now > limit or (now > end and not few)

    def pull(seed: int) -> None:
        chance = random.Random(seed)
        try:
            while not is_over():
                number = chance.randrange(32)
                with shelf.borrow(number):
                    fetched = fetch(place, f"{NAME}@1.{number}.0", lock=False)
                    time.sleep(chance.uniform(0, 0.03))
                    sizes = {name: (fetched.path / name).stat().st_size for name in fetched.manifest.files}
                assert sizes == {name: record.size for name, record in fetched.manifest.files.items()}
                shelf.pulls += 1
        except Exception as error:
            shelf.failures.append(error)

    def clean() -> None:
        try:
            while not is_over():
                shelf.let_a_day_pass()
                Cache().record_path(place.hub.location, NAME).unlink(missing_ok=True)
                half = leave_half(Cache().folder / "releases")
                found = collect_garbage(place.hub, dry_run=False)
                shelf.deleted += [path for path in found.paths if Path(path).name in shelf.digests]
                shelf.halves += not half.exists()
        except Exception as error:
            shelf.failures.append(error)

    threads = [threading.Thread(target=pull, args=(seed,)) for seed in range(16)]
    threads.append(threading.Thread(target=clean))
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    with capsys.disabled():
        print(
            f"\n16 pullers and gc for {seconds} s: {shelf.pulls} pulls, {len(shelf.failures)} failed; gc deleted "
            f"{len(shelf.deleted)} releases and {shelf.halves} unfinished ones"
        )
    assert shelf.failures == []
    assert len(shelf.deleted) >= 10
    assert shelf.halves >= 1
    assert list((Cache().folder / "releases").glob(".tmp-*")) == []


class Shelf:
    """The releases of one cache, and how many have each of them in use."""

    def __init__(self, count: int) -> None:
        self.digests: list[str] = []
        self.users, self.counting = [0] * count, threading.Lock()
        self.failures: list[Exception] = []
        self.deleted: list[Path | str] = []
        self.pulls = self.halves = 0

    @contextlib.contextmanager
    def borrow(self, number: int) -> Iterator[None]:
        """Use a release; nobody lets a day pass for it meanwhile."""
        with self.counting:
            self.users[number] += 1
        try:
            yield
        finally:
            with self.counting:
                self.users[number] -= 1

    def let_a_day_pass(self) -> None:
        """End the leases of the releases that nobody uses; the next pull may come at any time."""
        for number, digest in enumerate(self.digests):
            with self.counting, contextlib.suppress(FileNotFoundError):
                if self.users[number] == 0:
                    os.utime(Cache().folder / "checked" / f"{digest}.json", (0, 0))


def leave_half(folder: Path) -> Path:
    """Leave what a process that was killed while it pulled leaves."""
    half = folder / new_name().replace(f"-{os.getpid()}-", f"-{2**31 - 1}-")
    half.mkdir(parents=True)
    (half / "README.md").write_bytes(b"half")
    return half


# -- broken machines -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("error", [28, 122, 27, 5])
def test_a_disk_that_is_full_is_no_reason_for_an_old_version(
    place: Place, monkeypatch: pytest.MonkeyPatch, error: int
) -> None:
    release(place.hub, "1.0.0")
    fetch(place)
    release(place.hub, "2.0.0", 1)

    def broken(self: object, data: bytes) -> int:
        raise type(self)._error(self, OSError(error, os.strerror(error)))  # type: ignore[attr-defined]

    before = snapshot(Cache().folder)
    monkeypatch.setattr("registry.disk.machine.CheckedSink.write", broken)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(CacheError, match=os.strerror(error)):
            fetch(place)
    assert snapshot(Cache().folder) == before
    monkeypatch.undo()


def test_a_folder_that_cannot_be_read_is_no_reason_for_an_old_version(tmp_path: Path) -> None:
    place = FolderPlace(tmp_path / "registry")
    release(place.hub, "1.0.0")
    fetch(place)
    release(place.hub, "2.0.0", 1)
    (place.root / NAME / "refs.json").unlink()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(OSError, match=r"refs\.json"):
            fetch(place)


@pytest.mark.parametrize("folder", ["/nowhere/at/all", "file"])
def test_a_missing_folder_for_temporary_files_is_named(
    place: Place, folder: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    release(place.hub, "1.0.0")
    (tmp_path / "file").write_bytes(b"")
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / folder) if folder == "file" else folder)
    with pytest.raises(MachineError, match="Set TMPDIR"):
        verify(NAME, hub=place.hub)


def test_nobody_without_a_home_is_told_what_to_set(monkeypatch: pytest.MonkeyPatch) -> None:
    def unknown(path: str) -> str:
        return path

    monkeypatch.delenv(VARIABLE)
    monkeypatch.delenv("HOME", raising=False)
    for variable in ("XDG_CACHE_HOME", "HF_HOME", "HF_ASSETS_CACHE"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setattr(os.path, "expanduser", unknown)  # as for a uid that no list of users has
    with pytest.raises(MachineError, match=f"Set {VARIABLE}"):
        Cache()
    assert Cache("/srv/cache").folder == Path("/srv/cache")
    monkeypatch.setenv("HF_HOME", "/srv/hf")
    assert Cache().folder == Path("/srv/hf/assets/lora-plugins/registry")
    monkeypatch.setenv("HF_ASSETS_CACHE", "/srv/assets")
    assert Cache().folder == Path("/srv/assets/lora-plugins/registry")


def test_the_cache_of_an_earlier_release_is_read(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv(VARIABLE)
    for variable in ("HF_HOME", "HF_ASSETS_CACHE"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "user"))
    (tmp_path / "user" / "lora-plugins" / "registry").mkdir(parents=True)
    assert Cache().folder == tmp_path / "user" / "lora-plugins" / "registry"
    (tmp_path / "user" / "huggingface" / "assets" / "lora-plugins" / "registry").mkdir(parents=True)
    assert Cache().folder == tmp_path / "user" / "huggingface" / "assets" / "lora-plugins" / "registry"


def test_a_cache_that_is_only_read_hands_out_what_it_has(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    """As in an image that brings its adapters along; root may write everywhere, so writing is refused by hand."""
    release(place.hub, "1.0.0")
    path = fetch(place).path
    yank(f"{NAME}@1.0.0", "wrong data", hub=place.hub)

    def refuse(*args: object, **options: object) -> None:
        raise OSError(30, "Read-only file system")

    for name in ("replace_file", "create_exclusively", "temporary_file"):
        monkeypatch.setattr(f"registry.disk.files.{name}", refuse)
        if name != "replace_file":
            monkeypatch.setattr(f"registry.disk.mutex.{name}", refuse)
    monkeypatch.setattr(os, "utime", refuse)
    with pytest.warns(YankedWarning):
        assert fetch(place, f"{NAME}@1.0.0").path == path


def test_a_registry_that_is_not_mounted_is_replaced_by_the_cache_only_offline(tmp_path: Path) -> None:
    place = FolderPlace(tmp_path / "registry")
    release(place.hub, "1.0.0")
    path = fetch(place).path
    place.root.rename(tmp_path / "elsewhere")
    with pytest.raises(RepositoryNotFound):
        fetch(place)
    assert fetch(place, offline=True).path == path


def test_a_sparse_file_of_fifty_gigabytes_is_not_copied(tmp_path: Path) -> None:
    source, target = tmp_path / "source", tmp_path / "target"
    source.mkdir()
    target.mkdir()
    (source / "adapter_config.json").write_bytes(b"{}")
    for head in (b"", (100).to_bytes(8, "little"), save(pair())):
        with open(source / "adapter_model.safetensors", "wb") as file:
            file.write(head)
            file.truncate(50 * 1024**3)
        with pytest.raises(UnsafeFile, match="adapter_model"):
            copy_adapter(source, target)
        for each in target.iterdir():
            assert each.stat().st_size <= 2
            each.unlink()


@pytest.mark.parametrize("name", ["adapter_config.json", "tokenizer.json", "tokenizer_config.json"])
def test_other_sparse_files_are_not_copied_either(tmp_path: Path, name: str) -> None:
    source, target = tmp_path / "source", tmp_path / "target"
    source.mkdir()
    target.mkdir()
    for file, content in (("adapter_config.json", b"{}"), ("adapter_model.safetensors", save(pair()))):
        (source / file).write_bytes(content)
    with open(source / name, "wb") as sparse:
        sparse.truncate(50 * 1024**3)
    with pytest.raises(TooLarge, match=rf"{name} has 53,687,091,200 bytes"):
        (copy_adapter if name == "adapter_config.json" else copy_tokenizer)(source, target)
    assert all(each.stat().st_size == 0 for each in target.iterdir())


# -- leftovers -----------------------------------------------------------------------------------------------------


def names_of_the_dead(prefix: str) -> list[str]:
    """Names that a process of this machine gave that is dead."""
    script = f"from registry.disk.owners import new_name; print(new_name({prefix!r}))"
    found = subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, text=True, timeout=60)
    return found.stdout.split()


def test_what_a_killed_process_was_writing_is_swept_by_the_next_call(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = FolderPlace(tmp_path / "registry")
    release(place.hub, "1.0.0")
    fetch(place, lock=True)
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(temporary))
    [folder], [file], [push] = (names_of_the_dead(prefix) for prefix in (".tmp-", "tmp-", "lora-plugins-"))
    record = Cache().record_path(place.hub.location, NAME)
    places = [Cache().folder / "releases" / folder, place.root / NAME / folder, temporary / push]
    for each in places:
        (each / "inside").mkdir(parents=True)
        (each / "inside" / "file").write_bytes(b"half")
        each.chmod(0o555)
    files = [record.parent / file, Path(file), Cache().folder / "checked" / file, place.root / NAME / file]
    for each in files:
        each.write_bytes(b"half")
    mine = Path("tmp-of-mine")
    mine.write_bytes(b"not ours")
    release(place.hub, "1.1.0", 1)
    fetch(place, lock=True, reference=f"{NAME}@1.1.0")
    verify(NAME, hub=place.hub)
    assert [str(each) for each in (*places, *files) if each.exists()] == []
    assert mine.exists()


def test_what_a_living_process_is_writing_is_left_alone(tmp_path: Path) -> None:
    from registry.disk.owners import find_leftovers, new_name

    alive = tmp_path / new_name()
    alive.mkdir()
    elsewhere = tmp_path / ".tmp-00000000-1--0123456789abcdef"  # another host's: until it is a day old
    elsewhere.mkdir()
    assert find_leftovers(tmp_path) == []
    os.utime(elsewhere, (0, 0))
    assert find_leftovers(tmp_path) == [elsewhere]
    assert find_leftovers(tmp_path / "nothing") == []


# -- rollback and freeze -------------------------------------------------------------------------------------------


def test_a_hidden_version_is_missed(place: Place) -> None:
    release(place.hub, "1.0.0")
    release(place.hub, "1.1.0", 1)
    fetch(place)
    place.move_tag(NAME, "v1.1.0", None)
    for reference in (NAME, f"{NAME}>=1", f"{NAME}@1.1.0"):
        with pytest.raises(
            ReleaseMoved, match=r"org/adapter@1\.1\.0 .* is not there any more.* delete .*adapter\.json"
        ):
            fetch(place, reference)
    assert fetch(place, f"{NAME}@1.0.0").release.version == "1.0.0"
    assert any("1.1.0" in problem for problem in verify(f"{NAME}@1.0.0", hub=place.hub).problems)
    Cache().record_path(place.hub.location, NAME).unlink()
    assert fetch(place).release.version == "1.0.0"


def test_a_version_that_was_only_seen_is_missed_too(place: Place) -> None:
    release(place.hub, "1.0.0")
    release(place.hub, "1.1.0", 1)
    release(place.hub, "1.2.0rc1", 2)
    commit = place.hub.refs(NAME).tags["v1.0.0"]
    fetch(place, f"{NAME}@1.0.0")
    place.move_tag(NAME, "v1.1.0", commit)
    with pytest.raises(ReleaseMoved, match=r"1\.1\.0 .* was commit .* and is commit"):
        fetch(place)
    with pytest.raises(ReleaseMoved, match=r"1\.1\.0 .* was commit .* and is commit"):
        fetch(place, f"{NAME}@1.1.0")
    place.move_tag(NAME, "v1.2.0rc1", None)
    with pytest.raises(ReleaseMoved, match=r"1\.2\.0rc1 .* is not there any more"):
        fetch(place)


def test_a_tag_of_somebody_else_may_move(place: Place) -> None:
    release(place.hub, "1.0.0")
    release(place.hub, "1.1.0", 1)
    set_alias(f"{NAME}@1.0.0", "champion", hub=place.hub)
    code = place.hub.refs(NAME).branches[STATE_BRANCH]  # a commit without a manifest
    place.move_tag(NAME, "v0.1", code)
    assert fetch(place).release.version == "1.1.0"
    place.move_tag(NAME, "v0.1", None)
    assert fetch(place).release.version == "1.1.0"


def roll_back(place: Place, commit: str | None) -> None:
    if isinstance(place, LoopbackPlace):
        branches = place.loopback.repo(NAME).branches
        if commit is None:
            del branches[STATE_BRANCH]
        else:
            branches[STATE_BRANCH] = commit
        return
    assert isinstance(place, FolderPlace)
    path = place.root / NAME / "refs.json"
    refs = json.loads(path.read_text())
    refs["branches"].pop(STATE_BRANCH)
    if commit is not None:
        refs["branches"][STATE_BRANCH] = commit
    path.write_text(json.dumps(refs))


@pytest.mark.parametrize("to", ["seen before", "never seen", "gone"])
def test_a_withdrawal_that_is_rolled_back_is_missed(place: Place, to: str) -> None:
    release(place.hub, "1.0.0")
    release(place.hub, "1.1.0", 1)
    set_alias(f"{NAME}@1.0.0", "champion", hub=place.hub)
    if to == "seen before":
        fetch(place)
    earlier = place.hub.refs(NAME).branches[STATE_BRANCH]
    yank(f"{NAME}@1.1.0", "wrong data", hub=place.hub)
    assert fetch(place).release.version == "1.0.0"
    roll_back(place, None if to == "gone" else earlier)
    for reference in (NAME, f"{NAME}@1.1.0", f"{NAME}@champion"):
        with pytest.raises(ReleaseMoved, match=r"earlier state of itself.*the withdrawal of 1\.1\.0"):
            fetch(place, reference)
    assert any("withdrawal of 1.1.0" in problem for problem in verify(f"{NAME}@1.0.0", hub=place.hub).problems)


def test_an_alias_that_is_rolled_back_is_missed(place: Place) -> None:
    release(place.hub, "1.0.0")
    release(place.hub, "1.1.0", 1)
    set_alias(f"{NAME}@1.0.0", "champion", hub=place.hub)
    earlier = place.hub.refs(NAME).branches[STATE_BRANCH]
    set_alias(f"{NAME}@1.1.0", "champion", hub=place.hub)
    assert fetch(place, f"{NAME}@champion").release.version == "1.1.0"
    roll_back(place, earlier)
    with pytest.raises(ReleaseMoved, match="history of the alias champion"):
        fetch(place, f"{NAME}@champion")


def test_who_offers_a_version_again_is_believed(place: Place) -> None:
    release(place.hub, "1.0.0")
    release(place.hub, "1.1.0", 1)
    yank(f"{NAME}@1.1.0", "a mistake", hub=place.hub)
    set_alias(f"{NAME}@1.0.0", "champion", hub=place.hub)
    assert fetch(place).release.version == "1.0.0"
    unyank(f"{NAME}@1.1.0", hub=place.hub)
    remove_alias(NAME, "champion", hub=place.hub)
    assert fetch(place).release.version == "1.1.0"


@pytest.mark.parametrize("cut", [0, 1, 0.5, -2])
def test_a_cut_record_is_an_error_that_says_what_to_delete(place: Place, cut: float) -> None:
    release(place.hub, "1.0.0")
    fetch(place)
    record = Cache().record_path(place.hub.location, NAME)
    data = record.read_bytes()
    record.write_bytes(data[: int(cut * len(data)) if 0 < cut < 1 else int(cut)])
    with pytest.raises(CacheError, match=r"is damaged .*adapter\.json.* delete that file"):
        fetch(place)
    record.unlink()
    fetch(place)


@pytest.mark.parametrize(
    "damage", [b"{}", b'{"format": 1, "versions": {"1.0.0": {"commit": "x", "manifest": "y"}}}', b"\xff", b"[" * 10**5]
)
def test_a_planted_record_is_an_error(place: Place, damage: bytes) -> None:
    release(place.hub, "1.0.0")
    fetch(place)
    Cache().record_path(place.hub.location, NAME).write_bytes(damage)
    with pytest.raises(CacheError, match="is damaged"):
        fetch(place)


@pytest.mark.parametrize("kind", ["link", "pipe", "folder"])
def test_a_record_that_is_no_file_is_not_followed(place: Place, kind: str, tmp_path: Path) -> None:
    release(place.hub, "1.0.0")
    fetch(place)
    record = Cache().record_path(place.hub.location, NAME)
    data = record.read_bytes()
    record.unlink()
    if kind == "link":
        (tmp_path / "elsewhere").write_bytes(data)
        record.symlink_to(tmp_path / "elsewhere")
    elif kind == "pipe":
        os.mkfifo(record)
    else:
        record.mkdir()
    with pytest.raises(CacheError):
        fetch(place)


# -- the lock file -------------------------------------------------------------------------------------------------


def test_eight_pulls_with_one_lock_lose_no_entry(tmp_path: Path) -> None:
    """Processes, as in continuous integration; two adapters each."""
    place = FolderPlace(tmp_path / "registry")
    names = [f"org/adapter-{number}" for number in range(16)]
    for number, name in enumerate(names):
        release(place.hub, "1.0.0", number, name=name)
    script = (
        "import os, sys; from pathlib import Path; from registry.pulling.lockfile import Lock\n"
        "from registry.pulling.pull import fetch_adapter\n"
        "os.fsync = lambda descriptor: None\n"
        "for name in sys.argv[2:]:\n"
        "    fetch_adapter(name, hub=Path(sys.argv[1]), token=None, lock=Lock.choose(True, frozen=False),\n"
        "                  offline=False, cache_dir=None)\n"
    )
    calls = [[sys.executable, "-c", script, str(place.root), *names[start::8]] for start in range(8)]
    running = [subprocess.Popen(call) for call in calls]
    assert [process.wait(120) for process in running] == [0] * 8
    assert sorted(json.loads(Path("adapters.lock").read_bytes())["adapters"]) == sorted(names)
    assert sorted(path.name for path in Path().iterdir()) == ["adapters.lock"]


@pytest.mark.parametrize("lock", [None, True])
@pytest.mark.parametrize("kind", ["device", "pipe", "dangling link", "link", "folder"])
def test_a_lock_file_that_is_no_file_is_refused_at_once(place: Place, kind: str, lock: bool | None) -> None:
    """A cloned repository can carry a link."""
    release(place.hub, "1.0.0")
    path = Path("adapters.lock")
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    elif kind == "link":
        Path("other").write_bytes(b'{"adapters": {}, "format": 1}')
        path.symlink_to("other")
    else:
        path.symlink_to("/dev/zero" if kind == "device" else "nowhere")
    with pytest.raises(InvalidLock, match="a lock file is a file of its own"):
        fetch(place, lock=lock)


def test_a_lock_file_without_end_is_not_read_to_its_end(place: Place) -> None:
    with open("adapters.lock", "wb") as file:
        file.truncate(50 * 1024**3)
    with pytest.raises(InvalidLock):
        fetch(place)


def test_a_full_disk_leaves_nothing_beside_the_lock_file(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    release(place.hub, "1.0.0")
    fetch(place)

    def full(descriptor: int) -> None:
        raise OSError(28, os.strerror(28))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(InvalidLock, match="No space left"):
        fetch(place, lock=True)
    assert list(Path().iterdir()) == []

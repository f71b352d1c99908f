"""From a reference to checked files: every form, every lie, the lock, the cache, no network."""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import stat
import threading
import warnings
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import pytest
from hubs import KINDS, FolderPlace, LoopbackPlace, Place, make_place
from releases import MODULE, NAME, contents, draft, folder_of, release
from safetensors.numpy import save

from registry.catalog.aliases import aliases, remove_alias, set_alias
from registry.catalog.listing import foreign_tags, list_adapters, show, versions
from registry.catalog.withdrawal import unyank, yank
from registry.errors import (
    AliasMoved,
    AliasNotFound,
    CacheError,
    HostileAnswer,
    HubUnavailable,
    IntegrityError,
    InvalidLock,
    InvalidManifest,
    InvalidReference,
    LockEntryNotFound,
    LockMismatch,
    NotAdapter,
    Offline,
    ReleaseMoved,
    RepositoryNotFound,
    RepositoryReplaced,
    StaleWarning,
    UnknownBase,
    UnsafeFile,
    VersionExists,
    VersionNotFound,
    YankedWarning,
)
from registry.formats.manifest import MANIFEST_FILE
from registry.formats.records import FileRecord
from registry.formats.references import parse_version
from registry.hubs.folder import FolderHub
from registry.hubs.protocol import MAIN
from registry.publishing.publish import publish
from registry.pulling.cache import VARIABLE, Cache
from registry.pulling.fetch import Fetched
from registry.pulling.lockfile import LOCK_FILE, Lock
from registry.pulling.pull import fetch_adapter, lock_adapters
from registry.testing import LoopbackHub
from registry.upkeep.cleanup import collect_garbage
from registry.upkeep.mirroring import mirror
from registry.upkeep.verification import verify


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, str(tmp_path / "cache"))
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    monkeypatch.setattr("registry.publishing.publish.PATIENCE", 0.2)
    # Waiting for the disk is for power failures, which these tests don't have.
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)


@pytest.fixture(params=KINDS)
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Place:
    return make_place(request, tmp_path, timeout=30)  # a busy machine answers late


@pytest.fixture
def stocked(place: Place) -> Place:
    """Three releases of which one is a pre-release."""
    for seed, version in enumerate(["1.0.0", "1.1.0", "2.0.0rc1"]):
        release(place.hub, version, seed)
    return place


def fetch(place: Place, reference: str = NAME, **options: Any) -> Fetched:
    lock = Lock.choose(options.pop("lock", None), frozen=options.pop("frozen", False))
    arguments = {"hub": place.hub, "token": None, "offline": False, "cache_dir": None, **options}
    return fetch_adapter(reference, lock=lock, **arguments)


def version(place: Place, reference: str = NAME, **options: Any) -> str:
    return fetch(place, reference, **options).release.version


def commit_of(place: Place, version: str) -> str:
    return place.hub.refs(NAME).tags[f"v{version}"]


def forget(tmp_path: Path) -> None:
    """A fresh machine."""
    (tmp_path / "cache").rename(tmp_path / f"cache-{os.urandom(4).hex()}")


def expire_leases() -> None:
    """Let a day pass since the last pull."""
    for notes in (Cache().folder / "checked").iterdir():
        os.utime(notes, (0, 0))


# -- resolving -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("behind", "found"),
    [("", "1.1.0"), ("@1.0", "1.0.0"), ("@2.0.0rc1", "2.0.0rc1"), ("<1.1", "1.0.0"), (">=1,<2", "1.1.0"),
     (">=2.0rc1", "2.0.0rc1"), ("~=1.0", "1.1.0"), ("==1.*", "1.1.0")],
)  # fmt: skip
def test_forms(stocked: Place, behind: str, found: str) -> None:
    assert version(stocked, NAME + behind) == found
    assert version(stocked, f"{NAME}@{commit_of(stocked, found)}") == found


@pytest.mark.parametrize(
    ("behind", "error", "says"),
    [
        ("@1.2", VersionNotFound, r"no version 1\.2\.0; it has 2\.0\.0rc1, 1\.1\.0, 1\.0\.0"),
        (">=3", VersionNotFound, "no version in >=3"),
        (">=2", VersionNotFound, "no version in >=2"),
        ("~=1.5", VersionNotFound, "no version in ~=1.5"),
        ("@champion", AliasNotFound, "no alias champion; it has no aliases"),
        (f"@{'0' * 40}", NotAdapter, "is not a published version"),
        ("@@", InvalidReference, "neither"),
    ],
)
def test_what_is_not_there(stocked: Place, behind: str, error: type[Exception], says: str) -> None:
    with pytest.raises(error, match=says):
        fetch(stocked, NAME + behind)
    assert not Path(os.environ[VARIABLE], "releases").exists()


def test_no_repository_and_no_release(place: Place) -> None:
    with pytest.raises(RepositoryNotFound):
        fetch(place)
    place.hub.create(NAME)
    with pytest.raises(VersionNotFound, match="no published version yet"):
        fetch(place)
    release(place.hub, "1.0rc1")
    with pytest.raises(VersionNotFound, match=r"Pre-releases are taken by name: org/adapter@1\.0\.0rc1"):
        fetch(place)


def test_a_commit_without_its_tag_is_no_release(stocked: Place) -> None:
    files = draft("1.2.0", 9).all_files()
    main = stocked.hub.refs(NAME).branches[MAIN]
    half = stocked.hub.commit(NAME, MAIN, files, parent=main, message="half")
    assert version(stocked) == "1.1.0"
    for reference in (f"{NAME}@1.2.0", f"{NAME}@{half}"):
        with pytest.raises(VersionNotFound):
            fetch(stocked, reference)


# -- what is handed over -------------------------------------------------------------------------------------------


def test_the_folder_is_read_only_and_holds_the_release(stocked: Place) -> None:
    stocked.plant(NAME, commit_of(stocked, "1.1.0"), {"adapter_model.bin": b"pickle", "sub/x.py": b""})
    fetched = fetch(stocked)
    made = draft("1.1.0", 1)
    assert folder_of(fetched.path) == made.all_files()
    assert fetched.manifest == made.manifest
    assert fetched.path.name == made.manifest.digest
    assert stat.S_IMODE(fetched.path.stat().st_mode) == 0o555
    assert {stat.S_IMODE(file.stat().st_mode) for file in fetched.path.iterdir()} == {0o444}
    assert list(fetched.path.parent.glob(".tmp-*")) == []


def test_progress(stocked: Place) -> None:
    told: list[tuple[str, int, int]] = []
    fetch(stocked, progress=lambda *args: told.append(args))
    sizes = {name: len(data) for name, data in contents(1).items()}
    assert {name: (there, size) for name, there, size in told} == {n: (s, s) for n, s in sizes.items()}


def test_many_at_once(stocked: Place) -> None:
    paths: list[Path] = []
    threads = [threading.Thread(target=lambda: paths.append(fetch(stocked).path)) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(paths) == 8
    assert len(set(paths)) == 1
    assert folder_of(paths[0]) == draft("1.1.0", 1).all_files()


# -- the cache -----------------------------------------------------------------------------------------------------


def test_a_warm_cache_downloads_nothing(loopback_hub: LoopbackHub) -> None:
    place = LoopbackPlace(loopback_hub)
    release(place.hub, "1.0.0")
    fetch(place)
    loopback_hub.requests.clear()
    fetch(place)
    assert loopback_hub.routes() == ["refs"]
    assert_yank_and_read(place)
    loopback_hub.requests.clear()
    fetch(place)
    assert loopback_hub.routes() == ["refs"]


def assert_yank_and_read(place: Place) -> None:
    set_alias(NAME, "champion", hub=place.hub)
    assert version(place, f"{NAME}@champion") == "1.0.0"


@pytest.mark.parametrize("damage", ["flip", "truncate", "delete", "add", "link", "manifest", "folder link"])
def test_a_damaged_cache_is_filled_again(stocked: Place, tmp_path: Path, damage: str) -> None:
    path = fetch(stocked).path
    path.chmod(0o755)
    weights = path / "adapter_model.safetensors"
    data = weights.read_bytes()
    if damage == "flip":
        weights.chmod(0o644)
        weights.write_bytes(bytes([data[0]]) + data[1:-1] + bytes([data[-1] ^ 1]))
    elif damage == "truncate":
        os.truncate(weights, 10)
    elif damage == "add":
        (path / "adapter_model.bin").write_bytes(b"pickle")
    elif damage == "manifest":
        (path / MANIFEST_FILE).chmod(0o644)
        (path / MANIFEST_FILE).write_bytes(b"{}")
    elif damage == "folder link":
        path.rename(tmp_path / "elsewhere")
        path.symlink_to(tmp_path / "elsewhere")
    else:
        weights.unlink()
        if damage == "link":
            (tmp_path / "elsewhere").write_bytes(data)
            weights.symlink_to(tmp_path / "elsewhere")
    if damage not in ("manifest", "folder link"):
        with pytest.raises(IntegrityError, match=r"adapter_model\."):
            Cache().check(draft("1.1.0", 1).manifest)
    assert folder_of(fetch(stocked).path) == draft("1.1.0", 1).all_files()
    assert not path.is_symlink()
    assert list(path.parent.glob(".tmp-*")) == []


def test_two_registries_share_what_is_the_same(tmp_path: Path) -> None:
    one, two = FolderPlace(tmp_path / "one"), FolderPlace(tmp_path / "two")
    assert len({str(fetch(each).path) for each in (one, two) if release(each.hub, "1.0.0")}) == 1


def test_a_cache_that_cannot_be_written(stocked: Place, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(CacheError, match="cache_dir="):
        fetch(stocked, cache_dir=tmp_path / "file")


def test_a_full_disk_leaves_nothing(stocked: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "rename", full)
    with pytest.raises(CacheError, match="No space left"):
        fetch(stocked)
    assert list(Path(os.environ[VARIABLE], "releases").iterdir()) == []


# -- lies ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("file", ["adapter_model.safetensors", "adapter_config.json", "README.md"])
def test_tampered_bytes(stocked: Place, file: str) -> None:
    stocked.tamper(NAME, commit_of(stocked, "1.1.0"), file)
    with pytest.raises(IntegrityError, match=f"{file} has the sha256"):
        fetch(stocked)
    assert list(Path(os.environ[VARIABLE], "releases").iterdir()) == []


def test_a_tampered_manifest(stocked: Place, tmp_path: Path) -> None:
    """With all hashes fixed up only what was known before tells; here it is the digest from the first pull."""
    fetch(stocked)
    forged = draft("1.1.0", 77)
    commit = commit_of(stocked, "1.1.0")
    if isinstance(stocked, FolderPlace):
        for name, data in forged.all_files().items():
            (stocked.root / NAME / "commits" / commit / name).write_bytes(bytes(data))
    else:
        assert isinstance(stocked, LoopbackPlace)
        for name, data in forged.all_files().items():
            stocked.loopback.faults.replace(name, bytes(data))
    path = fetch(stocked).path  # the cache is right
    assert path.name == draft("1.1.0", 1).manifest.digest
    path.chmod(0o755)
    (path / MANIFEST_FILE).unlink()
    with pytest.raises(IntegrityError, match="before"):
        fetch(stocked)
    forget(tmp_path)
    assert fetch(stocked).manifest.digest == forged.manifest.digest  # nothing is known on a fresh machine


def test_truncated_bytes(loopback_hub: LoopbackHub) -> None:
    place = LoopbackPlace(loopback_hub, timeout=1)
    release(place.hub, "1.0.0")
    loopback_hub.faults.truncate("*.safetensors", declared=True)
    with pytest.raises(IntegrityError, match="bytes where the manifest says"):
        fetch(place)


def test_more_bytes_than_said(loopback_hub: LoopbackHub) -> None:
    place = LoopbackPlace(loopback_hub)
    release(place.hub, "1.0.0")
    loopback_hub.faults.replace("*.safetensors", b"x" * 10_000_000)
    with pytest.raises(HostileAnswer, match="more than the"):
        fetch(place)


def lie(place: Place, spoil: Callable[[dict[str, Any]], object], **files: bytes) -> None:
    """Publish 1.0.0 with a manifest that says something else."""
    made = draft("1.0.0")
    document = json.loads(made.manifest.to_bytes())
    spoil(document)
    place.hub.create(NAME)
    content: dict[str, Path | bytes] = {**made.files, MANIFEST_FILE: json.dumps(document).encode(), **files}
    main = place.hub.refs(NAME).branches[MAIN]
    place.hub.create_tag(NAME, "v1.0.0", place.hub.commit(NAME, MAIN, content, parent=main, message="m"))


@pytest.mark.parametrize(
    "path",
    ["../../x", "/abs", "C:\\x", "..\\x", "a/../../x", "", ".", "x\0", "x\n", "x" * 5000, "x.", "CON", ".git/config",
     ".env", "conftest.py", "x.pth", "sitecustomize.py", "adapter_model.bin", "readme.md", "sub/README.md"],
)  # fmt: skip
def test_hostile_names_in_a_manifest(place: Place, path: str, tmp_path: Path) -> None:
    lie(place, lambda document: document["files"].update({path: {"size": 1, "sha256": "0" * 64}}))
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(InvalidManifest, match=r"org/adapter@1\.0\.0") as caught:
        fetch(place)
    assert str(caught.value).isprintable()
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize(
    ("spoil", "error"),
    [
        (lambda document: document.update(version="1.0.1"), IntegrityError),
        (lambda document: document["files"]["README.md"].update(size=5), HostileAnswer),
        (lambda document: document["files"]["README.md"].update(size=10**15), InvalidManifest),
        (lambda document: document["files"].update({"vocab.txt": {"size": 1, "sha256": "0" * 64}}), IntegrityError),
        (lambda document: document["tensors"].popitem(), IntegrityError),
        (lambda document: document.clear(), InvalidManifest),
    ],
)
def test_manifests_that_do_not_fit(
    place: Place, spoil: Callable[[dict[str, Any]], object], error: type[Exception]
) -> None:
    lie(place, spoil)
    with pytest.raises(error):
        fetch(place)


def test_a_tag_without_a_manifest(place: Place) -> None:
    place.hub.create(NAME)
    place.hub.create_tag(NAME, "v1.0.0", place.hub.refs(NAME).branches[MAIN])
    with pytest.raises(NotAdapter, match="not set by this registry"):
        fetch(place)


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("adapter_config.json", json.dumps({"peft_type": "LORA", "r": 2, "megatron_core": "evil"}).encode()),
        ("adapter_config.json", b'{"peft_type": "LORA", "r": 2, "auto_mapping": {"parent_library": "os"}}'),
        ("adapter_config.json", b'{"peft_type": "LORA", "r": -1}'),
        ("adapter_model.safetensors", b"\x80\x04pickle" + b"\0" * 100),
        ("adapter_model.safetensors", (2**63).to_bytes(8, "little") + b"{}"),
    ],
)
def test_files_that_do_harm(place: Place, file: str, content: bytes) -> None:
    """Everything is as the manifest says, and the manifest comes from an attacker."""
    harmful = draft("1.0.0")
    record = FileRecord(len(content), hashlib.sha256(content).hexdigest())
    manifest = replace(harmful.manifest, files={**harmful.manifest.files, file: record})
    spoilt = replace(harmful, manifest=manifest, files={**harmful.files, file: content})
    publish(place.hub, NAME, parse_version("1.0.0"), lambda *_: spoilt)
    with pytest.raises(UnsafeFile):
        fetch(place)


def test_other_tensors_than_the_manifest_says(place: Place) -> None:
    import numpy

    weights = save({f"{MODULE}.lora_A.weight": numpy.ones((2, 8), "f4")})
    lie(place, lambda document: document["files"].update({"adapter_model.safetensors": _record(weights)}),
        **{"adapter_model.safetensors": weights})  # fmt: skip
    with pytest.raises(IntegrityError, match="tensors"):
        fetch(place)


def _record(data: bytes) -> dict[str, object]:
    return {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()}


# -- what was known before -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("reference", [NAME, f"{NAME}@1.1.0", f"{NAME}>=1"])
@pytest.mark.parametrize("lock", [True, None])
def test_a_moved_tag(stocked: Place, reference: str, lock: bool | None) -> None:
    """It is noticed by the lock, and without one on a machine that has pulled the version before."""
    fetch(stocked, reference, lock=lock)
    stocked.move_tag(NAME, "v1.1.0", commit_of(stocked, "1.0.0"))
    with pytest.raises(ReleaseMoved, match=r"org/adapter@1\.1\.0 .* was commit .* and is commit .* now"):
        fetch(stocked, reference, lock=lock)


def test_a_moved_tag_on_another_machine(stocked: Place, tmp_path: Path) -> None:
    fetch(stocked, lock=True)
    forget(tmp_path)
    stocked.move_tag(NAME, "v1.1.0", commit_of(stocked, "1.0.0"))
    with pytest.raises(ReleaseMoved):
        fetch(stocked)
    with pytest.raises(IntegrityError, match=r"holds the manifest of version 1\.0\.0"):
        fetch(stocked, lock=False)


def test_a_removed_tag(stocked: Place) -> None:
    fetch(stocked, lock=True)
    stocked.move_tag(NAME, "v1.1.0", None)
    with pytest.raises(ReleaseMoved, match="not there any more"):
        fetch(stocked)
    with pytest.raises(ReleaseMoved, match="not there any more"):
        fetch(stocked, lock=False)
    assert version(stocked, f"{NAME}@1.0.0", lock=False) == "1.0.0"


def test_of_many_versions_that_are_gone_three_are_named(place: Place) -> None:
    numbers = [f"1.{number}.0" for number in range(5)]
    for seed, number in enumerate(numbers):
        release(place.hub, number, seed)
    fetch(place)
    for gone, more in ((numbers[:3], ""), (numbers[3:], "(and 2 more)")):
        for number in gone:
            place.move_tag(NAME, f"v{number}", None)
        with pytest.raises(ReleaseMoved, match="shows an earlier state of itself") as caught:
            fetch(place)
        assert str(caught.value).count("is not there any more") == 3
        assert more in str(caught.value)
        assert ("more)" in str(caught.value)) == bool(more)


def test_a_deleted_repository_is_not_replaced_by_the_cache(place: Place) -> None:
    release(place.hub, "1.0.0")
    fetch(place)
    place.delete(NAME)
    with pytest.raises(RepositoryNotFound):
        fetch(place)


def test_verify_names_a_remade_version_once(stocked: Place, tmp_path: Path) -> None:
    fetch(stocked, lock=True)
    stocked.move_tag(NAME, "v1.1.0", None)
    release(stocked.hub, "1.1.0", seed=9)
    for fresh in (False, True):  # with what the machine remembers, and by the lock file alone
        if fresh:
            forget(tmp_path)
        problems = verify(NAME, hub=stocked.hub).problems
        assert [problem.partition(" was commit ")[0] for problem in problems[:1]] == [
            f"{NAME}@1.1.0 on {stocked.hub.location}"
        ]
        assert "has the sha256" in problems[1]
        assert len(problems) == 2


def test_a_remade_tag(stocked: Place, tmp_path: Path) -> None:
    fetch(stocked, lock=True)
    stocked.move_tag(NAME, "v1.1.0", None)
    release(stocked.hub, "1.1.0", seed=9)
    for fresh in (False, True):
        if fresh:
            forget(tmp_path)
        with pytest.raises(ReleaseMoved):
            fetch(stocked)


@pytest.mark.parametrize("lock", [True, False])
def test_a_repository_of_the_same_name(stocked: Place, lock: bool) -> None:
    fetch(stocked, lock=lock)
    stocked.delete(NAME)
    release(stocked.hub, "1.1.0", seed=5)
    release(stocked.hub, "1.2.0", seed=6)
    for reference in (NAME, f"{NAME}@1.1.0", f"{NAME}>1.1"):
        with pytest.raises((RepositoryReplaced, LockMismatch)) as caught:
            fetch(stocked, reference)
        assert isinstance(caught.value, LockMismatch) == (lock and reference.endswith(">1.1"))
    with pytest.raises(RepositoryReplaced, match="If it is meant to be so, delete"):
        lock_adapters([f"{NAME}>1.1"], hub=stocked.hub)


def test_the_way_out_works(stocked: Place) -> None:
    fetch(stocked)
    stocked.delete(NAME)
    release(stocked.hub, "1.1.0", seed=5)
    with pytest.raises(RepositoryReplaced) as caught:
        fetch(stocked)
    record = Cache().record_path(stocked.hub.location, NAME)
    assert str(record) in str(caught.value)
    record.unlink()
    assert version(stocked) == "1.1.0"


# -- the lock ------------------------------------------------------------------------------------------------------


def test_a_lock_is_written_when_asked_and_used_when_there(stocked: Place, tmp_path: Path) -> None:
    fetch(stocked)
    assert not Path(LOCK_FILE).exists()
    assert version(stocked, f"{NAME}<1.1", lock=True) == "1.0.0"
    entry = json.loads(Path(LOCK_FILE).read_text())["adapters"][NAME]
    made = draft("1.0.0").manifest
    assert entry == {
        "version": "1.0.0",
        "commit": commit_of(stocked, "1.0.0"),
        "manifest": made.digest,
        "registry": stocked.hub.location,
        "repository": stocked.hub.identity(NAME),
        "base": "org/base",
        "base_commit": "b" * 40,
    }
    written = Path(LOCK_FILE).read_bytes()
    assert version(stocked) == version(stocked, frozen=True) == version(stocked, f"{NAME}>=1") == "1.0.0"
    assert version(stocked, lock=False) == "1.1.0"
    with pytest.raises(LockMismatch, match=r"at 1\.0\.0, which is not org/adapter@1\.1\.0"):
        fetch(stocked, f"{NAME}@1.1.0")
    assert Path(LOCK_FILE).read_bytes() == written
    assert version(stocked, f"{NAME}@1.1.0", lock=True) == "1.1.0"
    assert version(stocked) == "1.1.0"
    assert version(stocked, lock=tmp_path / "other.lock") == "1.1.0"
    assert (tmp_path / "other.lock").exists()


def test_frozen(stocked: Place) -> None:
    with pytest.raises(LockEntryNotFound, match="is not there"):
        fetch(stocked, frozen=True)
    release(stocked.hub, "1.0.0", name="org/second")
    fetch(stocked, "org/second", lock=True)
    for lock in (None, True):
        with pytest.raises(LockEntryNotFound, match="org/adapter is not in"):
            fetch(stocked, frozen=True, lock=lock)


def test_locking_anew(stocked: Place) -> None:
    assert lock_adapters([f"{NAME}<1.1"], hub=stocked.hub)[NAME].version == "1.0.0"
    assert lock_adapters(hub=stocked.hub)[NAME].version == "1.0.0"
    assert lock_adapters([NAME], hub=stocked.hub)[NAME].version == "1.1.0"


@pytest.mark.parametrize(
    "text",
    ["", "[]", '{"format": 2}', '{"format": 1, "adapters": {"../x": {}}}', '{"format": 1, "adapters": {"a/b": {}}}',
     '{"format": 1, "format": 1}'],
)  # fmt: skip
def test_a_malformed_lock(stocked: Place, text: str) -> None:
    Path(LOCK_FILE).write_text(text)
    with pytest.raises(InvalidLock, match=LOCK_FILE):
        fetch(stocked)
    assert Path(LOCK_FILE).read_text() == text


# -- withdrawn versions and aliases --------------------------------------------------------------------------------


def test_yank(stocked: Place) -> None:
    fetch(stocked, lock=True)
    assert yank(f"{NAME}@1.1.0", "wrong data", hub=stocked.hub).yanked == "wrong data"
    yank(f"{NAME}@1.1.0", "wrong data", hub=stocked.hub)
    assert version(stocked, lock=False) == version(stocked, f"{NAME}>=1", lock=False) == "1.0.0"
    for reference, lock in ((f"{NAME}@1.1.0", False), (NAME, None), (f"{NAME}@{commit_of(stocked, '1.1.0')}", False)):
        with pytest.warns(YankedWarning, match=r"org/adapter@1\.1\.0 was withdrawn: wrong data"):
            assert version(stocked, reference, lock=lock) == "1.1.0"
    yank(f"{NAME}@1.0.0", "too", hub=stocked.hub)
    with pytest.raises(VersionNotFound, match=r"1\.0\.0 \(withdrawn\)"):
        fetch(stocked, lock=False)
    unyank(f"{NAME}@1.1.0", hub=stocked.hub)
    assert version(stocked, lock=False) == "1.1.0"


@pytest.mark.parametrize(
    ("reference", "reason", "error"),
    [(NAME, "x", InvalidReference), (f"{NAME}>1", "x", InvalidReference), (f"{NAME}@9", "x", VersionNotFound),
     (f"{NAME}@1", "", InvalidReference), (f"{NAME}@1", "a\x1b[31m", InvalidReference)],
)  # fmt: skip
def test_what_cannot_be_yanked(stocked: Place, reference: str, reason: str, error: type[Exception]) -> None:
    with pytest.raises(error):
        yank(reference, reason, hub=stocked.hub)


def test_aliases(stocked: Place) -> None:
    assert set_alias(f"{NAME}@1.0.0", "champion", hub=stocked.hub).aliases == ("champion",)
    assert version(stocked, f"{NAME}@champion") == "1.0.0"
    set_alias(f"{NAME}@1.0.0", "champion", hub=stocked.hub)
    set_alias(f"{NAME}@1.1.0", "champion", expect="1.0", hub=stocked.hub)
    assert version(stocked, f"{NAME}@champion") == "1.1.0"
    with pytest.raises(AliasMoved, match=r"stands for 1\.1\.0, not for 1\.0\.0"):
        set_alias(f"{NAME}@2.0.0rc1", "champion", expect="1.0.0", hub=stocked.hub)
    with pytest.raises(AliasMoved, match=r"not for nothing"):
        set_alias(f"{NAME}@2.0.0rc1", "champion", expect=None, hub=stocked.hub)
    remove_alias(NAME, "champion", hub=stocked.hub)
    with pytest.raises(AliasNotFound):
        fetch(stocked, f"{NAME}@champion")
    with pytest.raises(AliasNotFound):
        remove_alias(NAME, "champion", hub=stocked.hub)
    assert [move.version for move in aliases(NAME, hub=stocked.hub)["champion"]] == ["1.0.0", "1.1.0", None]
    for name in ("latest", "v1", "deadbeef", "a b"):
        with pytest.raises(InvalidReference):
            set_alias(NAME, name, hub=stocked.hub)


def test_of_two_who_move_an_alias_one_is_told(stocked: Place) -> None:
    outcomes: list[object] = []
    barrier = threading.Barrier(2)

    def move(to: str) -> None:
        barrier.wait()
        try:
            outcomes.append(set_alias(f"{NAME}@{to}", "champion", expect=None, hub=stocked.hub))
        except AliasMoved as error:
            outcomes.append(error)

    threads = [threading.Thread(target=move, args=(to,)) for to in ("1.0.0", "1.1.0")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(isinstance(outcome, AliasMoved) for outcome in outcomes) == [False, True]
    assert len(aliases(NAME, hub=stocked.hub)["champion"]) == 1


def test_changes_of_state_at_once_are_all_there(stocked: Place) -> None:
    works: list[Callable[[], object]] = [
        lambda: yank(f"{NAME}@1.0.0", "old", hub=stocked.hub),
        lambda: release(stocked.hub, "1.2.0", seed=7),
        *(lambda n=n: set_alias(f"{NAME}@1.1.0", f"stage-{n}", hub=stocked.hub) for n in range(4)),  # type: ignore[misc]
    ]
    errors: list[BaseException] = []

    def run(work: Callable[[], object]) -> None:
        try:
            work()
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=(work,)) for work in works]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    assert set(aliases(NAME, hub=stocked.hub)) == {f"stage-{n}" for n in range(4)}
    assert version(stocked) == "1.2.0"
    assert version(stocked, f"{NAME}<1.2") == "1.1.0"


def test_who_starts_the_state_second_loses_nothing(stocked: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    create_branch = type(stocked.hub).create_branch

    def late(self: Any, name: str, branch: str, commit: str) -> None:
        monkeypatch.setattr(type(stocked.hub), "create_branch", create_branch)
        set_alias(f"{NAME}@1.0.0", "first", hub=self)
        self.create_branch(name, branch, commit)

    monkeypatch.setattr(type(stocked.hub), "create_branch", late)
    set_alias(f"{NAME}@1.1.0", "second", hub=stocked.hub)
    assert set(aliases(NAME, hub=stocked.hub)) == {"first", "second"}


@pytest.mark.parametrize("content", [b"", b"[]", b'{"format": 2}', b'{"format": 1, "aliases": {"main": []}}',
                                     b'{"format": 1, "yanked": {"x": {"reason": "r", "time": "t"}}}'])  # fmt: skip
def test_a_damaged_state_is_said_to_be(stocked: Place, content: bytes) -> None:
    stocked.hub.create_branch(NAME, "registry", stocked.hub.refs(NAME).branches[MAIN])
    head = stocked.hub.refs(NAME).branches["registry"]
    stocked.hub.commit(NAME, "registry", {"registry.json": content}, parent=head, message="m")
    with pytest.raises(HostileAnswer, match=r"registry\.json"):
        fetch(stocked)


# -- without a network ---------------------------------------------------------------------------------------------


@pytest.fixture
def down(loopback_hub: LoopbackHub) -> Iterator[LoopbackPlace]:
    """A hub that was there when 1.0.0 and 1.1.0 were pulled, and isn't any more."""
    place = LoopbackPlace(loopback_hub, timeout=30)
    for seed, number in enumerate(["1.0.0", "1.1.0", "1.2.0"]):
        release(place.hub, number, seed)
    fetch(place, f"{NAME}@1.0.0")
    fetch(place, f"{NAME}@1.1.0")
    loopback_hub.requests.clear()
    loopback_hub.faults.refuse_connection("*", times=None)
    yield LoopbackPlace(loopback_hub, timeout=0.3)
    loopback_hub.faults.clear()


def test_offline_uses_the_cache_and_asks_nobody(down: LoopbackPlace) -> None:
    for reference, found in ((NAME, "1.1.0"), (f"{NAME}@1.0.0", "1.0.0"), (f"{NAME}<1.1", "1.0.0")):
        assert version(down, reference, offline=True) == found
    for reference in (f"{NAME}@1.2.0", f"{NAME}>=1.2", "org/other"):
        with pytest.raises(Offline, match="Pull it once"):
            fetch(down, reference, offline=True)
    assert down.loopback.requests == []


def test_a_hub_that_is_down(down: LoopbackPlace) -> None:
    with pytest.warns(StaleWarning, match=r"org/adapter@1\.1\.0 is taken from the cache"):
        assert version(down) == "1.1.0"
    with pytest.raises(HubUnavailable):
        fetch(down, f"{NAME}@1.2.0")


def test_a_lock_works_offline(down: LoopbackPlace, tmp_path: Path) -> None:
    down.loopback.faults.clear()
    fetch(LoopbackPlace(down.loopback, timeout=30), f"{NAME}@1.0.0", lock=True)
    down.loopback.faults.refuse_connection("*", times=None)
    assert version(down, offline=True, frozen=True) == "1.0.0"
    Cache().record_path(down.hub.location, NAME).unlink()
    assert version(down, offline=True, frozen=True) == "1.0.0"
    forget(tmp_path)
    with pytest.raises(Offline, match="not in the cache"):
        fetch(down, offline=True)


def test_a_damaged_cache_offline(down: LoopbackPlace) -> None:
    path = fetch(down, f"{NAME}@1.0.0", offline=True).path
    path.chmod(0o755)
    (path / "adapter_model.safetensors").unlink()
    with pytest.raises(IntegrityError, match=r"adapter_model\.safetensors of .* is missing"):
        fetch(down, f"{NAME}@1.0.0", offline=True)


def test_the_offline_switch_of_huggingface_hub(down: LoopbackPlace, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with warnings.catch_warnings():
        warnings.simplefilter("error", StaleWarning)  # it was switched off on purpose
        assert version(down) == "1.1.0"
    with pytest.raises(Offline):
        fetch(down, f"{NAME}@1.2.0")


def test_a_folder_is_not_the_network(tmp_path: Path) -> None:
    place = FolderPlace(tmp_path / "registry")
    release(place.hub, "1.0.0")
    assert version(place, offline=True) == "1.0.0"


# -- copies --------------------------------------------------------------------------------------------------------


def test_mirror_there_and_back(stocked: Place, tmp_path: Path) -> None:
    set_alias(f"{NAME}@1.0.0", "champion", hub=stocked.hub)
    yank(f"{NAME}@1.1.0", "wrong data", hub=stocked.hub)
    target = FolderHub(tmp_path / "copy")
    copied = mirror(NAME, target, hub=stocked.hub)
    assert [(each.version, each.created) for each in copied] == [("1.0.0", True), ("1.1.0", True), ("2.0.0rc1", True)]
    assert [each.manifest.digest for each in copied] == [each.commit for each in copied]
    assert not any(each.created for each in mirror(NAME, target, hub=stocked.hub))
    copy = FolderPlace(tmp_path / "copy")
    assert version(copy, f"{NAME}@champion") == version(copy) == "1.0.0"
    with pytest.warns(YankedWarning, match="wrong data"):
        digest = fetch(copy, f"{NAME}@1.1.0").manifest.digest
    assert digest == draft("1.1.0", 1).manifest.digest
    place_back = FolderHub(tmp_path / "back")
    assert [each.version for each in mirror(f"{NAME}<1.1", place_back, hub=target)] == ["1.0.0"]


def test_a_lock_holds_for_a_copy(stocked: Place, tmp_path: Path) -> None:
    fetch(stocked, f"{NAME}@1.0.0", lock=True)
    mirror(NAME, tmp_path / "copy", hub=stocked.hub)
    copy = FolderPlace(tmp_path / "copy")
    assert version(copy, frozen=True) == "1.0.0"
    other = FolderPlace(tmp_path / "other")
    release(other.hub, "1.0.0", seed=99)
    with pytest.raises(IntegrityError, match="before"):
        fetch(other, frozen=True)


def test_a_mirror_does_not_overwrite(stocked: Place, tmp_path: Path) -> None:
    other = FolderPlace(tmp_path / "other")
    release(other.hub, "1.0.0", created="2026-02-28T12:00:00Z")
    with pytest.raises(VersionExists, match="another manifest"):
        mirror(NAME, other.hub, hub=stocked.hub)


def test_mirror_to_a_hub(loopback_hub: LoopbackHub, tmp_path: Path) -> None:
    source, target = FolderPlace(tmp_path / "registry"), LoopbackPlace(loopback_hub)
    release(source.hub, "1.0.0")
    done = mirror(NAME, target.hub, hub=source.hub)[0]
    assert loopback_hub.read(NAME, MANIFEST_FILE, "v1.0.0") == draft("1.0.0").manifest.to_bytes()
    assert done.commit == loopback_hub.repo(NAME).tags["v1.0.0"]
    nameless = draft("1.1.0")
    manifest = replace(nameless.manifest, base=replace(nameless.manifest.base, id=None, commit=None))
    publish(source.hub, NAME, parse_version("1.1.0"), lambda *_: replace(nameless, manifest=manifest))
    with pytest.raises(UnknownBase, match="Push the adapter there with base_model="):
        mirror(f"{NAME}@1.1.0", target.hub, hub=source.hub)


# -- looking -------------------------------------------------------------------------------------------------------


def test_versions_and_show(stocked: Place) -> None:
    assert [(each.version, each.prerelease) for each in versions(NAME, hub=stocked.hub)] == [
        ("1.0.0", False), ("1.1.0", False), ("2.0.0rc1", True),
    ]  # fmt: skip
    assert show(f"{NAME}@1.0.0", hub=stocked.hub).manifest == draft("1.0.0").manifest
    release(stocked.hub, "0.1rc1", name="org/unfinished")
    stocked.hub.create("org/empty")
    assert [str(each.release) for each in list_adapters(hub=stocked.hub)] == [f"{NAME}@1.1.0"]
    assert list(list_adapters("org/other-base", hub=stocked.hub)) == []


def test_verify(stocked: Place) -> None:
    assert verify(NAME, hub=stocked.hub).ok
    commit = commit_of(stocked, "1.1.0")
    stocked.plant(NAME, commit, {"adapter_model.bin": b"pickle", ".env": b"x"})
    stocked.tamper(NAME, commit, "README.md")
    fetched = verify(NAME, hub=stocked.hub)
    assert not fetched.ok
    assert "README.md has the sha256" in " ".join(fetched.problems)
    assert fetched.others == (".env", "adapter_model.bin")


def test_verify_knows_the_lock(stocked: Place) -> None:
    fetch(stocked, lock=True)
    stocked.move_tag(NAME, "v1.1.0", commit_of(stocked, "1.0.0"))
    assert "holds the manifest of version 1.0.0" in verify(NAME, hub=stocked.hub).problems[0]


# -- garbage -------------------------------------------------------------------------------------------------------


def test_garbage(tmp_path: Path) -> None:
    place = FolderPlace(tmp_path / "registry")
    release(place.hub, "1.0.0")
    fetch(place)
    files = draft("1.1.0", 5).all_files()
    main = place.hub.refs(NAME).branches[MAIN]
    half = place.hub.commit(NAME, MAIN, files, parent=main, message="half")
    release(place.hub, "1.1.0", seed=6)
    yank(f"{NAME}@1.0.0", "old", hub=place.hub)
    assert collect_garbage(place.hub).paths == ()
    for path in (place.root / NAME / "commits").iterdir():
        os.utime(path, (0, 0))
    found = collect_garbage(place.hub)
    assert half in {path.name for path in found.paths}
    assert (found.deleted, found.size > 500) == (False, True)
    assert collect_garbage(place.hub, dry_run=False).paths == found.paths
    assert collect_garbage(place.hub).paths == ()
    with pytest.warns(YankedWarning):
        assert version(place, f"{NAME}@1.0.0") == "1.0.0"
    assert version(place) == "1.1.0"
    Cache().record_path(place.hub.location, NAME).unlink()
    assert collect_garbage(place.hub, dry_run=False).paths == ()
    expire_leases()
    assert len(collect_garbage(place.hub, dry_run=False).paths) == 2
    assert Cache().digests() == []


# -- many ----------------------------------------------------------------------------------------------------------


def test_ten_thousand_tags(place: Place) -> None:
    """All but one stand at the commit of that one, so they are not releases."""
    first = release(place.hub, "0.0.1")
    if isinstance(place, FolderPlace):
        path = place.root / NAME / "refs.json"
        refs = json.loads(path.read_text())
        refs["tags"].update({f"v1.{n}.0": first.commit for n in range(9_999)})
        path.write_text(json.dumps(refs))
    else:
        assert isinstance(place, LoopbackPlace)
        place.loopback.repo(NAME).tags.update({f"v1.{n}.0": first.commit for n in range(9_999)})
    assert [str(each) for each in versions(NAME, hub=place.hub)] == [f"{NAME}@0.0.1"]
    assert len(foreign_tags(NAME, hub=place.hub)) == 9_999
    with pytest.raises(IntegrityError, match=r"org/adapter@1\.9998\.0 on"):
        fetch(place, f"{NAME}@1.9998")
    assert version(place) == version(place, f"{NAME}<1") == "0.0.1"


# -- hubs that lie about names and numbers -------------------------------------------------------------------------


@pytest.mark.parametrize("commit", ["../../x", "", "main", "a" * 39, "A" * 40, "\x1b[31m"])
@pytest.mark.parametrize("kind", ["tags", "branches"])
def test_commits_that_are_none(loopback_hub: LoopbackHub, commit: str, kind: str) -> None:
    place = LoopbackPlace(loopback_hub)
    done = release(place.hub, "1.0.0")
    fetch(place)
    refs = {"branches": {"main": done.commit, "registry": done.commit}, "tags": {"v1.0.0": done.commit}}
    refs[kind] = dict.fromkeys(refs[kind], commit)
    answer = {k: [{"name": n, "ref": n, "targetCommit": c} for n, c in named.items()] for k, named in refs.items()}
    loopback_hub.faults.answer("refs", json.dumps(answer).encode(), times=None)
    with pytest.raises(HostileAnswer, match="does not point to a commit") as caught:
        fetch(place)
    assert str(caught.value).isprintable()
    loopback_hub.faults.clear()
    assert version(place, offline=True) == "1.0.0"


@pytest.mark.parametrize("identity", ["x" * 1000, "a\nb", "\x1b[31m"])
def test_an_identity_that_is_none(loopback_hub: LoopbackHub, identity: str) -> None:
    place = LoopbackPlace(loopback_hub)
    release(place.hub, "1.0.0")
    loopback_hub.faults.answer("info", json.dumps({"_id": identity}).encode(), times=None)
    with pytest.raises(HostileAnswer, match="has an invalid id"):
        fetch(place, lock=True)
    assert not Path(LOCK_FILE).exists()


@pytest.mark.parametrize("names", [["../x"], ["org/../../x", "a/b/c"], ["org/\x1b[31m"]])
def test_names_that_are_none_are_not_listed(loopback_hub: LoopbackHub, names: list[str]) -> None:
    place = LoopbackPlace(loopback_hub)
    release(place.hub, "1.0.0")
    found = [{"id": name} for name in [*names, NAME]]
    loopback_hub.faults.answer("list_models", json.dumps(found).encode(), times=None)
    assert [str(each.release) for each in list_adapters(hub=place.hub)] == [f"{NAME}@1.0.0"]


# -- secrets -------------------------------------------------------------------------------------------------------


def everything_told(call: Callable[[], object]) -> list[str]:
    """What a call returns, or its error with all that led to it, in every way in which it may be logged."""
    try:
        return [repr(call())]
    except Exception as error:
        texts, chain = [], cast("BaseException | None", error)
        while chain is not None:
            texts += [str(chain), repr(chain), repr(vars(chain)), repr(pickle.dumps(chain))]
            chain = chain.__context__
        return texts


def test_the_token_is_nowhere(loopback_hub: LoopbackHub, tmp_path: Path) -> None:
    token, texts = loopback_hub.token, []
    patient, place = LoopbackPlace(loopback_hub, timeout=30), LoopbackPlace(loopback_hub, timeout=0.5)
    release(patient.hub, "1.0.0")
    fetch(patient, lock=True)
    calls: list[Callable[[], object]] = [
        lambda: fetch(place, "org/nothing"),
        lambda: fetch(place, f"{NAME}@9", lock=False),
        lambda: release(place.hub, "1.0.0", seed=1),
        lambda: release(place.hub, "1.0.0", name="others/x"),
        lambda: yank(f"{NAME}@1.0.0", "x", hub=place.hub),
    ]
    for fault in (None, 503, 403, 401):
        loopback_hub.faults.clear()
        if fault is not None:
            loopback_hub.faults.status("*", fault, times=None, headers={"X-Error-Message": f"bad {token}"})
        texts += [text for call in calls for text in everything_told(call)]
    for path in tmp_path.rglob("*"):
        if path.is_file():
            texts.append(path.read_bytes().decode("latin-1"))
    assert len(texts) > 40
    assert not any(token in text for text in texts)
    assert loopback_hub.leaks() == []

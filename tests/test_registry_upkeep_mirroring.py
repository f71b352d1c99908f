"""Copies between all kinds of registries: nine pairs, with everything that belongs to a release."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hubs import EVERY_KIND, BucketPlace, FolderPlace, LoopbackPlace, Place
from plain import put
from releases import NAME, contents, folder_of, release

from registry import (
    aliases,
    annotate,
    collect_garbage,
    lock_adapters,
    mirror,
    pull_adapter,
    set_alias,
    show,
    verify,
    versions,
    yank,
)
from registry.errors import IntegrityError, LockMismatch, NotAdapter, RepositoryNotFound, VersionExists, VersionNotFound
from registry.testing import LoopbackHub

PAIRS = [(source, target) for source in EVERY_KIND for target in EVERY_KIND]


@pytest.fixture(autouse=True)
def _own_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LORA_REGISTRY_CACHE", str(tmp_path / "cache"))
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")


def make(kind: str, name: str, request: pytest.FixtureRequest, tmp_path: Path) -> Place:
    """Make a registry; two of one kind are two registries."""
    if kind == "folder":
        return FolderPlace(tmp_path / name)
    if kind == "bucket":
        return BucketPlace(f"{request.getfixturevalue('bucket')}/{name}")
    first = request.getfixturevalue("loopback_hub")
    if name == "source":
        return LoopbackPlace(first)
    second = LoopbackHub()
    second.__enter__()
    request.addfinalizer(second.close)
    return LoopbackPlace(second)


@pytest.fixture(params=PAIRS, ids="-".join)
def pair(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Place, Place]:
    """A registry to copy from and an empty one to copy to."""
    source, target = request.param
    return make(source, "source", request, tmp_path), make(target, "target", request, tmp_path)


def test_releases_are_the_same_on_every_other_registry(pair: tuple[Place, Place]) -> None:
    source, target = (place.hub for place in pair)
    with pytest.raises(RepositoryNotFound):
        mirror(NAME, target, hub=source)
    for seed, version in enumerate(("1.0.0", "1.1.0", "2.0.0rc1")):
        release(source, version, seed)
    set_alias(f"{NAME}@1.0.0", "champion", hub=source)
    annotate(f"{NAME}@1.0.0", "measured twice", add_tags=["reviewed"], hub=source)
    yank(f"{NAME}@1.1.0", "wrong data", hub=source)
    for reference in (f"{NAME}@9", f"{NAME}>=3"):
        with pytest.raises(VersionNotFound):
            mirror(reference, target, hub=source)

    assert [(each.version, each.created) for each in mirror(f"{NAME}@champion", target, hub=source)] == [
        ("1.0.0", True)
    ]
    assert [(each.version, each.created) for each in mirror(NAME, target, hub=source)] == [
        ("1.0.0", False), ("1.1.0", True), ("2.0.0rc1", True),
    ]  # fmt: skip
    assert not any(each.created for each in mirror(NAME, target, hub=source))

    def describe(hub: Any) -> list[Any]:
        return [
            [(each.version, each.yanked, each.note, each.tags, each.aliases) for each in versions(NAME, hub=hub)],
            [move.version for move in aliases(NAME, hub=hub)["champion"]],
            [show(f"{NAME}@{version}", hub=hub).manifest.digest for version in ("1.0.0", "1.1.0", "2.0.0rc1")],
            verify(f"{NAME}@champion", hub=hub).ok,
        ]

    assert describe(target) == describe(source)
    pulled = [pull_adapter(f"{NAME}@champion", hub=hub, lock=False) for hub in (source, target)]
    assert folder_of(Path(pulled[0])) == folder_of(Path(pulled[1]))
    assert pull_adapter(NAME, hub=target, lock=False).version == "1.0.0"  # 1.1.0 is withdrawn there, too
    assert collect_garbage(target, dry_run=False).problems == ()
    assert describe(target) == describe(source)


def test_a_lock_file_holds_for_the_copy(pair: tuple[Place, Place]) -> None:
    """The registry's address is in it, and the bytes are what counts."""
    source, target = (place.hub for place in pair)
    release(source, "1.0.0")
    lock_adapters([f"{NAME}@1.0.0"], hub=source)
    mirror(NAME, target, hub=source)
    assert pull_adapter(NAME, hub=target, frozen=True).version == "1.0.0"
    release(target, "1.1.0", 1)
    with pytest.raises(LockMismatch):
        pull_adapter(f"{NAME}@1.1.0", hub=target)
    with pytest.raises(VersionNotFound):
        pull_adapter(f"{NAME}@1.1.0", hub=source, lock=False)


def test_another_release_of_the_version_is_not_replaced(pair: tuple[Place, Place]) -> None:
    source, target = (place.hub for place in pair)
    release(source, "1.0.0", 1)
    there = release(target, "1.0.0", 2)
    with pytest.raises(VersionExists):
        mirror(NAME, target, hub=source)
    assert show(NAME, hub=target).manifest.digest == there.manifest.digest


def test_what_nobody_published_is_copied_to_a_branch(pair: tuple[Place, Place]) -> None:
    source, target = (place.hub for place in pair)
    files = {f"best/{name}": data for name, data in contents(3).items()}
    commit = put(pair[0], files, name=NAME)
    [copied] = mirror(f"{NAME}/best@main", target, hub=source)
    assert copied.created
    assert not mirror(f"{NAME}/best@{commit}", target, hub=source)[0].created
    adapters = [
        pull_adapter(f"{NAME}/best@{ref}", hub=hub) for ref, hub in ((commit, source), (f"copy-{commit[:40]}", target))
    ]
    assert adapters[0].manifest.content_digest == adapters[1].manifest.content_digest
    with pytest.raises(NotAdapter):
        mirror(f"{NAME}@main", target, hub=source)


def test_a_damaged_release_is_not_copied(pair: tuple[Place, Place]) -> None:
    source, target = pair
    source.tamper(NAME, release(source.hub, "1.0.0").commit, "adapter_model.safetensors")
    with pytest.raises(IntegrityError):
        mirror(NAME, target.hub, hub=source.hub)
    with pytest.raises(RepositoryNotFound):
        versions(NAME, hub=target.hub)

"""Unversioned adapters: taken by commit, branch or change request, from repositories that hold no release."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from hubs import KINDS, FolderPlace, LoopbackPlace, Place, make_place
from plain import put, put_request
from releases import CONFIG, contents, draft, release

from registry import (
    collect_garbage,
    compare_adapters,
    lock_adapters,
    mirror,
    pull_adapter,
    set_alias,
    show,
    verify,
    yank,
)
from registry.errors import (
    IntegrityError,
    InvalidAdapter,
    LockMismatch,
    NotAdapter,
    Offline,
    ReferenceConflict,
    RepositoryReplaced,
    SignatureNotFound,
    UnsafeFile,
    VersionNotFound,
)
from registry.hubs.folder import FolderHub
from registry.pulling.cache import Cache
from registry.pulling.lockfile import Lock
from registry.testing import LoopbackHub

NAME = "org/plain"
#: Of the manifest of one adapter, without its commit.
DIGEST = "51ebfea18a69"


@pytest.fixture(autouse=True)
def _own_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LORA_REGISTRY_CACHE", str(tmp_path / "cache"))
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")


@pytest.fixture(params=KINDS)
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Place:
    return make_place(request, tmp_path)


def inside(folder: str, seed: int = 0) -> dict[str, bytes]:
    return {f"{folder}/{name}": data for name, data in contents(seed).items()}


def config(**changes: Any) -> bytes:
    return json.dumps({**CONFIG, **changes}).encode()


def test_a_commit_gives_the_bytes_that_it_holds(place: Place) -> None:
    files = {**contents(), "optimizer.pt": b"x", "notes/readme.txt": b"y"}
    commit = put(place, files)
    adapter = pull_adapter(f"{NAME}@{commit}", hub=place.hub)
    assert str(adapter) == f"{NAME}@{commit}"
    assert (adapter.unversioned, adapter.version, adapter.commit) == (True, f"0+g{commit}", commit)
    held = {path.name: path.read_bytes() for path in Path(adapter).iterdir() if path.name != "adapter_manifest.json"}
    assert held == {name: files[name] for name in ("adapter_config.json", "adapter_model.safetensors")}
    assert (adapter.manifest.base.id, adapter.manifest.base.commit, adapter.manifest.base.fingerprint) == (
        "org/base", None, None,
    )  # fmt: skip


@pytest.mark.parametrize("text", ["@main", "@branch:main", "@dev", "@branch:dev", "@feature/one", "@final"])
def test_a_branch_or_a_tag_is_resolved_to_its_commit_at_once(place: Place, text: str) -> None:
    commit = put(place, contents())
    other = {branch: put(place, contents(seed), branch=branch) for seed, branch in ((1, "dev"), (2, "feature/one"))}
    place.hub.create_tag(NAME, "final", commit)
    meant = other.get(text.removeprefix("@").removeprefix("branch:"), commit)
    assert pull_adapter(NAME + text, hub=place.hub).commit == meant
    pull_adapter(NAME + text, hub=place.hub, lock=True)
    moved = put(
        place, contents(5), branch={other["dev"]: "dev", other["feature/one"]: "feature/one"}.get(meant, "main")
    )
    assert pull_adapter(NAME + text, hub=place.hub).commit == meant != moved  # the lock holds the commit


def test_a_change_request_is_taken_before_it_is_accepted(loopback_hub: LoopbackHub, tmp_path: Path) -> None:
    place = LoopbackPlace(loopback_hub)
    ref = put_request(place, contents())
    adapter = pull_adapter(f"{NAME}@{ref}", hub=place.hub)
    assert adapter.commit == loopback_hub.repo(NAME).pull_requests[ref]
    with pytest.raises(VersionNotFound, match=r"has no refs/pr/7"):
        pull_adapter(f"{NAME}@refs/pr/7", hub=place.hub)
    folder = FolderPlace(tmp_path / "registry")
    put(folder, contents())
    with pytest.raises(VersionNotFound, match="a folder has no change requests"):
        pull_adapter(f"{NAME}@refs/pr/1", hub=folder.hub)


def test_a_release_that_is_proposed_can_be_tried(loopback_hub: LoopbackHub) -> None:
    place = LoopbackPlace(loopback_hub)
    release(place.hub, "1.0.0", name=NAME)
    ref = put_request(place, draft("1.1.0", 3).all_files())  # type: ignore[arg-type]
    adapter = pull_adapter(f"{NAME}@{ref}", hub=place.hub)
    assert adapter.unversioned
    with pytest.raises(NotAdapter, match=r"holds the manifest of 1\.1\.0 without the tag v1\.1\.0"):
        pull_adapter(f"{NAME}@{adapter.commit}", hub=place.hub, cache_dir="another")


def test_folders_of_one_repository_are_adapters_of_their_own(place: Place) -> None:
    commit = put(place, {**inside("a", 1), **inside("b/c", 2), **contents(0)})
    found = {
        ref: pull_adapter(f"{ref}@{commit}", hub=place.hub, lock=True) for ref in (NAME, f"{NAME}/a", f"{NAME}/b/c")
    }
    assert len({adapter.manifest.digest for adapter in found.values()}) == 3
    assert str(found[f"{NAME}/b/c"]) == f"{NAME}/b/c@{commit}"
    entries = Lock(Path("adapters.lock")).entries()
    assert set(entries) == set(found)
    again = lock_adapters(hub=place.hub)
    assert {key: entry.manifest for key, entry in again.items()} == {r: a.manifest.digest for r, a in found.items()}
    assert pull_adapter(f"{NAME}/a", hub=place.hub, frozen=True).manifest.digest == entries[f"{NAME}/a"].manifest


@pytest.mark.parametrize(
    ("files", "says"),
    [
        (contents(), ["an unversioned adapter", "at the top", "base org/base, rank 2, targets q_proj", "adopt"]),
        (inside("x"), ["an unversioned adapter at commit", "x (base org/base", f"{NAME}/x@"]),
        ({**inside("x"), **inside("y", 1)}, ["2 unversioned adapters", "x (base", "y (base", "--all"]),
        ({"adapter_config.json": config(r=4), "adapter_model.bin": b"PK"}, ["rank 4", "weights in a pickle"]),
        ({"adapter_config.json": config(target_modules=list("abcdefg"))}, ["and 2 more", "without weights"]),
        ({"adapter_config.json": b"[", "adapter_model.safetensors": b"x"}, ["adapter_config.json cannot be used"]),
        ({"README.md": b"nothing"}, ["has no published version yet"]),
    ],
)  # fmt: skip
def test_a_bare_name_says_what_there_is_and_both_ways_on(
    place: Place, files: Mapping[str, bytes], says: list[str]
) -> None:
    commit = put(place, files)
    with pytest.raises(VersionNotFound) as caught:
        pull_adapter(NAME, hub=place.hub)
    assert all(part in str(caught.value) for part in says), str(caught.value)
    if len(says) > 1 and "pickle" not in says[-1]:
        assert commit in str(caught.value)


def test_a_bare_name_finds_an_adapter_that_is_on_another_branch_only(place: Place) -> None:
    commit = put(place, contents(), branch="epoch-3")
    with pytest.raises(NotAdapter, match=f"at commit {commit} of epoch-3"):
        show(NAME, hub=place.hub)


def test_a_repository_with_foreign_tags_says_how_to_take_what_they_hold(place: Place) -> None:
    commit = put(place, contents())
    place.hub.create_tag(NAME, "v1.0.0", commit)
    with pytest.raises(NotAdapter, match=f"foreign.*{NAME}@{commit}"):
        pull_adapter(f"{NAME}@1.0.0", hub=place.hub)
    assert pull_adapter(f"{NAME}@{commit}", hub=place.hub).unversioned


def test_what_names_a_release_still_means_the_release(place: Place) -> None:
    done = release(place.hub, "1.0.0", name=NAME)
    set_alias(f"{NAME}@1.0.0", "champion", hub=place.hub)
    for text in (NAME, f"{NAME}@1.0.0", f"{NAME}@champion", f"{NAME}@alias:champion", f"{NAME}@{done.commit}"):
        adapter = pull_adapter(text, hub=place.hub)
        assert (adapter.unversioned, adapter.version, adapter.commit) == (False, "1.0.0", done.commit)
    assert pull_adapter(f"{NAME}@main", hub=place.hub).version == "1.0.0"
    put(place, {"adapter_model.safetensors": contents(9)["adapter_model.safetensors"]}, name=NAME)
    with pytest.raises(NotAdapter, match=r"holds the manifest of 1\.0\.0 without the tag"):
        pull_adapter(f"{NAME}@main", hub=place.hub)
    assert pull_adapter(NAME, hub=place.hub).version == "1.0.0"


def test_an_alias_and_a_branch_of_one_name_are_told_apart(place: Place) -> None:
    release(place.hub, "1.0.0", name=NAME)
    set_alias(f"{NAME}@1.0.0", "best", hub=place.hub)
    commit = put(place, contents(4), branch="best", delete=("adapter_manifest.json",))
    with pytest.raises(ReferenceConflict, match=r"@alias:best or .*@branch:best"):
        pull_adapter(f"{NAME}@best", hub=place.hub)
    assert pull_adapter(f"{NAME}@alias:best", hub=place.hub).version == "1.0.0"
    assert pull_adapter(f"{NAME}@branch:best", hub=place.hub).commit == commit


@pytest.mark.parametrize(
    ("reference", "says"),
    [
        (f"{NAME}@nothing", "no alias nothing; it has no aliases, and no branch"),
        (f"{NAME}@branch:nothing", "has no branch nothing; its branches are main"),
        (f"{NAME}@{'0' * 40}", "no such commit"),
        (f"{NAME}/other@main", "holds no adapter in that folder. It has them in folders: .*/x@"),
        (f"{NAME}@main", "holds no adapter. It has them in folders"),
        (f"{NAME}/other", "holds no adapter in that folder. It has them in folders: .*/x@"),
    ],
)
def test_what_is_not_there_is_named(place: Place, reference: str, says: str) -> None:
    put(place, inside("x"))
    with pytest.raises(VersionNotFound, match=says):
        pull_adapter(reference, hub=place.hub)


@pytest.mark.parametrize(
    ("files", "error", "says"),
    [
        ({"adapter_model.bin": b"PK", "adapter_config.json": config()}, UnsafeFile, "--from-pickle"),
        ({"adapter_model.safetensors": contents()["adapter_model.safetensors"]}, NotAdapter, "LoraConfig"),
        ({"pytorch_lora_weights.safetensors": b"x"}, NotAdapter, "diffusers"),
        ({"adapters.safetensors": b"x"}, NotAdapter, "MLX"),
        ({"adapter_config.json": config()}, NotAdapter, "were not uploaded"),
        ({**contents(), "adapter_config.json": config(trust_remote_code=True)}, UnsafeFile, "trust_remote_code"),
        ({**contents(), "adapter_config.json": config(target_modules="(.*)*#")}, UnsafeFile, "take forever"),
        ({**contents(), "adapter_config.json": config(peft_type="IA3")}, UnsafeFile, "'LORA'"),
        ({**contents(), "adapter_model.safetensors": b"\x80\x05pickle" * 40}, UnsafeFile, "not a safetensors file"),
        ({**contents(), "adapter_config.json": config(r=8)}, InvalidAdapter, "do not belong together"),
    ],
)  # fmt: skip
def test_the_gates_of_releases_hold(
    place: Place, files: Mapping[str, bytes], error: type[Exception], says: str, tmp_path: Path
) -> None:
    commit = put(place, files)
    with pytest.raises(error, match=says):
        pull_adapter(f"{NAME}@{commit}", hub=place.hub)
    assert Cache().digests() == []


@pytest.mark.parametrize("file", ["adapter_model.safetensors", "adapter_config.json"])
def test_bytes_that_are_not_those_of_the_commit_are_refused(loopback_hub: LoopbackHub, file: str) -> None:
    place = LoopbackPlace(loopback_hub)
    commit = put(place, contents())
    place.tamper(NAME, commit, file)
    with pytest.raises((IntegrityError, UnsafeFile, InvalidAdapter)):
        pull_adapter(f"{NAME}@{commit}", hub=place.hub)
    assert Cache().digests() == []


def test_a_hub_that_serves_other_bytes_later_is_noticed(tmp_path: Path) -> None:
    place = FolderPlace(tmp_path / "registry")
    commit = put(place, contents())
    first = pull_adapter(f"{NAME}@main", hub=place.hub, lock="here.lock")
    place.plant(NAME, commit, {"adapter_model.safetensors": contents(3)["adapter_model.safetensors"]})
    found = verify(f"{NAME}@{commit}", hub=place.hub, lock="here.lock")
    assert not found.ok
    assert first.manifest.digest in found.problems[0]
    with pytest.raises(IntegrityError, match="and had"):
        pull_adapter(f"{NAME}@main", hub=place.hub, lock="here.lock", cache_dir=tmp_path / "other")


def test_another_repository_of_the_name_is_noticed(place: Place) -> None:
    commit = put(place, contents())
    pull_adapter(f"{NAME}@{commit}", hub=place.hub)
    place.delete(NAME)
    put(place, contents(1))
    with pytest.raises(RepositoryReplaced):
        pull_adapter(f"{NAME}@main", hub=place.hub)


def test_lock_cache_and_gc_hold_as_for_releases(place: Place, tmp_path: Path) -> None:
    one, two = put(place, contents()), put(place, contents(1))
    pull_adapter(f"{NAME}@{one}", hub=place.hub, lock=True)
    with pytest.raises(LockMismatch, match="0\\+g"):
        pull_adapter(f"{NAME}@{two}", hub=place.hub)
    assert pull_adapter(NAME, hub=place.hub).commit == one  # the lock knows the commit
    for path in (tmp_path / "cache" / "checked").iterdir():  # no lease keeps it
        path.unlink()
    assert collect_garbage(tmp_path / "nothing", dry_run=False).paths == ()
    offline = pull_adapter(f"{NAME}@{one}", hub=place.hub, offline=True, lock=False)
    assert offline.commit == one
    if not place.hub.local:
        with pytest.raises(Offline):
            pull_adapter(f"{NAME}@{two}", hub=place.hub, offline=True, lock=False)
        with pytest.raises(Offline, match="asking the registry"):
            pull_adapter(f"{NAME}@main", hub=place.hub, offline=True, lock=False)
        with pytest.raises(Offline):
            pull_adapter(NAME, hub=place.hub, offline=True, lock=False)


def test_a_hub_that_is_down_is_replaced_by_the_cache(loopback_hub: LoopbackHub) -> None:
    place = LoopbackPlace(loopback_hub, timeout=30)
    commit = put(place, contents())
    pull_adapter(f"{NAME}@{commit}", hub=place.hub)
    loopback_hub.faults.status("refs", 503, times=None)
    hub = LoopbackPlace(loopback_hub, timeout=0.3).hub
    with pytest.warns(UserWarning, match="taken from the cache"):
        assert pull_adapter(f"{NAME}@{commit}", hub=hub).commit == commit


def test_show_verify_diff_and_mirror_take_them(place: Place, tmp_path: Path) -> None:
    one = put(place, {**inside("a"), **contents(1)})
    described = show(f"{NAME}/a@{one}", hub=place.hub)
    adapter = pull_adapter(f"{NAME}/a@{one}", hub=place.hub)
    assert described.manifest.digest == adapter.manifest.digest
    found = verify(f"{NAME}/a@{one}", hub=place.hub)
    assert (found.ok, found.others, str(found.release)) == (True, (), f"{NAME}/a@{one}")
    difference = compare_adapters(adapter, pull_adapter(f"{NAME}@main", hub=place.hub))
    assert difference.before == f"{NAME}/a@{one}"
    assert difference.layers[0].change > 0
    target = FolderHub(tmp_path / "target")
    [copied] = mirror(f"{NAME}/a@main", target, hub=place.hub)
    assert copied.created
    [again] = mirror(f"{NAME}/a@main", target, hub=place.hub)
    assert (again.created, again.commit) == (False, copied.commit)
    there = pull_adapter(f"{NAME}/a@copy-{one[:40]}", hub=target)
    assert there.manifest.content_digest == adapter.manifest.content_digest
    assert (Path(there) / "adapter_config.json").read_bytes() == (Path(adapter) / "adapter_config.json").read_bytes()


def test_aliases_and_withdrawals_are_of_versions(place: Place) -> None:
    commit = put(place, contents())
    for change in (lambda ref: set_alias(ref, "champion", hub=place.hub), lambda ref: yank(ref, "bad", hub=place.hub)):
        with pytest.raises(NotAdapter, match="lora-plugins adopt"):
            change(f"{NAME}@{commit}")


def test_a_required_signature_is_missed(place: Place, tmp_path: Path) -> None:
    pytest.importorskip("cryptography")
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    commit, key = put(place, contents()), ec.generate_private_key(ec.SECP256R1())
    public = tmp_path / "key.pub"
    public.write_bytes(
        key.public_key().public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)
    )
    with pytest.raises(SignatureNotFound, match="nobody has signed it"):
        pull_adapter(f"{NAME}@{commit}", hub=place.hub, require_signature=public)


def test_the_digest_of_an_unversioned_adapter_stays_the_same(tmp_path: Path) -> None:
    """Lock files hold it: another way to make the manifest would turn every entry into an error."""
    place = FolderPlace(tmp_path / "registry")
    files = {**contents(), "adapter_config.json": b'{"peft_type": "LORA", "r": 2, "target_modules": ["q_proj"]}'}
    place.hub.create(NAME)
    commit = put(place, files)
    manifest = pull_adapter(f"{NAME}@{commit}", hub=place.hub).manifest
    told = json.loads(manifest.to_bytes())
    assert told.pop("version") == f"0+g{commit}"
    assert told["created"] == "1970-01-01T00:00:00Z"
    assert told["config"] == {"peft_type": "LORA", "r": 2, "target_modules": ["q_proj"]}
    assert sorted(told) == [
        "architecture",
        "base",
        "config",
        "created",
        "files",
        "format",
        "metrics",
        "tensors",
        "training",
    ]
    assert hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()[:12] == DIGEST

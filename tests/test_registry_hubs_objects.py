"""An object store as a registry: what only it has, and garbage."""

from __future__ import annotations

import io
import json
import sys
from datetime import timedelta
from pathlib import Path

import pytest
from hubs import BucketPlace
from releases import NAME, release

from registry import collect_garbage, verify
from registry.errors import (
    HostileAnswer,
    HubRefused,
    HubUnavailable,
    InvalidReference,
    ObjectStoreNotInstalled,
    RepositoryNotFound,
)
from registry.hubs import open_hub
from registry.hubs.objects import ObjectHub


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LORA_REGISTRY_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def place(bucket: str) -> BucketPlace:
    return BucketPlace(bucket)


def test_the_address_says_which_store(bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert open_hub(bucket).location == bucket
    assert open_hub(f"{bucket}/").location == bucket
    monkeypatch.setenv("LORA_REGISTRY", bucket)
    assert isinstance(open_hub(), ObjectHub)
    with pytest.raises(InvalidReference, match="s3://bucket/prefix"):
        open_hub("s3://bucket/../other")


def test_without_the_package_the_error_says_how_to_install_it(bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "obstore", None)
    with pytest.raises(ObjectStoreNotInstalled, match=r"pip install 'lora-plugins\[s3\]'"):
        open_hub(bucket)


def test_a_bucket_that_does_not_exist_is_said_on_the_first_write(bucket: str) -> None:
    hub = open_hub("s3://no-such-bucket/x")
    with pytest.raises(RepositoryNotFound):
        hub.refs(NAME)
    with pytest.raises(HubRefused, match="the bucket does not exist"):
        hub.create(NAME)


def test_a_store_that_does_not_answer_is_unavailable_and_no_secret_is_shown(
    bucket: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("registry.hubs.object_store._WHOLE", timedelta(seconds=1))
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    with pytest.raises(HubUnavailable) as caught:
        open_hub(bucket).refs(NAME)
    assert "127.0.0.1" not in str(caught.value)
    assert caught.value.__cause__ is None
    assert "a-secret-of-the-loopback-store" not in str(caught.value) + repr(open_hub(bucket))


@pytest.mark.parametrize("path", ["repository.json", "refs.json", "commits"])
@pytest.mark.parametrize("damage", [b"", b"{", b"[]", b'{"a": 1}', b'{"branches": {"main": 1}, "tags": {}}'])
def test_damaged_state_is_said_to_be(place: BucketPlace, path: str, damage: bytes) -> None:
    commit = release(place.hub, "1.0.0").commit
    key = f"{NAME}/commits/{commit}.json" if path == "commits" else f"{NAME}/{path}"
    place.store.put(key, io.BytesIO(damage))
    read = place.hub.files if path == "commits" else lambda name, _: place.hub.refs(name)
    with pytest.raises(HostileAnswer, match="is damaged"):
        read(NAME, commit)


def test_a_file_that_is_gone_or_short_is_said_to_be(place: BucketPlace) -> None:
    commit = release(place.hub, "1.0.0").commit
    digest = place.hub.hashes(NAME, commit)["adapter_model.safetensors"]
    place.store.put(f"{NAME}/files/{digest}", io.BytesIO(b"short"))
    with pytest.raises(HostileAnswer, match="is not whole"):
        place.hub.read(NAME, commit, "adapter_model.safetensors", 10**6)
    place.store.delete(f"{NAME}/files/{digest}")
    with pytest.raises(HostileAnswer, match="is not whole"):
        place.hub.read(NAME, commit, "adapter_model.safetensors", 10**6)


def test_a_lost_answer_to_a_change_of_the_refs_is_success(place: BucketPlace, monkeypatch: pytest.MonkeyPatch) -> None:
    place.hub.create(NAME)
    swap = place.store.swap
    monkeypatch.setattr(place.store, "swap", lambda *args: swap(*args) and False)
    head = place.hub.refs(NAME).branches["main"]
    commit = place.hub.commit(NAME, "main", {"x": b"1"}, parent=head, message="m")
    place.hub.create_tag(NAME, "v1.0.0", commit)
    assert place.hub.refs(NAME).branches["main"] == place.hub.refs(NAME).tags["v1.0.0"] == commit


def test_garbage_is_what_nothing_refers_to_and_is_old(place: BucketPlace, monkeypatch: pytest.MonkeyPatch) -> None:
    release(place.hub, "1.0.0")
    commit = release(place.hub, "1.1.0", 1).commit
    place.store.put(f"{NAME}/files/{'0' * 64}", io.BytesIO(b"left behind"))
    place.store.create(f"{NAME}/commits/{'1' * 64}.json", json.dumps({}).encode())
    assert collect_garbage(place.hub, dry_run=False).paths == ()
    monkeypatch.setattr("registry.hubs.objects._AGE", timedelta(seconds=-1))
    found = collect_garbage(place.hub)
    left = {f"{place.hub.location}/{NAME}/files/{'0' * 64}", f"{place.hub.location}/{NAME}/commits/{'1' * 64}.json"}
    assert left <= set(found.paths)
    assert not found.deleted
    assert collect_garbage(place.hub, dry_run=False).size == found.size
    assert collect_garbage(place.hub, dry_run=False).paths == ()
    assert place.hub.refs(NAME).tags["v1.1.0"] == commit
    assert all(verify(f"{NAME}@{number}", hub=place.hub).ok for number in ("1.0.0", "1.1.0"))

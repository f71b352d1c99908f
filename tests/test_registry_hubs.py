"""What every kind of hub promises: one suite for a folder, the Hub's protocol and an object store."""

from __future__ import annotations

import io
import os
import socket
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
from hubs import EVERY_KIND, LoopbackPlace, Place, make_place

from registry.disk import mutex as folder_lock
from registry.errors import (
    CommitNotFound,
    HostileAnswer,
    HubError,
    HubFileNotFound,
    HubRefused,
    HubUnavailable,
    InvalidReference,
    Offline,
    PlainTokenWarning,
    RepositoryNotFound,
)
from registry.hubs import VARIABLE, open_hub
from registry.hubs.folder import FolderHub
from registry.hubs.huggingface import HuggingFaceHub
from registry.hubs.protocol import Conflict, Hub, Refs, TagExists
from registry.testing import LoopbackHub

NAME = "org/adapter"
WEIGHTS = os.urandom(300_000)


@pytest.fixture(params=EVERY_KIND)
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Place:
    return make_place(request, tmp_path)


@pytest.fixture
def hub(place: Place) -> Hub:
    place.hub.create(NAME)
    return place.hub


@pytest.fixture
def head(hub: Hub) -> str:
    return hub.refs(NAME).branches["main"]


@pytest.fixture
def made(hub: Hub, head: str) -> str:
    files: dict[str, Path | bytes] = {"README.md": b"card", "a.safetensors": WEIGHTS}
    return hub.commit(NAME, "main", files, parent=head, message="first")


def content(hub: Hub, commit: str) -> dict[str, bytes]:
    """All files of a commit except the one that the Hub puts there."""
    return {path: hub.read(NAME, commit, path, 10**6) for path in hub.files(NAME, commit) if path != ".gitattributes"}


# -- repositories --------------------------------------------------------------------------------------------------


def test_a_new_repository_has_main_and_nothing_else(hub: Hub, head: str) -> None:
    assert hub.refs(NAME) == Refs({"main": head}, {})
    assert content(hub, head) == {}


def test_a_repository_that_exists_is_left_as_it_is(hub: Hub, made: str) -> None:
    before = hub.identity(NAME)
    hub.create(NAME, private=True)
    assert hub.refs(NAME).branches["main"] == made
    assert hub.identity(NAME) == before


def test_the_identity_is_another_one_after_deletion(place: Place, hub: Hub) -> None:
    before = hub.identity(NAME)
    hub.create("org/other")
    assert hub.identity("org/other") != before
    place.delete(NAME)
    with pytest.raises(RepositoryNotFound, match=NAME):
        hub.identity(NAME)
    hub.create(NAME)
    assert hub.identity(NAME) not in ("", before)


def test_a_repository_that_is_not_there(place: Place) -> None:
    commit = "0" * 40
    calls: list[Callable[[Hub], object]] = [
        lambda hub: hub.refs(NAME),
        lambda hub: hub.files(NAME, commit),
        lambda hub: hub.read(NAME, commit, "x", 1),
        lambda hub: hub.commit(NAME, "main", {"x": b""}, parent=commit, message="m"),
        lambda hub: hub.create_tag(NAME, "v1", commit),
        lambda hub: hub.create_branch(NAME, "b", commit),
    ]
    for call in calls:
        with pytest.raises(RepositoryNotFound, match=NAME):
            call(place.hub)


def test_names(hub: Hub, head: str) -> None:
    card = b"---\ntags:\n- lora-plugins\n---\n"
    hub.commit(NAME, "main", {"README.md": card}, parent=head, message="m")
    hub.create("org/second")
    hub.commit("org/second", "main", {"README.md": card}, parent=hub.refs("org/second").branches["main"], message="m")
    assert set(hub.names()) == {NAME, "org/second"}


# -- commits -------------------------------------------------------------------------------------------------------


def test_commit_adds_replaces_deletes_and_keeps(hub: Hub, made: str, tmp_path: Path) -> None:
    (tmp_path / "w").write_bytes(WEIGHTS[::-1])
    files: dict[str, Path | bytes] = {"b.safetensors": tmp_path / "w", "folder/x": b"x"}
    second = hub.commit(NAME, "main", files, parent=made, message="second", delete=("a.safetensors",))
    assert second != made
    assert hub.refs(NAME).branches == {"main": second}
    assert content(hub, second) == {"README.md": b"card", "b.safetensors": WEIGHTS[::-1], "folder/x": b"x"}
    assert content(hub, made) == {"README.md": b"card", "a.safetensors": WEIGHTS}
    sizes = {path: size for path, size in hub.files(NAME, second).items() if path != ".gitattributes"}
    assert sizes == {"README.md": 4, "b.safetensors": len(WEIGHTS), "folder/x": 1}


@pytest.mark.parametrize("size", [0, 1000, 11 * 2**20])
def test_files_of_equal_content_in_one_commit(hub: Hub, head: str, tmp_path: Path, size: int) -> None:
    data = b"\0" * size
    (tmp_path / "w").write_bytes(data)
    files: dict[str, Path | bytes] = {
        "a.safetensors": data, "b.safetensors": data, "c.safetensors": tmp_path / "w", "d.safetensors": tmp_path / "w",
        "README.md": b"card", "other.md": b"card",
    }  # fmt: skip
    commit = hub.commit(NAME, "main", files, parent=head, message="m")
    assert {path: size for path, size in hub.files(NAME, commit).items() if path != ".gitattributes"} == {
        **dict.fromkeys(["a.safetensors", "b.safetensors", "c.safetensors", "d.safetensors"], size),
        "README.md": 4, "other.md": 4,
    }  # fmt: skip
    sink = io.BytesIO()
    hub.download(NAME, commit, "d.safetensors", sink, size)
    assert sink.getvalue() == data


def test_commit_on_a_stale_parent_writes_nothing(hub: Hub, head: str, made: str) -> None:
    with pytest.raises(Conflict) as caught:
        hub.commit(NAME, "main", {"x": b"1"}, parent=head, message="m")
    assert (caught.value.branch, caught.value.head) == ("main", made)
    assert hub.refs(NAME) == Refs({"main": made}, {})
    with pytest.raises(Conflict):
        hub.commit(NAME, "elsewhere", {"x": b"1"}, parent=made, message="m")
    assert hub.refs(NAME) == Refs({"main": made}, {})


def test_the_same_files_again(hub: Hub, head: str) -> None:
    """Two commits may hold the same manifest; each has its own files all the same."""
    one = hub.commit(NAME, "main", {"adapter_manifest.json": b"{}", "README.md": b"1"}, parent=head, message="m")
    two = hub.commit(NAME, "main", {"README.md": b"2"}, parent=one, message="m")
    assert [hub.read(NAME, commit, "README.md", 9) for commit in (one, two)] == [b"1", b"2"]
    assert hub.refs(NAME).branches["main"] == two


def test_of_many_with_the_same_parent_one_commits(hub: Hub, head: str) -> None:
    outcomes: list[object] = []

    def commit(number: int) -> None:
        try:
            outcomes.append(hub.commit(NAME, "main", {"x": b"%d" % number}, parent=head, message="m"))
        except Conflict:
            outcomes.append(None)

    at_once(commit)
    winners = [outcome for outcome in outcomes if outcome is not None]
    assert len(outcomes) == 8
    assert winners == [hub.refs(NAME).branches["main"]]


def test_branches(hub: Hub, head: str, made: str) -> None:
    hub.create_branch(NAME, "release-1.0.1", head)
    hub.create_branch(NAME, "release-1.0.1", made)
    assert hub.refs(NAME).branches == {"main": made, "release-1.0.1": head}
    side = hub.commit(NAME, "release-1.0.1", {"x": b"1"}, parent=head, message="m")
    assert hub.refs(NAME).branches == {"main": made, "release-1.0.1": side}


# -- tags ----------------------------------------------------------------------------------------------------------


def test_tags_stand(hub: Hub, head: str, made: str) -> None:
    hub.create_tag(NAME, "v1.0.0", made)
    hub.create_tag(NAME, "v1.0.0", made)
    with pytest.raises(TagExists) as caught:
        hub.create_tag(NAME, "v1.0.0", head)
    assert (caught.value.tag, caught.value.commit) == ("v1.0.0", made)
    hub.create_tag(NAME, "v1.0.1rc1", head)
    assert hub.refs(NAME).tags == {"v1.0.0": made, "v1.0.1rc1": head}


def test_of_many_taggers_one_succeeds(hub: Hub, head: str) -> None:
    commits = [head]
    for number in range(7):
        commits.append(hub.commit(NAME, "main", {"x": b"%d" % number}, parent=commits[-1], message="m"))
    outcomes: list[str] = []

    def tag(number: int) -> None:
        try:
            hub.create_tag(NAME, "v1.0.0", commits[number])
            outcomes.append(commits[number])
        except TagExists:
            outcomes.append("")

    at_once(tag)
    assert len(outcomes) == 8
    assert [outcome for outcome in outcomes if outcome] == [hub.refs(NAME).tags["v1.0.0"]]


def test_a_tag_and_a_branch_of_one_name(hub: Hub, head: str, made: str) -> None:
    hub.create_branch(NAME, "v1.0.0", head)
    hub.create_tag(NAME, "v1.0.0", made)
    refs = hub.refs(NAME)
    assert (refs.branches["v1.0.0"], refs.tags["v1.0.0"]) == (head, made)


# -- files ---------------------------------------------------------------------------------------------------------


def test_reading(hub: Hub, made: str) -> None:
    sink = io.BytesIO()
    hub.download(NAME, made, "a.safetensors", sink, len(WEIGHTS))
    assert sink.getvalue() == WEIGHTS
    assert hub.read_range(NAME, made, "a.safetensors", 1000, 50) == WEIGHTS[1000:1050]
    assert hub.read_range(NAME, made, "a.safetensors", len(WEIGHTS) - 5, 50) == WEIGHTS[-5:]


def test_no_more_than_the_limit_is_read(hub: Hub, made: str) -> None:
    with pytest.raises(HostileAnswer, match="more than the 1000 bytes"):
        hub.read(NAME, made, "a.safetensors", 1000)
    sink = io.BytesIO()
    with pytest.raises(HostileAnswer, match="more than the 1000 bytes"):
        hub.download(NAME, made, "a.safetensors", sink, 1000)
    assert len(sink.getvalue()) <= 1000


@pytest.mark.parametrize("path", ["nothing", "a.safetensors/x", "../refs.json", "/etc/passwd", ""])
def test_files_that_are_not_there(hub: Hub, made: str, path: str) -> None:
    with pytest.raises(HubError) as caught:
        hub.read(NAME, made, path, 10**6)
    assert isinstance(caught.value, HubFileNotFound) or path in ("", "../refs.json")


def test_commits_that_are_not_there(hub: Hub, made: str) -> None:
    for commit in ("0" * 40, "0" * 64, "../..", made[:-1] + ("0" if made[-1] != "0" else "1")):
        with pytest.raises(CommitNotFound):
            hub.files(NAME, commit)


# -- what differs --------------------------------------------------------------------------------------------------


def test_proposals(place: Place, hub: Hub, head: str) -> None:
    if isinstance(place, LoopbackPlace):
        assert hub.propose(NAME, {"x": b"1"}, parent=head, message="m").startswith(place.loopback.endpoint)
        assert hub.refs(NAME).branches == {"main": head}
    else:
        with pytest.raises(HubRefused, match="without create_pr"):
            hub.propose(NAME, {"x": b"1"}, parent=head, message="m")


def test_location_holds_no_secret(place: Place) -> None:
    assert place.hub.location.startswith(("file:///", "http://127.0.0.1:", "s3://adapters/"))
    assert "a-secret-of-the-loopback-store" not in place.hub.location + repr(place.hub) + repr(vars(place.hub))
    if isinstance(place, LoopbackPlace):
        assert place.loopback.token not in place.hub.location + repr(place.hub)


# -- the folder ----------------------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path: Path) -> FolderHub:
    hub = FolderHub(tmp_path / "registry")
    hub.create(NAME)
    return hub


def test_folder_needs_no_socket(folder: FolderHub, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object, **options: object) -> None:
        raise AssertionError("a socket was opened")

    monkeypatch.setattr(socket, "socket", refuse)
    head = folder.refs(NAME).branches["main"]
    commit = folder.commit(NAME, "main", {"x": b"1"}, parent=head, message="m")
    folder.create_tag(NAME, "v1.0.0", commit)
    assert folder.read(NAME, commit, "x", 1) == b"1"


def test_folder_knows_a_release_by_its_manifest(folder: FolderHub, tmp_path: Path) -> None:
    other = FolderHub(tmp_path / "other")
    other.create(NAME)
    commits = {
        hub.commit(NAME, "main", {"adapter_manifest.json": b"{}"}, parent=hub.refs(NAME).branches["main"], message="m")
        for hub in (folder, other)
    }
    assert commits == {"44136fa355b3678a1146ad16f7e8649e94fb4fc21fe77e8310c060f61caaff8a"}


def test_nothing_is_left_of_a_commit_that_fails(folder: FolderHub, tmp_path: Path) -> None:
    head = folder.refs(NAME).branches["main"]
    before = sorted(map(str, (folder.root / NAME).rglob("*")))
    (tmp_path / "link").symlink_to("/etc/passwd")
    os.mkfifo(tmp_path / "pipe")
    for source in ("link", "pipe", "nothing"):
        with pytest.raises(HubError):
            folder.commit(NAME, "main", {"x": b"1", "y": tmp_path / source}, parent=head, message="m")
    for path in ("../x", "/x", "a//b", "a\\b", "C:x", "a\nb", "x" * 300, "", ".", "a/.."):
        with pytest.raises(InvalidReference):
            folder.commit(NAME, "main", {path: b"1"}, parent=head, message="m")
    assert sorted(map(str, (folder.root / NAME).rglob("*"))) == before


@pytest.mark.parametrize("planted", ["org", "org/adapter", "org/adapter/commits", "org/adapter/refs.json"])
def test_planted_links_are_not_followed(folder: FolderHub, tmp_path: Path, planted: str) -> None:
    head = folder.refs(NAME).branches["main"]
    path = folder.root / planted
    path.rename(tmp_path / "moved")
    path.symlink_to(tmp_path / "moved")
    before = sorted(map(str, (tmp_path / "moved").rglob("*")))
    with pytest.raises(HostileAnswer, match="symbolic link"):
        folder.commit(NAME, "main", {"x": b"1"}, parent=head, message="m")
    assert sorted(map(str, (tmp_path / "moved").rglob("*"))) == before


def test_a_planted_link_in_a_commit_is_not_read(folder: FolderHub) -> None:
    head = folder.refs(NAME).branches["main"]
    (folder.root / NAME / "commits" / head / "x").symlink_to("/etc/passwd")
    for call in (lambda: folder.read(NAME, head, "x", 10**6), lambda: folder.files(NAME, head)):
        with pytest.raises(HostileAnswer, match=r"symbolic link|not a regular file"):
            call()


@pytest.mark.parametrize("damage", [b"", b"{", b"[]", b'{"branches": {"main": 1}, "tags": {}}', b"[" * 100_000])
def test_damaged_refs_are_said_to_be(folder: FolderHub, damage: bytes) -> None:
    (folder.root / NAME / "refs.json").write_bytes(damage)
    with pytest.raises(HostileAnswer, match="damaged"):
        folder.refs(NAME)


def test_names_that_differ_in_case_only(folder: FolderHub) -> None:
    for twin in ("org/Adapter", "Org/other"):
        with pytest.raises(HubRefused, match="on many systems"):
            folder.create(twin)
    folder.create("org/other")


@pytest.mark.parametrize("name", ["../x", "org/../x", "org", "org/x/y", "/org/x", "org/.x", "org/CON", "org/a\0"])
def test_names_that_leave_the_folder(folder: FolderHub, name: str) -> None:
    with pytest.raises(InvalidReference):
        folder.create(name)
    with pytest.raises(RepositoryNotFound):
        folder.refs(name)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_that_is_not_ours(folder: FolderHub) -> None:
    (folder.root / NAME).chmod(0o555)
    with pytest.raises(HubRefused, match="Permission denied"):
        folder.create_tag(NAME, "v1.0.0", folder.refs(NAME).branches["main"])
    (folder.root / NAME).chmod(0o755)


def test_a_full_disk(folder: FolderHub, monkeypatch: pytest.MonkeyPatch) -> None:
    head = folder.refs(NAME).branches["main"]

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(HubUnavailable, match="No space left"):
        folder.commit(NAME, "main", {"x": b"1"}, parent=head, message="m")
    monkeypatch.undo()
    assert folder.refs(NAME).branches == {"main": head}
    assert list((folder.root / NAME).glob(".tmp-*")) == []


def test_without_hard_links(folder: FolderHub, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object, **options: object) -> None:
        raise OSError(1, "Operation not permitted")

    monkeypatch.setattr(os, "link", refuse)
    head = folder.refs(NAME).branches["main"]
    folder.create_tag(NAME, "v1.0.0", head)
    assert folder.refs(NAME).tags == {"v1.0.0": head}


def test_the_lock_of_a_dead_process_is_broken(folder: FolderHub) -> None:
    pid = os.fork()
    if pid == 0:
        with folder_lock.folder_lock(folder.root / NAME):
            os._exit(0)
    os.waitpid(pid, 0)
    assert (folder.root / NAME / "lock").exists()
    folder.create_tag(NAME, "v1.0.0", folder.refs(NAME).branches["main"])
    assert not (folder.root / NAME / "lock").exists()


def test_the_lock_of_another_host_is_broken_when_it_is_old(folder: FolderHub) -> None:
    lock = folder.root / NAME / "lock"
    lock.write_text('{"host": "elsewhere", "pid": 1, "started": "1", "nonce": "x"}')
    with pytest.raises(folder_lock.LockTimeout, match="elsewhere"), folder_lock.folder_lock(lock.parent, 0.1):
        pass
    os.utime(lock, (0, 0))
    folder.create_tag(NAME, "v1.0.0", folder.refs(NAME).branches["main"])


def test_a_live_lock_is_waited_for(folder: FolderHub) -> None:
    held, release = threading.Event(), threading.Event()

    def hold() -> None:
        with folder_lock.folder_lock(folder.root / NAME):
            held.set()
            release.wait()

    thread = threading.Thread(target=hold)
    thread.start()
    held.wait()
    threading.Timer(0.2, release.set).start()
    folder.create_tag(NAME, "v1.0.0", folder.refs(NAME).branches["main"])
    thread.join()
    assert "v1.0.0" in folder.refs(NAME).tags


# -- the network ---------------------------------------------------------------------------------------------------


def test_offline(loopback_hub: LoopbackHub, monkeypatch: pytest.MonkeyPatch) -> None:
    hub = HuggingFaceHub(loopback_hub.endpoint, loopback_hub.token)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(Offline, match="HF_HUB_OFFLINE is set"):
        hub.refs(NAME)


def test_errors_say_what_to_do(loopback_hub: LoopbackHub) -> None:
    loopback_hub.create_repo("org/gated", gated=True)
    loopback_hub.add_user("other")
    stranger = HuggingFaceHub(loopback_hub.endpoint, loopback_hub.add_user("reader", role="read").token, 1)
    head = stranger.refs("org/gated").branches["main"]
    with pytest.raises(HubRefused, match="gated; ask for access"):
        stranger.read("org/gated", head, ".gitattributes", 10**6)
    with pytest.raises(HubRefused, match="create_pr=True"):
        stranger.create_tag("org/gated", "v1.0.0", head)
    with pytest.raises(HubRefused, match="refuses this token"):
        HuggingFaceHub(loopback_hub.endpoint, "hf_wrong", 1).refs("org/gated")
    loopback_hub.faults.status("refs", 503, times=None)
    with pytest.raises(HubUnavailable, match="did not answer: HTTP 503"):
        HuggingFaceHub(loopback_hub.endpoint, None, 1.5).refs("org/gated")


def test_a_412_without_a_cause_is_no_conflict_for_ever(loopback_hub: LoopbackHub) -> None:
    hub = HuggingFaceHub(loopback_hub.endpoint, loopback_hub.token, 1)
    hub.create(NAME)
    loopback_hub.faults.status("commit", 412, times=None)
    with pytest.raises(HubUnavailable, match="has not moved"):
        hub.commit(NAME, "main", {"x": b"1"}, parent=hub.refs(NAME).branches["main"], message="m")


def test_the_stored_token_goes_to_the_configured_hub_only(
    loopback_hub: LoopbackHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    loopback_hub.create_repo(NAME, private=True)
    monkeypatch.setenv("HF_TOKEN", loopback_hub.token)
    with pytest.raises(HubError):
        HuggingFaceHub(loopback_hub.endpoint).refs(NAME)
    assert [served.authorized for served in loopback_hub.requests] == [False]
    assert HuggingFaceHub(loopback_hub.endpoint, token=True).refs(NAME)
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", loopback_hub.endpoint)
    assert HuggingFaceHub(loopback_hub.endpoint).refs(NAME)
    with pytest.raises(HubError):
        HuggingFaceHub(token=False).refs(NAME)


def test_a_token_over_plain_http_is_warned_of() -> None:
    with pytest.warns(PlainTokenWarning, match=r"http://hub\.example unencrypted"):
        HuggingFaceHub("http://hub.example", "hf_abc")


# -- which one is meant --------------------------------------------------------------------------------------------


def test_which_hub_is_meant(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(VARIABLE, raising=False)
    assert open_hub().location == "https://huggingface.co"
    assert open_hub("https://hub.example/").location == "https://hub.example"
    assert open_hub(tmp_path).location == open_hub(tmp_path.as_uri()).location == tmp_path.as_uri()
    assert open_hub(spaced := FolderHub(tmp_path / "a b#c%d")) is spaced
    assert open_hub(spaced.location).location == spaced.location
    monkeypatch.setenv(VARIABLE, tmp_path.as_uri())
    assert open_hub().location == tmp_path.as_uri()
    assert open_hub("https://hub.example").location == "https://hub.example"
    monkeypatch.setenv(VARIABLE, "")
    assert open_hub().location == "https://huggingface.co"


@pytest.mark.parametrize(
    "text",
    ["adapters", "adapters/all", "~adapters", ".hidden", "hf:org", "ftp://x",
     "s3://", "s3:bucket", "s3://Bucket", "s3://bucket/../x", "s3://user:secret@bucket",
     "file:", "file:adapters", "file://host/x", "file:///x?y",
     "https://", "https://user:secret@hub.example", "https://hub.example?x", "http://[", "https://x:port"],
)  # fmt: skip
def test_what_is_no_hub(text: str) -> None:
    with pytest.raises(InvalidReference) as caught:
        open_hub(text)
    assert "secret" not in str(caught.value)


def at_once(work: Callable[[int], None]) -> None:
    """Run eight calls at the same moment, each in a thread."""
    barrier = threading.Barrier(8)

    def run(number: int) -> None:
        barrier.wait()
        work(number)

    threads = [threading.Thread(target=run, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

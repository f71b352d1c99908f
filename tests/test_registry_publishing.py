"""Publishing, on both kinds of hub: what becomes visible, and when, whoever else publishes or fails meanwhile."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
from hubs import KINDS, LoopbackPlace, Place, make_place
from packaging.version import Version
from releases import NAME, draft, release

from registry.errors import HubRefused, HubUnavailable, VersionExists
from registry.hubs.protocol import MAIN
from registry.publishing import publish as publishing
from registry.publishing.publish import Draft, manifest_at, publish
from registry.testing import LoopbackHub


@pytest.fixture(params=KINDS)
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Place:
    return make_place(request, tmp_path)


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(publishing, "PATIENCE", 0.3)
    # Waiting for the disk is for power failures, which these tests don't have.
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)


def tags(place: Place) -> list[str]:
    return sorted(place.hub.refs(NAME).tags)


def on_main(place: Place) -> str | None:
    held = manifest_at(place.hub, NAME, place.hub.refs(NAME).branches[MAIN])
    return held and held.version


def half(place: Place, version: str, seed: int = 0, branch: str = MAIN) -> str:
    """A release whose publisher died between commit and tag."""
    place.hub.create(NAME)
    refs = place.hub.refs(NAME)
    files = draft(version, seed).all_files()
    return place.hub.commit(NAME, branch, files, parent=refs.branches[branch], message="half")


# -- one at a time -------------------------------------------------------------------------------------------------


def test_a_release_is_a_commit_and_a_tag(place: Place) -> None:
    done = release(place.hub, "1.0")
    refs = place.hub.refs(NAME)
    assert (done.version, done.created) == ("1.0.0", True)
    assert refs.tags == {"v1.0.0": done.commit}
    assert refs.branches == {"main": done.commit}
    there = set(place.hub.files(NAME, done.commit)) - {".gitattributes"}
    assert there == {"adapter_config.json", "adapter_model.safetensors", "adapter_manifest.json", "README.md"}


def test_the_same_again_is_success_and_other_content_is_not(place: Place) -> None:
    first = release(place.hub, "1.0.0")
    refs = place.hub.refs(NAME)
    again = release(place.hub, "1.0", created="2026-02-28T12:00:00Z")
    assert (again.commit, again.created, again.manifest) == (first.commit, False, first.manifest)
    with pytest.raises(VersionExists, match=r"org/adapter@1\.0\.0 is published with other content"):
        release(place.hub, "1.0.0", seed=1)
    assert place.hub.refs(NAME) == refs


def test_main_is_the_newest_stable_release(place: Place) -> None:
    for seed, version in enumerate(["1.0.0", "2.0.0", "1.1.0", "3.0.0rc1", "2.0.1"]):
        release(place.hub, version, seed)
        assert on_main(place) == {"1.1.0": "2.0.0", "3.0.0rc1": "2.0.0"}.get(version, version)
    assert tags(place) == ["v1.0.0", "v1.1.0", "v2.0.0", "v2.0.1", "v3.0.0rc1"]
    assert sorted(place.hub.refs(NAME).branches) == ["main", "release-1.1.0", "release-3.0.0rc1"]


def test_files_of_the_version_before_are_not_kept(place: Place) -> None:
    publish(place.hub, NAME, Version("1.0"), lambda *_: draft("1.0", vocab_txt=b"a b"))
    done = release(place.hub, "1.1.0")
    assert "vocab.txt" not in place.hub.files(NAME, done.commit)


def test_counting(place: Place) -> None:
    seen: list[tuple[str, str]] = []

    def made(version: Version, before: Version | None) -> Draft:
        seen.append((str(version), str(before)))
        return draft(str(version), len(seen))

    for part in ("minor", "patch", "major"):
        publish(place.hub, NAME, part, made)
    assert seen == [("0.1.0", "None"), ("0.1.1", "0.1.0"), ("1.0.0", "0.1.1")]
    same = publish(place.hub, NAME, "patch", lambda version, before: draft(str(version), 3))
    assert (same.version, same.created) == ("1.0.0", False)


def test_a_tag_that_is_no_release(place: Place) -> None:
    place.hub.create(NAME)
    place.hub.create_tag(NAME, "v1.0.0", place.hub.refs(NAME).branches[MAIN])
    with pytest.raises(VersionExists, match="holds no release"):
        release(place.hub, "1.0.0")


def test_a_branch_with_the_name_of_a_tag(place: Place) -> None:
    place.hub.create(NAME)
    place.hub.create_branch(NAME, "v1.0.0", place.hub.refs(NAME).branches[MAIN])
    done = release(place.hub, "1.0.0")
    assert place.hub.refs(NAME).tags == {"v1.0.0": done.commit}


def test_proposing(place: Place) -> None:
    def propose() -> object:
        return publish(place.hub, NAME, Version("1.0"), lambda *_: draft("1.0"), propose=True)

    if isinstance(place, LoopbackPlace):
        done = propose()
        assert getattr(done, "url", "").startswith(place.loopback.endpoint)
        assert tags(place) == []
    else:
        with pytest.raises(HubRefused, match="no change requests"):
            propose()


# -- halves --------------------------------------------------------------------------------------------------------


def test_a_half_release_is_finished_by_the_same_push(place: Place) -> None:
    commit = half(place, "1.0.0")
    assert tags(place) == []
    done = release(place.hub, "1.0.0", created="2026-02-28T12:00:00Z")
    assert (done.commit, done.created) == (commit, True)
    assert place.hub.refs(NAME).tags == {"v1.0.0": commit}


def test_a_half_release_makes_room_for_other_content(place: Place) -> None:
    commit = half(place, "1.0.0")
    done = release(place.hub, "1.0.0", seed=1)
    assert done.commit != commit
    assert place.hub.refs(NAME).tags == {"v1.0.0": done.commit}
    assert on_main(place) == "1.0.0"


def test_a_half_release_of_a_newer_version_is_passed_over(place: Place) -> None:
    half(place, "9.0.0")
    done = release(place.hub, "1.0.0", seed=1)
    refs = place.hub.refs(NAME)
    assert refs.tags == {"v1.0.0": done.commit}
    assert refs.branches[MAIN] == done.commit


def test_a_half_release_on_its_own_branch(place: Place) -> None:
    release(place.hub, "2.0.0")
    place.hub.create_branch(NAME, "release-1.0.0", place.hub.refs(NAME).branches[MAIN])
    commit = half(place, "1.0.0", seed=1, branch="release-1.0.0")
    assert release(place.hub, "1.0.0", seed=1).commit == commit
    assert on_main(place) == "2.0.0"


def test_who_is_between_commit_and_tag_is_waited_for(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(publishing, "PATIENCE", 10)
    commit = half(place, "1.0.0")
    threading.Timer(0.3, lambda: place.hub.create_tag(NAME, "v1.0.0", commit)).start()
    with pytest.raises(VersionExists):
        release(place.hub, "1.0.0", seed=1)
    assert place.hub.refs(NAME).tags == {"v1.0.0": commit}
    assert place.hub.refs(NAME).branches == {"main": commit}


def test_who_was_taken_for_dead_and_was_not(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    """The one that sets the tag first has won, and main holds what it published."""
    commit = half(place, "1.0.0")
    create_tag = type(place.hub).create_tag

    def late(self: object, name: str, tag: str, loser: str) -> None:
        monkeypatch.setattr(type(place.hub), "create_tag", create_tag)
        place.hub.create_tag(name, tag, commit)
        place.hub.create_tag(name, tag, loser)

    monkeypatch.setattr(type(place.hub), "create_tag", late)
    with pytest.raises(VersionExists):
        release(place.hub, "1.0.0", seed=1)
    assert place.hub.refs(NAME).tags == {"v1.0.0": commit}
    refs = place.hub.refs(NAME)
    held, tagged = (manifest_at(place.hub, NAME, at) for at in (refs.branches[MAIN], commit))
    assert held is not None
    assert held == tagged


# -- several at once -----------------------------------------------------------------------------------------------


def at_once(work: Callable[[int], object]) -> list[object]:
    """Run eight calls at the same moment, each in a thread; what they return or raise."""
    barrier, outcomes = threading.Barrier(8), list[object]()

    def run(number: int) -> None:
        barrier.wait()
        try:
            outcomes.append(work(number))
        except Exception as error:
            outcomes.append(error)

    threads = [threading.Thread(target=run, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return outcomes


@pytest.fixture
def patient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(publishing, "PATIENCE", 30)


@pytest.mark.usefixtures("patient")
def test_eight_contents_for_one_version(place: Place) -> None:
    outcomes = at_once(lambda number: release(place.hub, "1.0.0", seed=number))
    winners = [outcome for outcome in outcomes if not isinstance(outcome, Exception)]
    assert len(winners) == 1
    assert {type(outcome) for outcome in outcomes} == {publishing.Published, VersionExists}
    refs = place.hub.refs(NAME)
    assert refs.tags == {"v1.0.0": winners[0].commit}
    assert refs.branches == {"main": winners[0].commit}


@pytest.mark.usefixtures("patient")
def test_eight_versions_at_once(place: Place) -> None:
    outcomes = at_once(lambda number: release(place.hub, f"1.{number}.0", seed=number))
    assert not any(isinstance(outcome, Exception) for outcome in outcomes), outcomes
    assert tags(place) == [f"v1.{number}.0" for number in range(8)]
    assert on_main(place) == "1.7.0"
    for number in range(8):
        held = manifest_at(place.hub, NAME, place.hub.refs(NAME).tags[f"v1.{number}.0"])
        assert held == draft(f"1.{number}.0", number).manifest


@pytest.mark.usefixtures("patient")
def test_eight_times_the_same(place: Place) -> None:
    outcomes = at_once(lambda number: release(place.hub, "1.0.0", created=f"2026-01-31T12:00:0{number}Z"))
    assert {outcome.commit for outcome in outcomes} == set(place.hub.refs(NAME).tags.values())


@pytest.mark.usefixtures("patient")
def test_eight_times_the_next_version(place: Place) -> None:
    outcomes = at_once(lambda number: release(place.hub, "patch", seed=number))
    assert not any(isinstance(outcome, Exception) for outcome in outcomes), outcomes
    assert tags(place) == [f"v0.0.{number}" for number in range(1, 9)]


# -- the network ---------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("patient")
def test_a_hub_that_ignores_the_parent(loopback_hub: LoopbackHub) -> None:
    place = LoopbackPlace(loopback_hub)
    loopback_hub.faults.ignores_parent_commit = True
    outcomes = at_once(lambda number: release(place.hub, "1.0.0", seed=number))
    winners = [outcome for outcome in outcomes if not isinstance(outcome, Exception)]
    assert {type(outcome) for outcome in outcomes} == {publishing.Published, VersionExists}
    assert len(winners) == 1
    refs = place.hub.refs(NAME)
    assert refs.tags == {"v1.0.0": winners[0].commit}
    held, tagged = (manifest_at(place.hub, NAME, at) for at in (refs.branches[MAIN], winners[0].commit))
    assert held is not None
    assert held == tagged


@pytest.mark.parametrize("route", ["create_repo", "branch", "commit", "tag"])
@pytest.mark.parametrize("status", [None, 503])
def test_lost_answers_are_success(loopback_hub: LoopbackHub, route: str, status: int | None) -> None:
    place = LoopbackPlace(loopback_hub)
    version = "1.0.0rc1" if route == "branch" else "1.0.0"
    loopback_hub.faults.lose_response(route, status=status)
    done = release(place.hub, version)
    assert place.hub.refs(NAME).tags == {f"v{version}": done.commit}
    assert len(loopback_hub.repo(NAME).history(loopback_hub.repo(NAME).resolve(done.commit))) == 2


@pytest.mark.parametrize("route", ["commit", "tag"])
def test_a_hub_that_stops_answering(loopback_hub: LoopbackHub, route: str) -> None:
    """What was asked for happened; nobody could tell. The next push finds out."""
    place = LoopbackPlace(loopback_hub, timeout=0.5)
    release(place.hub, "0.9.0")

    def down(request: object) -> None:
        loopback_hub.faults.lose_response(route, status=503)
        loopback_hub.faults.status("*", 503, times=None)

    loopback_hub.faults.call_after(route, down, times=1)
    with pytest.raises(HubUnavailable):
        release(place.hub, "1.0.0", seed=1)
    loopback_hub.faults.clear()
    done = release(place.hub, "1.0.0", seed=1)
    assert tags(place) == ["v0.9.0", "v1.0.0"]
    assert len(loopback_hub.repo(NAME).history(loopback_hub.repo(NAME).resolve(done.commit))) == 3


def test_a_hub_that_knows_no_tags_as_revisions(loopback_hub: LoopbackHub) -> None:
    place = LoopbackPlace(loopback_hub)
    loopback_hub.faults.resolves_tags = False
    release(place.hub, "1.0.0")
    with pytest.raises(VersionExists):
        release(place.hub, "1.0.0", seed=1)

"""Releases are told from tags: a tag that somebody else has set is shown as foreign and never chosen."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest
from hubs import KINDS, FolderPlace, LoopbackPlace, Place, make_place
from releases import NAME, release

from registry import aliases, foreign_tags, mirror, pull_adapter, set_alias, show, verify, versions, yank
from registry.errors import NotAdapter, RegistryError, VersionExists
from registry.formats.manifest import MANIFEST_FILE, MAX_MANIFEST
from registry.hubs.protocol import MAIN
from registry.publishing import publish as publishing

TAGS = ["v2.0.0", "v1.5.0", "v0.1.0", "v3.0.0rc1"]


@pytest.fixture(params=KINDS)
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Place:
    return make_place(request, tmp_path)


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(publishing, "PATIENCE", 0.2)
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)
    monkeypatch.setenv("LORA_REGISTRY_CACHE", str(tmp_path / "cache"))


@pytest.fixture(params=["at a commit without release", "at another release", "at a change on top of a release"])
def tagged(request: pytest.FixtureRequest, place: Place) -> Place:
    """A repository with the release 1.0.0 and four foreign tags."""
    place.hub.create(NAME)
    commit = place.hub.refs(NAME).branches[MAIN]
    place.hub.create_branch(NAME, "notes", commit)
    done = release(place.hub, "1.0.0")
    if request.param == "at another release":
        commit = done.commit
    elif request.param == "at a change on top of a release":  # as an edit of the card on the Hub's website makes it
        place.hub.create_branch(NAME, "edited", done.commit)
        commit = place.hub.commit(NAME, "edited", {"NOTES": b"edited"}, parent=done.commit, message="m")
        assert place.hub.read(NAME, commit, MANIFEST_FILE, MAX_MANIFEST)
    for tag in TAGS:
        place.hub.create_tag(NAME, tag, commit)
    return place


@pytest.mark.parametrize("behind", ["", ">=1", ">=0.1rc1", "~=1.0", "@1.0.0"])
def test_a_foreign_tag_is_never_chosen(tagged: Place, behind: str) -> None:
    assert pull_adapter(f"{NAME}{behind}", hub=tagged.hub).version == "1.0.0"
    assert show(f"{NAME}{behind}", hub=tagged.hub).version == "1.0.0"
    found = verify(f"{NAME}{behind}", hub=tagged.hub)
    assert (found.release.version, found.ok) == ("1.0.0", True)


def test_a_foreign_tag_is_shown_as_foreign(tagged: Place) -> None:
    assert [each.version for each in versions(NAME, hub=tagged.hub)] == ["1.0.0"]
    assert set(foreign_tags(NAME, hub=tagged.hub)) == set(TAGS)


@pytest.mark.parametrize("commit", ["stays", "is gone too"])
@pytest.mark.parametrize("tag", ["v2.0.0", "v0.1.0"])
def test_a_foreign_tag_may_vanish_and_move(tagged: Place, tag: str, commit: str) -> None:
    assert pull_adapter(NAME, hub=tagged.hub).version == "1.0.0"
    refs = tagged.hub.refs(NAME)
    foreign = refs.tags[tag]
    other = tagged.hub.commit(NAME, "notes", {"NOTES": b"n"}, parent=refs.branches["notes"], message="m")
    for place in (None, other):
        tagged.move_tag(NAME, tag, place)
        if commit == "is gone too" and foreign != refs.tags["v1.0.0"]:
            lose(tagged, foreign)
        for reference in (NAME, f"{NAME}>=0.5,<2", f"{NAME}@1.0.0"):
            assert pull_adapter(reference, hub=tagged.hub).version == "1.0.0"
        assert verify(NAME, hub=tagged.hub).ok


def lose(place: Place, commit: str) -> None:
    """Forget a commit that no tag names any more, as a cleaned-up or squashed repository does."""
    if isinstance(place, FolderPlace):
        shutil.rmtree(place.root / NAME / "commits" / commit, ignore_errors=True)
    elif isinstance(place, LoopbackPlace):
        place.loopback.repo(NAME).commits.pop(commit, None)


def test_an_old_foreign_tag_of_a_folder_may_vanish_with_its_commit(tmp_path: Path) -> None:
    place = FolderPlace(tmp_path / "registry")
    place.hub.create(NAME)
    foreign = place.hub.commit(NAME, MAIN, {"x": b"1"}, parent=place.hub.refs(NAME).branches[MAIN], message="m")
    release(place.hub, "1.0.0")
    place.hub.create_tag(NAME, "v0.1.0", foreign)  # older than the newest release, so no pull asks for it
    assert pull_adapter(NAME, hub=place.hub).version == "1.0.0"
    place.move_tag(NAME, "v0.1.0", None)
    lose(place, foreign)
    assert pull_adapter(NAME, hub=place.hub).version == "1.0.0"


def test_who_names_a_foreign_tag_is_told(tagged: Place) -> None:
    for action in (
        lambda: pull_adapter(f"{NAME}@2.0.0", hub=tagged.hub),
        lambda: show(f"{NAME}@2.0.0", hub=tagged.hub),
        lambda: mirror(f"{NAME}@2.0.0", tagged.hub, hub=tagged.hub),
    ):
        with pytest.raises(RegistryError, match=r"tag v2\.0\.0 is foreign|its tag is wrong"):
            action()


def test_counting_starts_from_the_newest_release_and_passes_foreign_tags(tagged: Place) -> None:
    assert release(tagged.hub, "patch", seed=1).version == "1.0.1"
    assert release(tagged.hub, "minor", seed=2).version == "1.1.0"
    # 2.0.0 has a tag already.
    assert release(tagged.hub, "major", seed=3).version == "3.0.0"
    with pytest.raises(VersionExists):
        release(tagged.hub, "2.0.0", seed=4)


def test_a_release_below_a_foreign_tag_is_on_main(tagged: Place) -> None:
    done = release(tagged.hub, "1.2.0", seed=1)
    assert tagged.hub.refs(NAME).branches[MAIN] == done.commit


def test_a_copy_takes_releases_only(tagged: Place, tmp_path: Path) -> None:
    target = FolderPlace(tmp_path / "target")
    assert [str(each) for each in mirror(NAME, target.hub, hub=tagged.hub)] == [f"{NAME}@1.0.0"]
    assert set(target.hub.refs(NAME).tags) == {"v1.0.0"}


def test_a_repository_with_foreign_tags_only(place: Place) -> None:
    place.hub.create(NAME)
    for tag in TAGS:
        place.hub.create_tag(NAME, tag, place.hub.refs(NAME).branches[MAIN])
    assert versions(NAME, hub=place.hub) == []
    with pytest.raises(NotAdapter, match="were not set by this registry"):
        pull_adapter(NAME, hub=place.hub)
    assert release(place.hub, "patch").version == "0.0.1"


def test_aliases_and_withdrawals_are_for_releases(place: Place) -> None:
    place.hub.create(NAME)
    first = place.hub.refs(NAME).branches[MAIN]
    release(place.hub, "1.0.0")
    place.hub.create_tag(NAME, "v2.0.0", first)
    with pytest.raises(NotAdapter):
        set_alias(f"{NAME}@2.0.0", "champion", hub=place.hub)
    with pytest.raises(NotAdapter):
        yank(f"{NAME}@2.0.0", "wrong", hub=place.hub)
    set_alias(NAME, "champion", hub=place.hub)
    assert aliases(NAME, hub=place.hub)["champion"][-1].version == "1.0.0"


def test_the_commit_of_a_release_with_two_tags_is_that_release(tagged: Place) -> None:
    commit = tagged.hub.refs(NAME).tags["v1.0.0"]
    assert pull_adapter(f"{NAME}@{commit}", hub=tagged.hub).version == "1.0.0"

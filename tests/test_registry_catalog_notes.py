"""Notes and tags on versions, the list of adapters, and an alias that moves only to what is better."""

from __future__ import annotations

import contextlib
import io
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hubs import KINDS, FolderPlace, Place, make_place
from releases import NAME, draft, release

from lora_plugins.commands.cli import program
from registry import aliases, annotate, list_adapters, mirror, move_if_better, set_alias, show, versions, yank
from registry.catalog import aliases as moving
from registry.catalog.metrics import find_direction
from registry.catalog.state import STATE_FILE, State
from registry.errors import AliasMoved, InvalidReference, MetricNotFound
from registry.formats.references import parse_version
from registry.publishing.publish import publish


@pytest.fixture(params=KINDS)
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Place:
    return make_place(request, tmp_path)


def measured(place: Place, version: str, name: str = NAME, **metrics: float) -> None:
    made = draft(version, hash(version) % 1000)
    made = replace(made, manifest=replace(made.manifest, metrics=metrics))
    publish(place.hub, name, parse_version(version), lambda *_: made)


def test_notes_and_tags_are_put_on_a_version(place: Place, tmp_path: Path) -> None:
    release(place.hub, "1.0.0")
    release(place.hub, "1.1.0", 1)
    digest = show(f"{NAME}@1.0.0", hub=place.hub).manifest.digest
    done = annotate(f"{NAME}@1.0.0", "good on long texts", add_tags=["reviewed", "eu"], hub=place.hub)
    assert (done.note, done.tags) == ("good on long texts", ("eu", "reviewed"))
    set_alias(f"{NAME}@1.0.0", "champion", hub=place.hub)
    yank(f"{NAME}@1.1.0", "bad", hub=place.hub)
    first, second = versions(NAME, hub=place.hub)
    assert (first.note, first.tags, first.aliases) == ("good on long texts", ("eu", "reviewed"), ("champion",))
    assert (second.note, second.tags, second.yanked) == (None, (), "bad")
    assert annotate(f"{NAME}@champion", remove_tags=["eu", "other"], hub=place.hub).tags == ("reviewed",)
    target = FolderPlace(tmp_path / "target")
    mirror(NAME, target.hub, hub=place.hub, cache_dir=tmp_path / "cache")
    assert versions(NAME, hub=target.hub)[0].note == "good on long texts"
    assert annotate(f"{NAME}@1.0.0", "", hub=place.hub).note is None
    assert show(f"{NAME}@1.0.0", hub=place.hub).manifest.digest == digest


def test_a_state_without_notes_is_as_it_was(place: Place) -> None:
    release(place.hub, "1.0.0")
    set_alias(f"{NAME}@1.0.0", "champion", hub=place.hub)
    refs = place.hub.refs(NAME)
    held = json.loads(place.hub.read(NAME, refs.branches["registry"], STATE_FILE, 10_000))
    assert sorted(held) == ["aliases", "format", "serial", "yanked"]
    assert State.parse(State().to_bytes()) == State()


@pytest.mark.parametrize(
    ("reference", "options", "says"),
    [
        (NAME, {"note": "x"}, "may mean several versions"),
        (f"{NAME}>=1.0", {"note": "x"}, "may mean several versions"),
        (f"{NAME}@1.0.0", {"note": "two\nlines"}, "one line"),
        (f"{NAME}@1.0.0", {"note": "\x1b[31m"}, "printable"),
        (f"{NAME}@1.0.0", {"note": "x" * 501}, "500"),
        (f"{NAME}@1.0.0", {"add_tags": ["Not Valid"]}, "is not a valid tag"),
        (f"{NAME}@1.0.0", {"add_tags": [f"t{i}" for i in range(65)]}, "may have 64"),
    ],
)
def test_what_a_note_or_a_tag_cannot_be(tmp_path: Path, reference: str, options: Any, says: str) -> None:
    place = FolderPlace(tmp_path / "registry")
    release(place.hub, "1.0.0")
    with pytest.raises(InvalidReference, match=says):
        annotate(reference, hub=place.hub, **options)


def test_adapters_are_found_by_base_and_words(place: Place) -> None:
    card = b"---\nbase_model: org/base\ntags:\n- lora-plugins\n---\n# Card\n"
    for name in ("org/one", "org/two"):
        publish(place.hub, name, parse_version("1.0.0"), lambda *_: draft("1.0.0", README_md=card))
    annotate("org/two@1.0.0", "Summaries of law", add_tags=["reviewed"], hub=place.hub)

    def found(*given: Any, **options: Any) -> list[str]:
        return [each.name for each in list_adapters(*given, hub=place.hub, **options)]

    assert found() == ["org/one", "org/two"]
    assert found(search="SUMMARIES reviewed") == found("org/base", search="law") == ["org/two"]
    assert found(search="one") == ["org/one"]
    assert found(search="summaries nothing") == found("org/other") == []


@pytest.mark.parametrize(
    ("metric", "direction"),
    [
        ("eval_loss", "lower"), ("perplexity", "lower"), ("test/wer", "lower"), ("mean.squared.error", "lower"),
        ("eval_accuracy", "higher"), ("f1", "higher"), ("rougeL", "higher"), ("pass@1", "higher"),
        ("eval_rewards/margins", "higher"),
    ],
)  # fmt: skip
def test_the_direction_follows_from_the_name(metric: str, direction: str) -> None:
    assert find_direction(metric) == direction
    assert find_direction(metric, "lower") == "lower"


@pytest.mark.parametrize("metric", ["score", "eval_my_thing", "loss_of_accuracy", "", "glossary"])
def test_a_direction_that_does_not_follow_is_asked_for(metric: str) -> None:
    with pytest.raises(InvalidReference, match="better='lower'"):
        find_direction(metric)
    assert find_direction(metric, "higher") == "higher"
    with pytest.raises(InvalidReference, match="must be 'lower' or 'higher'"):
        find_direction(metric, "up")


def test_an_alias_moves_to_what_is_better_only(place: Place) -> None:
    for version, loss in (("1.0.0", 0.5), ("1.1.0", 0.7), ("1.2.0", 0.5), ("1.3.0", 0.25)):
        measured(place, version, eval_loss=loss, score=loss)

    def move(version: str, metric: str = "eval_loss", **options: Any) -> tuple[Any, ...]:
        found = move_if_better(f"{NAME}@{version}", "best", metric, hub=place.hub, **options)
        return found.moved, found.standing, found.before, found.after

    assert move("1.0.0") == (True, None, None, 0.5)
    assert move("1.0.0") == (False, "1.0.0", None, 0.5)
    assert move("1.1.0") == (False, "1.0.0", 0.5, 0.7)
    assert move("1.2.0") == (False, "1.0.0", 0.5, 0.5)
    assert move("1.3.0") == (True, "1.0.0", 0.5, 0.25)
    assert move("1.1.0", "score", better="higher") == (True, "1.3.0", 0.25, 0.7)
    assert [each.version for each in aliases(NAME, hub=place.hub)["best"]] == ["1.0.0", "1.3.0", "1.1.0"]
    with pytest.raises(InvalidReference, match="does not follow"):
        move("1.0.0", "score")


def test_a_metric_that_is_missing_is_named(tmp_path: Path) -> None:
    place = FolderPlace(tmp_path / "registry")
    measured(place, "1.0.0")
    measured(place, "1.1.0", eval_loss=0.5)
    set_alias(f"{NAME}@1.0.0", "best", hub=place.hub)
    with pytest.raises(MetricNotFound, match=r"1\.0\.0 has no metric 'eval_loss'; it has no metrics"):
        move_if_better(f"{NAME}@1.1.0", "best", "eval_loss", hub=place.hub)
    with pytest.raises(MetricNotFound, match=r"1\.1\.0 has no metric 'accuracy'; it has eval_loss"):
        move_if_better(f"{NAME}@1.1.0", "best", "accuracy", hub=place.hub)
    assert [each.version for each in aliases(NAME, hub=place.hub)["best"]] == ["1.0.0"]


def test_who_moves_it_meanwhile_is_compared_with(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    for version, loss in (("1.0.0", 0.5), ("1.1.0", 0.4), ("1.2.0", 0.3)):
        measured(place, version, eval_loss=loss)
    set_alias(f"{NAME}@1.0.0", "best", hub=place.hub)
    real, raced = moving.move_alias, []

    def race(*arguments: Any) -> None:
        if not raced:
            raced.append(True)
            set_alias(f"{NAME}@1.2.0", "best", hub=place.hub)
        real(*arguments)

    monkeypatch.setattr(moving, "move_alias", race)
    found = move_if_better(f"{NAME}@1.1.0", "best", "eval_loss", hub=place.hub)
    assert (found.moved, found.standing, found.before, found.after) == (False, "1.2.0", 0.3, 0.4)

    def always(hub: Any, name: str, alias: str, version: str, expect: str) -> None:
        raise AliasMoved("raced")

    set_alias(f"{NAME}@1.0.0", "best", hub=place.hub)
    monkeypatch.setattr(moving, "move_alias", always)
    with pytest.raises(AliasMoved):
        move_if_better(f"{NAME}@1.1.0", "best", "eval_loss", hub=place.hub)


def run(*arguments: str, code: int = 0) -> str:
    output = io.StringIO()
    with contextlib.redirect_stdout(output), pytest.raises(SystemExit) as ended:
        program(list(arguments))
    assert (ended.value.code or 0) == code, output.getvalue()
    return output.getvalue()


def test_the_commands_print_notes_and_both_values(tmp_path: Path) -> None:
    place, hub = FolderPlace(tmp_path / "registry"), ("--hub", str(tmp_path / "registry"))
    measured(place, "1.0.0", eval_loss=0.5)
    measured(place, "1.1.0", eval_loss=0.25)
    assert "is 1.0.0: it is new. eval_loss (lower is better): 0.5" in run(
        "alias", f"{NAME}@1.0.0", "best", "--if-better", "eval_loss", *hub
    )
    moved = run("alias", f"{NAME}@1.1.0", "best", "--if-better", "eval_loss", *hub)
    assert moved == f"{NAME}@best is 1.1.0 now. eval_loss (lower is better): 1.0.0 0.5, 1.1.0 0.25\n"
    stays = json.loads(run("alias", f"{NAME}@1.0.0", "best", "--if-better", "eval_loss", *hub, "--json"))
    assert (stays["moved"], stays["before"], stays["after"]) == (False, 0.25, 0.5)
    run("alias", f"{NAME}@1.0.0", "best", "--if-better", "eval_loss", "--expect", "1.0.0", *hub, code=2)
    run("note", f"{NAME}@1.1.0", *hub, code=2)
    assert "fine; tags reviewed" in run("note", f"{NAME}@1.1.0", "fine", "--tag", "reviewed", *hub)
    assert run("list", *hub).rstrip("\n") == f"{NAME}\t1.1.0\torg/base\tbest\t[reviewed]; fine"
    assert json.loads(run("list", "--search", "fine", *hub, "--json"))[0]["metrics"] == {"eval_loss": 0.25}
    assert run("list", "--search", "nothing", *hub) == ""
    assert "[reviewed]; fine" in run("versions", NAME, *hub)
    assert "[reviewed]; fine" in run("show", f"{NAME}@1.1.0", *hub)

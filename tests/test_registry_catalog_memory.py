"""What a machine remembers of a repository: written whole, read whole, and compared with what is shown now."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest

from registry.catalog import memory
from registry.catalog.memory import Pulled, Seen, find_lost_state, find_lost_tags, parse_record, write_record
from registry.catalog.state import Move, State, Yank
from registry.errors import HostileAnswer
from registry.formats.strict_json import JsonRefused

TIME = "2026-01-31T12:00:00Z"
STATE = State({"1.0.0": Yank("wrong data", TIME)}, {"champion": (Move("1.0.0", TIME),)}, serial=3)
SEEN = Seen("id", {"1.0.0": Pulled("a" * 40, "d" * 64)}, {"v1.0.0": "a" * 40}, STATE, "b" * 40, ("c" * 40,))


def test_what_is_written_is_read_again() -> None:
    assert parse_record(write_record(SEEN)) == SEEN
    assert parse_record(write_record(Seen())).tags == {}


DAMAGE: dict[str, Callable[[dict[str, Any]], object]] = {
    "a newer format": lambda r: r.update(format=2),
    "no format": lambda r: r.pop("format"),
    "tags without commits": lambda r: r.update(tags={"v1.0.0": "main"}),
    "tags with numbers": lambda r: r.update(tags={"v1.0.0": 1}),
    "tags as a list": lambda r: r.update(tags=["v1.0.0"]),
    "a version without a commit": lambda r: r["versions"]["1.0.0"].pop("commit"),
    "a version with a short commit": lambda r: r["versions"]["1.0.0"].update(commit="a" * 39),
    "a version with a short digest": lambda r: r["versions"]["1.0.0"].update(manifest="d" * 63),
    "a state that is none": lambda r: r.update(state=1),
    "a state of another format": lambda r: r["state"].update(format=99),
    "a state commit that is none": lambda r: r.update(state_commit="registry"),
    "former states that are none": lambda r: r.update(former_states=["registry"]),
    "former states as a text": lambda r: r.update(former_states="c" * 40),
    "an identity that is a number": lambda r: r.update(identity=1),
}


@pytest.mark.parametrize("case", DAMAGE)
def test_a_damaged_record_is_refused_as_a_whole(case: str) -> None:
    record = json.loads(write_record(SEEN))
    DAMAGE[case](record)
    with pytest.raises((JsonRefused, HostileAnswer)):
        parse_record(json.dumps(record).encode())


def test_a_record_has_a_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "_MOST", 1)
    assert parse_record(write_record(SEEN)) == SEEN
    with pytest.raises(JsonRefused):
        parse_record(write_record(SEEN.with_tags({"v1.1.0": "b" * 40})))


def test_tags_are_added_and_never_forgotten() -> None:
    after = SEEN.with_tags({"v1.1.0": "b" * 40})
    assert after.tags == {"v1.0.0": "a" * 40, "v1.1.0": "b" * 40}
    assert find_lost_tags(after, {"v1.0.0": "a" * 40, "v2.0.0": "e" * 40}) == {"v1.1.0": None}
    assert find_lost_tags(after, {"v1.0.0": "e" * 40, "v1.1.0": "b" * 40}) == {"v1.0.0": "e" * 40}
    assert find_lost_tags(after, after.tags) == {}


def test_a_state_follows_another_and_an_old_one_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    newer = State(serial=4)
    assert SEEN.with_state(newer, "b" * 40) == SEEN  # the same commit
    assert SEEN.with_state(newer, "c" * 40) == SEEN  # a commit that was superseded
    after = SEEN.with_state(newer, "d" * 40)
    assert (after.state, after.state_commit, after.former_states) == (newer, "d" * 40, ("c" * 40, "b" * 40))
    assert Seen().with_state(newer, "d" * 40).former_states == ()
    monkeypatch.setattr(memory, "_MOST_STATES", 1)
    assert SEEN.with_state(newer, "d" * 40).former_states == ("b" * 40,)


@pytest.mark.parametrize(
    ("state", "commit", "lost"),
    [
        (STATE, "b" * 40, []),
        (State(STATE.yanked, STATE.aliases, serial=4), "d" * 40, []),
        (State({}, STATE.aliases, serial=4), "d" * 40, []),  # offered again by its owner
        (State({}, STATE.aliases, serial=2), "d" * 40, ["the withdrawal of 1.0.0"]),
        (State({}, STATE.aliases, serial=4), "c" * 40, ["the withdrawal of 1.0.0"]),
        (State(STATE.yanked, STATE.aliases, serial=3), "c" * 40, [f"the changes between {'c' * 40} and {'b' * 40}"]),
        (State(STATE.yanked, {}, serial=4), "d" * 40, ["the history of the alias champion"]),
        (State(STATE.yanked, {"champion": (Move("1.1.0", TIME),)}, serial=4), "d" * 40,
         ["the history of the alias champion"]),
        (State(STATE.yanked, {"champion": (Move("1.0.0", TIME), Move("1.1.0", TIME))}, serial=4), "d" * 40, []),
        (State({}, STATE.aliases, serial=3, stored=False), "d" * 40, ["the withdrawal of 1.0.0"]),
        (State({}, STATE.aliases, serial=3, stored=False), "b" * 40, ["the withdrawal of 1.0.0"]),
        (State(stored=False), None, ["the withdrawal of 1.0.0", "the history of the alias champion"]),
        (State(stored=False), "d" * 40, ["the withdrawal of 1.0.0", "the history of the alias champion"]),
        (State(STATE.yanked, STATE.aliases, stored=False), None, [f"the changes between the start and {'b' * 40}"]),
        (State(STATE.yanked, STATE.aliases, serial=0), "d" * 40, []),  # written by the first release, without a number
    ],
)  # fmt: skip
def test_what_a_state_has_lost(state: State, commit: str | None, lost: list[str]) -> None:
    assert find_lost_state(SEEN, state, commit) == lost


def test_who_has_seen_no_state_misses_none() -> None:
    assert find_lost_state(Seen(), STATE, "d" * 40) == []
    assert find_lost_state(Seen(), State(stored=False), None) == []
    assert find_lost_state(Seen(), State(stored=False), "d" * 40) == []

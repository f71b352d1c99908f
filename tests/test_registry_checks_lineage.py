"""What a release was trained from: kept where plain, left out where it names a machine, said where it is missing."""

from __future__ import annotations

import getpass
import json
import math
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from releases import draft, release

from registry import FolderHub, Manifest, show
from registry.checks import lineage
from registry.checks.lineage import FIELDS, LINEAGE_FILE, clean_lineage, list_lineage, read_lineage
from registry.publishing.card import model_card

GOOD: dict[str, Any] = {
    "dataset": {"train": {"id": "org/data", "revision": "a" * 40, "sha256": "b" * 64, "rows": 1200, "columns": ["q"]}},
    "recipe": {
        "model": "org/base",
        "dataset": "org/data@main",
        "template": "Q: {q}\n---\n</s> A and/or B: {a}",
        "r": 8,
    },
    "code": {"of": "the script", "commit": "c" * 40, "dirty": True},
    "seed": 42,
    "tracker": [{"name": "wandb", "id": "x1y2", "url": "https://wandb.ai/team/project/runs/x1y2"}],
    "hardware": {"device": "cpu", "threads": 4},
    "libraries": {"torch": "2.13.0+cpu"},
    "parent": "none",
    "losses": {"step": [1, 2], "loss": [4.5, 4.25], "grad_norm": [0.5, None]},
}


@pytest.fixture
def jane(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The machine is called janes-laptop, and its user jane."""
    monkeypatch.setattr(socket, "gethostname", lambda: "janes-laptop")
    monkeypatch.setattr(getpass, "getuser", lambda: "jane")
    monkeypatch.setenv("HOME", "/home/jane")
    lineage._find_machine.cache_clear()
    yield
    lineage._find_machine.cache_clear()


def text_of(value: Any) -> str:
    return json.dumps(value)


def test_plain_facts_are_kept_as_they_are() -> None:
    found = clean_lineage(GOOD)
    assert {key: value for key, value in found.items() if key != "not_recorded"} == GOOD
    assert found["not_recorded"] == {}
    assert clean_lineage(found) == found


@pytest.mark.parametrize(
    "private",
    [
        "/home/jane/data/train.jsonl",
        "~/data/train.jsonl",
        "data from /mnt/share/x",
        "C:\\Users\\jane\\train.jsonl",
        "D:/data/train",
        "\\\\server\\share\\x",
        "file:///srv/data",
        "/home/jane",
        "run on janes-laptop",
    ],
)
@pytest.mark.parametrize("place", ["recipe", "hardware", "code", "libraries"])
def test_no_path_or_host_name_stays_wherever_it_stands(private: str, place: str, jane: None) -> None:
    found = clean_lineage({**GOOD, place: {"value": private, "kept": "2.1"}})
    assert private not in text_of(found)
    assert json.dumps(private)[1:-1] not in text_of(found)
    assert found[place] == {"kept": "2.1"}
    assert "names a place on the machine" in found["not_recorded"][f"{place}.value"]


def test_numbers_that_are_missing_or_not_finite_keep_their_place_in_a_list() -> None:
    losses = {"step": [1, 2, 3], "loss": [math.nan, 4.0, 3.0], "grad_norm": [math.inf, None, 0.5]}
    found = clean_lineage({**GOOD, "losses": losses})
    assert found["losses"] == {"step": [1, 2, 3], "loss": [None, 4.0, 3.0], "grad_norm": [None, None, 0.5]}
    assert found["not_recorded"]["losses.grad_norm"] == "a value is not finite"
    assert clean_lineage(found)["losses"] == found["losses"]
    assert Manifest.parse(json.dumps({**json.loads(draft("1.0.0").manifest.to_bytes()), "lineage": found}).encode())
    assert ("losses", "3 of steps 1 to 3, first none, last 3") in list_lineage(found)


def test_a_field_whose_name_is_that_of_the_machine_is_said_to_be_left_out(jane: None) -> None:
    found = clean_lineage({**GOOD, "hardware": {"janes-laptop": {"device": "cpu"}, "threads": 4}})
    assert found["hardware"] == {"threads": 4}
    assert "names a place on the machine" in found["not_recorded"]["hardware.a name"]
    assert "janes" not in text_of(found)


def test_a_host_name_is_left_out_of_keys_reasons_and_lists_too(jane: None) -> None:
    given = {
        "recipe": {"janes-laptop": 1, "r": 8, "target_modules": ["q_proj", "janes-laptop"]},
        "not_recorded": {"code": "git on janes-laptop does not answer", "janes-laptop": "x"},
    }
    found = clean_lineage(given)
    assert "janes" not in text_of(found)
    assert found["recipe"] == {"r": 8, "target_modules": ["q_proj"]}


@pytest.mark.parametrize("name", ["data/train.jsonl", "train.csv", "./data", "a/b/c", "my data"])
@pytest.mark.parametrize("field", ["dataset", "eval_dataset", "model"])
def test_a_relative_path_is_not_taken_for_an_id(name: str, field: str) -> None:
    found = clean_lineage({"recipe": {field: name, "r": 8}})
    assert found["recipe"] == {"r": 8}
    assert f"recipe.{field}" in found["not_recorded"]


@pytest.mark.parametrize(
    "url",
    [
        "http://localhost:5000/#/runs/1",
        "http://127.0.0.1:5000/x",
        "http://10.1.2.3/x",
        "http://tracking/x",
        "https://mlflow.corp.internal/x",
        "https://wandb.ai/jane/p/runs/1",
        "file:///tmp/mlruns",
        "http://[::1",
    ],
)
def test_the_address_of_a_tracker_in_the_house_is_left_out(url: str, jane: None) -> None:
    found = clean_lineage({"tracker": [{"name": "mlflow", "id": "7", "url": url}]})
    assert found["tracker"] == [{"name": "mlflow", "id": "7"}]
    assert "in its network" in found["not_recorded"]["tracker.url"]


@pytest.mark.parametrize(
    ("given", "kept"),
    [
        ("https://ml.example.org/#/experiments/1/runs/a-b_2", "https://ml.example.org/#/experiments/1/runs/a-b_2"),
        ("https://ml.example.org/x#/a?token=secret", "https://ml.example.org/x"),
        ("https://ml.example.org/x#token=secret", "https://ml.example.org/x"),
        ("https://ml.example.org/#/jane/runs/1", None),
    ],
)
def test_the_page_of_a_run_behind_the_number_sign_is_kept(given: str, kept: str | None, jane: None) -> None:
    (tracker,) = clean_lineage({"tracker": [{"name": "mlflow", "url": given}]})["tracker"]
    assert tracker.get("url") == kept


def test_the_address_of_a_tracker_has_no_password_and_no_query() -> None:
    given = {"tracker": [{"url": "https://jane:secret@wandb.ai:8443/team/runs/1?key=secret#secret"}]}
    assert clean_lineage(given)["tracker"] == [{"url": "https://wandb.ai:8443/team/runs/1"}]


@pytest.mark.parametrize("value", [None, 3, "x", [], {"dataset": None}, {"unknown": 1}, {"recipe": {}}, {"losses": []}])
def test_what_is_missing_is_said_for_every_field(value: Any) -> None:
    found = clean_lineage(value, "nobody wrote it down")
    assert set(found["not_recorded"]) == set(FIELDS)
    assert all(text.startswith("not recorded: ") for _, text in list_lineage(found))


def test_numbers_that_are_not_finite_and_deep_values_are_left_out() -> None:
    deep: Any = "end"
    for _ in range(40):
        deep = {"in": deep}
    found = clean_lineage({"recipe": {"deep": deep, "nan": float("nan"), "r": 8}, "seed": 1})
    assert found["recipe"]["r"] == 8
    assert "nan" not in found["recipe"]
    json.dumps(found, allow_nan=False)


def test_a_lineage_that_is_too_large_is_not_published() -> None:
    found = clean_lineage({"recipe": {f"flag{i}": "x" * 19_000 for i in range(40)}})
    assert list_lineage(found) == [("lineage", "not recorded: it is larger than a manifest may hold")]


@pytest.mark.parametrize("content", [b"[", b"{}" * 3, b"[1]", b"\xff", b'{"seed": NaN}', b"[" * 100_000])
def test_a_file_that_is_not_a_lineage_is_said_to_be_none(tmp_path: Path, content: bytes) -> None:
    (tmp_path / LINEAGE_FILE).write_bytes(content)
    assert set(read_lineage(tmp_path)["not_recorded"]) == set(FIELDS)
    (tmp_path / LINEAGE_FILE).unlink()
    assert "the folder holds no lineage.json" in list_lineage(read_lineage(tmp_path))[0][1]
    (tmp_path / LINEAGE_FILE).symlink_to("/etc/hostname")
    assert set(read_lineage(tmp_path)["not_recorded"]) == set(FIELDS)


def test_a_manifest_from_before_it_was_recorded_is_read_and_says_so(tmp_path: Path) -> None:
    old = draft("1.0.0").manifest
    document = json.loads(old.to_bytes())
    assert "lineage" not in document, "an empty one is left out, so that old bytes stay what they were"
    manifest = Manifest.parse(json.dumps(document).encode())
    assert manifest.lineage == {}
    assert manifest.content_digest == old.content_digest
    assert list_lineage(manifest.lineage) == [("lineage", "not recorded: the release is older than this record")]


def test_it_is_not_part_of_what_makes_two_pushes_the_same(tmp_path: Path) -> None:
    document = json.loads(draft("1.0.0").manifest.to_bytes())
    other = Manifest.parse(json.dumps({**document, "lineage": clean_lineage(GOOD)}).encode())
    assert other.content_digest == draft("1.0.0").manifest.content_digest


def test_show_prints_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from registry.commands.inspecting import show as command

    hub = FolderHub(tmp_path)
    release(hub, "1.0.0")
    assert show("org/adapter@1.0.0", hub=hub).manifest.lineage == {}
    command("org/adapter@1.0.0", hub=str(tmp_path))
    assert "not recorded: the release is older than this record" in capsys.readouterr().out


def test_text_of_strangers_is_shown_as_text_in_the_card() -> None:
    hostile = {
        "recipe": {"<script>alert(1)</script>": "| x | [y](http://evil) \n# z"},
        "libraries": {"a": "<img src=x>"},
    }
    card = model_card(
        name="org/a", version="1.0.0", base="org/b", base_commit=None, parameters=[("q", 1, 2)], training={},
        metrics={}, picture=False, lineage=clean_lineage(hostile),
    )  # fmt: skip
    assert "<script>" not in card
    assert "<img" not in card
    assert "\n# z" not in card
    assert "\\| x \\| \\[y\\]" in card


@pytest.mark.parametrize(
    "value",
    [
        {
            "dataset": "x",
            "recipe": [1],
            "code": 1,
            "losses": {"step": 3},
            "resumed": [1, {"changed": 2}],
            "not_recorded": 3,
        },
        {"dataset": {"train": 1}, "tracker": {"a": {"b": [1]}}, "seed": None, "losses": {"step": [1], "loss": []}},
        {
            "dataset": {"train": {"rows": "many", "columns": "x"}},
            "not_recorded": {"recipe": {"a": 1}, "dataset.train.id": 1},
        },
    ],
)
def test_a_malformed_lineage_of_a_foreign_manifest_can_be_shown(value: dict[str, Any]) -> None:
    rows = list_lineage(value)
    assert rows
    assert all(isinstance(label, str) and isinstance(text, str) for label, text in rows)


def test_checks_are_listed_in_two_rows() -> None:
    rows = list_lineage({"checks": {"on": ["dead-loss", "frozen-head"], "switched off": []}})
    assert ("checks: on", "dead-loss, frozen-head") in rows
    assert ("checks: switched off", "none") in rows

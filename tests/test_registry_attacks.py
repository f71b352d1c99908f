"""All 38 attacks, on a folder registry and on a Hub: refused with a typed error, and with nothing left over."""

from __future__ import annotations

import multiprocessing.util
import os
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest
from hubs import KINDS, make_place

from registry.errors import AdapterWarning, PlainTokenWarning
from registry.pulling.cache import VARIABLE

pytest.register_assert_rewrite("attacking", "attacks_on_content", "attacks_on_the_registry")

from attacking import Attack, Attempt, Scene, is_expected  # noqa: E402
from attacks_on_content import ATTACKS as ON_CONTENT  # noqa: E402
from attacks_on_the_registry import ATTACKS as ON_THE_REGISTRY  # noqa: E402

ATTACKS = (*ON_CONTENT, *ON_THE_REGISTRY)


@pytest.fixture(params=KINDS)
def scene(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Scene]:
    multiprocessing.util.get_temp_dir()  # made once for the whole run, and not in the folder of this test
    for name in ("work", "temporary", "home"):
        (tmp_path / name).mkdir()
    monkeypatch.setenv(VARIABLE, str(tmp_path / "cache"))
    monkeypatch.setenv("TMPDIR", str(tmp_path / "temporary"))
    monkeypatch.setattr(tempfile, "tempdir", None)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path / "work")
    monkeypatch.setattr("registry.publishing.publish.PATIENCE", 0.2)
    # PEFT takes ten seconds to load; the defaults of its configuration are no part of any attack.
    monkeypatch.setattr("registry.publishing.source._defaults", dict)
    # Waiting for the disk is for power failures, which these tests don't have.
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)
    yield Scene(make_place(request, tmp_path, timeout=2), tmp_path, monkeypatch)
    tempfile.tempdir = None


def test_every_attack_of_the_list_is_here_once() -> None:
    assert [attack.number for attack in ATTACKS] == list(range(1, 39))
    assert len({attack.name for attack in ATTACKS}) == 38


@pytest.mark.timeout(60)
@pytest.mark.parametrize("attack", ATTACKS, ids=str)
def test_an_attack_is_refused_and_leaves_nothing(scene: Scene, attack: Attack) -> None:
    failures, attempts = [], 0
    for attempt in attack.attempts(scene):
        attempts += 1
        problem = _problem(scene, attack, attempt)
        if problem:
            failures.append(f"{attempt.label}: {problem}")
    assert attempts >= 1
    if failures:
        pytest.fail("\n".join(failures), pytrace=False)


def _problem(scene: Scene, attack: Attack, attempt: Attempt) -> str:
    """What is wrong with the outcome of an attempt; nothing, if it is as it has to be."""
    before = scene.snapshot()
    outcome: BaseException | None = None
    with warnings.catch_warnings():
        # Where a warning is the outcome, the attempt expects it as an error.
        warnings.simplefilter("error", AdapterWarning)
        warnings.simplefilter("error", PlainTokenWarning)
        try:
            attempt.action()
        except Exception as error:
            outcome = error
    if attempt.refused and outcome is None:
        return "accepted"
    if outcome is not None and (not attempt.refused or not is_expected(outcome, attack.errors)):
        return f"{type(outcome).__name__}: {str(outcome)[:300]!a}"
    if not attempt.writes and (after := scene.snapshot()) != before:
        return f"left {sorted(set(map(str, after.items())) ^ set(map(str, before.items())))[:4]}"
    return f"left {scene.temporary()[:4]}" if scene.temporary() else ""

"""The table of checks: records that fit together, enforced in their order."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from registry.checks.adapter_files import AdapterFiles
from registry.checks.record import SEVERITIES, Check, Finding
from registry.checks.table import CHECKS, PARTS, enforce
from registry.errors import InvalidAdapter, UnsafeFile


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.name)
def test_a_record_is_whole(check: Check) -> None:
    assert re.fullmatch(r"[a-z]+(-[a-z0-9]+)*", check.name)
    assert check.severity in SEVERITIES
    assert check.reads, "a check that reads nothing would run everywhere"
    assert set(check.reads) <= {*PARTS, "base"}
    assert not set(check.refused) & set(check.warned), "it cannot both refuse and warn at one place"


def test_names_are_unique() -> None:
    names = [check.name for check in CHECKS]
    assert len(set(names)) == len(names)


@pytest.fixture
def files(tmp_path: Path) -> AdapterFiles:
    return AdapterFiles(tmp_path)


def test_the_first_check_that_refuses_gives_the_error(files: AdapterFiles) -> None:
    ran: list[str] = []

    def find(name: str) -> list[str]:
        ran.append(name)
        return [f"{name} is wrong"]

    checks = [
        Check("warns", "note", ("files",), lambda _: find("first"), warned=("push",)),
        Check("refuses", "error", ("files",), lambda _: find("second"), refused={"push": InvalidAdapter}),
        Check("never-reached", "error", ("files",), lambda _: find("third"), refused={"push": UnsafeFile}),
    ]
    with pytest.raises(InvalidAdapter, match=r"^second is wrong"):
        enforce(files, "push", PARTS, checks=checks)
    assert ran == ["first", "second"]


def test_a_check_runs_where_it_counts_and_can_read(files: AdapterFiles) -> None:
    def unreachable(_: AdapterFiles) -> list[str]:
        raise AssertionError("it must not run")

    checks = [
        Check("another-place", "error", ("files",), unreachable, refused={"pull": InvalidAdapter}),
        Check("nowhere", "note", ("files",), unreachable),
        Check("unreadable", "error", ("files", "values"), unreachable, refused={"push": InvalidAdapter}),
        Check("sound", "error", ("files",), lambda _: [], refused={"push": InvalidAdapter}),
        Check("told", "warning", ("files",), lambda _: [Finding("told"), "told again"], warned=("push",)),
    ]
    assert enforce(files, "push", ("files", "header"), checks=checks) == ["told", "told again"]

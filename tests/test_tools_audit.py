"""The audit says what it asked; a database that answered nothing is not taken for one that found nothing."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest

FILE = Path(__file__).parent.parent / "tools" / "audit.py"
SOUND = {"name": "sound", "version": "1.0", "vulns": []}
SKIPPED = {"name": "unknown", "skip_reason": "Dependency not found on PyPI and could not be audited: unknown (1.0)"}
WEAK = {"name": "weak", "version": "1.0", "vulns": [{"id": "PYSEC-1", "fix_versions": ["1.1"]}, {"id": "PYSEC-2"}]}


@pytest.fixture(scope="module")
def audit() -> Any:
    spec = importlib.util.spec_from_file_location("audit", FILE)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    ("packages", "code", "says"),
    [
        ([SOUND], 0, "No known vulnerabilities in 1 packages"),
        ([SOUND, SKIPPED], 0, "in 1 packages; not known there: unknown (1)"),
        ([SKIPPED, SKIPPED], 2, "NOT AUDITED: the database of vulnerabilities knows none of 2 packages"),
        ([], 2, "NOT AUDITED"),
        ([SOUND, WEAK, SKIPPED], 1, "weak 1.0: PYSEC-1, PYSEC-2, fixed in 1.1"),
    ],
)
def test_what_the_database_said(audit: Any, packages: list[Any], code: int, says: str) -> None:
    found, text = audit.summarize(json.dumps({"dependencies": packages, "fixes": []}), "")
    assert found == code
    assert says in text


@pytest.mark.parametrize("output", ["", "null", "{}", "<html>"])
def test_a_database_that_cannot_be_reached(audit: Any, output: str) -> None:
    code, text = audit.summarize(output, "Traceback\nConnectionError: no route")
    assert (code, text) == (
        2, "NOT AUDITED: the database of vulnerabilities cannot be reached (ConnectionError: no route)"
    )  # fmt: skip

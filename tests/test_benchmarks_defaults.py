"""The program that measures targets at equal time, on a model that is too small to say anything."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import twin

ROOT = Path(__file__).parent.parent


@pytest.mark.slow
def test_the_program_of_the_defaults_compares_a_small_model(tmp_path: Path) -> None:
    twin.make_base(tmp_path / "small", steps=1)
    program = [sys.executable, str(ROOT / "benchmarks" / "defaults.py"), "--models", str(tmp_path / "small")]
    options = ["--texts", "manual", "--seconds", "0.3", "--length", "16", "--held_out", "2"]
    done = subprocess.run([*program, *options], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    for targets in ("default (query_key_value)", "attention", "all-linear"):
        assert f"| small | manual | {targets} | 8 | 0.001 |" in done.stdout

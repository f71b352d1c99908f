"""What the project says about itself: files for contributors agree with the tree."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parent.parent


def _folders(package: str) -> set[str]:
    return {path.parent.name for path in (ROOT / package).glob("*/__init__.py")}


@pytest.mark.parametrize("package", ["lora_plugins", "registry"])
def test_architecture_page_names_every_room(package: str) -> None:
    text = (ROOT / "ARCHITECTURE.md").read_text()
    assert {room for room in _folders(package) if f"`{room}/`" not in text} == set()


def test_architecture_page_names_no_room_that_is_gone() -> None:
    named = set(re.findall(r"`(\w+)/`", (ROOT / "ARCHITECTURE.md").read_text()))
    assert named <= _folders("lora_plugins") | _folders("registry")


@pytest.mark.parametrize("page", ["CONTRIBUTING.md", "RELEASING.md", "ARCHITECTURE.md", "README.md"])
def test_paths_and_targets_that_a_page_names_exist(page: str) -> None:
    text = (ROOT / page).read_text()
    paths = set(re.findall(r"`((?:lora_plugins|registry|tests|tools|docs)/[\w/.]+)`", text))
    assert {path for path in paths if not (ROOT / path).exists() and "NAME" not in path} == set()
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    assert set(re.findall(r"make ([a-z]+(?:-[a-z]+)*)", text)) - {"sure"} <= targets


def test_make_help_names_every_target() -> None:
    done = subprocess.run(["make", "help"], cwd=ROOT, capture_output=True, text=True, check=True)
    phony = re.search(r"^\.PHONY: ((?:.*\\\n)*.*)$", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert phony is not None
    named = set(re.findall(r"make ([a-z-]+)", done.stdout))
    assert set(phony[1].replace("\\", " ").split()) == named


def test_pre_commit_runs_the_ruff_of_the_constraints() -> None:
    config = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())
    constraint = re.search(r"^ruff==(.+)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
    assert constraint is not None
    assert config["repos"][0]["rev"] == f"v{constraint[1]}"


def test_issue_forms_are_valid_yaml() -> None:
    forms = sorted((ROOT / ".github" / "ISSUE_TEMPLATE").glob("*.yml"))
    assert len(forms) >= 3
    for form in forms:
        assert yaml.safe_load(form.read_text())

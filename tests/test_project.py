"""What the project says about itself: files for contributors agree with the tree."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
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


def _required() -> set[str]:
    data = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    optional = [item for extra in data["optional-dependencies"].values() for item in extra]
    names = [re.split(r"[\[<>=!~; ]", item)[0] for item in [*data["dependencies"], *optional]]
    return {name.lower().replace("-", "_") for name in names}


#: Loaded by vLLM, which brings itself and its web framework. Declared, it would bring another torch.
VLLM_PLUGIN = "lora_plugins/serving/vllm_resolver.py"


def test_the_plugin_of_vllm_imports_what_vllm_has() -> None:
    tree = ast.parse((ROOT / VLLM_PLUGIN).read_text())
    found = {str(node.module).split(".")[0] for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    outside = found - set(sys.stdlib_module_names) - {"lora_plugins", "registry"}
    assert outside == {"fastapi", "vllm"}


def test_every_imported_library_is_declared() -> None:
    """Of the packages, not of what they happen to bring along."""
    imported = set()
    for package in ("lora_plugins", "registry"):
        for path in sorted((ROOT / package).rglob("*.py")):
            if path == ROOT / VLLM_PLUGIN:
                continue
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, ast.Import):
                    imported |= {alias.name.split(".")[0] for alias in node.names}
                elif isinstance(node, ast.ImportFrom) and node.module:
                    imported.add(node.module.split(".")[0])
    outside = imported - set(sys.stdlib_module_names) - {"lora_plugins", "registry"}
    distributions = {
        "yaml": "pyyaml", "optimum": "optimum_quanto", "google": "protobuf", "OpenSSL": "pyopenssl",
        "markdown_it": "markdown_it_py",
    }  # fmt: skip
    assert {name for name in outside if distributions.get(name, name).lower() not in _required()} == set()


def _texts(tree: ast.Module) -> Iterator[str]:
    """The strings of a module, docstrings left out; ``{}`` stands for what an f-string inserts."""
    held: set[int] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.JoinedStr):
            parts = node.values
            held |= {id(part) for part in parts}
            yield "".join(str(part.value) if isinstance(part, ast.Constant) else "{}" for part in parts)
        elif isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            held.add(id(node.value))
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in held:
            yield node.value


def _find_riddles(package: str) -> set[str]:
    files = sorted((ROOT / package).rglob("*.py"))
    texts = ((path, text) for path in files for text in _texts(ast.parse(path.read_text())))
    # "There is no adapter" is plain English, "x is no adapter" is not.
    riddle = re.compile(r"(?<!here )\b(?:is|are) (?:no|the \w+ of no)\b(?! (?:longer|more)\b)")
    return {f"{path.name}: {text}" for path, text in texts if riddle.search(text)}


@pytest.mark.parametrize("package", ["lora_plugins", "registry"])
def test_no_message_says_that_something_is_no_thing(package: str) -> None:
    """A user reads "must be" or "is not a valid …", never "'x' is no version"."""
    assert _find_riddles(package) == set()


def test_a_message_that_says_is_no_is_found() -> None:
    module = ast.parse('def f(x):\n    "x is no y."\n    raise ValueError(f"{x!r} is no "\n        "version")\n')
    assert list(_texts(module)) == ["{} is no version"]


@pytest.mark.parametrize("package", ["lora_plugins", "registry"])
def test_words_are_written_out(package: str) -> None:
    files = (ROOT / package).rglob("*.py")
    assert {path.name for path in files if "can't" in path.read_text()} == set()


#: Tests of the whole product, which no single room owns.
WHOLE = {
    "benchmarks",
    "benchmarks_defaults",
    "benchmarks_gpu",
    "canaries",
    "docs",
    "docs_notebooks",
    "docs_site",
    "numbers",
    "old_releases",
    "project",
    "registry",
    "registry_attacks",
    "registry_load",
    "rooms",
    "smollm2",
    "text",
    "tiers",
    "tools_audit",
    "tools_peers",
    "wheel",
}


def test_tests_are_found_from_the_room_that_they_test() -> None:
    """A file is named after its room: ``test_trainer_liveness.py``, ``test_registry_hubs_client.py``."""
    rooms = [*_folders("lora_plugins"), *(f"registry_{room}" for room in {*_folders("registry"), "text"})]
    names = {path.stem.removeprefix("test_") for path in (ROOT / "tests").glob("test_*.py")} - WHOLE
    assert {name for name in names if not any(f"{name}_".startswith(f"{room}_") for room in rooms)} == set()
    untested = {room for room in rooms if not any(f"{name}_".startswith(f"{room}_") for name in names)}
    assert untested <= {"models", "registry_catalog", "registry_disk"}

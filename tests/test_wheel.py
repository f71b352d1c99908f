"""A built wheel, installed into an empty environment, has everything: packages, marks, entry points, the program."""

from __future__ import annotations

import email
import json
import os
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Build the wheel from a copy of what belongs into it, so that the checkout stays clean."""
    source = tmp_path_factory.mktemp("source")
    output = tmp_path_factory.mktemp("wheel")
    for name in ("lora_plugins", "registry", "pyproject.toml", "README.md", "LICENSE"):
        _copy(ROOT / name, source / name)
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(output), str(source)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    [built] = output.glob("*.whl")
    return built


def _copy(source: Path, target: Path) -> None:
    import shutil

    if source.is_dir():
        shutil.copytree(source, target, ignore=shutil.ignore_patterns("__pycache__"))
    else:
        shutil.copy(source, target)


@pytest.fixture(scope="module")
def python(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An environment that holds the wheel and sees the dependencies of this one, but not the checkout."""
    folder = tmp_path_factory.mktemp("environment")
    venv.create(folder, with_pip=False)
    scripts = folder / ("Scripts" if os.name == "nt" else "bin")
    site = Path(sysconfig.get_path("purelib", vars={"base": str(folder), "platbase": str(folder)}))
    command = [sys.executable, "-m", "pip", "--python", str(scripts / "python"), "install", "--no-deps", str(wheel)]
    done = subprocess.run([*command, "--no-index"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    # A path line adds the folder and leaves its .pth files alone, one of which points to the checkout.
    (site / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return scripts / "python"


def run(python: Path, *arguments: str) -> str:
    """Run the environment's Python far away from the checkout."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    command = [str(python), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, cwd=python.parent, env=environment, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_the_wheel_has_both_packages_and_nothing_else(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
    tops = {name.split("/")[0] for name in names}
    assert tops == {"lora_plugins", "registry", f"{'-'.join(wheel.name.split('-')[:2])}.dist-info"}
    for expected in ("lora_plugins/py.typed", "registry/py.typed", "lora_plugins/builtin/architectures/__init__.py"):
        assert expected in names
    modules = {
        path.relative_to(ROOT).as_posix() for top in ("lora_plugins", "registry") for path in _modules(ROOT / top)
    }
    assert modules <= set(names)


def _modules(folder: Path) -> list[Path]:
    found = [*folder.rglob("*.py"), *folder.rglob("templates/*")]
    return [path for path in found if "__pycache__" not in path.parts]


def test_the_wheels_metadata(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        [name] = [name for name in archive.namelist() if name.endswith(".dist-info/METADATA")]
        metadata = email.message_from_bytes(archive.read(name))
        entry_points = archive.read(name.replace("METADATA", "entry_points.txt")).decode()
        assert name.replace("METADATA", "licenses/LICENSE") in archive.namelist()
    assert metadata["Name"] == "lora-plugins"
    assert metadata["License-Expression"] == "Apache-2.0"
    assert "lora-plugins = lora_plugins.commands.cli:main" in entry_points
    assert (
        metadata.get_payload(decode=True).decode().strip() == (ROOT / "README.md").read_text(encoding="utf-8").strip()
    )
    required = [value.split(";")[0] for value in metadata.get_all("Requires-Dist") if "extra ==" not in value]
    assert not [value for value in required if "==" in value], "dependencies are ranges"


def test_the_program_of_the_wheel_runs(python: Path) -> None:
    program = python.parent / "lora-plugins"
    version = subprocess.run([program, "--version"], capture_output=True, text=True, check=True).stdout
    assert version.startswith("lora-plugins ")
    plugins = json.loads(run(python, "-m", "lora_plugins", "plugins", "--json"))
    assert all(plugin["disabled"] is None for plugin in plugins if plugin["builtin"])
    assert {"architectures", "bitsandbytes", "commands"} <= {plugin["name"] for plugin in plugins}


def test_both_packages_come_from_the_wheel(python: Path) -> None:
    code = "import json, lora_plugins, registry; print(json.dumps([lora_plugins.__file__, registry.__file__]))"
    for file in json.loads(run(python, "-c", code)):
        assert Path(file).is_relative_to(python.parent.parent)
        assert (Path(file).parent / "py.typed").is_file()

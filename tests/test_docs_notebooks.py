"""The notebooks of the documentation: they run from the first cell to the last, and their pages are theirs."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

ROOT = Path(__file__).parent.parent
NAMES = ("train_and_publish", "registry")


@pytest.fixture
def notebooks() -> ModuleType:
    spec = importlib.util.spec_from_file_location("notebooks", ROOT / "tools" / "notebooks.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def printed(notebook: dict[str, Any]) -> str:
    """All that the cells of a notebook gave."""
    outputs = [output for cell in notebook["cells"] for output in cell.get("outputs", ())]
    return "\n".join("".join(o.get("text", "")) + "".join(o.get("data", {}).get("text/plain", "")) for o in outputs)


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_a_notebook_runs_from_the_first_cell_to_the_last(
    name: str, notebooks: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("nbclient", reason="nbclient is not installed: pip install 'lora-plugins[notebooks]'")
    pytest.importorskip("ipykernel", reason="ipykernel is not installed: pip install 'lora-plugins[notebooks]'")
    if name == "train_and_publish":
        from lora_plugins.commands.demo.model import demo_model

        monkeypatch.setenv("MODEL", str(demo_model()))
        monkeypatch.setenv("STEPS", "6")
    monkeypatch.setenv("LORA_REGISTRY_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    folder = tmp_path / "work"
    folder.mkdir()
    told = printed(notebooks.run(name, folder))
    wanted = {
        "train_and_publish": ("the base is the one it was trained on", "to the last bit: True"),
        "registry": ("although 1.2.0 is out", "2.0.0rc1 stays 0.47 0.61", "undamaged: True", "1.1.0 copied"),
    }
    assert [text for text in wanted[name] if text not in told] == []


def test_the_pages_are_those_of_the_notebooks(
    notebooks: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", ["notebooks", "--check"])
    assert notebooks.main() == 0
    assert notebooks.NOTEBOOKS == NAMES
    (tmp_path / "notebooks").mkdir()
    for name in NAMES:
        content = (ROOT / "docs" / "notebooks" / f"{name}.ipynb").read_text(encoding="utf-8")
        (tmp_path / "notebooks" / f"{name}.ipynb").write_text(content, encoding="utf-8")
        (tmp_path / f"notebook-{name}.md").write_text("older", encoding="utf-8")
    monkeypatch.setattr(notebooks, "DOCS", tmp_path)
    assert notebooks.main() == 1
    assert capsys.readouterr().err.count("is not up to date: run `make docs`") == len(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_a_notebook_opens_anywhere(name: str, notebooks: ModuleType) -> None:
    notebook = notebooks.read(name)
    assert (notebook["nbformat"], notebook["metadata"]["kernelspec"]["name"]) == (4, "python3")
    assert all(cell["outputs"] or cell["source"] for cell in notebook["cells"] if cell["cell_type"] == "code")
    text = json.dumps(notebook)
    assert [path for path in ("/tmp/", "/root/", "/home/", str(ROOT)) if path in text] == []
    assert "%pip install" in text
    assert not any(output["output_type"] == "error" for cell in notebook["cells"] for output in cell.get("outputs", ()))

"""Write the notebooks of the documentation as pages; ``--run`` runs them first and keeps what they print.

Run as ``python tools/notebooks.py``. ``--run`` needs ``nbclient`` and ``ipykernel``; the variable ``MODEL`` may name a
folder with the model.
"""

from __future__ import annotations

import argparse
import html
import json
import os
import re
import sys
import tempfile
import textwrap
from pathlib import Path
from typing import Any

DOCS = Path(__file__).parent.parent / "docs"
NOTEBOOKS = ("train_and_publish", "registry")
#: The id of the model that a folder in ``MODEL`` stands for.
PUBLISHED = "HuggingFaceTB/SmolLM2-135M-Instruct"
#: Characters of a line of code or output on a page that is 1,280 pixels wide.
WIDTH = 110
_KEEP: Any = {"break_on_hyphens": False, "replace_whitespace": False}
#: Colors of a terminal.
_NOISE = re.compile(r"\x1b\[[0-9;]*m")


def read(name: str) -> dict[str, Any]:
    """Return a notebook."""
    found: dict[str, Any] = json.loads((DOCS / "notebooks" / f"{name}.ipynb").read_text(encoding="utf-8"))
    return found


def run(name: str, folder: Path) -> dict[str, Any]:
    """Run a notebook in a folder and return it with what its cells printed."""
    import nbclient
    import nbformat

    notebook = nbformat.read(DOCS / "notebooks" / f"{name}.ipynb", as_version=4)
    place = {"metadata": {"path": str(folder)}}
    client = nbclient.NotebookClient(notebook, timeout=1800, startup_timeout=300, resources=place)
    client.execute(env={**os.environ, "LORA_REGISTRY_CACHE": str(folder / "cache")})
    for cell in notebook.cells:
        cell.metadata = {}
        if cell.cell_type == "code":  # what libraries say of themselves names folders of this machine
            cell.outputs = [output for output in cell.outputs if output.get("name") != "stderr"]
    text = nbformat.writes(notebook).replace(str(folder), "~")
    if model := os.environ.get("MODEL"):
        text = text.replace(model, PUBLISHED).replace(Path(model).name, PUBLISHED)
    found: dict[str, Any] = json.loads(text)
    return found


def write_page(name: str) -> str:
    """Return the page of a notebook: text, code, and what the code prints."""
    parts = []
    for cell in read(name)["cells"]:
        text = "".join(cell["source"])
        if cell["cell_type"] == "markdown":
            parts.append(re.sub(r"\((\w+)\.ipynb\)", lambda found: f"(notebook-{found[1]}.md)", text))
        else:
            # A semicolon at the end tells a notebook to show no value.
            parts.append(f"```python {{.norun}}\n{text.removesuffix(';')}\n```")
            parts += _show_outputs(cell["outputs"])
    title, _, rest = "\n\n".join(parts).partition("\n\n")
    link = f"[Download the notebook](notebooks/{name}.ipynb). The outputs are from a run on a CPU."
    # Without the table of contents, the code fits into 1,280 pixels.
    return f"---\nhide: [toc]\n---\n\n{title}\n\n{link}\n\n{rest}\n"


def _show_outputs(outputs: list[dict[str, Any]]) -> list[str]:
    """Return outputs as Markdown. What a cell prints bit by bit is one block."""
    printed = "".join(
        "".join(one["text"]) for one in outputs if one["output_type"] == "stream" and one["name"] == "stdout"
    )
    shown = [_quote(printed)] if printed.strip() else []
    for one in outputs:
        if one["output_type"] != "stream":
            table, text = ("".join(one["data"].get(kind, "")) for kind in ("text/html", "text/plain"))
            if table.startswith(
                "<pre"
            ):  # wide text in its own colors: as text it can be scrolled, and read in the dark
                table, text = "", html.unescape(re.sub(r"<[^>]+>", "", table))
            shown.append(table or _quote(text))
    return shown


def _quote(text: str) -> str:
    """Return a block of text, with long lines continued as a notebook shows them."""
    lines = _NOISE.sub("", text).rstrip().split("\n")
    wrapped = [textwrap.fill(line, WIDTH, **_KEEP) if len(line) > WIDTH else line for line in map(str.rstrip, lines)]
    return "```text\n" + "\n".join(wrapped) + "\n```"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="say whether the pages are up to date")
    parser.add_argument("--run", action="store_true", help="run the notebooks and keep what they print")
    options = parser.parse_args()
    stale = []
    for name in NOTEBOOKS:
        if options.run:
            with tempfile.TemporaryDirectory() as folder:
                notebook = run(name, Path(folder))
            text = json.dumps(notebook, indent=1, ensure_ascii=False, sort_keys=True) + "\n"
            (DOCS / "notebooks" / f"{name}.ipynb").write_text(text, encoding="utf-8")
        page, text = DOCS / f"notebook-{name}.md", write_page(name)
        if options.check:
            if not page.exists() or page.read_text(encoding="utf-8") != text:
                stale.append(page.name)
        else:
            page.write_text(text, encoding="utf-8")
    for name in stale:
        print(f"docs/{name} is not up to date: run `make docs`", file=sys.stderr)
    return 1 if stale else 0


if __name__ == "__main__":
    sys.exit(main())

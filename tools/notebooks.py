"""Write the notebooks of the documentation as pages; ``--run`` runs them first and keeps what they print.

Run as ``python tools/notebooks.py``. ``--run`` needs ``nbclient`` and ``ipykernel``; a variable ``MODEL`` names a folder with the model.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import tempfile
from pathlib import Path
from typing import Any

DOCS = Path(__file__).parent.parent / "docs"
NOTEBOOKS = ("train_and_publish", "registry")
#: Colors of a terminal, and addresses in memory.
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
    nbclient.NotebookClient(notebook, timeout=1800, startup_timeout=300, resources=place).execute()
    for cell in notebook.cells:
        cell.metadata = {}
    found: dict[str, Any] = json.loads(nbformat.writes(notebook))
    return found


def write_page(name: str) -> str:
    """Return the page of a notebook: text, code, and what the code prints."""
    parts = []
    for cell in read(name)["cells"]:
        text = "".join(cell["source"])
        if cell["cell_type"] == "markdown":
            parts.append(re.sub(r"\((\w+)\.ipynb\)", lambda found: f"(notebook-{found[1]}.md)", text))
        else:
            parts.append(f"```python {{.norun}}\n{text}\n```")
            parts += [shown for output in cell["outputs"] if (shown := _show(output))]
    title, _, rest = "\n\n".join(parts).partition("\n\n")
    link = f"[Download the notebook](notebooks/{name}.ipynb). What is shown here is what it printed on a CPU."
    return f"{title}\n\n{link}\n\n{rest}\n"


def _show(output: dict[str, Any]) -> str:
    """Return an output as Markdown."""
    if output["output_type"] == "stream":
        text = "".join(output["text"]) if output["name"] == "stdout" else ""
    else:
        data = output["data"]
        if "text/html" in data:
            return "".join(data["text/html"])
        text = "".join(data.get("text/plain", ""))
    text = _NOISE.sub("", text).rstrip()
    return f"```text\n{text}\n```" if text else ""


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

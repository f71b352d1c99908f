"""Write the table of docs/formats.md from the records of lora_plugins; with --check, fail when it is out of date."""

from __future__ import annotations

import sys
from pathlib import Path

from lora_plugins import Format
from lora_plugins.plugins.host import plugin_host

PAGE = Path(__file__).parent.parent / "docs" / "formats.md"
BEGIN, END = "<!-- The table is written by `make docs`. -->\n", "<!-- End of the table. -->\n"

TRAINS = {
    "stored": "yes, as stored",
    "float": "yes, dequantized while loading",
    "untried": "refused: not tried",
    "no": "refused",
}


def row(record: Format) -> str:
    """One line of the table."""
    layers = ", ".join(f"`{name.partition('.')[2]}`" for name in record.layers) or "those of its library"
    trains = TRAINS[record.trains]
    if record.backends:
        trains += f" (`{'`, `'.join(record.backends)}`)"
    cells = (f"`{record.method}`", record.title, layers, trains, record.merges, record.needs, record.evidence)
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def table() -> str:
    """The table and, below it, why each refused format is refused and what to load instead."""
    heads = ("`quant_method`", "format", "layers", "adapters train", "merging", "needs", "how we know")
    records = plugin_host().formats()
    lines = ["| " + " | ".join(heads) + " |", "|" + " --- |" * len(heads), *map(row, records), ""]
    lines += [f"- `{one.method}`: {one.reason}. Instead, {one.instead}." for one in records if one.reason]
    return "\n".join(lines) + "\n"


def page() -> str:
    """The whole page, with the table of today."""
    text = PAGE.read_text(encoding="utf-8")
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    return f"{before}{BEGIN}\n{table()}\n{END}{after}"


def main() -> int:
    """Write or check the page; the exit code says whether it is up to date."""
    if "--check" not in sys.argv[1:]:
        PAGE.write_text(page(), encoding="utf-8")
    elif PAGE.read_text(encoding="utf-8") != page():
        print(f"{PAGE.name} differs from the records of the formats; run `make docs`.", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())

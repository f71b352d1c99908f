"""Write the table of docs/formats.md from the records of lora_plugins; with --check, fail when it is out of date."""

from __future__ import annotations

import re
import sys
from pathlib import Path

from lora_plugins import Format
from lora_plugins.plugins.host import plugin_host

PAGE = Path(__file__).parent.parent / "docs" / "formats.md"
BEGIN, END = "<!-- The table is written by `make docs`. -->\n", "<!-- End of the table. -->\n"

#: What the records say of where a fact is from, and the word for it in the table.
EVIDENCE = {
    "run in the tests on a CPU with transformers 5.23.0": "tests",
    "read in transformers 5.23.0 and PEFT 0.21.2": "source",
}

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
    known = re.sub("|".join(EVIDENCE), lambda found: EVIDENCE[found[0]], record.evidence)
    known = known.replace("tests and ", "tests, ")
    cells = (f"`{record.method}`", record.title, layers, trains, record.merges, record.needs, known)
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def table() -> str:
    """The table and, below it, why each refused format is refused and what to load instead."""
    heads = ("`quant_method`", "format", "layers", "adapters train", "merging", "needs", "known from")
    records = plugin_host().formats()
    lines = ["| " + " | ".join(heads) + " |", "|" + " --- |" * len(heads), *map(row, records), ""]
    advice: dict[tuple[str, str], list[str]] = {}
    for one in records:
        if one.reason:
            advice.setdefault((one.reason, one.instead), []).append(f"`{one.method}`")
    lines += [f"- {', '.join(names)}: {reason}. Instead, {instead}." for (reason, instead), names in advice.items()]
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

"""Draw the diagrams of the documentation; ``--check`` says whether they are up to date.

Run as ``python tools/diagrams.py``.
"""

from __future__ import annotations

import argparse
import sys
import textwrap
from pathlib import Path
from typing import NamedTuple
from xml.sax.saxutils import escape

DOCS = Path(__file__).parent.parent / "docs"

#: Sizes in pixels; characters that fit into one pixel, of bold and of plain text.
WIDTH, LEFT, RIGHT, LINE, GAP = 750, 260, 440, 18, 14
BOLD, PLAIN = 0.115, 0.132

STYLE = """
  .box { fill: #e8eaf6; stroke: #3f51b5; }
  .ours { fill: #e0f2f1; stroke: #00796b; }
  .loop { fill: none; stroke: #757575; stroke-dasharray: 5 4; }
  .arrow { stroke: #616161; fill: none; }
  text { font: 13px system-ui, sans-serif; fill: #212121; }
  .name { font-weight: 600; }
  .note { fill: #616161; }
  @media (prefers-color-scheme: dark) {
    .box { fill: #283593; stroke: #9fa8da; }
    .ours { fill: #004d40; stroke: #80cbc4; }
    .loop { stroke: #bdbdbd; }
    .arrow { stroke: #bdbdbd; }
    text { fill: #fafafa; }
    .note { fill: #bdbdbd; }
  }
"""


class Row(NamedTuple):
    """What happens on the left, what that causes on the right, and whether it is repeated."""

    name: str
    effect: str
    repeated: bool = False


EVENTS = [
    Row(
        "Trainer(…, callbacks=[LoraCallback()])\non_init_end",
        "Select the target modules, test the backend, quantize in place, freeze, add adapters. The prepared model "
        "replaces the Trainer's; saving and resuming are wrapped.",
    ),
    Row("train(\nresume_from_checkpoint=…)", "Compare this run with the checkpoint's; load all of its adapters."),
    Row(
        "on_train_begin",
        "Check that something is trainable, that the optimizer contains it, that everything new is trained, and that "
        "everything trained is saved.",
    ),
    Row("forward, loss", "Compute the loss in chunks and the LoRA branch as one function.", repeated=True),
    Row("on_pre_optimizer_step", "Check that gradients arrive and that the loss is finite.", repeated=True),
    Row("optimizer.step()\non_optimizer_step", "Check that the adapters changed.", repeated=True),
    Row("on_step_end, on_log", "Send the report and the results of the checks to the trackers.", repeated=True),
    Row("save_model\non_save", "Compare the file with the model, tensor by tensor.", repeated=True),
    Row("on_train_end", "An adapter that never changed is an error. All adapters of the best checkpoint are restored."),
    Row("push_to_hub, PushToRegistryCallback", "Check the release before it is uploaded."),
]

RELEASE = [
    Row(
        'push_adapter(model, "org/name",\nversion="1.2.0")',
        "Collect the adapter's own files. Check values, shapes, configuration and base. Hash, write manifest and card.",
    ),
    Row("one commit", "Only files of the release are written; other files in the repository stay."),
    Row("tag v1.2.0", "Now it is a version, which never changes. Of two pushes of one version, one succeeds."),
    Row("main, release-1.0.x", "The branch of the newest stable release follows, for users of plain PEFT."),
    Row(
        'set_alias(…, "champion")\nyank(…)',
        "An alias moves by compare-and-swap. Ranges skip a withdrawn version.",
    ),
    Row(
        'pull_adapter(\n"org/name>=1.2,<2")',
        "Choose the version, or the one in the lock file. Download what is missing, hash and check everything.",
    ),
    Row("adapter.check(base), adapter.load()", "Compare the base with the recorded one, then load onto it."),
    Row("merge, continue training", "Each of them makes the same check first."),
]


def draw(rows: list[Row], title: str, repeated: str) -> str:
    """Return an SVG of boxes on the left, one below the other, each with what it causes on the right."""
    parts, top, loop = [], 40, []
    for number, row in enumerate(rows):
        names = [line for text in row.name.split("\n") for line in textwrap.wrap(text, int(LEFT * BOLD)) or [""]]
        effects = textwrap.wrap(row.effect, int(RIGHT * PLAIN))
        height = LINE * max(len(names), len(effects)) + 14
        left = 24
        parts += [
            f'<rect class="box" x="{left}" y="{top}" width="{LEFT}" height="{height}" rx="6"/>',
            f'<rect class="ours" x="{left + LEFT + 22}" y="{top}" width="{RIGHT}" height="{height}" rx="6"/>',
            _arrow(left + LEFT, top + height / 2, "h20"),
        ]
        parts += [_write(left + 10, top + 5 + LINE * (place + 0.8), line, "name") for place, line in enumerate(names)]
        parts += [
            _write(left + LEFT + 32, top + 5 + LINE * (place + 0.8), line, "") for place, line in enumerate(effects)
        ]
        if number + 1 < len(rows):
            parts.append(
                f'<path class="arrow" d="M{left + LEFT / 2} {top + height}v{GAP - 2}" marker-end="url(#tip)"/>'
            )
        if row.repeated:
            loop += [top, top + height]
        top += height + GAP
    if loop:
        parts.insert(
            0,
            f'<rect class="loop" x="12" y="{loop[0] - 8}" width="{WIDTH}" height="{loop[-1] - loop[0] + 16}" rx="8"/>',
        )
        parts.append(_write(WIDTH + 20, (loop[0] + loop[-1]) / 2, repeated, "note"))
    total = WIDTH + (110 if loop else 16)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {total} {top}" role="img">\n'
        f"<title>{escape(title)}</title>\n<style>{STYLE}</style>\n"
        '<defs><marker id="tip" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7" orient="auto">'
        '<path class="arrow" d="M0 0L7 4L0 8"/></marker></defs>\n'
        + _write(24, 24, title, "name")
        + "\n"
        + "\n".join(parts)
        + "\n</svg>\n"
    )


def _arrow(x: float, y: float, way: str) -> str:
    return f'<path class="arrow" d="M{x:g} {y:g}{way}" marker-end="url(#tip)"/>'


def _write(x: float, y: float, text: str, kind: str) -> str:
    return f'<text x="{x:g}" y="{y:g}" class="{kind}">{escape(text)}</text>'


DIAGRAMS = {
    "events.svg": draw(EVENTS, "What happens when, in a Trainer with LoraCallback", "every step"),
    "release.svg": draw(RELEASE, "The life of a release", ""),
}


def main() -> int:
    """Write the diagrams, or compare them with the files."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="only say whether the files are up to date")
    if not parser.parse_args().check:
        for name, text in DIAGRAMS.items():
            (DOCS / name).write_text(text, encoding="utf-8")
        return 0
    stale = [name for name, text in DIAGRAMS.items() if (DOCS / name).read_text(encoding="utf-8") != text]
    for name in stale:
        print(f"docs/{name} is not up to date: run `make docs`", file=sys.stderr)
    return 1 if stale else 0


if __name__ == "__main__":
    sys.exit(main())

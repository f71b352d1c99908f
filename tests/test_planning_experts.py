"""Plans of published mixture-of-experts models, and the table of them in docs/planning.md."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import tiny
from transformers import AutoConfig

from lora_plugins import plan

CONFIGURATIONS = Path(__file__).parent / "data" / "configurations"
PAGE = Path(__file__).parent.parent / "docs" / "planning.md"

#: File -> name in the table, and parameters of the text model in thousand millions, as its makers state them.
MODELS = {
    "gpt-oss-20b": ("gpt-oss-20b", 20.9),
    "qwen3-30b-a3b": ("Qwen3-30B-A3B", 30.5),
    "mixtral-8x7b": ("Mixtral-8x7B", 46.7),
    "llama-4-scout": ("Llama-4-Scout, text", 107.8),
    "deepseek-v3": ("DeepSeek-V3", 671.0),
}


def make_plan(file: str) -> Any:
    values = json.loads((CONFIGURATIONS / f"{file}.json").read_text())
    config = AutoConfig.for_model(values.pop("model_type"), **values)
    return plan(config, dtype="bfloat16", gradient_checkpointing=True, length=512, experts="routed", device="cuda")


def read_table() -> dict[str, list[str]]:
    section = PAGE.read_text(encoding="utf-8").partition("## Experts")[2].partition("\n## ")[0]
    rows = [line.strip("|").split("|") for line in section.splitlines() if line.startswith("|")][2:]
    return {cells[0].strip(): [cell.strip() for cell in cells[1:]] for cells in rows}


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"strategy": "fsdp"}, True),
        ({"strategy": "zero3"}, True),
        ({"strategy": "ddp"}, False),
        ({"strategy": "fsdp", "quantization": {"name": "nf4", "skip_modules": ["experts"]}}, False),
    ],
)
def test_a_plan_over_quantized_experts_says_what_training_would_refuse(settings: dict[str, Any], said: bool) -> None:
    made = plan(tiny.mixtral(), **{"quantization": "nf4", "devices": 2, "length": 8, **settings})
    refusals = [note for note in made.notes if "cannot train over experts that are stored quantized" in note]
    assert bool(refusals) == said
    assert all("model.layers.0.mlp.experts" in note for note in refusals)


@pytest.mark.slow
@pytest.mark.parametrize("file", MODELS)
def test_published_models_and_their_table(file: str) -> None:
    name, parameters = MODELS[file]
    made = make_plan(file)
    assert (made.total - made.trainable) / 1e9 == pytest.approx(parameters, abs=0.06)
    rows = {row.quantization: row for row in made.rows if row.quantization in ("int8", "nf4") and row.checkpointing}
    shares = {row.quantized_share for row in rows.values()}
    assert min(shares) > 0.94
    totals = [f"{rows[backend].memory.total / 1e9:.1f}" for backend in ("int8", "nf4")]
    fits = next((str(size) for size in (24, 48, 80) if rows["nf4"].memory.total <= size * 1e9), "none")
    assert read_table()[name] == [f"{min(shares):.1%}", *totals, fits]


def test_every_model_is_in_the_table() -> None:
    assert list(read_table()) == [name for name, _ in MODELS.values()]
    assert all(re.fullmatch(r"[\d.]+|none", cell.rstrip("%")) for row in read_table().values() for cell in row)

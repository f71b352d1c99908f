"""Plans of a published model whose 4-bit weights two devices divide, and the table of them in docs/planning.md."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoConfig

from lora_plugins import plan
from lora_plugins.planning.amounts import fits, parse_memory

CONFIGURATION = Path(__file__).parent / "data" / "configurations" / "llama-3.1-70b.json"
PAGE = Path(__file__).parent.parent / "docs" / "planning.md"

#: First cells of a row -> what is planned, and the memory of one card.
ROWS: dict[tuple[str, str], tuple[dict[str, Any], str]] = {
    (kind, cards): ({"quantization": quantization, **settings}, memory)
    for kind, quantization in {"nf4": "nf4", "nf4, double_quant": {"name": "nf4", "double_quant": True}}.items()
    for cards, settings, memory in (
        ("2 of 24 GiB, FSDP2", {"devices": 2, "strategy": "fsdp"}, "24GiB"),
        ("2 of 24 GiB, ZeRO-3", {"devices": 2, "strategy": "zero3"}, "24GiB"),
        ("1 of 48 GiB", {}, "48GiB"),
    )
}
#: Of the base: blocks, weights of a block's linear layers, weights of the embedding and of the head.
BLOCKS, LINEAR, ENDS = 80, 2 * 8192 * 8192 + 2 * 1024 * 8192 + 3 * 28672 * 8192, 128256 * 8192


def make_plan(settings: dict[str, Any]) -> Any:
    values = json.loads(CONFIGURATION.read_text())
    config = AutoConfig.for_model(values.pop("model_type"), **values)
    return plan(config, dtype="bfloat16", gradient_checkpointing=True, length=512, device="cuda", **settings)


def read_table() -> dict[tuple[str, str], list[str]]:
    section = PAGE.read_text(encoding="utf-8").partition("### Llama-3.1-70B on two cards")[2].partition("\n## ")[0]
    rows = [line.strip("|").split("|") for line in section.splitlines() if line.startswith("|")][2:]
    cells = [[cell.strip() for cell in row] for row in rows]
    return {(row[0], row[1]): row[2:] for row in cells}


def test_every_case_is_in_the_table() -> None:
    assert list(read_table()) == list(ROWS)


@pytest.mark.slow
@pytest.mark.parametrize("row", ROWS)
def test_a_model_of_seventy_billion_weights_and_its_table(row: tuple[str, str]) -> None:
    settings, memory = ROWS[row]
    made = make_plan(settings)
    assert made.total - made.trainable == 70_553_706_496
    held = made.chosen.memory
    # Half a byte for a weight; a scale of four bytes, or of one and a little, for 64 weights.
    scale = 4 if settings["quantization"] == "nf4" else 1 + 4 / 256
    quantized = BLOCKS * LINEAR * (1 / 2 + scale / 64)
    assert held.weights * settings.get("devices", 1) == pytest.approx(quantized + 2 * 2 * ENDS, rel=0.003)
    if settings.get("strategy") == "fsdp":
        assert held.communication == pytest.approx(2 * 2 * ENDS, rel=0.001)
    sizes = (held.weights, held.communication, held.activations, held.total)
    answer = "yes" if fits(held, parse_memory(memory)) else "no"
    assert read_table()[row] == [*(f"{size / 1e9:.1f}" for size in sizes), answer]

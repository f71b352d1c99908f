"""``quantization="auto"`` takes the least lossy backend that fits into the given memory, with its reason."""

from __future__ import annotations

from typing import Any

import pytest
import stored_bases
import tiny
import torch

from lora_plugins import plan
from lora_plugins.planning.amounts import USABLE
from lora_plugins.planning.result import Plan
from lora_plugins.plugins.host import plugin_host
from lora_plugins.quantization.request import Quantization
from lora_plugins.quantization.selftest import weight_error
from lora_plugins.recipe import prepare
from lora_plugins.recipe.parser import parse

WIDE: dict[str, Any] = {"length": 4, "r": 2, "optim": "sgd"}


@pytest.fixture(scope="module")
def figures() -> Plan:
    return plan(wide(), **WIDE)


def wide() -> Any:
    """A Llama whose memory is mostly its linear layers."""
    return tiny.llama(hidden_size=256, intermediate_size=512).config


def needed(figures: Plan, name: str) -> int:
    row = next(row for row in figures.rows if row.quantization == name and not row.checkpointing)
    return int(row.memory.total / USABLE) + 1


def test_a_float_base_that_fits_stays_in_float(figures: Plan) -> None:
    made = plan(wide(), quantization="auto", memory=needed(figures, ""), **WIDE)
    assert made.chosen.quantization == ""
    assert any("took a float base, the least lossy that fits" in note for note in made.notes)


def test_eight_bits_come_before_four_and_the_reason_names_what_did_not_fit(figures: Plan) -> None:
    made = plan(wide(), quantization="auto", memory=needed(figures, "int8"), **WIDE)
    assert made.chosen.quantization == "int8"
    assert made.chosen.fits
    reason = next(note for note in made.notes if "auto" in note)
    assert "a float base needs" in reason
    assert "% from the float ones" in reason


def test_four_bits_are_taken_where_eight_do_not_fit_and_the_least_lossy_of_them(figures: Plan) -> None:
    fours = {row.quantization for row in figures.rows if row.quantization and not row.unavailable}
    fours = {name for name in fours if plugin_host().quantizer(name).bits == 4}
    memory = max(needed(figures, name) for name in fours)
    made = plan(wide(), quantization="auto", memory=memory, **WIDE)
    errors = {name: round(error(name), 2) for name in fours}
    assert made.chosen.quantization in fours
    assert errors[made.chosen.quantization] == min(errors.values())


def test_where_nothing_fits_the_smallest_is_taken_and_advice_is_given() -> None:
    made = plan(wide(), quantization="auto", memory=1000, **WIDE)
    sizes = {row.quantization: row.memory.total for row in made.rows if not row.checkpointing and not row.unavailable}
    assert made.chosen.memory.total == min(sizes.values())
    assert any("no backend fits" in note for note in made.notes)
    assert made.advice


def test_a_stored_base_keeps_its_backend(tmp_path: Any) -> None:
    config = stored_bases.llama().config
    config.save_pretrained(tmp_path)
    stored_bases.declare(tmp_path, {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"})
    assert plan(tmp_path, quantization="auto", memory="1GiB", **WIDE).chosen.quantization == "nf4"


def error(name: str) -> float:
    return weight_error(
        Quantization(plugin_host().quantizer(name), {"skip_modules": []}), torch.device("cpu"), torch.float32
    )


def test_the_order_of_loss_is_that_of_the_benchmark() -> None:
    # docs/backends.md: held-out loss +0.15, +0.27 and +0.43.
    assert 0 < error("int8") < 0.02 < error("nf4") < error("fp4")
    pytest.importorskip("hqq")
    assert error("int4-hqq") < error("nf4")


def test_the_train_command_chooses_and_says_why(tmp_path: Any) -> None:
    stored_bases.llama().save_pretrained(tmp_path / "base")
    flags = {
        "--model": tmp_path / "base",
        "--dataset": "x.jsonl",
        "--quantization": "auto",
        "--output-dir": tmp_path / "out",
        "--chunk-length": 8,
        "--per-device-train-batch-size": 1,
    }
    recipe, training = parse([str(part) for pair in flags.items() for part in pair])
    said: list[str] = []
    prepare.choose_quantization(recipe, training, said.append)
    # Any machine has room for a model of half a megabyte.
    assert recipe.quantization == "none"
    assert len(said) == 1
    assert "took a float base" in said[0]

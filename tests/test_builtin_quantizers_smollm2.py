"""Every backend on SmolLM2: sixty steps with evaluations, a loss that falls, an adapter that comes back, its merge.

On four of the model's layers always, on all of them among the slow tests.
"""

from __future__ import annotations

import copy
import inspect
import shlex
import statistics
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments

from lora_plugins import LoraCallback, dequantize_model, prepare_model
from lora_plugins.commands.demo.model import demo_model
from lora_plugins.errors import DemoError, MergeError
from lora_plugins.quantization.precision import fast_bfloat16
from lora_plugins.quantization.request import owner_of

NAMES = (
    "int8",
    "nf4",
    "fp4",
    "int8-torchao",
    "float8-torchao",
    "int8-quanto",
    "int4-quanto",
    "int8-hqq",
    "int4-hqq",
)
DOUBLE = tuple({"name": name, "double_quant": True} for name in ("nf4", "fp4"))

STEPS = 60

Load = Callable[[int | None], Any]


@pytest.fixture(scope="session")
def folder() -> Path:
    try:
        return demo_model()
    except DemoError as error:
        pytest.skip(f"the demo's model is not here: {error}")


@pytest.fixture(scope="session")
def load(folder: Path) -> Load:
    """Makes a fresh copy of the model, of its first layers or of all.

    In bfloat16 where the machine multiplies it; elsewhere the backward pass alone takes forty times as long.
    """
    dtype = torch.bfloat16 if fast_bfloat16(torch.device("cpu")) else torch.float32
    originals: dict[int | None, Any] = {}

    def copy_of(layers: int | None) -> Any:
        if layers not in originals:
            extra = {} if layers is None else {"num_hidden_layers": layers}
            originals[layers] = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, **extra)
        return copy.deepcopy(originals[layers])

    return copy_of


@pytest.fixture(scope="session")
def tokens(folder: Path) -> torch.Tensor:
    """Source of the standard library, one long row."""
    text = "\n".join(inspect.getsource(module) for module in (textwrap, statistics, shlex))
    ids: torch.Tensor = AutoTokenizer.from_pretrained(folder)(text, return_tensors="pt").input_ids[0]
    return ids


def rows(tokens: torch.Tensor, count: int, length: int, offset: int) -> Dataset:
    ids = tokens[offset : offset + count * length].view(count, length).tolist()
    return Dataset.from_dict({"input_ids": ids, "labels": ids})


def journey(
    folder: Path, load: Load, tokens: torch.Tensor, quantization: Any, *, layers: int | None, length: int, rate: float
) -> None:
    """Train through the Trainer, evaluate in between, save, load onto a fresh base, merge."""
    base = load(layers)
    linears = [name for name, m in base.named_modules() if isinstance(m, torch.nn.Linear) and name != "lm_head"]
    train, held_out = rows(tokens, STEPS, length, 0), rows(tokens, 8, 32, STEPS * length)
    trainer = Trainer(
        model=base,
        args=TrainingArguments(
            output_dir=str(folder),
            max_steps=STEPS,
            per_device_train_batch_size=1,
            per_device_eval_batch_size=4,
            learning_rate=rate,
            lr_scheduler_type="constant",
            eval_strategy="steps",
            eval_steps=STEPS // 2,
            logging_steps=1,
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
            use_cpu=True,
        ),
        train_dataset=train,
        eval_dataset=held_out,
        callbacks=[LoraCallback(r=8, lora_dropout=0.05, quantization=quantization)],
    )
    before = trainer.evaluate()["eval_loss"]
    trainer.train()
    model: Any = trainer.model

    name = quantization if isinstance(quantization, str) else quantization["name"]
    owners = {path: owner_of(m) for path, m in model.named_modules() if path.endswith(".base_layer")}
    assert owners
    assert all(owner is not None and owner.name == name for owner in owners.values())
    quantized = [m for m in model.modules() if owner_of(m) is not None]
    assert len(quantized) == len(linears)
    steps = [entry["grad_norm"] for entry in trainer.state.log_history if "grad_norm" in entry]
    assert len(steps) == STEPS
    assert min(steps) > 0
    evaluations = [entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry]
    assert len(evaluations) == 2
    assert before > evaluations[0] > evaluations[1], f"held-out loss went {[before, *evaluations]}"

    trainer.save_model(str(folder / "adapter"))
    again: Any = prepare_model(load(layers), adapter=folder / "adapter", quantization=quantization)
    ids = tokens[None, :32]
    with torch.no_grad():
        for training in (False, True):
            model.train(training), again.train(training)
            assert torch.equal(_without_dropout(model)(ids).logits, _without_dropout(again)(ids).logits)
        adapted = again(ids).logits.float()
        with again.disable_adapter():
            effect = torch.linalg.vector_norm(again(ids).logits.float() - adapted)
        owner = next(iter(owners.values()))
        if owner is not None and owner.bits < 8:
            with pytest.raises(MergeError, match="dequantize_model"):
                again.merge_and_unload()
        dequantize_model(again)
        merged = again.merge_and_unload()(ids).logits.float()
    assert all(type(m) is torch.nn.Linear for path, m in merged_linears(again))
    assert torch.linalg.vector_norm(merged - adapted) < 0.2 * effect


def merged_linears(model: Any) -> list[tuple[str, Any]]:
    return [(path, m) for path, m in model.named_modules() if path.endswith("_proj")]


def _without_dropout(model: Any) -> Any:
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.eval()
    return model


@pytest.mark.parametrize("name", NAMES)
def test_four_layers(tmp_path: Path, load: Load, tokens: torch.Tensor, name: str) -> None:
    journey(tmp_path, load, tokens, name, layers=4, length=16, rate=2e-3)


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("quantization", [*NAMES, *DOUBLE], ids=str)
def test_all_layers(tmp_path: Path, load: Load, tokens: torch.Tensor, quantization: Any) -> None:
    journey(tmp_path, load, tokens, quantization, layers=None, length=64, rate=5e-4)

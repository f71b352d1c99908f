"""A real small model and real text: what quantization costs, and an adapter that comes back to the bit."""

from __future__ import annotations

import inspect
import shlex
import statistics
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import bitsandbytes as bnb
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from lora_plugins import prepare_model
from lora_plugins.commands.demo.model import demo_model
from lora_plugins.errors import DemoError
from lora_plugins.quantization.precision import loading_dtype


@pytest.fixture(scope="module")
def folder() -> Path:
    try:
        return demo_model()
    except DemoError as error:
        pytest.skip(f"the demo's model is not here: {error}")


@pytest.fixture(scope="module")
def tokens(folder: Path) -> torch.Tensor:
    """Source of the standard library, shape ``[16, 256]``: 4,096 tokens."""
    text = "\n".join(inspect.getsource(module) for module in (textwrap, statistics, shlex))
    ids = AutoTokenizer.from_pretrained(folder)(text, return_tensors="pt").input_ids[0]
    return ids[: 16 * 256].view(16, 256)


def held_out_loss(model: Any, tokens: torch.Tensor, *, training: bool) -> float:
    model.train(training)
    with torch.no_grad():
        losses = [model(input_ids=batch, labels=batch).loss.item() for batch in tokens.split(4)]
    return sum(losses) / len(losses)


def test_int8_costs_less_than_one_per_cent_of_loss(folder: Path, tokens: torch.Tensor) -> None:
    assert tokens.numel() >= 4096
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=loading_dtype())
    linears = [name for name, m in model.named_modules() if isinstance(m, torch.nn.Linear) and name != "lm_head"]
    float_bytes = sum(model.get_submodule(name).weight.numel() * 4 for name in linears)
    base = held_out_loss(model, tokens, training=False)
    wrapped = prepare_model(model, r=8, lora_dropout=0.0, quantization="int8")
    quantized = [m for m in wrapped.modules() if isinstance(m, bnb.nn.Linear8bitLt)]
    assert len(quantized) == len(linears) == 210
    assert sum(m.weight.nbytes for m in quantized) * 4 == float_bytes
    assert type(wrapped.get_base_model().lm_head) is torch.nn.Linear
    training = held_out_loss(wrapped, tokens, training=True)
    evaluation = held_out_loss(wrapped, tokens, training=False)
    print(f"held-out loss {base:.4f}; int8, training kernel {training:.4f}, evaluation kernel {evaluation:.4f}")
    assert training == pytest.approx(base, rel=0.01)
    assert evaluation == pytest.approx(base, rel=0.01)
    assert training != evaluation, "the two kernels are not the same"


RELOAD = """
import sys, torch
from transformers import AutoModelForCausalLM
from lora_plugins import prepare_model
from lora_plugins.quantization.precision import loading_dtype
folder, adapter, tokens, output, backend = sys.argv[1:]
model = AutoModelForCausalLM.from_pretrained(folder, dtype=loading_dtype())
model = prepare_model(model, adapter=adapter, quantization=backend).eval()
ids = torch.load(tokens)
with torch.no_grad():
    with_adapter = model(input_ids=ids).logits
    with model.disable_adapter():
        without = model(input_ids=ids).logits
torch.save({"with": with_adapter, "without": without}, output)
"""


@pytest.mark.parametrize("backend", ["int8", "nf4"])
def test_adapter_gives_the_same_logits_in_a_new_process(
    tmp_path: Path, folder: Path, tokens: torch.Tensor, backend: str
) -> None:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=loading_dtype())
    wrapped = prepare_model(model, r=8, lora_dropout=0.0, quantization=backend)
    optimizer = torch.optim.AdamW([p for p in wrapped.parameters() if p.requires_grad], lr=2e-3)
    for batch in tokens[:8].split(4):
        wrapped.train()(input_ids=batch, labels=batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    with torch.no_grad():
        expected = wrapped.eval()(input_ids=tokens[8:10]).logits
    wrapped.save_pretrained(tmp_path / "adapter")
    torch.save(tokens[8:10], tmp_path / "tokens.pt")
    command = [sys.executable, "-c", RELOAD, folder, tmp_path / "adapter", tmp_path / "tokens.pt", tmp_path / "out.pt"]
    done = subprocess.run([*map(str, command), backend], capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    reloaded = torch.load(tmp_path / "out.pt")
    assert torch.equal(reloaded["with"], expected)
    assert (reloaded["without"] - expected).abs().max() > 0.1

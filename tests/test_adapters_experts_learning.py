"""What routed experts learn over a quantized base, against the same run over the base in float."""

from __future__ import annotations

import argparse
import copy
import email.message
import inspect
import mailbox
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, MixtralConfig, Qwen3MoeConfig, set_seed

from lora_plugins import prepare_model
from lora_plugins.adapters.report import make_report

SIZES: dict[str, Any] = {
    "vocab_size": 128,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "pad_token_id": 0,
}
KINDS = {
    "mixtral": MixtralConfig(**SIZES, intermediate_size=96, num_local_experts=4),
    "qwen3_moe": Qwen3MoeConfig(**SIZES, head_dim=16, moe_intermediate_size=48, num_experts=8, num_experts_per_tok=2),
}
LENGTH = 64


def read_rows(module: Any, *, swapped: bool = False) -> torch.Tensor:
    """The source of a module of the standard library, a character a token, in rows; upper and lower case swapped."""
    source = inspect.getsource(module)
    text = (source.swapcase() if swapped else source).encode("ascii", "replace")
    ids = torch.tensor([min(code, 127) for code in text])
    return ids[: len(ids) // LENGTH * LENGTH].view(-1, LENGTH)


def train(model: Any, rows: torch.Tensor, steps: int, rate: float) -> None:
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=rate)
    order = torch.Generator().manual_seed(7)
    model.train()
    for _ in range(steps):
        batch = rows[torch.randint(0, len(rows), (16,), generator=order)]
        model(input_ids=batch, labels=batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def measure(model: Any, rows: torch.Tensor) -> float:
    model.eval()
    with torch.no_grad():
        return float(model(input_ids=rows, labels=rows).loss)


@pytest.fixture(scope="module", params=KINDS)
def base(request: pytest.FixtureRequest) -> Any:
    """A model trained from scratch on one kind of text."""
    set_seed(0)
    model = AutoModelForCausalLM.from_config(KINDS[request.param])
    train(model, read_rows(argparse), 300, 3e-3)
    assert measure(model, read_rows(argparse)[-40:]) < 2.5
    return model


def adapt(base: Any, quantization: str | None) -> tuple[float, float, float]:
    """Held-out loss before and after 20 LoRA steps on other text, and the share of the weights quantized."""
    rows = read_rows(mailbox, swapped=True)
    held_out = read_rows(email.message, swapped=True)[:60]
    set_seed(1)
    model = prepare_model(
        copy.deepcopy(base), quantization=quantization, experts="routed", target_modules="all-linear", lora_dropout=0.0
    )
    before = measure(model, held_out)
    train(model, rows, 20, 1e-2)
    return before, measure(model, held_out), make_report(model).quantized_share


@pytest.mark.slow
def test_held_out_loss_over_a_quantized_base(base: Any) -> None:
    before, in_float, share = adapt(base, None)
    assert share == 0
    assert in_float < before - 0.3, "the run in float learns something"
    for backend, most in (("int8", 0.01), ("nf4", 0.03)):
        _, loss, share = adapt(base, backend)
        print(f"{type(base).__name__} {backend}: {loss:.4f}, float {in_float:.4f}, before {before:.4f}")
        assert share > 0.6, "most of the weights are experts and quantized"
        assert loss == pytest.approx(in_float, rel=most)

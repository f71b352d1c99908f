"""Load a saved adapter onto a fresh base in a new process, and compare its logits with those of the run."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from lora_plugins.demo.model import load_base
from lora_plugins.demo.quiet import quiet
from lora_plugins.errors import DemoError

if TYPE_CHECKING:
    import torch
    from torch import nn


@dataclass(frozen=True)
class Reload:
    """How a reloaded adapter compares with the one in the run, on one batch in evaluation mode.

    Attributes:
        equal: Whether the logits are equal bit by bit.
        difference: Largest absolute difference of a logit; 0.0 when equal.
        difference_off: The same with the reloaded adapter switched off: how much the adapter does.
    """

    equal: bool
    difference: float
    difference_off: float


def logits(model: nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """Return a model's logits in evaluation mode, on the CPU."""
    import torch

    device = next(model.parameters()).device
    model.eval()
    with torch.inference_mode():
        inputs = {name: batch[name].to(device) for name in ("input_ids", "attention_mask")}
        output: torch.Tensor = model(**inputs).logits
        return output.cpu()


def compare_in_new_process(
    model: nn.Module, batch: dict[str, torch.Tensor], *, base: str, adapter: Path, quantization: str | None
) -> Reload:
    """Reload an adapter in a new Python process and compare it with the model at hand.

    Args:
        model: The model of the run.
        batch: ``input_ids`` and ``attention_mask``, each of shape ``[batch, length]``.
        base: Folder or id of the base model, loaded afresh.
        adapter: Folder of the saved adapter.
        quantization: Backend to quantize the fresh base with.

    Raises:
        DemoError: The other process failed; its own message was printed.
    """
    from safetensors.torch import save_file

    with tempfile.TemporaryDirectory() as folder:
        reference = Path(folder) / "reference.safetensors"
        tensors = {name: batch[name] for name in ("input_ids", "attention_mask")}
        save_file({**tensors, "logits": logits(model, batch)}, reference)
        command = [sys.executable, "-m", __name__, base, str(adapter), quantization or "none", str(reference)]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        raise DemoError(f"The process that reloads the adapter ended with code {done.returncode}.")
    return Reload(**json.loads(done.stdout.splitlines()[-1]))


def _compare(base: str, adapter: str, quantization: str, reference: str) -> Reload:
    import torch
    from safetensors.torch import load_file

    from lora_plugins import prepare_model

    stored = load_file(reference)
    backend = None if quantization == "none" else quantization
    model = prepare_model(load_base(base), quantization=backend, adapter=Path(adapter))
    expected, got = stored["logits"], logits(model, stored)
    with model.disable_adapter():
        off = logits(model, stored)
    return Reload(torch.equal(expected, got), float((expected - got).abs().max()), float((expected - off).abs().max()))


if __name__ == "__main__":
    quiet()
    result = _compare(*sys.argv[1:])
    print(json.dumps(result.__dict__))

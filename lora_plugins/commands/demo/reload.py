"""Reload an adapter in a new process and compare its logits with the run."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from lora_plugins.commands.calm import quiet
from lora_plugins.commands.demo.model import load_base
from lora_plugins.errors import DemoError

if TYPE_CHECKING:
    import torch
    from torch import nn

__all__ = ["Reload", "compare_in_new_process", "find_cache", "logits"]


@dataclass(frozen=True)
class Reload:
    """How a reloaded adapter compares with the one in the run, on one batch in evaluation mode.

    Attributes:
        equal: Whether the logits are equal bit by bit.
        difference: Largest absolute difference of a logit; 0.0 when equal.
        difference_off: The same with the reloaded adapter switched off: how much the adapter does.
        identity: For a pulled adapter, whether the base was recognized as the one it was trained on.
    """

    equal: bool
    difference: float
    difference_off: float
    identity: str | None = None


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
    model: nn.Module,
    batch: dict[str, torch.Tensor],
    *,
    base: str,
    adapter: Path | str,
    quantization: str | None,
    registry: Path | None = None,
) -> Reload:
    """Reload an adapter in a new Python process and compare it with the model at hand.

    Args:
        model: The model of the run.
        batch: ``input_ids`` and ``attention_mask``, each of shape ``[batch, length]``.
        base: Folder or id of the base model, loaded afresh.
        adapter: Folder of the saved adapter; with ``registry``, the reference of a release.
        quantization: Backend to quantize the fresh base with.
        registry: Folder registry to pull the release from; it is checked against the base before it is loaded.

    Raises:
        DemoError: The other process failed; its own message was printed.
    """
    from safetensors.torch import save_file

    with tempfile.TemporaryDirectory() as folder:
        reference = Path(folder) / "reference.safetensors"
        tensors = {name: batch[name] for name in ("input_ids", "attention_mask")}
        save_file({**tensors, "logits": logits(model, batch)}, reference)
        backend = quantization or "none"
        command = [sys.executable, "-m", __name__, base, str(adapter), backend, str(reference), str(registry or "none")]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)  # noqa: S603 - our own interpreter and arguments
    if done.returncode:
        raise DemoError(f"The process that reloads the adapter ended with code {done.returncode}.")
    return Reload(**json.loads(done.stdout.splitlines()[-1]))


def _compare(base: str, adapter: str, quantization: str, reference: str, registry: str) -> Reload:
    import torch
    from safetensors.torch import load_file

    from lora_plugins import prepare_model

    stored = load_file(reference)
    backend = None if quantization == "none" else quantization
    _say("loading the base afresh")
    loaded = load_base(base)
    _say(f"pulling {adapter} and checking it against the base" if registry != "none" else f"reading {adapter}")
    folder, identity = (Path(adapter), None) if registry == "none" else _pull_and_check(adapter, Path(registry), loaded)
    _say("quantizing the base and loading the adapter" if backend else "loading the adapter")
    model = prepare_model(loaded, quantization=backend, adapter=folder)
    _say("comparing logits with those of the run")
    expected, got = stored["logits"], logits(model, stored)
    with model.disable_adapter():
        off = logits(model, stored)
    difference, difference_off = (float((expected - other).abs().max()) for other in (got, off))
    return Reload(torch.equal(expected, got), difference, difference_off, identity)


def _say(line: str) -> None:
    """Tell the user what comes next; standard output carries the result."""
    print(f"  {line} …", file=sys.stderr, flush=True)


def _pull_and_check(reference: str, registry: Path, model: nn.Module) -> tuple[Path, str]:
    """Pull a release and check it against a base model; return its folder and the identity that the check found."""
    from registry import pull_adapter

    adapter = pull_adapter(reference, hub=registry, cache_dir=find_cache(registry), lock=False)
    return Path(adapter.path), adapter.check(model).identity


def find_cache(registry: Path) -> Path:
    """Return the demo's own cache folder, next to its registry; the user's cache stays untouched."""
    return registry.with_name("registry-cache")


if __name__ == "__main__":
    quiet()
    _say("importing PEFT")
    result = _compare(*sys.argv[1:])
    print(json.dumps(result.__dict__))

"""Compare what `plan` predicts with what a real training step on this CPU holds, for SmolLM2-135M.

For each dtype and backend of the frozen base, with and without gradient checkpointing, at two batch sizes and
two lengths: weights, gradients and optimizer state (must be equal) and the peak of live tensor bytes. The peak of
resident memory of the process that ran the step stands beside. Prints a table; ``--json`` prints everything.

    python benchmarks/plan_memory.py --bases float32 int8 --batch-sizes 2 3 --lengths 96 160
"""

# ruff: noqa: TID253 - a program for developers, which always needs them

from __future__ import annotations

import argparse
import gc
import itertools
import json
import multiprocessing
import resource
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

#: Name -> dtype of the model as it is loaded, and the backend.
BASES: dict[str, tuple[str, str | None]] = {
    "float32": ("float32", None),
    "bfloat16": ("bfloat16", None),
    "int8": ("bfloat16", "int8"),
    "nf4": ("bfloat16", "nf4"),
}


@dataclass(frozen=True)
class Comparison:
    """One step, predicted and measured; bytes."""

    base: str
    batch_size: int
    length: int
    checkpointing: bool
    weights: tuple[int, int]
    gradients: tuple[int, int]
    optimizer: tuple[int, int]
    peak: tuple[int, int]
    peak_rss_rise: int

    @property
    def exact(self) -> bool:
        """Whether everything but activations is as predicted, to the byte."""
        return all(predicted == found for predicted, found in (self.weights, self.gradients, self.optimizer))

    @property
    def error(self) -> float:
        """By how much the predicted peak is off, relative to the measured one."""
        return self.peak[0] / self.peak[1] - 1


def compare(folder: str, base: str, batch_size: int, length: int, checkpointing: bool) -> Comparison:
    """Predict one step and run it in this process.

    Args:
        folder: Folder of the model.
        base: A key of `BASES`.
        batch_size: Examples in the batch.
        length: Tokens in each.
        checkpointing: Whether blocks are computed again in the backward pass.
    """
    from lora_plugins import plan

    dtype, quantization = BASES[base]
    predicted = plan(
        folder,
        dtype=dtype,
        quantization=quantization,
        batch_size=batch_size,
        length=length,
        gradient_checkpointing=checkpointing,
        optim="adamw_torch",
        device="cpu",
    ).chosen.memory
    before = _peak_rss()
    found = measure(folder, dtype, quantization, batch_size, length, checkpointing)
    return Comparison(
        base,
        batch_size,
        length,
        checkpointing,
        (predicted.weights, found["weights"]),
        (predicted.gradients, found["gradients"]),
        (predicted.optimizer, found["optimizer"]),
        (predicted.total, found["peak"]),
        _peak_rss() - before,
    )


def measure(
    folder: str, dtype: str, quantization: str | None, batch_size: int, length: int, checkpointing: bool
) -> dict[str, int]:
    """Train two steps for real and count the second one, when the optimizer has its state."""
    from transformers import AutoModelForCausalLM

    from lora_plugins import prepare_model
    from lora_plugins.chunked_loss import chunked_loss
    from lora_plugins.counting import tensor_bytes
    from lora_plugins.planning.live import LiveBytes
    from lora_plugins.quantization import owner_of

    base = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype))
    model: Any = prepare_model(base, quantization=quantization).train()
    model.config.use_cache = False
    if checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4)
    ids = torch.randint(100, 1000, (batch_size, length), generator=torch.Generator().manual_seed(0))

    def step() -> None:
        with chunked_loss(model):
            model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()

    step()
    gradients = sum(p.grad.nbytes for p in trained)
    optimizer.zero_grad()
    gc.collect()
    state = [value for held in optimizer.state.values() for value in held.values() if isinstance(value, torch.Tensor)]
    packed = [
        tensor
        for module in model.modules()
        if (owner := owner_of(module)) is not None
        for tensor in owner.extra_tensors(module)
    ]
    live = LiveBytes(*model.parameters(), *model.buffers(), *packed, *state)
    with live:
        step()
    return {
        "weights": tensor_bytes(model).total,
        "gradients": gradients,
        "optimizer": sum(tensor.nbytes for tensor in state),
        "peak": live.peak,
    }


def _peak_rss() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _job(arguments: tuple[str, str, int, int, bool]) -> Comparison:
    torch.set_num_threads(2)
    return compare(*arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    """Compare and print; the exit code is 1 when something is not exact or a peak is off by more than ten per cent."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bases", nargs="+", choices=list(BASES), default=list(BASES))
    parser.add_argument("--batch-sizes", nargs="+", type=int, default=[1, 3])
    parser.add_argument("--lengths", nargs="+", type=int, default=[128, 320])
    parser.add_argument("--json", action="store_true", help="print everything as JSON")
    options = parser.parse_args(arguments)
    from lora_plugins.demo.model import demo_model

    folder = str(demo_model())
    results = []
    # A process for each, because the peak of resident memory never falls.
    with multiprocessing.get_context("spawn").Pool(1, maxtasksperchild=1) as pool:
        cases = itertools.product(options.bases, options.batch_sizes, options.lengths, (False, True))
        for result in pool.imap(_job, [(folder, *case) for case in cases], chunksize=1):
            results.append(result)
            if not options.json:
                print(_line(result), flush=True)
    if options.json:
        print(json.dumps([asdict(result) for result in results], indent=1))
    return 0 if all(result.exact and abs(result.error) <= 0.1 for result in results) else 1


def _line(result: Comparison) -> str:
    exact = "exact" if result.exact else f"NOT exact: {result.weights} {result.gradients} {result.optimizer}"
    return (
        f"{result.base:9} batch {result.batch_size} length {result.length:4} "
        f"checkpointing {'on ' if result.checkpointing else 'off'}: weights, gradients, optimizer {exact}; "
        f"peak predicted {result.peak[0] / 1e6:7.1f} MB, measured {result.peak[1] / 1e6:7.1f} MB "
        f"({result.error:+.1%}), resident memory +{result.peak_rss_rise / 1e6:.0f} MB"
    )


if __name__ == "__main__":
    sys.exit(main())

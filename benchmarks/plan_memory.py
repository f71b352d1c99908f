"""Compare what `plan` predicts with what a real training step on this CPU holds, for SmolLM2-135M.

For each dtype and backend of the frozen base, with and without gradient checkpointing, at two batch sizes and
two lengths: weights, gradients and optimizer state (must be equal) and the peak of live tensor bytes. The peak of
resident memory of the process that ran the step stands beside.

    python benchmarks/plan_memory.py                           prints
    python benchmarks/plan_memory.py --bases float32 --write   renews these rows on the docs page
"""

# ruff: noqa: TID253 - a program for developers, which always needs them

from __future__ import annotations

import argparse
import functools
import gc
import itertools
import multiprocessing
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent))

import measure


class Base(NamedTuple):
    """How the frozen base is held; what ``compute_dtype="auto"`` depends on, the machine, is said here."""

    dtype: str
    quantization: str | None
    compute_dtype: str


BASES = {
    "float32": Base("float32", None, "float32"),
    "int8-float32": Base("float32", "int8", "float32"),
    "nf4-float32": Base("float32", "nf4", "float32"),
    "bfloat16": Base("bfloat16", None, "bfloat16"),
    "int8-bfloat16": Base("float32", "int8", "bfloat16"),
    "nf4-bfloat16": Base("float32", "nf4", "bfloat16"),
}


@dataclass(frozen=True)
class Case:
    """One step.

    Attributes:
        base: A key of `BASES`.
        checkpointing: Whether blocks are computed again in the backward pass.
        batch_size: Examples.
        length: Tokens in each.
    """

    base: str
    checkpointing: bool
    batch_size: int
    length: int


@dataclass(frozen=True)
class Step:
    """Bytes of one step, predicted or measured.

    Attributes:
        weights: Base, adapters and buffers.
        gradients: Of all trained tensors.
        optimizer: State of the optimizer.
        peak: Most that is alive at one time, all of the above included.
        quantized_share: Share of the float base's bytes that the backend stores in its own way, 0 to 1.
        resident_rise: Peak of resident memory above what the process held before the model, 0 if predicted.
    """

    weights: int
    gradients: int
    optimizer: int
    peak: int
    quantized_share: float
    resident_rise: int = 0

    @property
    def lasting(self) -> tuple[int, int, int]:
        """What does not depend on the batch."""
        return self.weights, self.gradients, self.optimizer

    @property
    def activations(self) -> int:
        """What is alive at the peak besides weights and optimizer state."""
        return self.peak - self.weights - self.optimizer


def predict(folder: str, case: Case) -> Step:
    """Return what `plan` says about a step."""
    name = BASES[case.base].quantization or ""
    rows = _rows(folder, BASES[case.base]._replace(quantization=None), case.batch_size, case.length)
    row = next(row for row in rows if (row.quantization, row.checkpointing) == (name, case.checkpointing))
    memory = row.memory
    return Step(memory.weights, memory.gradients, memory.optimizer, memory.total, row.quantized_share)


@functools.cache
def _rows(folder: str, base: Base, batch_size: int, length: int) -> list[Any]:
    """The plan's rows, which have every backend, with and without checkpointing."""
    from lora_plugins import plan

    return plan(
        folder,
        dtype=base.dtype,
        compute_dtype=base.compute_dtype,
        batch_size=batch_size,
        length=length,
        optim="adamw_torch",
        device="cpu",
    ).rows


def run(folder: str, case: Case) -> Step:
    """Train two steps for real and count the second one, when the optimizer has its state."""
    from transformers import AutoModelForCausalLM

    from lora_plugins import prepare_model
    from lora_plugins.planning.step import LiveBytes
    from lora_plugins.quantization.counting import count_parameters, tensor_bytes
    from lora_plugins.quantization.request import owner_of
    from lora_plugins.trainer.chunked_loss import chunked_loss

    before = measure.resident()
    dtype, quantization, compute_dtype = BASES[case.base]
    base = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype))
    float_bytes = tensor_bytes(base).total
    model: Any = prepare_model(base, quantization=quantization, compute_dtype=compute_dtype).train()
    model.config.use_cache = False
    if case.checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4)
    random = torch.Generator().manual_seed(0)

    def step(*shape: int) -> None:
        ids = torch.randint(100, 1000, shape, generator=random)
        with chunked_loss(model):
            model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()

    # A few tokens give the optimizer the same state as many.
    step(1, 8)
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
        step(case.batch_size, case.length)
    quantized = count_parameters(model).quantized * getattr(torch, dtype).itemsize
    return Step(
        tensor_bytes(model).total,
        gradients,
        sum(tensor.nbytes for tensor in state),
        live.peak,
        quantized / float_bytes,
        measure.peak_resident() - before,
    )


def failures(predicted: Step, found: Step) -> list[str]:
    """Return what of a prediction does not hold, empty when all does."""
    wrong = [
        f"{name}: {one:,} predicted, {other:,} found"
        for name, one, other in zip(
            ("weights", "gradients", "optimizer"), predicted.lasting, found.lasting, strict=True
        )
        if one != other
    ]
    if abs(predicted.quantized_share - found.quantized_share) > 1e-9:
        wrong.append(f"share quantized: {predicted.quantized_share:.4f} predicted, {found.quantized_share:.4f} found")
    if abs(predicted.peak / found.peak - 1) > 0.1:
        wrong.append(f"peak: {predicted.peak:,} predicted, {found.peak:,} found")
    return wrong


def _predict(arguments: tuple[str, Case]) -> Step:
    return predict(*arguments)


def _run(arguments: tuple[str, Case]) -> Step:
    torch.set_num_threads(1)
    return run(*arguments)


def compare(folder: str, cases: Sequence[Case]) -> Iterator[tuple[Case, Step, Step]]:
    """Predict each case and run it, in a process of its own because the peak of resident memory never falls.

    Yields:
        The case, what was predicted and what was found.
    """
    context = multiprocessing.get_context("forkserver")
    # What every case needs is imported once, before the processes part.
    context.set_forkserver_preload(
        ["transformers.models.llama.modeling_llama", "peft", "lora_plugins.trainer.chunked_loss"]
    )
    jobs = [(folder, case) for case in cases]
    with context.Pool(1) as planner, context.Pool(1, maxtasksperchild=1) as runner:
        predicted = planner.imap(_predict, jobs)
        found = runner.imap(_run, jobs, chunksize=1)
        yield from zip(cases, predicted, found, strict=True)


def main(arguments: Sequence[str] | None = None) -> int:
    """Compare and print; the exit code is 1 when something is not exact or a peak is off by more than ten per cent."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bases", nargs="+", choices=list(BASES), default=list(BASES))
    parser.add_argument("--batch-sizes", nargs="+", type=int, default=[1, 3])
    parser.add_argument("--lengths", nargs="+", type=int, default=[48, 96])
    parser.add_argument("--write", action="store_true", help="renew these rows on the docs page")
    options = parser.parse_args(arguments)
    from lora_plugins.commands.demo.model import demo_model

    cases = [
        Case(base, checkpointing, batch_size, length)
        for base, batch_size, length, checkpointing in itertools.product(
            options.bases, options.batch_sizes, options.lengths, (False, True)
        )
    ]
    wrong = 0
    for case, predicted, found in compare(str(demo_model()), cases):
        print(_line(case, predicted, found), flush=True)
        wrong += bool(failures(predicted, found))
        if options.write:
            _write({**asdict(case), "predicted": asdict(predicted), "measured": asdict(found)})
    return 1 if wrong else 0


def _line(case: Case, predicted: Step, found: Step) -> str:
    lasting = "as predicted" if predicted.lasting == found.lasting else "; ".join(failures(predicted, found))
    return (
        f"{case.base:13} batch {case.batch_size} length {case.length:4} "
        f"checkpointing {'on ' if case.checkpointing else 'off'}: weights, gradients, optimizer {lasting}; "
        f"peak predicted {predicted.peak / 1e6:7.1f} MB, found {found.peak / 1e6:7.1f} MB "
        f"({predicted.peak / found.peak - 1:+.1%}, of the activations "
        f"{(predicted.peak - found.peak) / found.activations:+.1%}), "
        f"resident memory +{found.resident_rise / 1e6:.0f} MB"
    )


def _write(row: dict[str, Any]) -> None:
    """Put a row in the place of the one of the same case."""

    def place(row: dict[str, Any]) -> tuple[int, int, int, bool]:
        return list(BASES).index(row["base"]), row["batch_size"], row["length"], row["checkpointing"]

    known = measure.recorded().get("plan_memory", {}).get("rows", [])
    rows = sorted([*(other for other in known if place(other) != place(row)), row], key=place)
    command = "python benchmarks/plan_memory.py --write"
    section = {"command": command, "hardware": measure.hardware(), "versions": measure.versions(), "rows": rows}
    measure.record("plan_memory", section)


if __name__ == "__main__":
    sys.exit(main())

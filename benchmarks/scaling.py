"""How the time and memory of a step grow with layers, width, rank, sequence and batch, and where it is not linear.

Small Llamas with random weights, int8 base, one dimension growing at a time.

    python benchmarks/scaling.py            prints
    python benchmarks/scaling.py --write    renews the docs page
"""

from __future__ import annotations

import argparse
import itertools
import math
import sys
from dataclasses import dataclass, replace
from typing import Any

import page
from measure import Clock, hardware, record, versions

REPEATS = 5

#: From this much more (or less) time per unit on, growth is called not linear.
_TOLERANCE = 0.15


@dataclass(frozen=True)
class Point:
    """One model and batch."""

    layers: int = 4
    width: int = 512
    rank: int = 8
    sequence: int = 256
    batch: int = 2


GROWTH: dict[str, tuple[int, ...]] = {
    "layers": (2, 4, 8, 16),
    "width": (256, 512, 1024, 2048),
    "rank": (4, 8, 16, 32, 64, 128),
    "sequence": (128, 256, 512, 1024, 2048),
    "batch": (1, 2, 4, 8, 16),
}


def make_model(point: Point) -> Any:
    """A Llama with a quantized base and adapters on every linear layer of its blocks."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from lora_plugins import prepare_model

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=8192,
        hidden_size=point.width,
        intermediate_size=3 * point.width,
        num_hidden_layers=point.layers,
        num_attention_heads=point.width // 64,
        num_key_value_heads=point.width // 64,
        max_position_embeddings=4096,
    )
    model = LlamaForCausalLM(config).to(torch.bfloat16)
    return prepare_model(model, r=point.rank, quantization="int8", target_modules="all-linear").train()


def measure(point: Point) -> dict[str, Any]:
    """Median seconds of a forward and backward pass, and most bytes of tensors that were alive in one."""
    import torch

    model = make_model(point)
    ids = torch.randint(0, 8192, (point.batch, point.sequence))

    def step() -> None:
        from lora_plugins.trainer.chunked_loss import chunked_loss

        with chunked_loss(model):
            model(input_ids=ids, labels=ids).loss.backward()
        model.zero_grad()

    step()
    seconds = []
    for _ in range(REPEATS):
        clock = Clock()
        step()
        seconds.append(clock.read()[0])
    count = sum(p.numel() for p in model.parameters())
    return {"seconds": sorted(seconds)[REPEATS // 2], "live_mib": _live_bytes(step) / 2**20, "parameters": count}


def _live_bytes(step: Any) -> int:
    """Most bytes that a step allocated and had not freed yet."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as run:
        step()
    live = peak = 0
    for event in sorted(run.profiler.kineto_results.events(), key=lambda event: event.start_ns()):
        if event.name() == "[memory]":
            live += event.nbytes()
            peak = max(peak, live)
    return peak


def grow(dimension: str) -> list[dict[str, Any]]:
    """Measure one dimension from its smallest to its largest value."""
    points: list[dict[str, Any]] = []
    for value in GROWTH[dimension]:
        found = {"value": value, "growth": None, **measure(replace(Point(), **{dimension: value}))}
        if points:
            ratio = found["seconds"] / points[-1]["seconds"]
            found["growth"] = math.log(ratio) / math.log(value / points[-1]["value"])
        points.append(found)
        print(f"{dimension} {value}: {found['seconds']:.3f} s, {found['live_mib']:.0f} MiB", file=sys.stderr)
    return points


def findings(points: dict[str, list[dict[str, Any]]]) -> list[str]:
    """A sentence for each dimension: from where to where doubling it doubles the time."""
    return [f"{dimension}: {_finding(series)}" for dimension, series in points.items()]


def _finding(series: list[dict[str, Any]]) -> str:
    parts = []
    for before, after in itertools.pairwise(series):
        growth = after["growth"]
        kind = "linear" if abs(growth - 1) <= _TOLERANCE else "less than linear" if growth < 1 else "more than linear"
        if parts and parts[-1][0] == kind:
            parts[-1][2] = after["value"]
        else:
            parts.append([kind, before["value"], after["value"]])
    return ", then ".join(f"{kind} from {start} to {end}" for kind, start, end in parts)


def main() -> None:
    """Measure, print and, where asked, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=GROWTH, default=list(GROWTH), help="dimensions to measure")
    parser.add_argument("--write", action="store_true", help="write the results and the docs page")
    options = parser.parse_args()
    base = Point()
    points = {dimension: grow(dimension) for dimension in options.only}
    results = {
        "command": " ".join(["python benchmarks/scaling.py", *sys.argv[1:]]),
        "hardware": hardware(),
        "versions": versions(),
        "work": f"One dimension grows at a time from {base.layers} layers of width {base.width}, rank {base.rank} on "
        f"every linear layer, {base.batch} rows of {base.sequence} tokens; forward and backward pass, int8 base. Live "
        "memory is what the pass allocates beyond the model. An exponent of 1 means that doubling the dimension "
        "doubles the time.",
        "points": points,
        "findings": findings(points),
    }
    print("\n".join(page.scaling_section(results)))
    if options.write:
        record("scaling", results)


if __name__ == "__main__":
    main()

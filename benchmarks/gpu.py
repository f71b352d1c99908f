"""One GPU: is it right, is it fast and small, is the plan true? No network.

Models of random weights are made on the device from published shapes; tokens are synthetic. Three questions:

* right? For int8, nf4 and float: the fused branch against PEFT's, the loss in pieces against the whole, gradients, one
  checkpoint saved, resumed and reloaded, liveness, and the published count of BLOOMZ-7B1 through a Trainer;
* fast and small? The recipe, PEFT in bfloat16 and ours in int8 (by bitsandbytes' products in int8, and by dequantized
  ones), nf4 and bfloat16, each in a process of its own, in turns: tokens a second and peak memory at 4 x 512 and
  1 x 2048 tokens, with and without gradient checkpointing;
* true? What `plan` says about memory against what was measured.

It begins no new part after eight minutes (``--minutes``).

Beside torch, transformers, peft and accelerate it needs wheels only: ``pip download bitsandbytes datasets pluggy …``.

    python benchmarks/gpu.py                  prints the tables
    python benchmarks/gpu.py --write          renews the docs page; --json FILE writes the results there
    python benchmarks/gpu.py --tiny           everything with tiny shapes on whatever device there is, in two minutes
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gpu_parts
import page
from gpu_parts import BACKENDS, CONTENDERS, PUBLISHED, SHAPES
from measure import hardware, record, run_child, versions


@dataclass(frozen=True)
class Job:
    """One process: a part, a shape, and a backend or contender."""

    part: str
    shape: str
    name: str

    def arguments(self, options: argparse.Namespace) -> list[str]:
        """Return the command line of its process."""
        given = ["--part", self.part, "--shape", self.shape, "--name", self.name, f"--steps={options.steps}"]
        return given + ["--tiny"] * options.tiny


def list_jobs(options: argparse.Namespace) -> Iterator[Job]:
    """Yield the processes, those first that would be missed most when time runs out."""
    first = options.shapes[0]
    for number in range(options.rounds):
        # Every other round goes backwards, so that a card that gets warmer favours nobody.
        names = list(options.only) if number % 2 == 0 else list(reversed(options.only))
        yield from (Job("speed", first, name) for name in names)
        if number == 0:
            yield from (Job("right", first, name) for name in BACKENDS)
            yield Job("plan", first, "")
    for shape in options.shapes[1:]:
        yield from (Job("speed", shape, name) for name in options.only)
        yield Job("plan", shape, "")
        yield from (Job("right", shape, name) for name in BACKENDS)


def run_jobs(options: argparse.Namespace) -> tuple[list[tuple[Job, dict[str, Any]]], list[str]]:
    """Run the processes until time is up; return what they found, and the names of those that were left out."""
    end = time.monotonic() + 60 * options.minutes
    longest: dict[str, float] = {}
    done, left = [], []
    for job in list_jobs(options):
        begin = time.monotonic()
        label = " ".join(filter(None, (job.part, job.shape, job.name)))
        # A part that hasn't run yet is taken to be as long as the longest other one.
        if begin + longest.get(job.part, max(longest.values(), default=0.0)) > end:
            left.append(label)
            continue
        try:
            found = run_child(Path(__file__), job.arguments(options))
        except RuntimeError as error:
            # One contender that fails is a result; the others go on.
            found = {"error": str(error).splitlines()[-1][:200]}
        seconds = time.monotonic() - begin
        longest[job.part] = max(longest.get(job.part, 0.0), seconds)
        done.append((job, found))
        print(
            f"{label}: {seconds:.0f} s{' ' + found['error'] if 'error' in found else ''}", file=sys.stderr, flush=True
        )
    return done, left


def summarize(done: list[tuple[Job, dict[str, Any]]]) -> dict[str, Any]:
    """Return the results by shape: checks by backend, contenders with their settings, and the plan's bytes."""
    shapes: dict[str, Any] = {}
    for job, found in done:
        shape = shapes.setdefault(job.shape, {"right": {}, "speed": {}, "plan": {}, "failed": {}})
        if "error" in found:
            shape["failed"][f"{job.part} {job.name}".strip()] = found["error"]
        elif job.part == "plan":
            shape["plan"] = found
        elif job.part == "right":
            shape["right"][job.name] = found["checks"]
        else:
            _add_round(shape["speed"].setdefault(job.name, {"settings": {}}), found)
    return shapes


def _add_round(contender: dict[str, Any], found: dict[str, Any]) -> None:
    contender |= {key: found[key] for key in ("trainable", "total", "prepared")}
    for name, setting in found["settings"].items():
        kept = contender["settings"].setdefault(name, {"round_seconds": [], "allocated": 0, "reserved": 0})
        if "error" in setting:
            kept["error"] = setting["error"]
            continue
        kept["round_seconds"].append(statistics.median(setting["seconds"]))
        kept |= {key: max(kept[key], setting[key]) for key in ("allocated", "reserved")}


def run_part(options: argparse.Namespace) -> dict[str, Any]:
    """Do the work of one process."""
    if options.part == "right":
        return gpu_parts.check_backend(options.shape, options.name, tiny=options.tiny)
    if options.part == "plan":
        return gpu_parts.predict(options.shape, tiny=options.tiny)
    return gpu_parts.measure_contender(options.shape, options.name, tiny=options.tiny, steps=options.steps)


def find_failures(results: dict[str, Any]) -> list[str]:
    """Return what is not as it must be: checks that don't hold, counts that are not the published ones, failures."""
    found = []
    for shape, result in results["shapes"].items():
        found += [f"{shape}: {name}: {error}" for name, error in result["failed"].items()]
        for backend, checks in result["right"].items():
            found += [
                f"{shape}, {backend}: {check['name']} is {check['found']:.2g}, above {check['limit']:.2g}"
                for check in checks
                if not check["holds"]
            ]
        for name, contender in result["speed"].items():
            counts = contender["trainable"], contender["total"]
            if not results["settings"]["tiny"] and shape in PUBLISHED and counts != PUBLISHED[shape]:
                found.append(f"{shape}, {name}: {counts[0]:,} of {counts[1]:,} trained, not as published")
    return found


def _parse(words: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiny", action="store_true", help="tiny shapes, on whatever device there is")
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=list(SHAPES), help="the first is measured most")
    parser.add_argument("--only", nargs="+", choices=CONTENDERS, default=list(CONTENDERS), help="contenders to run")
    parser.add_argument("--rounds", type=int, default=2, help="processes for each contender of the first shape")
    parser.add_argument("--steps", type=int, default=4, help="steps of a setting, besides the first")
    parser.add_argument("--minutes", type=float, default=8.0, help="no process is begun that would end later")
    parser.add_argument("--write", action="store_true", help="write the results and the docs page")
    parser.add_argument("--json", type=Path, help="write the results into this file")
    parser.add_argument("--part", choices=("right", "speed", "plan"), help=argparse.SUPPRESS)
    parser.add_argument("--shape", choices=SHAPES, help=argparse.SUPPRESS)
    parser.add_argument("--name", help=argparse.SUPPRESS)
    return parser.parse_args(words)


def main(words: list[str] | None = None) -> int:
    """Run everything, print the tables; the exit code is 1 if something is not right."""
    options = _parse(words)
    if options.part:
        print(json.dumps(run_part(options)))
        return 0
    machine = hardware()
    if machine["gpu"] is None and not options.tiny:
        print("There is no GPU here. Use --tiny to try the program.", file=sys.stderr)
        return 2
    done, left = run_jobs(options)
    results = {
        "command": " ".join(["python benchmarks/gpu.py", *(sys.argv[1:] if words is None else words)]),
        "hardware": machine,
        "versions": versions(),
        "settings": {key: getattr(options, key) for key in ("tiny", "rounds", "steps", "minutes")} | gpu_parts.LORA,
        "shapes": summarize(done),
        "left_out": left,
    }
    print("\n".join(page.gpu_tables(results)))
    if options.json:
        options.json.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    if options.write and not options.tiny:
        record("gpu", results)
    failures = find_failures(results)
    print("\n".join(failures), file=sys.stderr)
    return 1 if failures else 0


if __name__ == "__main__":
    raise SystemExit(main())

"""How fast this machine multiplies matrices, and what share of that a training step reaches.

python benchmarks/gemm.py            prints
python benchmarks/gemm.py --write    renews the docs page
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import page
from measure import Clock, hardware, record, run_child, versions, write_rows
from training import float_dtype

REPEATS = 7

#: Rows, outputs, inputs: a large square, and the products of a SmolLM2 step of 512 tokens.
SHAPES = ((2048, 2048, 2048), (512, 576, 576), (512, 1536, 576), (512, 576, 1536), (256, 49152, 576))


def best_seconds(function: Callable[[], Any]) -> float:
    """Best wall time of several calls."""
    function()
    times = []
    for _ in range(REPEATS):
        clock = Clock()
        function()
        times.append(clock.read()[0])
    return min(times)


def limits(shape: tuple[int, int, int]) -> dict[str, Any]:
    """Giga-operations a second for one shape in each dtype."""
    import torch

    rows, outputs, inputs = shape
    work = 2 * rows * outputs * inputs / 1e9
    found: dict[str, Any] = {"shape": list(shape)}
    for dtype in (torch.float32, torch.bfloat16):
        x, weight = torch.randn(rows, inputs).to(dtype), torch.randn(outputs, inputs).to(dtype)
        seconds = best_seconds(lambda x=x, weight=weight: torch.nn.functional.linear(x, weight))  # type: ignore[misc]
        found[str(dtype).removeprefix("torch.")] = work / seconds
    x = torch.randint(-127, 127, (rows, inputs), dtype=torch.int8)
    weight = torch.randint(-127, 127, (outputs, inputs), dtype=torch.int8)
    found["int8"] = work / best_seconds(lambda: torch._int_mm(x, weight.T))
    return found


def step() -> dict[str, Any]:
    """One step of ours in int8: seconds, and operations of its matrix products."""
    with tempfile.TemporaryDirectory() as folder:
        write_rows(Path(folder), 256)
        script = Path(__file__).with_name("training.py")
        arguments = ["--contender", "ours-int8", "--data", folder, "--steps", "6", "--count-operations"]
        return run_child(script, arguments)


def main() -> None:
    """Measure, print and, where asked, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="write the results and the docs page")
    options = parser.parse_args()
    shapes = [limits(shape) for shape in SHAPES]
    run = step()
    seconds = sorted(run["wall"])[len(run["wall"]) // 2]
    reached = run["operations"] / seconds / 1e9
    # What the products of a step would take at the speed of each shape is close to that of the middle one.
    kind = float_dtype()
    limit = sorted(shape[kind] for shape in shapes[1:])[2]
    share = (
        f"A step of lora-plugins in int8 (2 rows of 256 tokens) has {run['operations'] / 1e9:.0f}·10⁹ operations in "
        f"matrix products and takes {seconds:.2f} s: {reached:.0f}·10⁹ a second, {100 * reached / limit:.0f} % of the "
        f"{limit:.0f}·10⁹ that these shapes reach in {kind}. Products in int8 are not used: they would need "
        "activations in int8, which changes the results."
    )
    command = " ".join(["python benchmarks/gemm.py", *sys.argv[1:]])
    results = {"command": command, "hardware": hardware(), "versions": versions(), "shapes": shapes, "share": share}
    print("\n".join(page.gemm_section(results)))
    if options.write:
        record("gemm", results)


if __name__ == "__main__":
    main()

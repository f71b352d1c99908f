"""What the benchmarks share: the machine, memory and time of this process, text as rows of tokens."""

from __future__ import annotations

import contextlib
import json
import os
import platform
import resource
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]

#: What the programs measured last, by program; `page.py` makes the docs page of it.
RESULTS = ROOT / "docs" / "benchmarks.json"

#: Flags of a CPU that decide how fast it multiplies matrices.
_FLAGS = ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "amx_bf16", "amx_int8")


def hardware() -> dict[str, Any]:
    """Describe this machine without naming it."""
    import torch

    text = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").is_file() else ""
    fields = dict(line.split(":", 1) for line in text.splitlines() if ":" in line)
    flags = next((value.split() for key, value in fields.items() if key.strip() == "flags"), [])
    model = next((value.strip() for key, value in fields.items() if key.strip() == "model name"), platform.machine())
    pages = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return {
        "cpu": model,
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "flags": [flag for flag in _FLAGS if flag in flags],
        "memory_gib": round(pages / 2**30),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "python": platform.python_version(),
    }


def versions() -> dict[str, str]:
    """Releases of the libraries that are compared, of those that are installed."""
    from importlib.metadata import PackageNotFoundError, version

    found = {}
    for name in ("torch", "transformers", "peft", "accelerate", "bitsandbytes", "trl"):
        with contextlib.suppress(PackageNotFoundError):
            found[name] = version(name)
    return found


def resident() -> int:
    """Bytes of memory that this process holds now."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def peak_resident() -> int:
    """Most bytes of memory that this process has held."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


@dataclass
class Clock:
    """Wall and CPU time of this process since it was made."""

    wall: float = 0.0
    cpu: float = 0.0

    def __post_init__(self) -> None:
        self.wall, self.cpu = time.perf_counter(), time.process_time()

    def read(self) -> tuple[float, float]:
        """Seconds of wall time and of CPU time."""
        return time.perf_counter() - self.wall, time.process_time() - self.cpu


def run_child(script: Path, arguments: Sequence[str]) -> dict[str, Any]:
    """Run a script in a new process and return the JSON object in the last line that it prints.

    Raises:
        RuntimeError: It failed; the message has the end of what it said.
    """
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "PYTHONWARNINGS": "ignore"}
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    done = subprocess.run([sys.executable, str(script), *arguments], capture_output=True, text=True, env=environment)  # noqa: S603 - our own interpreter and arguments
    if done.returncode:
        raise RuntimeError(f"{script.name} {' '.join(arguments)} failed:\n{done.stderr[-2000:]}")
    result: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return result


def write_rows(folder: Path, length: int) -> None:
    """Write real text as rows of ``length`` tokens: ``train.npy`` and ``held_out.npy``, each ``[rows, length]``.

    The text is the demo's: functions of Python's standard library with their summaries; no module is in both.
    """
    import numpy as np
    from transformers import AutoTokenizer

    from lora_plugins.commands.demo.dataset import collect_examples, split_examples
    from lora_plugins.commands.demo.model import demo_model

    tokenizer = AutoTokenizer.from_pretrained(demo_model())
    for name, examples in zip(("train", "held_out"), split_examples(collect_examples()), strict=True):
        ids: list[int] = []
        for example in examples:
            ids += tokenizer(f"{example.source}\n# {example.summary}\n", add_special_tokens=False)["input_ids"]
            ids.append(tokenizer.eos_token_id)
        rows = len(ids) // length
        np.save(folder / f"{name}.npy", np.array(ids[: rows * length], dtype=np.int32).reshape(rows, length))


def recorded() -> dict[str, Any]:
    """Return what the programs have measured so far, by program."""
    return json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.is_file() else {}


def record(section: str, results: dict[str, Any]) -> None:
    """Put the results of one program among the committed ones and renew the docs page."""
    import page

    known = recorded()
    known[section] = results
    RESULTS.write_text(json.dumps(_rounded(known), indent=1, sort_keys=True) + "\n", encoding="utf-8")
    page.write()


def _rounded(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _rounded(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_rounded(item) for item in value]
    return float(f"{value:.5g}") if isinstance(value, float) else value

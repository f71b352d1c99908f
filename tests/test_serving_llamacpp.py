"""llama.cpp with base and adapter as GGUF computes what transformers does; run by `make test-serving`."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy
import pytest
import served
import torch

from lora_plugins import export_adapter

HERE = Path(__file__).parent

#: Folder with `llama_cpp_py_sync`, and llama.cpp's source folder.
LIBRARY, SOURCE = os.environ.get("LLAMA_CPP_LIBRARY"), os.environ.get("LLAMA_CPP_SOURCE")

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not (LIBRARY and SOURCE), reason="needs llama.cpp: run `make test-serving`"),
]

IDS = [1, *range(3, 40, 2), 7, 7, 90]


def run(*arguments: str) -> None:
    done = subprocess.run([sys.executable, *arguments], capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.parametrize("case", list(served.cases()))
def test_llama_cpp_computes_the_logits_of_transformers(case: str, tmp_path: Path) -> None:
    family, changes = served.cases()[case]
    model = served.write(family, tmp_path, **changes)
    export_adapter(tmp_path / "adapter", tmp_path / "adapter.gguf", "gguf", base=tmp_path / "base")
    run(str(HERE / "llamacpp_convert.py"), str(SOURCE), str(tmp_path / "base"), str(tmp_path / "base.gguf"))
    base = str(tmp_path / "base.gguf")
    jobs = [
        {"base": base, "adapter": adapter, "ids": IDS, "out": str(tmp_path / f"{name}.npy")}
        for name, adapter in (("bare", None), ("adapted", str(tmp_path / "adapter.gguf")))
    ]
    (tmp_path / "jobs.json").write_text(json.dumps(jobs))
    run(str(HERE / "llamacpp_run.py"), str(LIBRARY), str(tmp_path / "jobs.json"))
    ids = torch.tensor([IDS])
    with torch.no_grad():
        wanted = model(input_ids=ids).logits[0]
        with model.disable_adapter():
            bare = model(input_ids=ids).logits[0]
    made = {name: torch.from_numpy(numpy.load(tmp_path / f"{name}.npy")) for name in ("bare", "adapted")}
    distance = {
        "bare": float((made["bare"] - bare).abs().max()),
        "adapted": float((made["adapted"] - wanted).abs().max()),
        "effect": float((wanted - bare).abs().max()),
    }
    print(f"\n{case}: largest difference {distance}")
    assert distance["bare"] < 1e-2
    assert distance["effect"] > 0.1
    assert distance["adapted"] < 1e-2

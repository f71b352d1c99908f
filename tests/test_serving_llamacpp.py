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
from lora_plugins.serving import gguf_families

HERE = Path(__file__).parent

#: Shared library with llama.cpp's C interface, and llama.cpp's source folder, whose scripts convert the base.
LIBRARY, SOURCE = os.environ.get("LLAMA_CPP_LIBRARY"), os.environ.get("LLAMA_CPP_SOURCE")

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not (LIBRARY and SOURCE), reason="needs llama.cpp: run `make test-serving`"),
]

IDS = [1, *range(3, 40, 2), 7, 7, 90]


def run(*arguments: str) -> None:
    done = subprocess.run([sys.executable, *arguments], capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]


def compute(folder: Path, adapters: dict[str, Path | None]) -> dict[str, torch.Tensor]:
    """Logits in llama.cpp of the base in ``folder``, with and without adapters, by name."""
    base = folder / "base.gguf"
    run(str(HERE / "llamacpp_convert.py"), str(SOURCE), str(folder / "base"), str(base))
    jobs = [
        {"base": str(base), "adapter": adapter and str(adapter), "ids": IDS, "out": str(folder / f"{name}.npy")}
        for name, adapter in adapters.items()
    ]
    (folder / "jobs.json").write_text(json.dumps(jobs))
    run(str(HERE / "llamacpp_run.py"), str(LIBRARY), str(folder / "jobs.json"))
    return {name: torch.from_numpy(numpy.load(folder / f"{name}.npy")) for name in adapters}


@pytest.mark.parametrize("case", list(served.cases()))
def test_llama_cpp_computes_the_logits_of_transformers(case: str, tmp_path: Path) -> None:
    family, changes = served.cases()[case]
    model = served.write(family, tmp_path, **changes)
    export_adapter(tmp_path / "adapter", tmp_path / "a.gguf", "gguf", base=tmp_path / "base")
    made = compute(tmp_path, {"bare": None, "adapted": tmp_path / "a.gguf"})
    ids = torch.tensor([IDS])
    with torch.no_grad():
        wanted = model(input_ids=ids).logits[0]
        with model.disable_adapter():
            bare = model(input_ids=ids).logits[0]
    distance = {
        "bare": float((made["bare"] - bare).abs().max()),
        "adapted": float((made["adapted"] - wanted).abs().max()),
        "effect": float((wanted - bare).abs().max()),
    }
    print(f"\n{case}: largest difference {distance}")
    assert distance["bare"] < 1e-2
    assert distance["effect"] > 0.5
    assert distance["adapted"] < 1e-2


def test_a_wrong_order_of_rows_shows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The comparison above sees what it is for: queries and keys in transformers' order."""
    model = served.write("llama", tmp_path)
    monkeypatch.setitem(gguf_families.FAMILIES, "llama", gguf_families.Family("llama"))
    export_adapter(tmp_path / "adapter", tmp_path / "a.gguf", "gguf", base=tmp_path / "base")
    made = compute(tmp_path, {"wrong": tmp_path / "a.gguf"})["wrong"]
    with torch.no_grad():
        wanted = model(input_ids=torch.tensor([IDS])).logits[0]
    print(f"\nunpermuted: largest difference {float((made - wanted).abs().max())}")
    assert float((made - wanted).abs().max()) > 0.1

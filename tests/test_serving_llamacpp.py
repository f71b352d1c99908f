"""llama.cpp with base and adapter as GGUF computes what transformers does; run by `make test-serving`."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy
import pytest
import served
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from lora_plugins import export_adapter
from lora_plugins.commands.demo.dataset import Example, prompt_text
from lora_plugins.commands.demo.model import demo_model
from lora_plugins.serving import gguf_families

HERE = Path(__file__).parent

#: Shared library with llama.cpp's C interface, and llama.cpp's source folder, whose scripts convert the base.
LIBRARY, SOURCE = os.environ.get("LLAMA_CPP_LIBRARY"), os.environ.get("LLAMA_CPP_SOURCE")

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not (LIBRARY and SOURCE), reason="needs llama.cpp: run `make test-serving`"),
]

IDS = [1, *range(3, 40, 2), 7, 7, 90]


def run(*arguments: str) -> str:
    done = subprocess.run([sys.executable, *arguments], capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def compute(folder: Path, jobs: Mapping[str, tuple[Path | None, Sequence[int]]]) -> dict[str, torch.Tensor]:
    """Logits in llama.cpp of the base in ``folder``: name -> adapter and token ids."""
    base = folder / "base.gguf"
    run(str(HERE / "llamacpp_convert.py"), str(SOURCE), str(folder / "base"), str(base))
    written = [
        {"base": str(base), "adapter": adapter and str(adapter), "ids": list(ids), "out": str(folder / f"{name}.npy")}
        for name, (adapter, ids) in jobs.items()
    ]
    (folder / "jobs.json").write_text(json.dumps(written))
    run(str(HERE / "llamacpp_run.py"), str(LIBRARY), str(folder / "jobs.json"))
    return {name: torch.from_numpy(numpy.load(folder / f"{name}.npy")) for name in jobs}


@pytest.mark.parametrize("case", list(served.cases()))
def test_llama_cpp_computes_the_logits_of_transformers(case: str, tmp_path: Path) -> None:
    family, changes = served.cases()[case]
    model = served.write(family, tmp_path, **changes)
    export_adapter(tmp_path / "adapter", tmp_path / "a.gguf", "gguf", base=tmp_path / "base")
    made = compute(tmp_path, {"bare": (None, IDS), "adapted": (tmp_path / "a.gguf", IDS)})
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
    made = compute(tmp_path, {"wrong": (tmp_path / "a.gguf", IDS)})["wrong"]
    with torch.no_grad():
        wanted = model(input_ids=torch.tensor([IDS])).logits[0]
    print(f"\nunpermuted: largest difference {float((made - wanted).abs().max())}")
    assert float((made - wanted).abs().max()) > 0.1


def run_demo(folder: Path) -> list[dict[str, str]]:
    """Run the demo as its command does, on its model in float32; returns what it shows of three functions."""
    AutoModelForCausalLM.from_pretrained(demo_model(), dtype=torch.float32).save_pretrained(folder / "base")
    AutoTokenizer.from_pretrained(demo_model()).save_pretrained(folder / "base")
    options = ["--quantization", "none", "--steps", "12", "--output", str(folder / "demo"), "--json"]
    shown = run("-m", "lora_plugins", "demo", "--model", str(folder / "base"), *options)
    samples: list[dict[str, str]] = json.loads(shown)["samples"]
    return samples


@pytest.mark.timeout(1800)
def test_the_demos_adapter_writes_the_demos_summaries(tmp_path: Path) -> None:
    """Token by token: the likeliest one in llama.cpp is the one that the demo's model wrote, up to the end."""
    samples = run_demo(tmp_path)
    adapter = tmp_path / "demo" / "adapter"
    tokenizer: Any = AutoTokenizer.from_pretrained(tmp_path / "base")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.float32)
    model: Any = PeftModel.from_pretrained(base, adapter).eval()
    texts, lengths, wanted, bare = {}, {}, {}, {}
    for index, sample in enumerate(samples):
        text = prompt_text(Example(sample["module"], sample["source"], sample["author"]), tokenizer)
        prompt = tokenizer(text, return_tensors="pt", add_special_tokens=False)
        with torch.inference_mode():
            ids = model.generate(**prompt, max_new_tokens=24, do_sample=False, pad_token_id=tokenizer.pad_token_id)
            wanted[str(index)] = model(ids).logits[0]
            with model.disable_adapter():
                bare[str(index)] = model(ids).logits[0]
        texts[str(index)], lengths[str(index)] = ids[0], prompt["input_ids"].shape[1]
        answer = tokenizer.decode(ids[0, lengths[str(index)] :], skip_special_tokens=True)
        assert " ".join(answer.split()) == sample["after"] != sample["before"]
    export_adapter(adapter, tmp_path / "a.gguf", "gguf", base=tmp_path / "base")
    made = compute(tmp_path, {name: (tmp_path / "a.gguf", ids.tolist()) for name, ids in texts.items()})
    equal = total = 0
    for name, ids in texts.items():
        likeliest = made[name].argmax(-1)[lengths[name] - 1 : -1]
        equal += int((likeliest == ids[lengths[name] :]).sum())
        total += len(likeliest)
        print(f"\nllama.cpp: {tokenizer.decode(likeliest, skip_special_tokens=True)!r}")
    distance = max(float((made[name] - wanted[name]).abs().max()) for name in texts)
    effect = max(float((wanted[name] - bare[name]).abs().max()) for name in texts)
    print(
        f"{equal} of {total} tokens; largest difference of a logit {distance:.4f}, effect of the adapter {effect:.1f}"
    )
    assert equal == total >= 10
    assert distance < 0.05 < 1 < effect

"""The command ``train`` on a real model, SmolLM2-135M-Instruct, from JSONL to a merged model. Minutes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import twin
from transformers import AutoModelForCausalLM, AutoTokenizer

from lora_plugins import prepare_model
from lora_plugins.commands.demo.model import demo_model
from lora_plugins.errors import DemoError

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def base() -> Path:
    try:
        return demo_model()
    except DemoError as error:
        pytest.skip(str(error))


def answer(model: Any, tokenizer: Any) -> str:
    prompt = tokenizer(twin.PROMPT.format(**twin.dialogues(1, seed=3)[0]), return_tensors="pt")
    output = model.generate(**prompt, max_new_tokens=16, do_sample=False, pad_token_id=tokenizer.eos_token_id)
    return str(tokenizer.decode(output[0, prompt["input_ids"].shape[1] :]))


@pytest.mark.parametrize("merge", ["fp16", "same"])
def test_merged_model_has_the_trained_loss_and_writes_another_text(tmp_path: Path, base: Path, merge: str) -> None:
    twin.write_jsonl(tmp_path / "train.jsonl", twin.dialogues(40, seed=1))
    words = ["--model", str(base), "--dataset", "train.jsonl", "--output_dir", "out", "--chunk-length", "128"]
    settings = ["--max_steps", "8", "--learning_rate", "2e-3", "--logging_steps", "2", "--merge", merge]
    done = subprocess.run(
        [sys.executable, "-m", "lora_plugins", "train", *words, *settings],
        cwd=tmp_path,
        env={**os.environ, "HF_DATASETS_CACHE": str(tmp_path / "cache")},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out" / "model")
    plain = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    before, text = twin.held_out_loss(plain, tokenizer, 8), answer(plain, tokenizer)
    trained = prepare_model(plain, adapter=tmp_path / "out" / "adapter", quantization="int8", compute_dtype="float32")
    adapter = twin.held_out_loss(trained, tokenizer, 8, training_kernels=True)
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "out" / "model", dtype=torch.float32)
    assert adapter < 0.9 * before
    assert twin.held_out_loss(merged, tokenizer, 8) == pytest.approx(adapter, rel=0.01)
    assert answer(merged, tokenizer) != text
    distance = json.loads((tmp_path / "out" / "metrics.json").read_text())["merge"]["distance"]
    assert distance["relative"] < 0.1

"""SageMaker's inference script: the merged model, or base and adapter, with the recipe's sampling.

A request holds `inputs`, a prompt or the columns of the template it was trained with, and optionally `parameters`
for `generate`.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

#: How the recipe samples; a request's `parameters` override it.
SAMPLING = {"do_sample": True, "top_p": 0.9, "temperature": 0.1, "max_new_tokens": 100}


@dataclass
class Served:
    """What answers requests."""

    model: Any
    tokenizer: Any
    template: str | None


def model_fn(model_dir: str, context: Any = None) -> Served:
    """Load what is served.

    With `ADAPTER=org/name@1.2` in the environment it comes from the registry, else it is the merged model in
    `model_dir`, else the adapter in `model_dir/adapter` over its base.
    """
    folder = Path(model_dir)
    reference = os.environ.get("ADAPTER")
    if reference:
        from registry import pull_adapter

        adapter = Path(os.fspath(pull_adapter(reference)))
    else:
        adapter = folder / "adapter"
    recipe = _recipe(adapter) or _recipe(folder)
    if reference or not (folder / "config.json").is_file():
        model, tokenizer = _with_adapter(adapter, recipe)
    else:
        model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
        tokenizer = AutoTokenizer.from_pretrained(folder)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return Served(model.to(device).eval(), tokenizer, recipe.get("template"))


def _recipe(folder: Path) -> dict[str, Any]:
    file = folder / "recipe.json"
    return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}


def _with_adapter(adapter: Path, recipe: dict[str, Any]) -> tuple[Any, Any]:
    from peft import PeftConfig, PeftModel

    base = recipe.get("base") or PeftConfig.from_pretrained(str(adapter)).base_model_name_or_path
    model = AutoModelForCausalLM.from_pretrained(base, dtype="auto")
    return PeftModel.from_pretrained(model, str(adapter)), AutoTokenizer.from_pretrained(base)


def predict_fn(data: dict[str, Any], served: Served, context: Any = None) -> dict[str, str]:
    """Answer a request."""
    inputs = data["inputs"]
    prompt = inputs if isinstance(inputs, str) else prompt_of(served.template, inputs)
    encoded = served.tokenizer(prompt, return_tensors="pt").to(served.model.device)
    parameters = {**SAMPLING, "pad_token_id": served.tokenizer.pad_token_id, **data.get("parameters", {})}
    with torch.inference_mode():
        output = served.model.generate(
            input_ids=encoded["input_ids"], attention_mask=encoded["attention_mask"], **parameters
        )
    answer = output[0, encoded["input_ids"].shape[1] :]
    return {"generated_text": served.tokenizer.decode(answer, skip_special_tokens=True)}


def prompt_of(template: str | None, columns: dict[str, str]) -> str:
    """The template's text up to its completion, filled with the columns of a request."""
    if not template:
        raise ValueError("The model was trained without a template; send `inputs` as a text.")
    start, _, end = template.replace("\\n", "\n").removesuffix("{eos_token}").rpartition("{")
    if "}" not in end:
        raise ValueError(f"The template {template!r} has no column; send `inputs` as a text.")
    return start.format(**columns)

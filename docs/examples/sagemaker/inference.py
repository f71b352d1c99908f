"""SageMaker's inference script: the merged model, or base and adapter, with the recipe's sampling.

A request holds `inputs` and optionally `parameters` for `generate`. The inputs are a prompt, the columns of the
template that the model was trained with, or a conversation: a list of `role` and `content`.
"""

from __future__ import annotations

import json
import os
import string
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

    With `ADAPTER=org/name@1.2` in the environment it comes from the registry, over the base that the release names or
    over `BASE`, a folder or an id. Else it is the merged model in `model_dir`, else the adapter in `model_dir/adapter`
    over its base.
    """
    folder = Path(model_dir)
    recipe = _recipe(folder / "adapter") or _recipe(folder)
    reference = os.environ.get("ADAPTER")
    if reference:
        model, tokenizer = _from_registry(reference, os.environ.get("BASE"))
    elif (folder / "config.json").is_file():
        model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
        tokenizer = AutoTokenizer.from_pretrained(folder)
    else:
        model, tokenizer = _with_adapter(folder / "adapter", recipe)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return Served(model.to(device).eval(), tokenizer, recipe.get("template"))


def _recipe(folder: Path) -> dict[str, Any]:
    file = folder / "recipe.json"
    return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}


def _from_registry(reference: str, base: str | None) -> tuple[Any, Any]:
    from registry import pull_adapter

    adapter = pull_adapter(reference)
    model = adapter.load(base, dtype="auto")
    if Path(adapter.path, "tokenizer_config.json").is_file():
        # Its vocabulary is not the base's.
        return model, AutoTokenizer.from_pretrained(adapter.path)
    recorded = adapter.manifest.base
    if base is not None:
        return model, AutoTokenizer.from_pretrained(base)
    return model, AutoTokenizer.from_pretrained(recorded.id, revision=recorded.commit or "main")


def _with_adapter(adapter: Path, recipe: dict[str, Any]) -> tuple[Any, Any]:
    from peft import PeftConfig, PeftModel

    base = recipe.get("base") or PeftConfig.from_pretrained(str(adapter)).base_model_name_or_path
    model = AutoModelForCausalLM.from_pretrained(base, dtype="auto")
    return PeftModel.from_pretrained(model, str(adapter)), AutoTokenizer.from_pretrained(base)


def predict_fn(data: dict[str, Any], served: Served, context: Any = None) -> dict[str, str]:
    """Answer a request."""
    encoded = encode(data["inputs"], served).to(served.model.device)
    parameters = {**SAMPLING, "pad_token_id": served.tokenizer.pad_token_id, **data.get("parameters", {})}
    with torch.inference_mode():
        output = served.model.generate(
            input_ids=encoded["input_ids"], attention_mask=encoded["attention_mask"], **parameters
        )
    answer = output[0, encoded["input_ids"].shape[1] :]
    return {"generated_text": served.tokenizer.decode(answer, skip_special_tokens=True).strip()}


def encode(inputs: str | dict[str, str] | list[dict[str, str]], served: Served) -> Any:
    """Tokens of what a request asks, written as in training."""
    if isinstance(inputs, list):
        return served.tokenizer.apply_chat_template(
            inputs, add_generation_prompt=True, return_dict=True, return_tensors="pt"
        )
    prompt = inputs if isinstance(inputs, str) else prompt_of(served.template, inputs, served.tokenizer)
    return served.tokenizer(prompt, return_tensors="pt")


def prompt_of(template: str | None, columns: dict[str, str], tokenizer: Any) -> str:
    """The template's text up to its completion, filled with the columns of a request."""
    if not template:
        raise ValueError("It is not known how prompts were written in training; send `inputs` as a text.")
    if template == "chat":
        raise ValueError("The model was trained on conversations; send `inputs` as a list of `role` and `content`.")
    tokens = {"eos_token": tokenizer.eos_token, "bos_token": tokenizer.bos_token}
    parts = [(literal, name) for literal, name, _, _ in string.Formatter().parse(template.replace("\\n", "\n"))]
    *asked, answer = [index for index, (_, name) in enumerate(parts) if name is not None and name not in tokens]
    missing = [parts[index][1] for index in asked if parts[index][1] not in columns]
    if missing:
        raise ValueError(f"The template {template!r} needs {', '.join(map(str, missing))} in `inputs`.")
    values = {**columns, **tokens}
    filled = [literal + (str(values[name]) if name is not None else "") for literal, name in parts[:answer]]
    # A space before the answer belongs to the answer's first token.
    return ("".join(filled) + parts[answer][0]).rstrip(" ")

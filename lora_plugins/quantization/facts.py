"""How a base is stored, as plain data for manifests and merging."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from lora_plugins.models.wrapping import base_of
from lora_plugins.quantization.formats import read_allowed, read_dequantized, stored_format
from lora_plugins.quantization.request import Quantization, detect_quantization, options_known, unknown_layers
from lora_plugins.text import dtype_name

__all__ = ["FACTS_ATTRIBUTE", "RECORD_ATTRIBUTE", "describe_quantization", "record_facts"]


#: Where a prepared model carries its facts; on the base, and readable through PEFT's wrapper too.
FACTS_ATTRIBUTE = "lora_plugins_facts"
#: Where a prepared model carries the whole record of its preparation, `adapters.records.Preparation`.
RECORD_ATTRIBUTE = "lora_plugins_preparation"


def record_facts(model: nn.Module, share: float | None = None) -> dict[str, Any]:
    """Record on a model how its base is stored, and return the record.

    ``model.lora_plugins_facts`` is a dict that goes into JSON as it is::

        {"quantization": {"name": "int8", "options": {"threshold": 5.0}}, "known": True, "share": 0.8086}

    ``quantization`` is ``None`` for a base in float. ``share`` is the share of all weights that quantized layers and
    stacks hold, 0 to 1; a base in float has none. If ``known`` is true, name and options reproduce the quantization
    of the base (``quantization={"name": …, **options}``); if not, the base was quantized with options, or into layers,
    that no backend here can read. A base whose files are quantized and whose weights transformers dequantized while
    loading is in float, and ``stored`` names the format of the files: ``{"quantization": None, "known": True, "stored":
    "fp8"}``.

    Args:
        model: A prepared model, wrapped or not.
        share: Share of its weights that are quantized, 0 to 1, if it is known.
    """
    base = base_of(model)
    facts = describe_quantization(base)
    if facts["quantization"] is not None and share is not None:
        facts["share"] = round(share, 4)
    setattr(base, FACTS_ATTRIBUTE, facts)
    return facts


def describe_quantization(base: nn.Module) -> dict[str, Any]:
    """Return what `record_facts` writes, for a base model on any device."""
    quantization = detect_quantization(base)
    unknown = unknown_layers(base)
    allowed = read_allowed(base)
    if allowed is not None:
        return {"quantization": {"name": allowed, "options": {}}, "known": False}
    if quantization is not None:
        options, complete = _read_plain_options(quantization)
        known = complete and options_known(base, quantization) and not unknown
        return {"quantization": {"name": quantization.name, "options": options}, "known": known}
    if unknown:
        name = stored_format(base) or next(iter(unknown.values()))
        return {"quantization": {"name": name, "options": {}}, "known": False}
    stored = read_dequantized(base)
    return {"quantization": None, "known": True, **({"stored": stored} if stored else {})}


def _read_plain_options(quantization: Quantization) -> tuple[dict[str, Any], bool]:
    """Return the options as JSON values, and whether none of them is missing."""
    plain: dict[str, Any] = {}
    complete = True
    for name, value in quantization.options.items():
        if name == "skip_modules" and not value:
            continue
        if isinstance(value, torch.dtype):
            plain[name] = dtype_name(value)
        elif _is_plain(value):
            plain[name] = value
        else:
            complete = False
    return plain, complete


def _is_plain(value: Any) -> bool:
    if isinstance(value, (list, tuple)):
        return all(_is_plain(item) for item in value)
    return value is None or isinstance(value, (str, bool, int, float))

"""Steps of the test with bases on a Hub, each in a process of its own: huggingface_hub reads its endpoint at import."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from adapters import adapted
from peft import AutoPeftModelForCausalLM, PeftModel
from transformers import AutoModelForCausalLM

IDS = torch.arange(1, 9)[None]


def logits(model: Any) -> list[float]:
    with torch.no_grad():
        values: list[float] = model.eval()(IDS).logits.flatten().tolist()
    return values


def push(_: Path) -> Any:
    """Train on the base of the Hub, in what state it is now, and publish."""
    from registry import push_adapter

    model = adapted(AutoModelForCausalLM.from_pretrained("org/base"))
    done = push_adapter(model, "org/name", version="1.2.0")
    base = done.manifest.base
    return {"base": base.id, "commit": base.commit, "logits": logits(model)}


def use(folder: Path) -> Any:
    """Load it in every way that people have."""
    from registry import pull_adapter

    adapter = pull_adapter("org/name")
    identity = adapter.check("org/base").identity
    # Verified; the base comes at the commit that it was trained on.
    loaded = logits(adapter.load())
    # With PEFT and without this package.
    base = AutoModelForCausalLM.from_pretrained(folder)
    plain = logits(PeftModel.from_pretrained(base, "org/name", revision="v1.2.0"))
    # PEFT's auto class takes the commit of the base from the configuration, too.
    auto = logits(AutoPeftModelForCausalLM.from_pretrained(adapter))
    return {"identity": identity, "loaded": loaded, "plain": plain, "auto": auto}


STEPS: dict[str, Callable[[Path], Any]] = {"push": push, "use": use}

if __name__ == "__main__":
    print(json.dumps(STEPS[sys.argv[1]](Path(sys.argv[2]))))

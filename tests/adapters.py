"""Small adapters, as PEFT writes them and as the registry hands them over, for the tests of the registry."""

from __future__ import annotations

import json
import shutil
import struct
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn

from registry.publishing.draft import make_release
from registry.publishing.source import collect
from registry.pulling.adapter import Adapter


def adapted(base: Any, seed: int = 3, **lora: Any) -> PeftModel:
    """A model with adapters that change something: every B has values, as after training."""
    fields: dict[str, Any] = {"r": 4, "target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM", **lora}
    torch.manual_seed(seed)
    model = get_peft_model(base, LoraConfig(**fields))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name or "lora_embedding_A" in name:
                nn.init.normal_(parameter, std=0.1)
    return model


def saved(base: Any, folder: Path, **lora: Any) -> Path:
    """An adapter folder, as ``save_pretrained`` writes it."""
    adapted(base, **lora).save_pretrained(folder)
    return folder


def pulled(source: Any, folder: Path, version: str = "1.0.0", **options: Any) -> Adapter:
    """An adapter as pull hands it over, without any hub in between."""
    folder.mkdir(parents=True)
    with collect(source, on_hub=False, **options) as collected:
        manifest, files = make_release(collected, "org/name", version)
        for name, content in files.items():
            if isinstance(content, bytes):
                (folder / name).write_bytes(content)
            else:
                shutil.copy(content, folder / name)
    (folder / "adapter_manifest.json").write_bytes(manifest.to_bytes())
    return Adapter("org/name", manifest.digest, manifest, str(folder))


def safetensors(header: Any, data: bytes = b"", length: int | None = None) -> bytes:
    """The bytes of a safetensors file with any header at all."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data

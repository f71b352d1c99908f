"""Write an adapter as a LoRA file for llama.cpp."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import torch

from lora_plugins.errors import ExportError
from lora_plugins.serving.gguf_tensors import Pair, find_family, load_gguf, make_pairs
from lora_plugins.serving.source import Source, load_tensors, wrap_empty
from lora_plugins.text import private_folder

__all__ = ["GgufDtype", "write_gguf"]

#: Dtype of the factors in the file.
GgufDtype = Literal["f32", "f16", "bf16"]


def write_gguf(source: Source, target: Path, dtype: GgufDtype = "f32") -> int:
    """Write an adapter as one GGUF file, complete or not at all.

    Args:
        source: The adapter.
        target: The file.
        dtype: Dtype of the factors.

    Returns:
        Number of tensors of the base that it adapts.

    Raises:
        UnsupportedExport: llama.cpp has no place for something in the adapter.
        ExportError: The package gguf is missing, or values are too large for the dtype.
    """
    family = find_family(source)
    alpha = float(source.job.config.lora_alpha) or 1.0
    pairs = make_pairs(source, wrap_empty(source), load_tensors(source), alpha)
    _check_range(source, pairs, dtype)
    with private_folder(target) as folder:
        written = folder / "adapter.gguf"
        _write(source, written, family.architecture, alpha, pairs, dtype)
        os.replace(written, target)
    return len(pairs)


def _check_range(source: Source, pairs: Sequence[Pair], dtype: str) -> None:
    if dtype != "f16":
        return
    for pair in pairs:
        for part, tensor in (("lora_a", pair.a), ("lora_b", pair.b)):
            if not bool(tensor.half().isfinite().all()):
                raise ExportError(
                    f"{pair.name}.{part} of {source.title} does not fit float16. Export with dtype='f32' (--dtype f32)."
                )


def _write(
    source: Source, target: Path, architecture: str, alpha: float, pairs: Sequence[Pair], dtype: GgufDtype
) -> None:
    gguf = load_gguf()
    writer = gguf.GGUFWriter(target, architecture)
    writer.add_type(gguf.GGUFType.ADAPTER)
    writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
    writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, alpha)
    _add_facts(writer, source)
    kind = {
        "f32": gguf.GGMLQuantizationType.F32,
        "f16": gguf.GGMLQuantizationType.F16,
        "bf16": gguf.GGMLQuantizationType.BF16,
    }[dtype]
    for pair in pairs:
        for part, tensor in (("lora_a", pair.a), ("lora_b", pair.b)):
            values = gguf.quants.quantize(tensor.to(torch.float32).contiguous().numpy(), kind)
            writer.add_tensor(f"{pair.name}.{part}", values, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _add_facts(writer: Any, source: Source) -> None:
    writer.add_name(source.name)
    if source.manifest is not None:
        writer.add_version(source.manifest.version)
    # A folder of this machine is nobody's base elsewhere.
    if not source.base_is_folder:
        writer.add_base_model_count(1)
        writer.add_base_model_name(0, source.job.base)
        writer.add_base_model_repo_url(0, f"https://huggingface.co/{source.job.base}")
        if source.job.revision:
            writer.add_base_model_version(0, source.job.revision)

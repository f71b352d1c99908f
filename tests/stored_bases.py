"""Small checkpoints in the storage formats that transformers loads, written by their libraries or by their layout."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import GptOssConfig, GptOssForCausalLM

__all__ = ["compressed", "declare", "fp8", "gguf", "llama", "mxfp4", "with_layers"]


def llama() -> Any:
    """A Llama of 2 layers and hidden size 128 in bfloat16, which has room for groups and blocks."""
    return tiny.llama(hidden_size=128, intermediate_size=256).to(torch.bfloat16)  # type: ignore[arg-type]


def declare(folder: Path, config: dict[str, Any]) -> Path:
    """Write a ``quantization_config`` into a folder's ``config.json``."""
    file = folder / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "quantization_config": config}))
    return folder


def rewrite(folder: Path, model: Any, convert: Callable[[str, torch.Tensor], dict[str, torch.Tensor]]) -> Path:
    """Save a model with each tensor replaced by what it is converted to."""
    model.save_pretrained(folder)
    file = folder / "model.safetensors"
    stored: dict[str, torch.Tensor] = {}
    for name, tensor in load_file(file).items():
        stored |= convert(name, tensor)
    save_file(stored, file, metadata={"format": "pt"})
    return folder


def compressed(folder: Path, **weights: Any) -> Path:
    """A checkpoint of compressed-tensors, made by the library itself; ``weights`` are its ``QuantizationArgs``."""
    pytest.importorskip("compressed_tensors")
    from compressed_tensors.compressors import ModelCompressor
    from compressed_tensors.quantization import (
        QuantizationArgs,
        QuantizationConfig,
        QuantizationScheme,
        apply_quantization_config,
    )
    from compressed_tensors.quantization.utils import calculate_qparams

    model = llama()
    arguments = QuantizationArgs(**weights)
    scheme = QuantizationScheme(targets=["Linear"], weights=arguments)
    config = QuantizationConfig(config_groups={"one": scheme}, ignore=["lm_head"], quantization_status="frozen")
    apply_quantization_config(model, config)
    for module in model.modules():
        if hasattr(module, "quantization_scheme"):
            weight = module.weight.detach()
            size = weights.get("group_size") or weight.shape[1]
            whole = weights["strategy"] == "tensor"
            groups = weight.reshape(1, -1) if whole else weight.reshape(weight.shape[0], -1, size)
            scale, zero = calculate_qparams(groups.amin(-1), groups.amax(-1), arguments)
            module.weight_scale.data.copy_(scale)
            if hasattr(module, "weight_zero_point"):
                module.weight_zero_point.data.copy_(zero)
    compressor = ModelCompressor.from_pretrained_model(model)
    compressor.compress_model(model)
    model.save_pretrained(folder)
    compressor.update_config(str(folder))
    return folder


def fp8(folder: Path, *, method: str = "fp8") -> Path:
    """Float8 in blocks of 64 x 64 with a float scale each, or MXFP8: in rows of 32 with a power of two each."""
    rows, columns = (64, 64) if method == "fp8" else (1, 32)

    def convert(name: str, tensor: torch.Tensor) -> dict[str, torch.Tensor]:
        if not name.endswith("proj.weight"):
            return {name: tensor}
        high, wide = tensor.shape
        blocks = tensor.float().reshape(high // rows, rows, wide // columns, columns)
        scale = blocks.abs().amax((1, 3)) / 448
        if method == "mxfp8":
            scale = torch.exp2(scale.log2().ceil())
        packed = (blocks / scale[:, None, :, None]).reshape(high, wide).to(torch.float8_e4m3fn)
        stored = scale if method == "fp8" else (scale.log2() + 127).to(torch.uint8)
        return {name: packed, name.replace(".weight", ".weight_scale_inv"): stored}

    config = {
        "quant_method": method,
        "activation_scheme": "dynamic",
        "weight_block_size": [rows, columns],
        "modules_to_not_convert": ["lm_head"],
        **({"scale_fmt": "ue8m0"} if method == "mxfp8" else {}),
    }
    return declare(rewrite(folder, llama(), convert), config)


def mxfp4(folder: Path) -> Path:
    """A gpt-oss of one layer whose experts are blocks of 32 values of 4 bits, with an exponent each."""
    config = GptOssConfig(
        num_hidden_layers=1,
        num_local_experts=4,
        num_experts_per_tok=2,
        vocab_size=tiny.VOCABULARY,
        hidden_size=64,
        intermediate_size=64,
        head_dim=16,
        num_attention_heads=4,
        num_key_value_heads=2,
        layer_types=["full_attention"],
        pad_token_id=0,
    )
    torch.manual_seed(0)

    def convert(name: str, tensor: torch.Tensor) -> dict[str, torch.Tensor]:
        if not name.endswith(("experts.gate_up_proj", "experts.down_proj")):
            return {name: tensor}
        experts, columns, rows = tensor.shape
        blocks = torch.randint(0, 256, (experts, rows, columns // 32, 16), dtype=torch.uint8)
        return {
            name + "_blocks": blocks,
            name + "_scales": torch.full((experts, rows, columns // 32), 121, dtype=torch.uint8),
        }

    model = GptOssForCausalLM(config).to(torch.bfloat16)  # type: ignore[arg-type]
    kept = ["model.layers.*.self_attn", "model.layers.*.mlp.router", "model.embed_tokens", "lm_head"]
    return declare(rewrite(folder, model, convert), {"quant_method": "mxfp4", "modules_to_not_convert": kept})


def gguf(folder: Path) -> Path:
    """A Llama in 8-bit blocks of llama.cpp; the file is ``model.gguf``."""
    import gguf as library
    import numpy

    model = llama()
    config = model.config
    folder.mkdir(parents=True, exist_ok=True)
    writer = library.GGUFWriter(folder / "model.gguf", "llama")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_vocab_size(config.vocab_size)
    names = {
        "model.embed_tokens": "token_embd",
        "model.norm": "output_norm",
        "lm_head": "output",
        "self_attn.q_proj": "attn_q",
        "self_attn.k_proj": "attn_k",
        "self_attn.v_proj": "attn_v",
        "self_attn.o_proj": "attn_output",
        "mlp.gate_proj": "ffn_gate",
        "mlp.up_proj": "ffn_up",
        "mlp.down_proj": "ffn_down",
        "input_layernorm": "attn_norm",
        "post_attention_layernorm": "ffn_norm",
    }
    for name, tensor in model.state_dict().items():
        place = name.removesuffix(".weight")
        layer = place.split(".")[2] if place.startswith("model.layers.") else None
        end = place.split(".", 3)[3] if layer is not None else place
        named = names[end] if layer is None else f"blk.{layer}.{names[end]}"
        values = tensor.float().numpy().astype(numpy.float32)
        if "norm" in named:
            writer.add_tensor(f"{named}.weight", values)
        else:
            kind = library.GGMLQuantizationType.Q8_0
            writer.add_tensor(f"{named}.weight", library.quants.quantize(values, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return folder


def with_layers(make: Callable[[nn.Linear], nn.Module], config: Any = None) -> Any:
    """A small Llama whose ``gate_proj`` layers are replaced, with a quantization config on it."""
    model: Any = tiny.llama()
    for layer in model.model.layers:
        layer.mlp.gate_proj = make(layer.mlp.gate_proj)
    if config is not None:
        model.config.quantization_config = config
    return model

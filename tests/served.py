"""Tiny models of every family that llama.cpp takes an adapter for, with adapters in all of their linear layers."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model

WORDS = 96

_ROPE: dict[str, Any] = {
    "vocab_size": WORDS,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_MOE: dict[str, Any] = {"num_experts": 4, "num_experts_per_tok": 2}
_GEMMA: dict[str, Any] = {"head_dim": 16, "query_pre_attn_scalar": 16, "sliding_window": 64}

#: Family -> class in transformers, its configuration, and what gets an adapter.
MODELS: Mapping[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "bloom": (
        "Bloom",
        {"vocab_size": WORDS, "hidden_size": 64, "n_layer": 2, "n_head": 4},
        {"target_modules": ["query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"]},
    ),
    "gemma": ("Gemma", {**_ROPE, "head_dim": 16}, {}),
    "gemma2": ("Gemma2", {**_ROPE, **_GEMMA}, {}),
    "gemma3_text": ("Gemma3", {**_ROPE, **_GEMMA}, {"_config": "Gemma3Text"}),
    "gpt2": (
        "GPT2LMHead",
        {"vocab_size": WORDS, "n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 128, "n_ctx": 128},
        {"target_modules": ["c_attn", "c_proj", "c_fc"], "fan_in_fan_out": True},
    ),
    "gpt_neox": (
        "GPTNeoX",
        {**_ROPE, "rotary_pct": 0.5, "use_parallel_residual": True},
        {"target_modules": ["query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h", "lm_head"]},
    ),
    "granite": ("Granite", {**_ROPE, "tie_word_embeddings": False}, {"head": True}),
    "llama": ("Llama", {**_ROPE, "tie_word_embeddings": False}, {"head": True}),
    "mistral": ("Mistral", {**_ROPE, "head_dim": 32, "sliding_window": None}, {}),
    "mixtral": ("Mixtral", {**_ROPE, "num_local_experts": 4, "num_experts_per_tok": 2}, {"experts": True}),
    "olmo2": ("Olmo2", _ROPE, {}),
    # llama.cpp asks of OLMoE as many key heads as query heads, and normalizes Qwen3-MoE's router, as their releases do.
    "olmoe": ("Olmoe", {**_ROPE, **_MOE, "num_key_value_heads": 4}, {"experts": True}),
    "phi3": (
        "Phi3",
        {**_ROPE, "original_max_position_embeddings": 128},
        {"target_modules": ["qkv_proj", "o_proj", "gate_up_proj", "down_proj"], "head": True},
    ),
    "qwen2": ("Qwen2", {**_ROPE, "tie_word_embeddings": True}, {}),
    "qwen2_moe": (
        "Qwen2Moe",
        {**_ROPE, **_MOE, "moe_intermediate_size": 48, "shared_expert_intermediate_size": 80},
        {"experts": True},
    ),
    "qwen3": ("Qwen3", {**_ROPE, "head_dim": 32}, {}),
    "qwen3_moe": (
        "Qwen3Moe",
        {**_ROPE, **_MOE, "head_dim": 16, "moe_intermediate_size": 48, "norm_topk_prob": True},
        {"experts": True},
    ),
    "smollm3": ("SmolLM3", {**_ROPE, "no_rope_layer_interval": 4}, {}),
    "starcoder2": (
        "Starcoder2",
        {**_ROPE, "use_bias": True, "sliding_window": None},
        {"target_modules": ["q_proj", "k_proj", "v_proj", "o_proj", "c_fc", "c_proj"]},
    ),
}

#: The same types with what else an adapter may do: rsLoRA, ranks and scales by pattern, the input embedding.
VARIANTS: Mapping[str, tuple[str, dict[str, Any]]] = {
    "llama-embedding": ("llama", {"target_modules": ["q_proj", "k_proj", "embed_tokens", "lm_head"]}),
    "llama-patterns": ("llama", {"rank_pattern": {"k_proj": 2}, "alpha_pattern": {"layers.0.self_attn.q_proj": 3}}),
    "qwen3-rslora": ("qwen3", {"use_rslora": True}),
}

_LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
_ATTENTION = _LINEAR[:4]


def make_base(family: str) -> Any:
    """A tiny base whose norms and biases are no ones and zeros."""
    name, fields, more = MODELS[family]
    config = getattr(transformers, f"{more.get('_config', name.removesuffix('LMHead'))}Config")(**fields)
    made: Callable[..., Any] = getattr(transformers, f"{name}{'Model' if name.endswith('LMHead') else 'ForCausalLM'}")
    torch.manual_seed(0)
    model = made(config).eval()
    generator = torch.Generator().manual_seed(5)
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator)
    return model


def make_adapter(family: str, base: Any, **changes: Any) -> PeftModel:
    """The base with an adapter in every linear layer, of the size of the base's own weights."""
    more = dict(MODELS[family][2])
    more.pop("_config", None)
    head, experts = more.pop("head", False), more.pop("experts", False)
    fields: dict[str, Any] = {"r": 4, "lora_alpha": 8, "task_type": "CAUSAL_LM", "target_modules": list(_LINEAR)}
    if experts:
        fields["target_modules"] = list(_ATTENTION)
        fields["target_parameters"] = ["experts.gate_up_proj", "experts.down_proj"]
        fields["rank_pattern"] = {"experts.gate_up_proj": 8}
        fields["alpha_pattern"] = {"experts.gate_up_proj": 16}
    fields.update(more)
    if head:
        fields["target_modules"] = [*fields["target_modules"], "lm_head"]
    torch.manual_seed(1)
    model = get_peft_model(base, LoraConfig(**{**fields, **changes})).eval()
    generator = torch.Generator().manual_seed(2)
    for name, parameter in model.named_parameters():
        if "lora_B" in name or "lora_embedding_" in name:
            parameter.data = 0.1 * torch.randn(parameter.shape, generator=generator)
    return model


def write(family: str, folder: Path, **changes: Any) -> PeftModel:
    """Write ``base`` and ``adapter`` into a folder; returns the model with its adapter."""
    base = make_base(family)
    base.save_pretrained(folder / "base")
    model = make_adapter(family, base, **changes)
    model.save_pretrained(folder / "adapter", save_embedding_layers=False)
    return model


def cases() -> Mapping[str, tuple[str, dict[str, Any]]]:
    """Every case by name: its family, and changes to the adapter's configuration."""
    return {**{family: (family, {}) for family in MODELS}, **VARIANTS}

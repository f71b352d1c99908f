"""Where adapters go in the architectures that lora-plugins knows: data, one line for each family.

Query and value projections are the default where the LoRA paper and PEFT use them; models with one fused
projection get that one.
"""

from __future__ import annotations

from lora_plugins import Architecture, hookimpl

_QKVO = ("q_proj", "k_proj", "v_proj", "o_proj")
_GATED = ("gate_proj", "up_proj", "down_proj")
_LLAMA_SCOPES = {"attention": _QKVO, "mlp": _GATED}

#: Decoders with Llama's names.
_LLAMA = ("llama", "mistral", "stablelm", "gemma", "gemma2", "gemma3_text", "qwen2", "qwen3")

#: Encoders with BERT's names.
_BERT = ("bert", "roberta", "xlm-roberta", "electra", "layoutlm")
_BERT_SCOPES = {
    "attention": ("query", "key", "value", "attention.output.dense"),
    "mlp": ("intermediate.dense", "output.dense"),
}

_SINGLE = (
    Architecture(
        "bloom",
        ("query_key_value",),
        {"attention": ("query_key_value", "self_attention.dense"), "mlp": ("dense_h_to_4h", "dense_4h_to_h")},
    ),
    Architecture(
        "falcon",
        ("query_key_value",),
        {"attention": ("query_key_value", "self_attention.dense"), "mlp": ("dense_h_to_4h", "dense_4h_to_h")},
    ),
    Architecture(
        "gpt_neox",
        ("query_key_value",),
        {"attention": ("query_key_value", "attention.dense"), "mlp": ("dense_h_to_4h", "dense_4h_to_h")},
    ),
    Architecture("gpt2", ("c_attn",), {"attention": ("c_attn", "attn.c_proj"), "mlp": ("c_fc", "mlp.c_proj")}),
    Architecture("gpt_bigcode", ("c_attn",), {"attention": ("c_attn", "attn.c_proj"), "mlp": ("c_fc", "mlp.c_proj")}),
    Architecture("gptj", ("q_proj", "v_proj"), {"attention": (*_QKVO[:3], "out_proj"), "mlp": ("fc_in", "fc_out")}),
    Architecture("gpt_neo", ("q_proj", "v_proj"), {"attention": (*_QKVO[:3], "out_proj"), "mlp": ("c_fc", "c_proj")}),
    Architecture("codegen", ("qkv_proj",), {"attention": ("qkv_proj", "out_proj"), "mlp": ("fc_in", "fc_out")}),
    Architecture("mpt", ("Wqkv",), {"attention": ("Wqkv", "out_proj"), "mlp": ("up_proj", "down_proj")}),
    Architecture("opt", ("q_proj", "v_proj"), {"attention": (*_QKVO[:3], "out_proj"), "mlp": ("fc1", "fc2")}),
    Architecture("bart", ("q_proj", "v_proj"), {"attention": (*_QKVO[:3], "out_proj"), "mlp": ("fc1", "fc2")}),
    Architecture(
        "phi", ("q_proj", "v_proj", "fc1", "fc2"), {"attention": (*_QKVO[:3], "dense"), "mlp": ("fc1", "fc2")}
    ),
    Architecture("t5", ("q", "v"), {"attention": ("q", "k", "v", "o")}),
    Architecture("mt5", ("q", "v"), {"attention": ("q", "k", "v", "o")}),
    Architecture("deberta", ("in_proj",), {"attention": ("in_proj", "attention.output.dense")}),
    Architecture("deberta-v2", ("query_proj", "value_proj"), {"attention": ("query_proj", "key_proj", "value_proj")}),
    Architecture("rwkv", ("key", "value", "receptance", "output")),
    Architecture("rwkv7", ("r_proj", "k_proj", "v_proj", "o_proj", "key", "value")),
    # Attention layers only: the state-space layers read the weight of `out_proj` without calling it.
    Architecture("nemotron_h", _QKVO, never=("mixer.out_proj", "conv1d")),
    Architecture("mixtral", ("q_proj", "v_proj"), {"attention": _QKVO}, experts=("mlp.experts",), never=("mlp.gate",)),
    Architecture("llama4", ("q_proj", "v_proj"), text=("language_model",), vision=("vision_model",)),
    Architecture("gemma4", ("q_proj", "v_proj"), text=("language_model",), vision=("vision_tower", "audio_tower")),
    Architecture("blip-2", ("q", "v", "q_proj", "v_proj"), vision=("vision_model", "qformer")),
    # Not in transformers itself: loaded with trust_remote_code.
    Architecture("chatglm", ("query_key_value",)),
    Architecture("RefinedWebModel", ("query_key_value",)),
    Architecture("RefinedWeb", ("query_key_value",)),
    Architecture("btlm", ("c_proj", "c_attn")),
)


@hookimpl
def register_architectures() -> list[Architecture]:
    return [
        *(Architecture(name, ("q_proj", "v_proj"), _LLAMA_SCOPES) for name in _LLAMA),
        *(Architecture(name, ("query", "value"), _BERT_SCOPES) for name in _BERT),
        *_SINGLE,
    ]

"""Which base models vLLM's classes take an adapter for, and where."""

from __future__ import annotations

from collections.abc import Mapping

__all__ = ["ENDS", "RENAMED", "WITHOUT_ADAPTERS"]

_WITHOUT = """
    beam bloom cohere2_moe dbrx dots3_note dots3_note_text falcon falcon_mamba flint gemma3n gemma3n_text gpt-sw3
    gpt2 gptj hrm_text kimi_linear mamba mamba2 mimo_v2_flash moss_transcribe_diarize stablelm zamba2
"""

#: Types of text models whose class in vLLM 0.33 is not a ``SupportsLoRA``: with one, no server starts with
#: ``--enable-lora``.
WITHOUT_ADAPTERS = frozenset(_WITHOUT.split())

#: Names of ``embedding_modules`` of the class, and the types that have them. All other types are not known.
_TAKEN: Mapping[tuple[str, ...], str] = {
    ("embed_tokens", "lm_head"): """
        apertus ernie4_5 exaone4 exaone_moe falcon_h1 granite granite_swa granitemoe granitemoe_swa granitemoehybrid
        granitemoeshared hyperclovax internlm3 iquestcoder jamba lfm2 lfm2_moe llama llama4 llama4_text minicpm3 mixtral
        nemotron nemotron_h phi3 qwen3 qwen3_5 qwen3_5_moe qwen3_5_moe_text qwen3_5_text qwen3_moe
    """,
    # From the second line on: classes of transformers, which vLLM runs by its backend.
    ("embed_tokens",): """
        cohere cohere2
        arcee cwm flex_olmo glm gpt_bigcode gpt_neox hunyuan_v1_dense hunyuan_v1_moe jais2 kolibri1 mellum olmo olmo2
        olmo3 phi seed_oss smollm3 starcoder2 vaultgemma
    """,
    (): """
        afmoe axk1 deepseek_v2 deepseek_v3 deepseek_v32 ernie4_5_moe gemma gemma2 gemma3 gemma3_text
        gemma4 gemma4_text gemma4_unified glm4 glm4_moe glm4_moe_lite glm_moe_dsa gpt_oss hy_v3 hy_v4 laguna
        longcat_flash minimax_m2 ministral3 mistral olmo_hybrid olmoe opt qwen2 qwen2_moe qwen3_next qwen4_exp
        qwen4_exp_text
    """,
}

#: Type -> the input embedding and output head that take an adapter.
ENDS: Mapping[str, tuple[str, ...]] = {kind: taken for taken, kinds in _TAKEN.items() for kind in kinds.split()}

#: Type -> what vLLM's class calls an embedding (its ``hf_to_vllm_mapper``), by the name in transformers.
RENAMED: Mapping[str, Mapping[str, str]] = {"nemotron_h": {"embeddings": "embed_tokens"}}

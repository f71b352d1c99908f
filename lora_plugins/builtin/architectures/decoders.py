"""Decoder-only language models: dense, experts, state-space, hybrid."""

from __future__ import annotations

from lora_plugins.builtin.architectures.families import EXPERTS, FC, GATED, MAMBA_RAW, QKV_OUT, QKVO, QV, family, single

__all__ = ["ARCHITECTURES"]


#: Multi-head latent attention: low-rank down and up projections instead of one matrix each.
_LATENT = ("q_proj", "q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj")

#: Gates and output of a gated delta net, by the names of its releases.
_DELTA_NET = ("linear_attn.in_proj_qkvz", "linear_attn.in_proj_qkv", "linear_attn.out_proj")

_PHI_MLP = ("gate_up_proj", "down_proj")

#: The sparse-attention indexer picks positions and is trained by a loss of its own.
_INDEXER = ("indexer",)

ARCHITECTURES = [
    # -- dense, with Llama's names -------------------------------------------------------------
    *family(
        """
        apertus arcee bitnet cohere cohere2 csm cwm diffllama doge emu3_text_model ernie4_5 eurobert exaone4
        gemma gemma2 gemma3_text gemma4_text gemma4_unified_text granite granite_swa gte helium hrm_text
        hunyuan_v1_dense hunyuan_vl_text hyperclovax internlm3 iquestcoder jais2 jina_embeddings_v3 llama ministral
        ministral3 mistral mllama_text_model muse_glimmer_text nanochat nemotron nomic_bert olmo olmo2 olmo3 qwen2 qwen3
        seed_oss smollm3 stablelm ultrabert vaultgemma voxtral_realtime_text modernbert-decoder neomme
        qwen2_vl_text qwen2_5_vl_text qwen3_vl_text qwen2_5_omni_text cosmos3_edge_text cosmos3_omni_text
        granite_docling_text paddleocr_vl_text molmo2_text cohere_compass_text chameleon moonshine moonshine_streaming
        mimi t5gemma kyutai_speech_to_text_text
        """,
        QV,
        (*QKVO, "attn.Wo"),
        (*GATED, *FC, "Wi", "mlp.Wo"),
    ),
    # Its encoder passes on only keys and values: the query of its last layer is never read.
    *family("diffusion_gemma_text", ("k_proj", "v_proj"), QKVO, GATED, experts=EXPERTS, never=("router",)),
    *family("gemma3n_text", QV, QKVO, GATED, never=("altup",)),
    *family("gemma4_assistant gemma4_unified_assistant", ("q_proj", "o_proj"), QKVO, GATED),
    *family("glm glm4 glm4v_text glm46v_text glm_ocr_text", QV, QKVO, _PHI_MLP),
    *family("starcoder2", QV, QKVO, ("c_fc", "c_proj")),
    *family("moshi", ("q_proj.linear", "v_proj.linear"), tuple(f"{n}.linear" for n in QKVO), FC),
    *family("phi", (*QV, *FC), ("q_proj", "k_proj", "v_proj", "dense"), FC),
    *family("phi3 phi4", ("qkv_proj",), ("qkv_proj", "o_proj"), _PHI_MLP),
    *family("biogpt opt xglm musicgen_decoder musicgen_melody_decoder musicgen musicgen_melody", QV, QKV_OUT, FC),
    *family("kosmos_2_text_model kosmos_2_5_text_model", QV, QKV_OUT, FC),
    # The patcher splits the bytes with its own model, without gradients.
    *family("blt", QV, QKVO, GATED, never=("patcher",)),
    # -- dense, with names of their own --------------------------------------------------------
    *family(
        "bloom falcon RefinedWebModel RefinedWeb",
        ("query_key_value",),
        ("query_key_value", "self_attention.dense"),
        ("dense_h_to_4h", "dense_4h_to_h"),
    ),
    *family(
        "gpt_neox gpt_neox_japanese persimmon",
        ("query_key_value",),
        ("query_key_value", "attention.dense", "self_attn.dense"),
        ("dense_h_to_4h", "dense_4h_to_h"),
    ),
    *family(
        "gpt2 gpt-sw3 gpt_bigcode imagegpt openai-gpt",
        ("c_attn",),
        ("c_attn", "attn.c_proj", "q_attn"),
        ("c_fc", "mlp.c_proj"),
    ),
    *family("gptj", QV, QKV_OUT, ("fc_in", "fc_out")),
    *family("gpt_neo", QV, QKV_OUT, ("c_fc", "c_proj")),
    *family("codegen", ("qkv_proj",), ("qkv_proj", "out_proj"), ("fc_in", "fc_out")),
    *family("mpt", ("Wqkv",), ("Wqkv", "out_proj"), ("up_proj", "down_proj")),
    *family("ctrl", ("Wq", "Wv"), ("Wq", "Wk", "Wv", "multi_head_attention.dense")),
    *family(
        "cpmant",
        ("project_q", "project_v"),
        ("project_q", "project_k", "project_v", "attention_out"),
        ("w_0", "w_1", "w_out"),
    ),
    # Its attention has bare parameters instead of layers: the feed-forward part is what can be adapted.
    *single("xlnet", ("layer_1", "layer_2"), scopes={"mlp": ("layer_1", "layer_2")}),
    # Not in transformers itself: loaded with trust_remote_code.
    *family("chatglm", ("query_key_value",), ("query_key_value", "self_attention.dense")),
    *single("btlm", ("c_proj", "c_attn")),
    *single("rwkv7", ("r_proj", "k_proj", "v_proj", "o_proj", "key", "value")),
    # -- mixture of experts --------------------------------------------------------------------
    *family(
        """
        afmoe aria_text beam cohere2_moe dbrx dots1 ernie4_5_moe ernie4_5_vl_moe_text exaone_moe flex_olmo flint
        glm4_moe glm4v_moe_text gpt_oss granitemoe granitemoe_swa granitemoeshared hunyuan_v1_moe hy_v3 inkling_text
        inkling2_text kolibri1 laguna llama4_text mellum mimo_v2_flash minimax_m2 minimax_m3_vl_text mixtral
        muse_spark_text olmoe openai_privacy_filter phimoe qwen2_moe qwen3_moe qwen3_vl_moe_text solar_open step3p5
        qwen3_omni_moe_text unlimited_ocr_text
        """,
        (*QV, "Wqkv"),
        (*QKVO, "Wqkv", "out_proj"),
        (*GATED, "gate_up_proj"),
        experts=(*EXPERTS, "ffn.experts.mlp.w1", "ffn.experts.mlp.v1", "ffn.experts.mlp.w2"),
        never=("router", "gate", "shared_expert_gate"),
    ),
    *family(
        "zaya",
        ("q_proj", "v_proj_current", "v_proj_delayed"),
        ("q_proj", "k_proj", "v_proj_current", "v_proj_delayed", "o_proj"),
        experts=EXPERTS,
        never=("gate",),
    ),
    # Its query and output projections are routed experts as well.
    *family(
        "jetmoe",
        ("kv_proj",),
        ("kv_proj",),
        experts=("input_linear.weight", "output_linear.weight"),
        never=("router",),
    ),
    # -- latent attention ----------------------------------------------------------------------
    *family("minicpm3 youtu", _LATENT, _LATENT, GATED),
    *family(
        """
        axk1 deepseek_v2 deepseek_v3 glm4_moe_lite mistral4 deepseek_v32 glm_moe_dsa dots3_note_text hy_v4
        longcat_flash mistral_large4_text
        """,
        _LATENT,
        _LATENT,
        GATED,
        experts=EXPERTS,
        never=("router", "gate", *_INDEXER),
    ),
    *family(
        "axk2", (*_LATENT, "q_gate_proj"), (*_LATENT, "q_gate_proj"), GATED, experts=EXPERTS, never=("gate", *_INDEXER)
    ),
    # `o_a_proj` is a grouped layer: it is linear in name only.
    *family(
        "deepseek_v4",
        ("q_a_proj", "q_b_proj", "self_attn.kv_proj", "o_b_proj"),
        ("q_a_proj", "q_b_proj", "self_attn.kv_proj", "o_b_proj"),
        GATED,
        experts=EXPERTS,
        never=("gate", "compressor", "o_a_proj"),
    ),
    # -- linear attention beside softmax attention ---------------------------------------------
    *family(
        "qwen3_next qwen3_5_text qwen3_5_moe_text qwen4_exp_text",
        (*QKVO, *_DELTA_NET),
        (*QKVO, *_DELTA_NET, "linear_attn.in_proj_z", "linear_attn.in_proj_ba"),
        GATED,
        experts=EXPERTS,
        never=("gate", "shared_expert_gate", *_INDEXER),
    ),
    *family("olmo_hybrid", QV, (*QKVO, "linear_attn.g_proj"), GATED),
    *family(
        "kimi_linear bailing_hybrid glm5_next_text",
        (*_LATENT, "v_proj"),
        (*_LATENT, "k_proj", "v_proj"),
        GATED,
        experts=EXPERTS,
        never=("gate", "router", "forget_gate", *_INDEXER),
    ),
    *family(
        "minimax",
        (*QV, "qkv_proj"),
        (*QKVO, "qkv_proj", "self_attn.out_proj"),
        experts=EXPERTS,
        never=("gate",),
    ),
    # -- short convolutions and recurrences beside attention -----------------------------------
    *family(
        "lfm2 lfm2_moe lfm3",
        (*QV, "conv.in_proj"),
        (*QKV_OUT, "o_proj", "conv.in_proj"),
        ("w1", "w2", "w3"),
        experts=EXPERTS,
        never=("gate",),
    ),
    *family(
        "recurrent_gemma",
        (*QV, "linear_x", "linear_y"),
        (*QKVO, "linear_x", "linear_y", "linear_out"),
        GATED,
    ),
    *family(
        "xlstm",
        ("mlstm_layer.q", "mlstm_layer.v"),
        ("mlstm_layer.q", "mlstm_layer.k", "mlstm_layer.v"),
        ("proj_up", "proj_up_gate", "proj_down"),
    ),
    *family(
        "rwkv",
        ("key", "value", "receptance", "output"),
        ("attention.key", "attention.value", "attention.receptance", "attention.output"),
        ("feed_forward.key", "feed_forward.value", "feed_forward.receptance"),
    ),
    # -- state space, alone and beside attention -----------------------------------------------
    *single("mamba mamba2 falcon_mamba", ("in_proj",), scopes={"attention": ("in_proj",)}, never=MAMBA_RAW),
    *family(
        "bamba falcon_h1 granitemoehybrid jamba zamba zamba2",
        (*QV, "mamba.in_proj"),
        (*QKVO, "mamba.in_proj"),
        (*GATED, "gate_up_proj", "shared_mlp.input_linear", "shared_mlp.output_linear"),
        experts=EXPERTS,
        never=("router", "gate", *(f"mamba.{name}" for name in MAMBA_RAW)),
    ),
    # One mixer in each block: state space, attention, or feed-forward.
    *family(
        "nemotron_h",
        (*QKVO, "in_proj", "up_proj", "down_proj"),
        (*QKVO, "in_proj"),
        ("up_proj", "down_proj"),
        experts=("experts.up_proj", "experts.down_proj"),
        never=("gate", *(f"mixer.{name}" for name in MAMBA_RAW)),
    ),
]

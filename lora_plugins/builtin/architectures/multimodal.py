"""Multimodal language models; text scopes leave their encoders out."""

from __future__ import annotations

from lora_plugins.builtin.architectures.families import GATED, QKVO, QV, family, single

__all__ = ["ARCHITECTURES"]


#: Names of the parts beside the language model in transformers' composite models.
_TOWERS = (
    "vision_tower", "vision_model", "visual", "vision_encoder", "image_tower", "video_tower", "audio_tower",
    "multi_modal_projector", "mm_projector", "vision_projection", "vision_adapter", "connector", "projector",
    "resampler_model", "layerwise_projectors", "spatial_projectors", "aligner", "merger",
    "language_projection", "embed_vision", "embed_audio",
    # Computes word timestamps from the speech encoder, without the language model.
    "word_timestamp_encoder",
)  # fmt: skip

ARCHITECTURES = [
    # -- the language model's own record names the modules -------------------------------------
    *single(
        """
        aria audioflamingo3 aya_vision cohere2_vision cohere_compass cosmos3_edge cosmos3_omni deepseek_ocr2 deepseek_vl
        deepseek_vl_hybrid diffusion_gemma dots3_note ernie4_5_vl_moe exaone4_5 fast_vlm florence2 fun_asr_nano
        fuyu gemma3 gemma3n gemma4 gemma4_unified glm46v glm4v glm4v_moe glm5_next glm_ocr glmasr glmga got_ocr2
        granite4_vision granite_docling hunyuan_vl hyperclovax_vision_v2 idefics2 idefics3 inkling2 inkling_mm_model
        internvl kimi_k25 lfm2_vl lfm3_vl lighton_ocr llama4 llava llava_next llava_next_video llava_onevision
        minicpm_ocr minicpmv4_6 minicpmv4_7 minimax_m3_vl mistral3 mistral_large4 mllama modernvbert molmo2
        moss_transcribe_diarize muse_glimmer muse_spark musicflamingo nemo_speechlm nemotron_h_omni
        NemotronH_Nano_Omni_Reasoning_V3 ovis2 paddleocr_vl paligemma perception_lm pp_chart2table qianfan_ocr
        qwen2_5_omni_thinker qwen2_5_vl qwen2_audio qwen2_vl qwen3_5 qwen3_5_moe qwen3_asr qwen3_omni_moe_thinker
        qwen3_vl qwen3_vl_moe qwen4_exp shieldgemma2 smolvlm step3p7 ultravbert unlimited_ocr video_llama_3 video_llava
        vipllava voxtral voxtral_realtime emu3
        """,
        QV,
        inner=("text_config",),
        vision=_TOWERS,
    ),
    *single(
        "blip-2 instructblip instructblipvideo",
        ("q", "v", *QV),
        inner=("text_config",),
        vision=("vision_model", "qformer", "language_projection"),
    ),
    *single("granite_speech granite_speech_plus", QV, inner=("text_config",), vision=("encoder", "projector")),
    *single(
        "vibevoice vibevoice_asr",
        QV,
        inner=("text_config",),
        vision=(
            "acoustic_tokenizer_encoder",
            "semantic_tokenizer_encoder",
            "multi_modal_projector",
            "audio_tower",
            "diffusion_head",
        ),
    ),
    *single(
        "janus",
        QV,
        inner=("text_config",),
        vision=("vision_model", "aligner", "generation_aligner", "generation_head", "vqmodel"),
    ),
    # The queries of the vision-language model's last layer are never read: actions attend to keys and values.
    *single("pi0", QV, inner=("vlm_config", "dit_config"), vision=_TOWERS, unreached=("vlm",)),
    *single("kosmos-2", QV, inner=("text_config",), vision=("vision_model", "image_to_text_projection")),
    *single("kosmos-2.5", QV, inner=("text_config",), vision=("vision_model", "image_to_text_projection")),
    *single("vision-encoder-decoder", ("query", "value"), inner=("decoder",), text=("decoder",)),
    # -- with names of their own ---------------------------------------------------------------
    *family(
        "blip",
        ("query", "value"),
        ("query", "key", "value", "attention.output.dense", "crossattention.output.dense"),
        ("intermediate.dense", "output.dense"),
        vision=("vision_model",),
    ),
    *family(
        "git",
        ("query", "value"),
        ("query", "key", "value", "attention.output.dense"),
        ("intermediate.dense", "output.dense"),
        vision=("image_encoder", "visual_projection"),
    ),
    *family("idefics", QV, QKVO, GATED, vision=("vision_model", "perceiver_resampler")),
    *family("evolla", QV, QKVO, GATED, vision=("protein_encoder",)),
    *family("t5gemma2 t5gemma2_encoder", QV, QKVO, GATED, vision=("vision_tower", "multi_modal_projector")),
    *family(
        "kyutai_speech_to_text",
        tuple(f"{name}.linear" for name in QV),
        tuple(f"{name}.linear" for name in QKVO),
        ("fc1", "fc2"),
        vision=("codec_model",),
    ),
    *family(
        "pix2struct",
        ("query", "value"),
        ("query", "key", "value", "attention.output"),
        ("wi_0", "wi_1", "wo"),
        vision=("encoder",),
    ),
    *family("pp_formulanet", QV, ("q_proj", "k_proj", "v_proj", "out_proj"), ("fc1", "fc2"), vision=("encoder",)),
    *family(
        "phi4_multimodal",
        ("qkv_proj",),
        ("qkv_proj", "o_proj"),
        ("gate_up_proj", "down_proj"),
        vision=("embed_tokens_extend",),
    ),
]

"""Small random models of every type in transformers' auto mappings, for checking the architecture data.

The sizes that every configuration class shares under one of a few names are cut down; what a type needs
beyond that stands in `OVERRIDES`.
"""

# ruff: noqa: SIM905, TID253 - names separated by white space stay readable; a program for developers

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, cast

import torch
import transformers
from torch import nn
from transformers.models.auto import configuration_auto, modeling_auto

#: Task -> name of transformers' mapping from model type to class name.
MAPPINGS = {
    "causal LM": "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES",
    "seq2seq LM": "MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES",
    "sequence classification": "MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES",
    "token classification": "MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES",
    "masked LM": "MODEL_FOR_MASKED_LM_MAPPING_NAMES",
    "image-text-to-text": "MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES",
    "image classification": "MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES",
    "speech seq2seq": "MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING_NAMES",
}

#: Task -> mapping, of further heads: the tests publish and merge them for `HEAD_FAMILIES`.
HEADS = {
    "question answering": "MODEL_FOR_QUESTION_ANSWERING_MAPPING_NAMES",
    "multiple choice": "MODEL_FOR_MULTIPLE_CHOICE_MAPPING_NAMES",
    "next sentence prediction": "MODEL_FOR_NEXT_SENTENCE_PREDICTION_MAPPING_NAMES",
    "speech recognition": "MODEL_FOR_CTC_MAPPING_NAMES",
    "audio classification": "MODEL_FOR_AUDIO_CLASSIFICATION_MAPPING_NAMES",
    "audio frame classification": "MODEL_FOR_AUDIO_FRAME_CLASSIFICATION_MAPPING_NAMES",
    "speaker verification": "MODEL_FOR_AUDIO_XVECTOR_MAPPING_NAMES",
    "semantic segmentation": "MODEL_FOR_SEMANTIC_SEGMENTATION_MAPPING_NAMES",
}
#: Types whose further heads the tests publish and merge.
HEAD_FAMILIES = """
albert bart beit bert canine deberta-v2 distilbert electra funnel gpt2 hubert layoutlmv3 llama mistral modernbert mpnet
qwen2 qwen3 roberta segformer t5 unispeech-sat wav2vec2 wavlm whisper xlnet
""".split()

#: Attribute of a configuration -> value in a small one. A value is used only where the class has the attribute.
SMALL: dict[str, Any] = {
    **dict.fromkeys(
        ("hidden_size", "d_model", "n_embd", "dim", "embed_dim", "emb_dim", "embedding_size", "word_embed_proj_dim"), 64
    ),
    **dict.fromkeys(("hidden_dim", "model_dim", "width", "text_hidden_size"), 64),
    **dict.fromkeys(
        (
            "num_attention_heads",
            "n_head",
            "n_heads",
            "num_heads",
            "encoder_attention_heads",
            "decoder_attention_heads",
            "attention_heads",
            "num_query_heads",
        ),
        4,
    ),
    **dict.fromkeys(("num_key_value_heads", "num_kv_heads", "n_kv_heads", "multi_query_group_num"), 2),
    **dict.fromkeys(("head_dim", "d_kv", "attention_head_size"), 16),
    **dict.fromkeys(
        (
            "intermediate_size",
            "ffn_dim",
            "encoder_ffn_dim",
            "decoder_ffn_dim",
            "d_ff",
            "n_inner",
            "mlp_dim",
            "ffn_hidden_size",
        ),
        96,
    ),
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size", "expert_ffn_hidden_size"), 32),
    **dict.fromkeys(
        ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "encoder_layers", "decoder_layers", "depth"), 4
    ),
    **dict.fromkeys(("num_encoder_layers", "num_decoder_layers"), 4),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"), 4),
    **dict.fromkeys(("num_experts_per_tok", "num_experts_per_token", "moe_topk", "top_k"), 2),
    **dict.fromkeys(("q_lora_rank", "kv_lora_rank"), 32),
    **dict.fromkeys(("qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim"), 16),
    **dict.fromkeys(("n_group", "topk_group", "num_expert_group"), 1),
    **dict.fromkeys(("layerdrop", "encoder_layerdrop", "decoder_layerdrop"), 0),
    **dict.fromkeys(("d_latents", "attention_channels"), 64),
    "num_latents": 16,
    "moe_k": 2,
    "rotary_dim": 8,
    "entity_vocab_size": 100,
    "vocab_size_per_layer_input": 300,
    "encoder_hash_byte_group_vocab": 500,
    "first_k_dense_replace": 1,
    "vocab_size": 300,
    "max_position_embeddings": 128,
    "image_size": 32,
    "patch_size": 8,
    # The scan of state spaces needs memory for the square of a chunk in older releases.
    "mamba_chunk_size": 8,
}

#: Ids of special tokens must lie inside the small vocabulary.
VOCABULARY = 300

_HYBRID = ["linear_attention", "full_attention"] * 2
_CONV = ["conv", "full_attention"] * 2
_STAGES = {
    "embed_dim": 24,
    "depths": [1, 2],
    "num_heads": [2, 4],
    "window_size": 4,
    "image_size": 64,
    "patch_size": 4,
}
_BERT = {
    "model_type": "bert",
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 96,
    "vocab_size": 300,
}
_BERT_DECODER = {**_BERT, "is_decoder": True, "add_cross_attention": True}
_VIT = {**_BERT, "model_type": "vit", "image_size": 32, "patch_size": 8}
_WAV2VEC2 = {**_BERT, "model_type": "wav2vec2", "conv_dim": [32] * 7, "num_conv_pos_embeddings": 16, "layerdrop": 0.0}
_IDS = {"decoder_start_token_id": 1, "pad_token_id": 0}

_WINDOW = ["sliding_attention", "full_attention"] * 2

#: What single types need beyond `SMALL`, by ``model_type`` of the configuration.
OVERRIDES: dict[str, dict[str, Any]] = {
    "bailing_hybrid": {"layer_types": _HYBRID},
    "bamba": {"attn_layer_indices": [1, 3]},
    # Its cache asks this configuration for a number of layers, which only the parts have.
    "blt": {"use_cache": False},
    "blt_global_transformer": {"hidden_size": 128, "head_dim": 32},
    **{name: {"hidden_size_global": 128} for name in ("blt_local_encoder", "blt_local_decoder")},
    "cosmos3_edge_text": {
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [4, 2, 2]}
    },
    "diffusion_gemma": {"canvas_length": 16},
    "diffusion_gemma_text": {"num_experts": 4, "top_k_experts": 2, "moe_intermediate_size": 32, "global_head_dim": 32},
    "ernie4_5_vl_moe_text": {
        "moe_intermediate_size": [32, 32],
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [3, 3, 2]},
    },
    "fun_asr_nano": {"adaptor_config": {"intermediate_size": 16}},
    "chameleon": {"vocabulary_map": {"<image>": 5}},
    "dots1": {"n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1},
    "cohere_compass_text": {
        "layer_types": ["full_attention"] * 4,
        "rope_parameters": {
            "full_attention": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [4, 2, 2]}
        },
    },
    "dbrx": {
        "attn_config": {"kv_n_heads": 2, "rope_theta": 10000.0, "clip_qkv": 8.0},
        "ffn_config": {"ffn_hidden_size": 96, "hidden_size": 64, "moe_num_experts": 4, "moe_top_k": 2},
    },
    "convnextv2": {"image_size": 64, "patch_size": 4},
    "deepseek_ocr2_text": {"mlp_layer_types": ["dense", "sparse", "sparse", "sparse"], "num_experts_per_tok": 2},
    "dia_decoder": {
        "cross_hidden_size": 64,
        "cross_num_attention_heads": 4,
        "cross_num_key_value_heads": 4,
        "cross_head_dim": 16,
    },
    "donut-swin": _STAGES,
    "encoder-decoder": {"encoder": _BERT, "decoder": _BERT_DECODER, **_IDS},
    "vision-encoder-decoder": {"encoder": _VIT, "decoder": _BERT_DECODER, **_IDS},
    "speech-encoder-decoder": {"encoder": _WAV2VEC2, "decoder": _BERT_DECODER, **_IDS},
    "emu3": {"vocabulary_map": {"<image>": 5, "<|extra_200|>": 6}},
    "esm": {"vocab_size": 300, "pad_token_id": 1, "mask_token_id": 4},
    "esmc": {"num_key_value_heads": 4},
    "gemma3n_text": {
        "layer_types": _WINDOW,
        "num_kv_shared_layers": 2,
        "activation_sparsity_pattern": [0.0] * 4,
    },
    # Draft models, which read the keys and values of another one. The first asks for layers that all do; the second
    # takes less, and can be made.
    "gemma4_assistant": {
        "text_config": {
            "num_hidden_layers": 4,
            "num_kv_shared_layers": 4,
            "hidden_size_per_layer_input": 0,
            "vocab_size_per_layer_input": 0,
        }
    },
    "gemma4_unified_assistant": {
        "text_config": {"num_kv_shared_layers": 2, "layer_types": _WINDOW, "global_head_dim": 16},
        "backbone_hidden_size": 64,
    },
    "glm5_next_text": {
        "num_key_value_heads": 4,
        "qk_rope_head_dim": 0,
        "index_topk": 8,
        "index_kpool": 4,
        "index_head_dim": 16,
        "index_n_heads": 2,
        "linear_head_dim": 16,
        "linear_num_heads": 4,
    },
    "glm5_next_vision": {"out_hidden_size": 64, "projection_intermediate_size": 96},
    "gpt_neo": {"attention_types": [[["global", "local"], 2]]},
    "granitemoehybrid": {"layer_types": ["mamba", "attention"] * 2},
    "granite_docling_vision": {"out_hidden_size": 64, "deepstack_visual_indexes": [0, 1, 2]},
    "granite4_vision": {"deepstack_layer_map": [[0, 1]], "downsample_rate": "1/2"},
    "hunyuan_v1_dense": {"head_dim": 16},
    "hunyuan_v1_moe": {"head_dim": 16},
    **{name: {"num_query_tokens": 4, "image_token_index": 5} for name in ("blip-2", "instructblip")},
    "instructblipvideo": {"num_query_tokens": 4, "video_token_index": 5},
    # Its gates start at zero by default, and nothing of the image comes through.
    "idefics": {"alpha_initializer": "ones", "cross_layer_interval": 1},
    "hunyuan_vl_text": {
        "head_dim": 16,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 2, 2, 2]},
    },
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2, "expert_layer_offset": 1},
    "kimi_linear": {"layer_types": _HYBRID},
    "kyutai_speech_to_text": {"codec_config": {"upsample_groups": 16}},
    "lfm2": {"layer_types": _CONV},
    "lfm2_moe": {"layer_types": _CONV, "num_dense_layers": 1},
    "layoutlmv3": {"coordinate_size": 10, "shape_size": 12, "input_size": 32},
    "lilt": {"hidden_size": 96},
    "longformer": {"attention_window": 8},
    "mamba2": {"chunk_size": 8, "num_heads": 8, "head_dim": 16, "n_groups": 1},
    "mistral4": {"head_dim": 32},
    "molmo2_adapter": {"vision_feature_layer": [3, 1], "hidden_size": 64, "head_dim": 16},
    "muse_spark_audio": {"out_hidden_size": 64, "hidden_sizes": [16, 16, 32, 32], "depths": [1, 1, 1, 1]},
    "moonshine_streaming": {"num_key_value_heads": 4},
    "ministral": {"head_dim": 16},
    "nemotron": {"num_key_value_heads": 2},
    "nemotron_h": {
        "chunk_size": 8,
        "mamba_num_heads": 8,
        "mamba_head_dim": 16,
        "n_groups": 2,
        "ssm_state_size": 16,
        "moe_shared_expert_intermediate_size": 32,
    },
    "nemotron_h_omni": {"vision_config": {"video_temporal_patch_size": 2}, "vision_hidden_size": 64},
    "nemotron3_diarization": {"head_config": {"audio_hidden_size": 64}},
    "qwen4_exp_text": {
        "indexer_n_heads": 2,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 16,
        "indexer_budget": 8,
        "indexer_compress_ratio": 4,
    },
    "kosmos-2": {"latent_query_num": 4},
    # In training the positions must be as many as the words.
    "reformer": {
        "axial_pos_shape": [4, 4],
        "axial_pos_embds_dim": [32, 32],
        "feed_forward_size": 96,
        "local_attn_chunk_length": 8,
        "lsh_attn_chunk_length": 8,
        "num_buckets": 2,
        "hash_seed": 0,
        "hidden_dropout_prob": 0.0,
        "local_attention_probs_dropout_prob": 0.0,
    },
    # The scale that new layers have lets less through than a float32 can tell.
    "swiftformer": {"layer_scale_init_value": 0.1},
    "step3p5": {"sliding_window": 8, "layer_types": _WINDOW},
    "swin": _STAGES,
    "swinv2": _STAGES,
    "zamba": {"num_hidden_layers": 6, "layers_block_type": ["mamba", "hybrid", "mamba", "hybrid", "mamba", "hybrid"]},
    "zamba2": {"chunk_size": 8, "layers_block_type": ["mamba", "hybrid", "mamba", "hybrid"], "num_mem_blocks": 2},
    "levit": {"image_size": 224, "patch_size": 16},
    "mobilevit": {"image_size": 128, "patch_size": 2},
    "pi0": {"vlm_config": {"projection_dim": 64}, "chunk_size": 4},
    "pix2struct_text_model": {"hidden_size": 64},
    # What its sliding layers have instead of the sizes above stands in names of its own.
    "dots3_note_text": {
        "head_dim": 32,
        "sliding_window": 8,
        "index_topk": 8,
        "index_head_dim": 32,
        "index_n_heads": 2,
        "shared_experts_intermediate_size": 32,
        "swa_num_attention_heads": 4,
        "swa_num_key_value_heads": 4,
        "swa_q_lora_rank": 32,
        "swa_kv_lora_rank": 32,
        "swa_head_dim": 32,
        "swa_qk_nope_head_dim": 16,
        "swa_v_head_dim": 16,
    },
    "dots3_note_vision_encoder": {"adapter_in_dim": 64, "adapter_out_dim": 64},
    "dots3_note_audio_encoder": {"adapter_input_size": 64, "adapter_out_dim": 64, "downsample_hidden_size": 16},
    # Without large weights the signal of so many convolutions dies out in the epsilon of the normalisations.
    "efficientnet": {
        "width_coefficient": 0.25,
        "depth_coefficient": 1.0,
        "hidden_dim": 320,
        "image_size": 64,
        "initializer_range": 0.3,
    },
    "florence_vision": {
        "depths": [1, 1],
        "patch_size": [7, 3],
        "patch_stride": [4, 2],
        "patch_padding": [3, 1],
        "patch_prenorm": [False, True],
        "embed_dim": [32, 64],
        "num_heads": [2, 4],
        "num_groups": [2, 4],
        "window_size": 4,
        "projection_dim": 64,
    },
    "janus_vision_model": {"projection_dim": 64, "num_image_tokens": 16},
    "janus_vqgan": {
        "base_channels": 32,
        "channel_multiplier": [1, 2],
        "num_res_blocks": 1,
        "latent_channels": 32,
        "projection_dim": 64,
        "image_token_embed_dim": 64,
        "num_embeddings": 64,
        "embed_dim": 8,
    },
    **{
        name: {"num_filters": 4, "downsampling_ratios": [2, 4], "depths": [1, 1, 1], "hidden_size": size}
        for name, size in (("vibevoice_acoustic_tokenizer", 16), ("vibevoice_acoustic_tokenizer_encoder", 32))
    },
    "pvt": {"image_size": 128},
    "xlstm": {"hidden_size": 128},
    "xmod": {"default_language": "en_XX"},
    **{name: {"hidden_size": 512} for name in ("qwen2_vl_text", "qwen2_5_vl_text", "qwen2_5_omni_text")},
    **{name: {"hidden_size": 256} for name in ("glm4v_text", "glm46v_text")},
    "glm_ocr_text": {"head_dim": 64},
    **{name: {"head_dim": 128} for name in ("glm4v_moe_text", "paddleocr_vl_text")},
    "convnext": {"image_size": 64, "patch_size": 4},
    "deepseek_v2": {"num_experts_per_tok": 2},
    "mobilevitv2": {"image_size": 128, "patch_size": 2},
    "pp_lcnet": {"image_size": 64},
    "zaya": {"num_experts_per_tok": 1},
}

#: Layers over time that the few frames of a batch suffice for.
_SPEAKERS = {"tdnn_dim": [64] * 5, "tdnn_kernel": [5, 3, 1, 1, 1], "xvector_output_dim": 64}

#: What a type needs for one task.
TASK_OVERRIDES: dict[tuple[str, str], dict[str, Any]] = {
    ("causal LM", "reformer"): {"is_decoder": True},
    # They shift the words for their decoder by themselves.
    **{(task, "t5"): {"decoder_start_token_id": 0} for task in ("question answering", "sequence classification")},
    ("semantic segmentation", "beit"): {"out_indices": [1, 2, 3, 4]},
    **{("speaker verification", name): _SPEAKERS for name in ("unispeech-sat", "wav2vec2", "wavlm")},
}


#: Type -> ends of the names of parameters that are zero in a new model (never in a trained one) and stop every
#: gradient: the scale of keys, the last layer of a block.
BLOCKING: dict[str, tuple[str, ...]] = {
    "neomme": ("o_proj.weight", "down_proj.weight"),
    "zaya": ("qk_norm.temp",),
}


_TIMM = "needs timm, which imports torchvision, whose builds for torch 2.13 on the package index load with CUDA only"
_PADDING = "its padding reads the stride of the convolution, which PEFT's wrapped layer does not have"
_LOST = "PEFT renames the tensors of its adapter on loading and finds none: refused before training"

_UNREADABLE = (
    "transformers splits its attention weights unevenly on loading and cannot load what it saved of a small model"
)
_SHARED = "its layers share weights, and the adapter of each changes them in its own way: refused by name"

#: Types whose small model the tests do not train and reload, and why; they are resolved at most.
NOT_TRAINED: dict[str, str] = {
    **dict.fromkeys(("fast_vlm", "gemma3n", "perception_lm", "timm_wrapper"), _TIMM),
    "dinat": "calls functions of NATTEN that its releases for this torch do not have any more",
    "layoutlmv2": "needs detectron2, which is not on the package index",
    "gemma4_assistant": (
        "transformers cannot make it: its configuration wants every layer to take its keys and values from another, "
        "its layers want one that makes them"
    ),
    "mra": "on a CPU transformers gives zeros for its attention, which is a CUDA kernel",
    "ibert": (
        "its layers are of a class that PEFT cannot wrap; target_parameters=['query.weight', 'value.weight'] adapts "
        "their bare weights, which is not a default"
    ),
    **dict.fromkeys(("mobilenet_v1", "mobilenet_v2"), _PADDING),
    "pp_formulanet": "PEFT asks a model with tied weights for its input embeddings, and transformers' class names none",
    **dict.fromkeys(("deepseek_ocr2", "unlimited_ocr"), _LOST),
}


#: Types whose small model the tests do not publish and load, and why.
NOT_PUBLISHED: dict[str, str] = {
    "nemo_speechlm": _UNREADABLE,
}
#: Types whose small model the tests do not merge, and why.
NOT_MERGED: dict[str, str] = {
    "nemo_speechlm": _UNREADABLE,
    "bit": "its convolutions standardize their weights in each step, and a sum with the update is another one: refused",
    **dict.fromkeys(("diffusion_gemma", "zamba"), _SHARED),
}
_ROWS = "its experts are rows of one matrix, which PEFT takes as one weight"
_SHARED_EXPERTS = "its shared experts are stacks of their own, computed in a way of their own"

#: Types with experts that are linear layers of their own, which every backend quantizes as such, and what of that
#: does not hold.
EXPERTS_AS_LAYERS = {
    "nllb-moe": "",
    "switch_transformers": (
        "; with bitsandbytes' 4 bits the second ones stay in float, because the model casts their input to the dtype "
        "of their weight"
    ),
}
#: Types whose stacked experts are not all quantized: which of them are, and why not the others.
EXPERTS_IN_FLOAT: dict[str, tuple[str, str]] = {
    "dbrx": ("no", _ROWS),
    "jetmoe": ("no", "they are of a class of its own, outside of transformers' interface"),
    **dict.fromkeys(("inkling_text", "inkling_mm_model"), ("the routed ones", _SHARED_EXPERTS)),
}
#: Types whose experts take no adapters, which is refused by name, and why.
EXPERTS_NOT_ADAPTED: dict[str, str] = {
    "dbrx": _ROWS,
    "mistral_large4": "PEFT renames the tensors of its shared experts when it loads them",
}


@dataclass(frozen=True)
class Case:
    """One entry of one auto mapping."""

    task: str
    model_type: str
    class_name: str


class CannotBuild(Exception):
    """No configuration that is tried gives a model; the text is the reason."""


def cases() -> list[Case]:
    """Every entry of the mappings of the installed transformers, in their order."""
    found = []
    for task, mapping in MAPPINGS.items():
        for model_type, name in getattr(modeling_auto, mapping).items():
            found.append(Case(task, model_type, name if isinstance(name, str) else name[0]))
    return found


def head_cases() -> list[Case]:
    """Return the further heads of `HEAD_FAMILIES`."""
    found = []
    for task, mapping in HEADS.items():
        names = getattr(modeling_auto, mapping)
        found += [Case(task, model_type, names[model_type]) for model_type in HEAD_FAMILIES if model_type in names]
    return found


def first_cases() -> dict[str, Case]:
    """One case for each model type, of the first mapping that has it: the one that the tests train."""
    found: dict[str, Case] = {}
    for case in cases():
        found.setdefault(case.model_type, case)
    return found


def build(case: Case, device: str = "meta", *, small_only: bool = False, seed: int = 0) -> nn.Module:
    """Return a model of one case, from a small configuration where that is valid, else from a larger one.

    Args:
        case: The case.
        device: Where to make it.
        small_only: Whether larger configurations are left out.
        seed: Seed of the weights.

    Raises:
        CannotBuild: With the reason that the first configuration failed for.
    """
    model_class = getattr(transformers, case.class_name)
    reason = ""
    for configuration in _configurations(case, model_class, small_only):
        try:
            torch.manual_seed(seed)
            config = configuration()
            if case.task == "sequence classification":
                _set_padding(config)
            with torch.device(device):
                model = model_class(config)
            _wake(model, case.model_type)
            return cast(nn.Module, model)
        except Exception as error:
            # Whatever a configuration class or a missing library raises is a reason for the list.
            reason = reason or f"{type(error).__name__}: {' '.join(str(error).split())}"
    raise CannotBuild(reason)


def _set_padding(config: Any) -> None:
    """Name a padding token, without which decoders classify one sequence at a time."""
    for part in (config, config.get_text_config()):
        if getattr(part, "pad_token_id", None) is None:
            part.pad_token_id = 0


def _wake(model: nn.Module, model_type: str) -> None:
    """Give random values to parameters that start at zero and let nothing through before training."""
    names = BLOCKING.get(model_type, ())
    with torch.no_grad():
        for path, parameter in model.named_parameters():
            if path.endswith(names) and names:
                parameter.normal_(std=0.2)


def _configurations(case: Case, model_class: Any, small_only: bool) -> Iterator[Callable[[], Any]]:
    own = getattr(model_class, "config_class", None)
    registered = configuration_auto.CONFIG_MAPPING[case.model_type]
    classes = dict.fromkeys(each for each in (own, registered) if each is not None and each.model_type)
    task = TASK_OVERRIDES.get((case.task, case.model_type), {})
    for each in classes:
        yield lambda each=each: small_config(each, task)
    if small_only:
        return
    for each in classes:
        yield lambda each=each: _shallow_config(each)
        yield each


def small_config(config_class: Any, extra: Mapping[str, Any] | None = None) -> Any:
    """Return a configuration with few and narrow layers.

    Args:
        config_class: A configuration class of transformers.
        extra: Values that go before all others.
    """
    overrides = {**OVERRIDES.get(config_class.model_type, {}), **(extra or {})}
    default = _default(config_class, overrides)
    parts = getattr(config_class, "sub_configs", {}) or {}
    values: dict[str, Any] = {}
    for name in _names(config_class, default):
        current = _value(default, name)
        if name in parts:
            part = type(current) if isinstance(current, transformers.PreTrainedConfig) else parts[name]
            if inspect.isclass(part) and part.__name__ != "AutoConfig":
                values[name] = small_config(part, overrides.pop(name, None))
        elif name in SMALL and isinstance(current, (int, float)) and not isinstance(current, bool):
            values[name] = type(current)(SMALL[name])
        elif name.endswith("_token_id") and isinstance(current, int) and current >= VOCABULARY:
            values[name] = VOCABULARY - 1 - len(values) % 50
    if "kv_lora_rank" in values and "num_key_value_heads" in values:
        # Latent attention makes keys and values for every head.
        values["num_key_value_heads"] = values["num_attention_heads"]
    return config_class(**{**values, **overrides})


def _shallow_config(config_class: Any) -> Any:
    default = config_class()
    names = ("num_hidden_layers", "n_layer", "num_layers")
    return config_class(**{name: 4 for name in names if isinstance(_value(default, name), int)})


def _default(config_class: Any, overrides: Mapping[str, Any]) -> Any:
    try:
        return config_class()
    except Exception:
        # Some classes refuse their own defaults.
        return config_class(**overrides)


def _value(config: Any, name: str) -> Any:
    # Attributes that vary from layer to layer raise instead of answering.
    with contextlib.suppress(Exception):
        return getattr(config, name, None)
    return None


def _names(config_class: Any, default: Any) -> list[str]:
    names = dict.fromkeys(vars(default))
    for cls in config_class.__mro__:
        names.update(dict.fromkeys(getattr(cls, "__annotations__", {})))
    mapped = getattr(config_class, "attribute_map", {})
    return [name for name in names if not name.startswith("_") and name not in mapped]


def inputs(model: nn.Module, seed: int = 0) -> dict[str, torch.Tensor]:
    """Return a batch of two that a small model takes: words, an image or sound, by what its forward asks for."""
    generator = torch.Generator().manual_seed(seed)
    config: Any = model.config
    main = getattr(model, "main_input_name", "input_ids")
    accepted = inspect.signature(model.forward).parameters
    ids = torch.randint(10, VOCABULARY - 60, (2 * _codebooks(config), 16), generator=generator)
    wanted = [name for name, value in accepted.items() if value.default is inspect.Parameter.empty]
    if "input_ids" in accepted:
        wanted.append("input_ids")
    elif main in accepted:
        wanted.append(main)
    if getattr(config, "is_encoder_decoder", False) or main in ("input_features", "input_values"):
        wanted += ["decoder_input_ids"] if "decoder_input_ids" in accepted else []
    if main == "pixel_values" and "decoder_input_ids" in accepted and "input_ids" not in accepted:
        wanted.append("decoder_input_ids")
    wanted += ["bbox"] if "bbox" in accepted else []
    makers: dict[str, Callable[[], torch.Tensor]] = {
        "input_ids": lambda: ids,
        "qformer_input_ids": lambda: ids,
        "decoder_input_ids": lambda: ids[:, :8],
        "bbox": lambda: torch.zeros(2, 16, 4, dtype=torch.float if config.model_type == "bros" else torch.long),
        "pixel_values": lambda: _image(config, generator),
        "input_features": lambda: _sound(config, main, generator),
        "input_values": lambda: _sound(config, main, generator),
    }
    batch = {name: makers[name]() for name in dict.fromkeys(wanted) if name in makers}
    name = type(model).__name__
    if name.endswith(("ForSequenceClassification", "ForQuestionAnswering")) and "decoder_input_ids" in batch:
        # The decoder reads the same words, and the classifier the state of the last one.
        del batch["decoder_input_ids"]
        batch["input_ids"] = torch.cat([ids[:, :-1], torch.full((len(ids), 1), config.eos_token_id)], dim=1)
    if name.endswith("ForMultipleChoice"):
        # Two texts for each example to choose from.
        batch = {name: torch.stack([value, value.flip(1)], dim=1) for name, value in batch.items()}
    special = BATCHES.get(config.model_type)
    return {**batch, **special(config, batch, generator)} if special else batch


def _placed(ids: torch.Tensor, token: int, count: int) -> torch.Tensor:
    """Return words that begin with so many placeholders for an image."""
    return torch.cat([torch.full((len(ids), count), token), ids], dim=1)


def _image_words(config: Any, batch: Mapping[str, torch.Tensor], _: torch.Generator) -> dict[str, torch.Tensor]:
    return {"input_ids": _placed(batch["input_ids"], config.image_token_id, config.num_query_tokens)}


def _video_words(config: Any, batch: Mapping[str, torch.Tensor], _: torch.Generator) -> dict[str, torch.Tensor]:
    frames = 4
    return {
        "pixel_values": batch["pixel_values"][:, None].repeat(1, frames, 1, 1, 1),
        "input_ids": _placed(batch["input_ids"], config.video_token_id, frames * config.num_query_tokens),
    }


def _kosmos(config: Any, batch: Mapping[str, torch.Tensor], generator: torch.Generator) -> dict[str, torch.Tensor]:
    place = torch.zeros_like(batch["input_ids"])
    place[:, 1 : 1 + config.latent_query_num] = 1
    return {"pixel_values": _image(config, generator), "image_embeds_position_mask": place}


def _patches(config: Any, _: Mapping[str, torch.Tensor], generator: torch.Generator) -> dict[str, torch.Tensor]:
    vision = config.vision_config
    place = torch.stack(torch.meshgrid(torch.arange(1, 3), torch.arange(1, 5), indexing="ij"), dim=-1).view(8, 2)
    colours = torch.randn(2, 8, vision.patch_embed_hidden_size, generator=generator)
    return {"flattened_patches": torch.cat([place.expand(2, 8, 2).float(), colours], dim=-1)}


def _idefics(config: Any, batch: Mapping[str, torch.Tensor], generator: torch.Generator) -> dict[str, torch.Tensor]:
    return {
        "pixel_values": _image(config, generator)[:, None],
        "image_attention_mask": torch.ones(*batch["input_ids"].shape, 1, dtype=torch.long),
    }


def _speech(config: Any, _: Mapping[str, torch.Tensor], generator: torch.Generator) -> dict[str, torch.Tensor]:
    return {"input_values": _sound(config, "input_values", generator)}


def _boxes(config: Any, _: Mapping[str, torch.Tensor], generator: torch.Generator) -> dict[str, torch.Tensor]:
    corner = torch.rand(2, 16, 2, generator=generator) / 2
    return {"bbox": torch.cat([corner, corner + 0.25], dim=-1), "pixel_values": _image(config, generator)}


def _cut_images(config: Any, _: Mapping[str, torch.Tensor], generator: torch.Generator) -> dict[str, torch.Tensor]:
    """Images of four by four patches each."""
    return {
        "pixel_values": torch.randn(2, 16, 3 * config.vision_config.patch_size**2, generator=generator),
        "pixel_attention_mask": torch.ones(2, 16, dtype=torch.long),
        "spatial_shapes": torch.full((2, 2), 4),
    }


def _words_and_sound(config: Any, _: Mapping[str, torch.Tensor], generator: torch.Generator) -> dict[str, torch.Tensor]:
    """At each position one word, and the sound of that time in every codebook."""
    return {"input_ids": torch.randint(10, VOCABULARY - 60, (2, 16, 1 + config.num_codebooks), generator=generator)}


def _draft(config: Any, _: Mapping[str, torch.Tensor], generator: torch.Generator) -> dict[str, Any]:
    """What the model that is drafted for hands over: words and states side by side, the last keys and values."""
    text = config.text_config
    heads, size = text.num_key_value_heads, text.hidden_size // text.num_attention_heads
    return {
        "inputs_embeds": torch.randn(2, 16, 2 * config.backbone_hidden_size, generator=generator),
        "position_ids": torch.arange(16).expand(2, 16),
        "shared_kv_states": {
            kind: tuple(torch.randn(2, heads, 16, size, generator=generator) for _ in range(2))
            for kind in ("full_attention", "sliding_attention")
        },
    }


def _dia(config: Any, _: Mapping[str, torch.Tensor], generator: torch.Generator) -> dict[str, torch.Tensor]:
    decoder = config.decoder_config
    size = (2, 8, decoder.num_channels)
    return {"decoder_input_ids": torch.randint(1, decoder.vocab_size, size, generator=generator)}


def _stream(config: Any, _: Mapping[str, torch.Tensor], generator: torch.Generator) -> dict[str, torch.Tensor]:
    """Sound and words at the same time: so many frames for each word."""
    frames = 16 * 2 * config.downsample_factor
    return {"input_features": torch.randn(2, config.audio_config.num_mel_bins, frames, generator=generator)}


def _first_is_global(_: Any, batch: Mapping[str, torch.Tensor], __: torch.Generator) -> dict[str, torch.Tensor]:
    mask = torch.zeros_like(batch["input_ids"])
    mask[:, 0] = 1
    return {"global_attention_mask": mask}


def _robot(config: Any, batch: Mapping[str, torch.Tensor], generator: torch.Generator) -> dict[str, torch.Tensor]:
    """One camera; the noise and its time are given, as they would be drawn anew in each step."""
    text = batch["input_ids"]
    vision = config.vlm_config.vision_config
    words = _placed(text, config.vlm_config.image_token_id, (vision.image_size // vision.patch_size) ** 2)
    return {
        "input_ids": words,
        "attention_mask": torch.ones_like(words),
        "pixel_values": _image(config.vlm_config, generator)[:, None],
        "pixel_attention_mask": torch.ones(2, 1, dtype=torch.bool),
        "state": torch.randn(2, config.max_state_dim, generator=generator),
        "noise": torch.randn(2, config.chunk_size, config.max_action_dim, generator=generator),
        "timestep": torch.tensor([0.25, 0.75]),
    }


Batch = Callable[[Any, Mapping[str, torch.Tensor], torch.Generator], dict[str, Any]]

#: Model type -> what its batch has beside, or instead of, what the names in its forward say.
BATCHES: dict[str, Batch] = {
    "blip-2": _image_words,
    "dia": _dia,
    "gemma4_unified_assistant": _draft,
    "idefics": _idefics,
    "instructblip": _image_words,
    "instructblipvideo": _video_words,
    "kosmos-2": _kosmos,
    "kyutai_speech_to_text": _words_and_sound,
    "longformer": _first_is_global,
    "pi0": _robot,
    "pix2struct": _patches,
    "siglip2": _cut_images,
    "speech-encoder-decoder": _speech,
    "udop": _boxes,
    "voxtral_realtime": _stream,
}


def _codebooks(config: Any) -> int:
    # A decoder of sound has a row of its own for each codebook.
    return int(config.num_codebooks) if config.model_type in ("musicgen_decoder", "musicgen_melody_decoder") else 1


def _image(config: Any, generator: torch.Generator) -> torch.Tensor:
    part = next((_value(config, name) for name in ("vision_config", "encoder") if _value(config, name)), config)
    size = _value(part, "image_size") or 64
    height, width = (size, size) if isinstance(size, int) else size
    return torch.randn(2, _value(part, "num_channels") or 3, height, width, generator=generator)


def _sound(config: Any, main: str, generator: torch.Generator) -> torch.Tensor:
    if main == "input_values" or config.model_type == "speech-encoder-decoder":
        return torch.randn(2, 4000, generator=generator)
    bins = _value(config, "num_mel_bins")
    if config.model_type == "whisper":
        return torch.randn(2, bins, 2 * config.max_source_positions, generator=generator)
    return torch.randn(2, 64, bins or 80, generator=generator)


def objective(output: Any) -> torch.Tensor:
    """Return a number that every output value has a share in, with fixed random weights."""
    value = output.logits if getattr(output, "logits", None) is not None else output[0]
    value = value[0] if isinstance(value, tuple) else value
    if getattr(output, "end_logits", None) is not None:
        value = torch.cat([output.start_logits, output.end_logits])
    weights = torch.randn(value.shape, generator=torch.Generator().manual_seed(1))
    return (value.float() * weights).mean() + (value.float() ** 2).mean()


def settle(model: nn.Module, model_type: str) -> None:
    """Put a model into the mode in which it gives the same output each time and passes gradients on."""
    model.eval()
    if model_type in ("rwkv", "reformer"):
        # In evaluation the one keeps a state, which it changes in place; the other refuses to go backward.
        model.train()


def measure_statistics(model: nn.Module) -> None:
    """Give batch norms the statistics of some batches, as a trained model has them.

    With those that they begin with, the signal of a random convolutional model dies out.
    """
    if not (norms := list(_batch_norms(model))):
        return
    model.eval()
    for norm in norms:
        norm.momentum = None  # the mean of all batches
        norm.train()
    with torch.no_grad():
        for seed in range(4):
            model(**inputs(model, seed))
    model.eval()


def has_statistics(model: nn.Module) -> bool:
    """Whether a model has norms that keep statistics of batches."""
    return next(_batch_norms(model), None) is not None


def _batch_norms(model: nn.Module) -> Iterator[nn.modules.batchnorm._BatchNorm]:
    return (module for module in model.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm))


def quiet() -> None:
    """Keep transformers from commenting on configurations that are small on purpose."""
    transformers.logging.set_verbosity_error()
    torch.set_num_threads(1)

"""Image classifiers and speech models."""

from __future__ import annotations

from lora_plugins.builtin.architectures.families import FC, QKV_OUT, QKVO, QV, family, single

__all__ = ["ARCHITECTURES"]


ARCHITECTURES = [
    # -- image classifiers with attention ------------------------------------------------------
    *family(
        "beit deit dinov2 dinov2_with_registers ijepa segformer swin vit vit_msn vit_mae vivit yolos", QV, QKVO, FC
    ),
    *family(
        "clip clip_vision_model metaclip_2 metaclip_2_vision_model siglip siglip_vision_model siglip2 "
        "siglip2_vision_model",
        QV,
        QKV_OUT,
        FC,
    ),
    *family(
        "data2vec-vision donut-swin dinat swinv2 mobilevit pvt",
        ("query", "value"),
        ("query", "key", "value", "attention.output.dense"),
        ("intermediate.dense", "output.dense", "mlp.dense1", "mlp.dense2"),
        never=("continuous_position_bias_mlp",),
    ),
    *family("pvt_v2", ("query", "value"), ("query", "key", "value", "attention.proj"), ("mlp.dense1", "mlp.dense2")),
    *family(
        "cvt",
        ("projection_query", "projection_value"),
        ("projection_query", "projection_key", "projection_value", "attention.output.dense"),
        ("intermediate.dense", "output.dense"),
    ),
    *family("hiera", ("attn.qkv",), ("attn.qkv", "attn.proj"), FC),
    # Attention and feed-forward parts are blocks of their own.
    *single(
        "levit",
        (
            "queries_keys_values.linear",
            "keys_values.linear",
            "queries.linear",
            "linear_up.linear",
            "linear_down.linear",
        ),
    ),
    *single("swiftformer", ("to_query", "to_key")),
    *single("mobilevitv2", ("qkv_proj.convolution",)),
    # -- image classifiers without attention ---------------------------------------------------
    *single("convnext convnextv2", ("pwconv1", "pwconv2")),
    *single("focalnet", ("projection_in", "projection_out")),
    *single("poolformer", ("output.conv1", "output.conv2")),
    *single("bit", ("conv1", "conv2", "conv3")),
    *single("efficientnet", ("expand_conv", "project_conv")),
    # MobileNet is absent on purpose: its padding reads the stride of the layer, which a wrapped layer does not have.
    *single("regnet resnet", ("convolution",)),
    *single("hgnet_v2", ("convolution",), heads=("fc",)),
    *single("pp_lcnet", ("pointwise_convolution.convolution",), heads=("head",)),
    *single("textnet", ("main_conv",)),
    # -- speech --------------------------------------------------------------------------------
    *family("whisper speech_to_text", QV, QKV_OUT, FC),
    *family(
        "speecht5 wav2vec2 wav2vec2-conformer hubert unispeech unispeech-sat",
        (*QV, "linear_q", "linear_v"),
        (*QKV_OUT, "linear_q", "linear_k", "linear_v", "linear_out"),
        ("intermediate_dense", "output_dense"),
    ),
    # Its attention hands the weights to a function of torch, without calling the layers.
    *single("wavlm", ("intermediate_dense", "output_dense"), never=QKV_OUT),
    *family(
        "seamless_m4t seamless_m4t_v2",
        (*QV, "linear_q", "linear_v"),
        (*QKV_OUT, "linear_q", "linear_k", "linear_v", "linear_out"),
        (*FC, "intermediate_dense", "output_dense"),
        text=("text_encoder", "text_decoder", "speech_encoder"),
    ),
    *family("canary cohere_asr", QV, QKVO, ("linear1", "linear2", *FC)),
    *family("dia", QV, QKVO, ("gate_up_proj", "down_proj")),
    *single("speech-encoder-decoder", QV, inner=("encoder", "decoder")),
]

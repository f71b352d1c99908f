"""What is trained is float32 whatever the base is, and every input meets its layer."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import tiny
import torch
from torch import nn
from transformers import (
    CLIPVisionConfig,
    CLIPVisionModelWithProjection,
    LlamaConfig,
    LlamaForSequenceClassification,
    PatchTSTConfig,
    PatchTSTForClassification,
    ViTConfig,
    ViTForImageClassification,
    Wav2Vec2Config,
    Wav2Vec2ForCTC,
    WhisperConfig,
    WhisperForConditionalGeneration,
)
from versions import needs

from lora_plugins import LoraCallback, prepare_model
from lora_plugins.adapters.prepare import prepare_plain
from lora_plugins.adapters.settings import LoraSettings
from lora_plugins.errors import PreparationError

IDS = torch.arange(1, 9)[None]


def trained_dtypes(model: nn.Module) -> set[torch.dtype]:
    return {p.dtype for p in model.parameters() if p.requires_grad}


def check_step(model: Any, **batch: Any) -> None:
    """One pass in training and one in evaluation: every trained tensor gets a finite gradient, and keeps its dtype."""
    before = {name: p.dtype for name, p in model.named_parameters() if p.requires_grad}
    output = model.train()(**batch)
    loss = output.loss if getattr(output, "loss", None) is not None else output[0].float().square().mean()
    loss.backward()
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert {name: p.dtype for name, p in trained.items()} == before
    assert trained
    assert all(p.grad is not None and p.grad.isfinite().all() for p in trained.values() if p.numel())
    with torch.no_grad():
        model.eval()(**batch)


def reward_model() -> Any:
    torch.manual_seed(0)
    return LlamaForSequenceClassification(
        LlamaConfig(
            vocab_size=96,
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_labels=1,
            pad_token_id=0,
        )
    )


# -- what is trained is float32 ----------------------------------------------------------------

HEADS: list[Any] = [
    (tiny.bert_classifier, {}, {"input_ids": IDS, "labels": torch.tensor([1])}),
    pytest.param(
        *(reward_model, {}, {"input_ids": IDS, "labels": torch.tensor([0.5])}),
        marks=needs("torch", "2.13", "its mean squared error of two dtypes has no backward pass"),
    ),
    (tiny.llama, {"modules_to_save": ["lm_head"]}, {"input_ids": IDS, "labels": IDS}),
    (tiny.llama, {"modules_to_save": ["embed_tokens", "norm"]}, {"input_ids": IDS, "labels": IDS}),
    (tiny.llama, {"modules_to_save": ["k_proj"]}, {"input_ids": IDS, "labels": IDS}),
    (tiny.llama, {"trainable_token_indices": [3, 4]}, {"input_ids": IDS, "labels": IDS}),
]


@pytest.mark.parametrize("backend", ["int8", "nf4", None])
@pytest.mark.parametrize(("make", "arguments", "batch"), HEADS)
def test_what_is_trained_is_float32_over_a_16_bit_base(
    make: Callable[[], Any], arguments: dict[str, Any], batch: dict[str, Any], backend: str | None
) -> None:
    model = prepare_model(make(), quantization=backend, compute_dtype="bfloat16", **arguments)
    assert trained_dtypes(model) == {torch.float32}
    check_step(model, **batch)


def test_what_is_trained_is_float32_over_a_base_that_was_loaded_in_float16() -> None:
    model = prepare_model(reward_model().half(), modules_to_save=["input_layernorm"])
    assert trained_dtypes(model) == {torch.float32}
    check_step(model, input_ids=IDS, labels=torch.tensor([0.5], dtype=torch.float16))


def test_another_dtype_can_be_asked_for() -> None:
    model = prepare_model(reward_model(), compute_dtype="bfloat16", trainable_dtype="bfloat16")
    assert trained_dtypes(model) == {torch.bfloat16}
    check_step(model, input_ids=IDS, labels=torch.tensor([0.5], dtype=torch.bfloat16))
    left = prepare_model(reward_model().bfloat16(), trainable_dtype=None)
    assert trained_dtypes(left) == {torch.bfloat16, torch.float32}, "PEFT makes adapters in float32 and copies heads"
    with pytest.raises(PreparationError, match=r"trainable_dtype must be 'float32'.*not 'float8'"):
        prepare_model(tiny.llama(), trainable_dtype="float8")


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("fields", [{}, {"use_rslora": True}, {"modules_to_save": ["score"]}], ids=str)
def test_a_factor_that_its_initialization_freezes_has_the_dtype_of_the_other(
    fields: dict[str, Any], fused: bool
) -> None:
    """MiCA trains lora_A only."""
    model = prepare_model(
        reward_model(),
        compute_dtype="bfloat16",
        trainable_dtype="bfloat16",
        target_modules=["q_proj"],
        init_lora_weights="mica",
        r=4,
        fused=fused,
        **fields,
    )
    factors = {name: p for name, p in model.named_parameters() if "lora_" in name}
    assert {p.requires_grad for p in factors.values()} == {True, False}
    assert {p.dtype for p in factors.values()} == {torch.bfloat16}
    check_step(model, input_ids=IDS, labels=torch.tensor([0.5], dtype=torch.bfloat16))


def test_saved_modules_of_a_wrapped_model_are_float32_too() -> None:
    config = peft.LoraConfig(target_modules=["q_proj"], modules_to_save=["score"], task_type="SEQ_CLS")
    wrapped: Any = peft.get_peft_model(reward_model().bfloat16(), config)
    prepared = prepare_plain(wrapped, LoraSettings.from_arguments(quantization="int8"))
    assert trained_dtypes(prepared) == {torch.float32}
    check_step(prepared, input_ids=IDS, labels=torch.tensor([0.5]))


def test_fp16_training_needs_float32_heads(tmp_path: Path) -> None:
    """A gradient scaler refuses 16-bit gradients; here the model says it before."""
    model = prepare_model(tiny.bert_classifier().half())
    assert {p.dtype for n, p in model.named_parameters() if "classifier" in n and p.requires_grad} == {torch.float32}


@pytest.mark.parametrize("backend", ["int8", "nf4", None])
def test_an_adapter_of_a_reward_trainer_is_continued(tmp_path: Path, backend: str | None) -> None:
    config = peft.LoraConfig(target_modules=["q_proj", "v_proj"], modules_to_save=["score"], task_type="SEQ_CLS")
    made: Any = peft.get_peft_model(reward_model(), config)
    made.save_pretrained(tmp_path)
    model = prepare_model(reward_model(), adapter=tmp_path, quantization=backend, compute_dtype="bfloat16")
    score = made.base_model.model.score.modules_to_save["default"].weight
    assert torch.equal(model.base_model.model.score.modules_to_save["default"].weight, score)  # type: ignore[union-attr]
    rounded = prepare_model(
        reward_model(), adapter=tmp_path, quantization=backend, compute_dtype="bfloat16", trainable_dtype="bfloat16"
    )
    assert torch.equal(rounded.base_model.model.score.modules_to_save["default"].weight, score.bfloat16())  # type: ignore[union-attr]


# -- every input meets its layer ---------------------------------------------------------------


def whisper() -> Any:
    return WhisperForConditionalGeneration(
        WhisperConfig(
            vocab_size=96,
            num_mel_bins=8,
            d_model=32,
            encoder_layers=1,
            decoder_layers=1,
            encoder_attention_heads=4,
            decoder_attention_heads=4,
            encoder_ffn_dim=32,
            decoder_ffn_dim=32,
            max_source_positions=10,
            max_target_positions=16,
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=2,
            decoder_start_token_id=1,
        )
    )


def wav2vec2(norm: str = "group") -> Any:
    return Wav2Vec2ForCTC(
        Wav2Vec2Config(
            vocab_size=32,
            hidden_size=32,
            num_hidden_layers=1,
            num_attention_heads=4,
            intermediate_size=32,
            conv_dim=(16, 16),
            conv_kernel=(8, 4),
            conv_stride=(4, 2),
            num_feat_extract_layers=2,
            feat_extract_norm=norm,
            num_conv_pos_embeddings=4,
            num_conv_pos_embedding_groups=2,
            mask_time_prob=0.0,
            layerdrop=0.0,
        )
    )


def vit() -> Any:
    return ViTForImageClassification(
        ViTConfig(
            hidden_size=32,
            num_hidden_layers=1,
            num_attention_heads=4,
            intermediate_size=32,
            image_size=8,
            patch_size=4,
            num_labels=3,
        )
    )


def clip() -> Any:
    return CLIPVisionModelWithProjection(
        CLIPVisionConfig(
            hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=4, image_size=8, patch_size=4
        )
    )


def patchtst() -> Any:
    return PatchTSTForClassification(
        PatchTSTConfig(
            num_input_channels=2,
            num_targets=2,
            context_length=16,
            patch_length=4,
            patch_stride=4,
            num_hidden_layers=1,
            d_model=32,
            num_attention_heads=4,
            ffn_dim=32,
            norm_type="layernorm",
            use_cls_token=True,
        )
    )


INPUTS: dict[str, tuple[Callable[[], Any], dict[str, Any]]] = {
    "whisper": (whisper, {"input_features": torch.randn(1, 8, 20), "labels": IDS[:, :4]}),
    "wav2vec2 group": (wav2vec2, {"input_values": torch.randn(1, 400), "labels": IDS[:, :4]}),
    "wav2vec2 layer": (lambda: wav2vec2("layer"), {"input_values": torch.randn(1, 400), "labels": IDS[:, :4]}),
    "vit": (vit, {"pixel_values": torch.randn(1, 3, 8, 8), "labels": torch.tensor([1])}),
    "clip": (clip, {"pixel_values": torch.randn(1, 3, 8, 8)}),
    "patchtst": (patchtst, {"past_values": torch.randn(2, 16, 2), "target_values": torch.tensor([0, 1])}),
}


@pytest.mark.parametrize("backend", ["int8", "nf4", "int8-torchao", "int8-hqq", None])
@pytest.mark.parametrize("name", list(INPUTS))
def test_sound_images_and_series_in_float32_meet_a_16_bit_base(name: str, backend: str | None) -> None:
    make, batch = INPUTS[name]
    targets = "all-linear" if name in ("clip", "patchtst") else None
    model = prepare_model(make(), quantization=backend, compute_dtype="bfloat16", target_modules=targets, strict=False)
    assert trained_dtypes(model) == {torch.float32}
    check_step(model, **batch)


def test_inputs_in_float16_meet_a_bfloat16_base() -> None:
    make, batch = INPUTS["whisper"]
    model = prepare_model(make().bfloat16(), quantization="int8")
    check_step(model, **{**batch, "input_features": batch["input_features"].half()})


def test_embeddings_that_are_given_in_float32_meet_a_16_bit_base() -> None:
    model = prepare_model(tiny.gpt2(), quantization="int8", compute_dtype="bfloat16")
    check_step(model, inputs_embeds=torch.randn(1, 8, 32), labels=IDS)


@pytest.mark.parametrize("make", [tiny.gpt2, tiny.llama, tiny.bloom, tiny.bert_classifier])
@pytest.mark.parametrize("backend", [None, "int8"])
def test_a_float16_model_trains_under_bfloat16_autocast_on_a_cpu(
    tmp_path: Path, make: Callable[[], Any], backend: str | None
) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = make().half()
        data = tiny.classes() if make is tiny.bert_classifier else tiny.rows()
        trainer = tiny.trainer(tmp_path, model, [LoraCallback(quantization=backend)], data=data, bf16=True, max_steps=2)
        trainer.train()
    assert trained_dtypes(trainer.model) == {torch.float32}


def test_the_head_of_a_language_model_stays_without_hooks_so_that_its_loss_is_chunked() -> None:
    model = prepare_model(tiny.llama(), quantization="int8", compute_dtype="bfloat16")
    assert not model.get_output_embeddings()._forward_pre_hooks

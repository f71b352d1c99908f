"""Exact parameter counts of published models, from their configurations on the meta device."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    BloomConfig,
    FalconConfig,
    GPT2Config,
    LlamaConfig,
    MistralConfig,
    MixtralConfig,
    PreTrainedConfig,
)

from lora_plugins import prepare_model
from lora_plugins.quantization.counting import count_parameters


def bloom(hidden: int, layers: int, heads: int) -> PreTrainedConfig:
    return BloomConfig(vocab_size=250880, hidden_size=hidden, n_layer=layers, n_head=heads)


def llama2(hidden: int, middle: int, layers: int, heads: int, kv_heads: int | None = None) -> PreTrainedConfig:
    return LlamaConfig(
        vocab_size=32000,
        hidden_size=hidden,
        intermediate_size=middle,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads or heads,
    )


def llama3() -> PreTrainedConfig:
    return LlamaConfig(
        vocab_size=128256,
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=8,
    )


def falcon40b() -> PreTrainedConfig:
    return FalconConfig(
        vocab_size=65024,
        hidden_size=8192,
        num_hidden_layers=60,
        num_attention_heads=128,
        num_kv_heads=8,
        new_decoder_architecture=True,
        parallel_attn=True,
        bias=False,
    )


LINEARS = "all-linear"
FALCON = ["query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"]

#: name: (configuration, LoRA arguments, trainable, all weights with the adapters)
CASES: dict[str, tuple[Callable[[], PreTrainedConfig], dict[str, Any], int, int]] = {
    "bloomz-7b1": (lambda: bloom(4096, 30, 32), {}, 3_932_160, 7_072_948_224),
    "bloom-560m": (lambda: bloom(1024, 24, 16), {}, 786_432, 559_214_592 + 786_432),
    "bloom-1b1": (lambda: bloom(1536, 24, 16), {}, 1_179_648, 1_065_314_304 + 1_179_648),
    "bloom-1b7": (lambda: bloom(2048, 24, 16), {}, 1_572_864, 1_722_408_960 + 1_572_864),
    "bloom-3b": (lambda: bloom(2560, 30, 32), {}, 2_457_600, 3_002_557_440 + 2_457_600),
    "bloom-176b": (lambda: bloom(14336, 70, 112), {}, 32_112_640, 176_247_271_424 + 32_112_640),
    "llama-2-7b": (lambda: llama2(4096, 11008, 32, 32), {}, 4_194_304, 6_742_609_920),
    "llama-2-7b dora": (lambda: llama2(4096, 11008, 32, 32), {"use_dora": True}, 4_456_448, 6_742_872_064),
    "llama-2-7b rslora": (lambda: llama2(4096, 11008, 32, 32), {"use_rslora": True}, 4_194_304, 6_742_609_920),
    "llama-2-7b linear r8": (
        lambda: llama2(4096, 11008, 32, 32),
        {"target_modules": LINEARS},
        19_988_480,
        6_758_404_096,
    ),
    "llama-2-7b linear r64": (
        lambda: llama2(4096, 11008, 32, 32),
        {"target_modules": LINEARS, "r": 64},
        159_907_840,
        6_898_323_456,
    ),
    "llama-2-13b": (lambda: llama2(5120, 13824, 40, 40), {}, 6_553_600, 13_022_417_920),
    "llama-2-70b": (lambda: llama2(8192, 28672, 80, 64, 8), {}, 16_384_000, 68_993_032_192),
    "llama-3-8b": (llama3, {}, 3_407_872, 8_033_669_120),
    "llama-3-8b linear r16": (llama3, {"target_modules": LINEARS, "r": 16}, 41_943_040, 8_072_204_288),
    "mistral-7b": (MistralConfig, {}, 3_407_872, 7_245_139_968),
    "mistral-7b linear r64": (MistralConfig, {"target_modules": LINEARS, "r": 64}, 167_772_160, 7_409_504_256),
    "falcon-40b": (falcon40b, {"target_modules": FALCON, "r": 64}, 444_334_080, 41_747_628_032),
    "gpt2": (GPT2Config, {}, 294_912, 124_734_720),
    "gpt3 q,v r1": (lambda: llama2(12288, 64, 96, 96), {"r": 1}, 4_718_592, 0),
    "gpt3 q,v r8": (lambda: llama2(12288, 64, 96, 96), {"r": 8}, 37_748_736, 0),
}


@pytest.mark.parametrize("name", CASES)
def test_published_model(name: str) -> None:
    make, lora, trainable, total = CASES[name]
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(make())
    count = count_parameters(prepare_model(model, **lora))
    assert count.trainable == trainable
    if total:
        assert count.total == total


def test_mixtral_experts_without_and_with_the_router() -> None:
    """PEFT's "all-linear" trains the routers too; ours does not."""
    import peft

    def mixtral() -> Any:
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(MixtralConfig())

    assert count_parameters(mixtral()).total == 46_702_792_704
    ours = prepare_model(mixtral(), target_modules=LINEARS, experts="routed", lora_dropout=0.0)
    assert count_parameters(ours).trainable == 178_782_208
    theirs = peft.get_peft_model(mixtral(), peft.LoraConfig(r=8, target_modules=LINEARS))
    assert count_parameters(theirs).trainable == 179_832_832

"""Every storage format that transformers 5 loads, as data."""

from __future__ import annotations

from lora_plugins import Format, hookimpl

__all__ = ["FORMATS", "register_formats"]


_READ = "read in transformers 5.23.0 and PEFT 0.21.2"
_RUN = "run in the tests on a CPU with transformers 5.23.0"

_FLOAT = "load the float model that it was made from, and quantize that with quantization="
_NO_GRADIENT = "transformers marks its layers as inference only, and PEFT has no LoRA layer for them"
_KERNEL = "its kernels have no backward pass, so no adapter below such a layer would get a gradient"
_NEVER = "no: the base is refused before training"
_PEFT_REFUSES = "PEFT cannot merge into its layers; merge into the float model it was made from (--base)"
_IN_FLOAT = "into the float weights; the result is not quantized again"

#: One record for each key of transformers' table of quantizers, in its order.
FORMATS = (
    Format(
        "awq",
        "AWQ",
        "untried",
        layers=("gptqmodel.BaseQuantLinear",),
        merges=_PEFT_REFUSES,
        needs="gptqmodel >= 5.0 (7.0 for PEFT), which ships as source and is compiled against the installed torch",
        evidence=_READ + " (AwqLoraLinear, dispatch by gptqmodel's layers)",
        reason="PEFT has a LoRA layer for it with gptqmodel's kernels, which was never run here",
        instead=_FLOAT + "'nf4'",
    ),
    Format(
        "bitsandbytes_4bit",
        "bitsandbytes 4-bit",
        "stored",
        layers=("bitsandbytes.Linear4bit",),
        backends=("fp4", "nf4"),
        merges="after dequantize_model(), or with `lora-plugins merge`; not in place",
        needs="bitsandbytes >= 0.50; CPU or GPU",
        evidence=_RUN,
    ),
    Format(
        "bitsandbytes_8bit",
        "bitsandbytes LLM.int8()",
        "stored",
        layers=("bitsandbytes.Linear8bitLt",),
        backends=("int8",),
        merges="in place, or with `lora-plugins merge`",
        needs="bitsandbytes >= 0.50; CPU or GPU",
        evidence=_RUN,
    ),
    Format(
        "gptq",
        "GPTQ",
        "untried",
        layers=("gptqmodel.BaseQuantLinear",),
        merges=_PEFT_REFUSES,
        needs="optimum >= 1.24 and gptqmodel >= 1.4.3 (7.0 for PEFT), which ships as source and is compiled against "
        "the installed torch",
        evidence=_READ + " (GPTQLoraLinear)",
        reason="PEFT has a LoRA layer for it with gptqmodel's kernels, which was never run here",
        instead=_FLOAT + "'nf4'",
    ),
    Format(
        "aqlm",
        "AQLM",
        "untried",
        layers=("aqlm.QuantizedLinear",),
        merges=_PEFT_REFUSES,
        needs="aqlm >= 1.0.2",
        evidence=_READ + " (AqlmLoraLinear)",
        reason="PEFT has a LoRA layer for it, which was never run here",
        instead=_FLOAT + "'nf4'",
    ),
    Format(
        "quanto",
        "optimum-quanto",
        "stored",
        layers=("optimum.QLinear",),
        backends=("int4-quanto", "int8-quanto"),
        merges="8 bits in place; 4 bits after dequantize_model(), or with `lora-plugins merge`",
        needs="optimum-quanto >= 0.2.7; CPU or GPU. transformers 5.23 quantizes with it while loading and saves none",
        evidence=_RUN,
        reason="only its int8 and int4 weights have a backend here",
        instead=_FLOAT + "'int8-quanto'",
    ),
    Format(
        "quark",
        "AMD Quark",
        "no",
        layers=("quark.QParamsLinear",),
        merges=_NEVER,
        needs="amd-quark",
        evidence=_READ,
        reason=_NO_GRADIENT,
        instead=_FLOAT + "'int8'",
    ),
    Format(
        "fouroversix",
        "Four Over Six (NVFP4)",
        "no",
        merges=_NEVER,
        needs="fouroversix, compiled for a CUDA GPU",
        evidence=_READ,
        reason="transformers trains it only with keep_master_weights, and then the base's own weights; PEFT has no "
        "LoRA layer for it",
        instead=_FLOAT + "'nf4'",
    ),
    Format(
        "fp_quant",
        "FP-Quant (MXFP4, NVFP4)",
        "no",
        layers=("fp_quant.FPQuantLinear",),
        merges=_NEVER,
        needs="fp_quant and a GPU; qutlass needs a Blackwell GPU",
        evidence=_READ,
        reason="transformers trains it only with store_master_weights, and then the base's own weights; PEFT has no "
        "LoRA layer for it",
        instead=_FLOAT + "'nf4'",
    ),
    Format(
        "eetq",
        "EETQ int8",
        "untried",
        layers=("transformers.EetqLinear",),
        merges=_PEFT_REFUSES,
        needs="kernels and a CUDA GPU; PEFT's LoRA layer needs eetq's own layers",
        evidence=_READ + " (EetqLoraLinear knows the classes of the package eetq only)",
        reason="PEFT's LoRA layer supports the layers of the package eetq, not those of transformers 5; neither was "
        "ever run here",
        instead=_FLOAT + "'int8'",
    ),
    Format(
        "higgs",
        "HIGGS",
        "no",
        layers=("transformers.HiggsLinear",),
        merges=_NEVER,
        needs="flute-kernel >= 0.3, fast_hadamard_transform and a CUDA GPU",
        evidence=_READ,
        reason=_NO_GRADIENT,
        instead="call model.dequantize() on a GPU and train on that, or " + _FLOAT + "'nf4'",
    ),
    Format(
        "hqq",
        "HQQ",
        "stored",
        layers=("hqq.HQQLinear",),
        backends=("int4-hqq", "int8-hqq"),
        merges="8 bits in place; 4 bits after dequantize_model(), or with `lora-plugins merge`",
        needs="hqq >= 0.2.8; CPU or GPU. transformers 5.23 raises NotImplementedError for HQQ checkpoints; hqq's own "
        "loader and quantization in place work",
        evidence=_RUN + " and hqq 0.2.8",
        reason="only its 8-bit and 4-bit weights have a backend here",
        instead=_FLOAT + "'int4-hqq'",
    ),
    Format(
        "compressed-tensors",
        "compressed-tensors",
        "stored",
        backends=("compressed-tensors",),
        merges="after dequantize_model(), or with `lora-plugins merge`; not in place",
        needs="compressed-tensors >= 0.15; CPU or GPU. transformers 5.23 does not load packed zero points (asymmetric "
        "groups) of compressed-tensors 0.20",
        evidence=_RUN + " and compressed-tensors 0.20",
        layers=("transformers.CompressedTensorsFP8Linear",),
        reason="the layers of use_optimized_inference=True have no backward pass",
        instead="load it again without use_optimized_inference, and prepare it before its first pass",
    ),
    Format(
        "fbgemm_fp8",
        "FBGEMM FP8",
        "no",
        layers=(
            "transformers.FbgemmFp8Linear",
            "transformers.FbgemmFp8Llama4TextExperts",
        ),
        merges=_NEVER,
        needs="fbgemm-gpu and a GPU of compute capability 9.0",
        evidence=_READ,
        reason=_KERNEL,
        instead=_FLOAT + "'int8'",
    ),
    Format(
        "torchao",
        "torchao",
        "stored",
        backends=("float8-torchao", "int8-torchao"),
        merges="in place, or with `lora-plugins merge`",
        needs="torchao >= 0.18; CPU or GPU. Weight-only int8 and float8; other configurations are refused",
        evidence=_RUN + " and torchao 0.18",
        reason="only its weight-only int8 and float8 tensors have a backend here",
        instead=_FLOAT + "'int8-torchao'",
    ),
    Format(
        "bitnet",
        "BitNet b1.58",
        "no",
        layers=("transformers.BitLinear", "transformers.AutoBitLinear"),
        merges="no: its layers round the weight to three values in every pass, which loses most of the adapter",
        needs="CPU or GPU; a C++ compiler for torch.compile",
        evidence=_READ,
        reason="transformers does not support gradients through its packed layers (bitlinear, and autobitlinear "
        "quantized offline); PEFT treats those of the online mode as float layers, and would merge into weights that "
        "are rounded to three values afterwards",
        instead="load another model; no float model computes the same as a BitNet model",
    ),
    Format(
        "vptq",
        "VPTQ",
        "no",
        layers=("vptq.VQuantLinear",),
        merges=_NEVER,
        needs="vptq >= 0.0.4 and a CUDA GPU",
        evidence=_READ,
        reason=_NO_GRADIENT,
        instead=_FLOAT + "'nf4'",
    ),
    Format(
        "spqr",
        "SpQR",
        "no",
        layers=("spqr_quant.QuantizedLinear",),
        merges=_NEVER,
        needs="spqr_quant and a CUDA GPU",
        evidence=_READ,
        reason=_NO_GRADIENT,
        instead=_FLOAT + "'nf4'",
    ),
    Format(
        "fp8",
        "FP8 in blocks (DeepSeek, Qwen3)",
        "float",
        layers=(
            "transformers.FP8Linear",
            "transformers.FP8Experts",
            "transformers.FP8Embedding",
        ),
        merges=_IN_FLOAT,
        needs="transformers dequantizes it to bfloat16 without a GPU of compute capability 8.9, else with "
        "FineGrainedFP8Config(dequantize=True)",
        evidence=_RUN,
        reason=_KERNEL,
        instead="load it with quantization_config=FineGrainedFP8Config(dequantize=True)",
    ),
    Format(
        "gguf",
        "GGUF",
        "float",
        layers=(
            "transformers.GgufLinear",
            "transformers.GgufExperts",
            "transformers.GgufEmbedding",
        ),
        merges=_IN_FLOAT,
        needs="gguf; transformers dequantizes it if the package kernels has no kernel for the device, else with "
        "GgufConfig(dequantize=True)",
        evidence=_RUN,
        reason=_KERNEL,
        instead="load it with quantization_config=GgufConfig(dequantize=True)",
    ),
    Format(
        "nvfp4",
        "NVFP4",
        "no",
        layers=("transformers.NVFP4Linear",),
        merges=_NEVER,
        needs="kernels and a Blackwell GPU; transformers 5.23 quantizes while loading and reads no NVFP4 checkpoint",
        evidence=_READ,
        reason=_NO_GRADIENT,
        instead=_FLOAT + "'nf4'",
    ),
    Format(
        "mxfp8",
        "MXFP8",
        "float",
        layers=("transformers.FP8GroupedLinear",),
        merges=_IN_FLOAT,
        needs="as FP8 in blocks",
        evidence=_RUN,
        reason=_KERNEL,
        instead="load it with quantization_config=FineGrainedFP8Config(dequantize=True)",
    ),
    Format(
        "auto-round",
        "AutoRound",
        "no",
        merges=_NEVER,
        needs="auto-round >= 0.5",
        evidence=_READ,
        reason="transformers marks it as inference only; on a CPU, auto-round 0.16 leaves tensors without data in the "
        "model",
        instead=_FLOAT + "'nf4'",
    ),
    Format(
        "mxfp4",
        "MXFP4 experts (gpt-oss)",
        "float",
        layers=("transformers.Mxfp4GptOssExperts",),
        merges=_IN_FLOAT,
        needs="transformers dequantizes it to bfloat16 on a CPU and where triton and kernels are missing, else with "
        "Mxfp4Config(dequantize=True)",
        evidence=_RUN,
        reason="transformers 5.23 does not support training on its packed experts",
        instead="load it with quantization_config=Mxfp4Config(dequantize=True)",
    ),
    Format(
        "metal",
        "Metal affine (MLX)",
        "float",
        layers=("transformers.MetalLinear",),
        merges=_IN_FLOAT,
        needs="transformers dequantizes it; on Apple silicon this needs MetalConfig(dequantize=True)",
        evidence=_READ,
        reason=_KERNEL,
        instead="load it with quantization_config=MetalConfig(dequantize=True)",
    ),
    Format(
        "sinq",
        "SINQ",
        "no",
        layers=("sinq.SINQLinear",),
        merges=_NEVER,
        needs="sinq, which installs its own torch",
        evidence=_READ,
        reason="PEFT has no LoRA layer for it",
        instead=_FLOAT + "'int4-hqq'",
    ),
    Format(
        "gemma",
        "Gemma's own (static range)",
        "no",
        layers=(
            "transformers.QuantizedLinear",
            "transformers.QuantizedEmbedding",
        ),
        merges=_NEVER,
        needs="CPU or GPU",
        evidence=_READ,
        reason=_NO_GRADIENT,
        instead=_FLOAT + "'nf4'",
    ),
)


@hookimpl
def register_formats() -> list[Format]:
    return list(FORMATS)

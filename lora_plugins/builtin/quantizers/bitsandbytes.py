"""The bitsandbytes backends: ``int8`` (LLM.int8()), ``nf4`` and ``fp4``."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from lora_plugins import ExpertsAsLayers, Quantizer, hookimpl

if TYPE_CHECKING:
    import torch
    from torch import nn

__all__ = ["FourBit", "Fp4", "Int8", "Int8Experts", "Nf4", "register_quantizers"]


_REQUIRES = ("bitsandbytes>=0.50",)
_LOGGERS = ("bitsandbytes",)
#: Bytes at whose multiples a part of a divided layer begins: kernels read packed weights in words of this size.
_ALIGNMENT = 16


def _import_library() -> Any:
    import bitsandbytes

    return bitsandbytes


def _import_int8_layer() -> Any:
    from lora_plugins.builtin.quantizers import int8_layer

    return int8_layer


def _is_layer(module: Any, layer: str) -> bool:
    # A model can only hold bitsandbytes layers once somebody has imported bitsandbytes.
    loaded = sys.modules.get("bitsandbytes")
    return loaded is not None and isinstance(module, getattr(loaded.nn, layer))


class Int8(Quantizer):
    """LLM.int8(): one int8 weight per value with a scale per output row, outlier columns kept in float.

    In training mode the weight is dequantized and multiplied in the input's dtype; in evaluation mode the
    activations are quantized too, with columns above ``threshold`` left in float. The two losses differ
    slightly, and the second depends on the batch. Source: https://arxiv.org/abs/2208.07339

    Options: ``threshold`` (default 6.0), the activation magnitude from which a column counts as outlier; ``lean``,
    whether training multiplies by the dequantized weight and keeps no input, by default on a CPU only.
    """

    name = "int8"
    bits = 8
    requires = _REQUIRES
    options = ("threshold", "lean")
    loss_note = (
        "training loss comes from dequantized weights, evaluation loss from LLM.int8()'s activation quantization: "
        "they differ slightly, and the second depends on the batch"
    )
    # The autograd function of bitsandbytes 0.50 keeps the input as an attribute.
    keeps_input = True
    # ``state.CB`` beside the parameter.
    copies_weight = True
    replaces_weight = True
    priority = 1
    loggers = _LOGGERS

    def available(self, device: torch.device, dtype: torch.dtype, options: Mapping[str, Any]) -> str | None:
        return None

    def quantize_linear(self, linear: nn.Linear, options: Mapping[str, Any]) -> nn.Module:
        bnb, ours = _import_library(), _import_int8_layer()

        device = linear.weight.device
        layer: Any = ours.Int8Linear(
            linear.in_features,
            linear.out_features,
            bias=linear.bias is not None,
            has_fp16_weights=False,
            threshold=options.get("threshold", 6.0),
            device="meta",
        )
        layer.lean = options.get("lean")
        if device.type == "cpu":
            values, scale = ours.quantize_rows(linear.weight.data)
            layer.weight = bnb.nn.Int8Params(values, requires_grad=False, CB=values, SCB=scale)
        else:
            # bitsandbytes 0.50 quantizes a float weight when it moves from the CPU to another device.
            weight = bnb.nn.Int8Params(linear.weight.data.to("cpu"), requires_grad=False, has_fp16_weights=False)
            layer.weight = weight.to(device)
        if linear.bias is not None:
            layer.bias = linear.bias
        return layer

    def owns(self, module: Any) -> bool:
        return _is_layer(module, "Linear8bitLt")

    def dequantize(self, module: Any) -> torch.Tensor:
        weight: torch.Tensor = _import_int8_layer().dequantize_weight(module.weight.data, _find_int8_scale(module))
        return weight

    def expert_format(self, options: Mapping[str, Any]) -> Int8Experts:
        return Int8Experts(self, options)

    def load_config(self, options: Mapping[str, Any]) -> Any:
        from transformers import BitsAndBytesConfig

        return BitsAndBytesConfig(
            load_in_8bit=True,
            llm_int8_threshold=options.get("threshold", 6.0),
            llm_int8_skip_modules=options.get("skip_modules"),
        )

    def reads(self, config: Any) -> bool:
        return bool(getattr(config, "load_in_8bit", False))

    def loaded_options(self, config: Any) -> Mapping[str, Any] | None:
        return _read_loaded(config, threshold="llm_int8_threshold", skip_modules="llm_int8_skip_modules")

    def extra_tensors(self, module: Any) -> Iterable[torch.Tensor]:
        # Under ZeRO-3 the second reference to the weight is a whole copy.
        again = module.state.CB
        return [_find_int8_scale(module), *([] if again is None else [again])]

    def layer_bytes(
        self, in_features: int, out_features: int, dtype: torch.dtype, options: Mapping[str, Any]
    ) -> int | None:
        return in_features * out_features + 4 * out_features

    def after_quantize(self, model: Any, options: Mapping[str, Any]) -> None:
        ours = _import_int8_layer()
        model.is_loaded_in_8bit = True
        for module in model.modules():
            # Not a class derived from it, such as this one.
            if _is_layer(module, "Linear8bitLt") and type(module).__name__ == "Linear8bitLt":
                module.__class__ = ours.Int8Linear
                module.lean = options.get("lean")


class Int8Experts(ExpertsAsLayers):
    """Experts stored like LLM.int8() layers, dequantized into the dtype in which they are multiplied."""

    def unpack_as(self, packed: Any, dtype: torch.dtype) -> torch.Tensor:
        made: torch.Tensor = _import_int8_layer().dequantize_weight(packed.weight.data, _find_int8_scale(packed), dtype)
        return made


def _read_loaded(config: Any, **names: str) -> dict[str, Any] | None:
    """Return our options from transformers' config, given its names; ``None`` for a config of another library."""
    if not all(hasattr(config, name) for name in names.values()):
        return None
    return {option: getattr(config, name) for option, name in names.items() if getattr(config, name) is not None}


def _find_int8_scale(module: Any) -> torch.Tensor:
    # The first forward pass moves the scale from the weight to the layer's state.
    scale = module.state.SCB if module.state.SCB is not None else module.weight.SCB
    assert scale is not None, "a Linear8bitLt without scale holds no quantized weight"  # noqa: S101 - narrows a type
    return scale


class FourBit(Quantizer):
    """4 bits a weight in blocks of 64 with one scale each; the kinds differ in their table of 16 values.

    Options: ``double_quant`` (default false) quantizes the scales as well; ``compute_dtype`` is the dtype of
    the matrix products, by default that of the activations (for a model loaded with `quantization_config`:
    bfloat16, or float32 on a CPU that is slow at it).
    """

    #: bitsandbytes' name for the table.
    kind: str
    bits = 4
    requires = _REQUIRES
    options = ("double_quant", "compute_dtype")
    replaces_weight = True
    loggers = _LOGGERS

    def available(self, device: torch.device, dtype: torch.dtype, options: Mapping[str, Any]) -> str | None:
        return None

    def quantize_linear(self, linear: nn.Linear, options: Mapping[str, Any]) -> nn.Module:
        bnb = _import_library()

        device = linear.weight.device
        layer = bnb.nn.Linear4bit(
            linear.in_features,
            linear.out_features,
            bias=linear.bias is not None,
            compute_dtype=options.get("compute_dtype"),
            compress_statistics=options.get("double_quant", False),
            quant_type=self.kind,
            device="meta",
        )
        weight = bnb.nn.Params4bit(
            linear.weight.data.to("cpu"),
            requires_grad=False,
            compress_statistics=options.get("double_quant", False),
            quant_type=self.kind,
            module=layer,
        )
        layer.weight = weight.to(device)
        if linear.bias is not None:
            layer.bias = linear.bias
        _keep_trainable(layer)
        return layer

    def owns(self, module: Any) -> bool:
        return _is_layer(module, "Linear4bit") and _find_kind(module) == self.kind

    def dequantize(self, module: Any) -> torch.Tensor:
        bnb = _import_library()

        if _is_divided(module):
            weight: torch.Tensor = module.dequantize()
            return weight
        return bnb.functional.dequantize_4bit(module.weight.data, module.weight.quant_state)

    def expert_format(self, options: Mapping[str, Any]) -> ExpertsAsLayers:
        return ExpertsAsLayers(self, options)

    def load_config(self, options: Mapping[str, Any]) -> Any:
        from transformers import BitsAndBytesConfig

        from lora_plugins import loading_dtype

        return BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type=self.kind,
            bnb_4bit_use_double_quant=options.get("double_quant", False),
            # The default of transformers 5 computes every layer in float32, whatever the model's dtype
            # (https://github.com/bitsandbytes-foundation/bitsandbytes/pull/2077).
            bnb_4bit_compute_dtype=options.get("compute_dtype") or loading_dtype(),
            llm_int8_skip_modules=options.get("skip_modules"),
        )

    def reads(self, config: Any) -> bool:
        return bool(getattr(config, "load_in_4bit", False)) and config.bnb_4bit_quant_type == self.kind

    def loaded_options(self, config: Any) -> Mapping[str, Any] | None:
        return _read_loaded(
            config,
            double_quant="bnb_4bit_use_double_quant",
            compute_dtype="bnb_4bit_compute_dtype",
            skip_modules="llm_int8_skip_modules",
        )

    def divide(self, module: Any) -> bool:
        from lora_plugins.builtin.quantizers.four_bit_layer import divide_layer

        divide_layer(module, _ALIGNMENT)
        return True

    def undivide(self, module: Any) -> None:
        if _is_divided(module):
            module.undivide()

    def divided_bytes(self, in_features: int, out_features: int, options: Mapping[str, Any]) -> int | None:
        sizes = self._list_sizes(in_features, out_features, options)
        return sum(-(-size // _ALIGNMENT) * _ALIGNMENT for size in sizes)

    def extra_tensors(self, module: Any) -> Iterable[torch.Tensor]:
        if _is_divided(module):
            return []
        state = module.weight.quant_state
        parts = [state.absmax, state.code]
        if state.nested:
            parts += [state.offset, state.state2.absmax, state.state2.code]
        return [part for part in parts if part is not None]

    def layer_bytes(
        self, in_features: int, out_features: int, dtype: torch.dtype, options: Mapping[str, Any]
    ) -> int | None:
        return sum(self._list_sizes(in_features, out_features, options))

    def _list_sizes(self, in_features: int, out_features: int, options: Mapping[str, Any]) -> list[int]:
        """Return the bytes of each tensor of a layer: packed weight, table, scales."""
        size = in_features * out_features
        blocks = -(-size // 64)
        packed, table = -(-size // 2), 4 * 16
        if not options.get("double_quant", False):
            return [packed, table, 4 * blocks]
        # A byte for each scale; a scale, a table and an offset for those.
        return [packed, table, blocks, 4 * -(-blocks // 256), 4 * 256, 4]

    def after_quantize(self, model: Any, options: Mapping[str, Any]) -> None:
        model.is_loaded_in_4bit = True
        for module in model.modules():
            if _is_layer(module, "Linear4bit"):
                _keep_trainable(module)


def _is_divided(module: Any) -> bool:
    return hasattr(module, "undivided")


def _find_kind(module: Any) -> str:
    # The parameter of a divided layer holds bytes alone.
    state = module.quant_state if _is_divided(module) else module.weight
    return str(state.quant_type)


class Nf4(FourBit):
    """4-bit NormalFloat, the table that fits normally distributed weights (QLoRA).

    Options: ``double_quant``, ``compute_dtype``. Source: https://arxiv.org/abs/2305.14314
    """

    name = kind = "nf4"
    priority = 1


class Fp4(FourBit):
    """4-bit floating point; further from normally distributed weights than ``nf4``.

    Options: ``double_quant``, ``compute_dtype``.
    """

    name = kind = "fp4"


def _keep_trainable(layer: Any) -> None:
    """Stop the layer from repacking its weight in the first evaluation on a CPU with AVX512-BF16.

    The packed form has no backward pass and is never unpacked on ``train()``, so after one evaluation the adapters
    would silently get no gradient: bitsandbytes 0.50, since
    https://github.com/bitsandbytes-foundation/bitsandbytes/pull/1804.
    """
    layer.support_avx512bf16_for_cpu = False


@hookimpl
def register_quantizers() -> list[Quantizer]:
    return [Int8(), Nf4(), Fp4()]

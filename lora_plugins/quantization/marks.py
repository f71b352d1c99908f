"""Set and remove the flags that transformers sets on a quantized model."""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedModel
from transformers.quantizers import AutoHfQuantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from lora_plugins.quantization.request import Quantization, QuantizedLayers, is_float

__all__ = ["QuantizedInPlace", "forget_unpacking", "tag_quantized", "untag_dequantized"]


class QuantizedInPlace(HfQuantizer):  # type: ignore[misc]
    """Marks a model as quantized in place: it can be trained under adapters, but not be saved as it is.

    Without this, transformers 5.23 would save such a base without complaint and load it with new random weights.
    """

    def __init__(self, name: str) -> None:
        super().__init__(QuantizationConfigMixin(quant_method=name), pre_quantized=False)

    def is_serializable(self) -> bool:
        return False

    @property
    def is_trainable(self) -> bool:
        return True


def tag_quantized(model: Any, quantization: Quantization, layers: QuantizedLayers) -> None:
    """Set all the flags that transformers sets on a model that was loaded quantized, or none.

    A part of them is worse than none: with ``is_quantized`` alone the Trainer (transformers 5.23) fails on a missing
    ``hf_quantizer``. A backend without a load-time config gets a `QuantizedInPlace`: without it, transformers
    would save the base in a form that it cannot read back.
    """
    options = {**quantization.options, "skip_modules": sorted(layers.skipped) or None}
    if "compute_dtype" in quantization.quantizer.options:
        options.setdefault("compute_dtype", getattr(model, "dtype", None))
    if isinstance(model, PreTrainedModel):
        config = quantization.quantizer.load_config(options)
        if config is not None:
            hf_quantizer = AutoHfQuantizer.from_config(config, pre_quantized=False)
            hf_quantizer.modules_to_not_convert = sorted(layers.skipped)
            model.config.quantization_config = config
        else:
            hf_quantizer = QuantizedInPlace(quantization.name)
        model.hf_quantizer = hf_quantizer
        model.is_quantized = True
        model.quantization_method = hf_quantizer.quantization_config.quant_method
        for module in model.modules():
            if isinstance(module, PreTrainedModel):
                module.config._is_quantized = True
    quantization.quantizer.after_quantize(model, options)


def untag_dequantized(model: Any) -> bool:
    """Remove the flags of a model that is marked quantized but holds only float weights.

    transformers 5.23 dequantizes a model from GGUF and leaves it marked, so its Trainer refuses the model.

    Returns:
        Whether there was anything to remove.
    """
    if not is_float(model):
        return False
    flagged = bool(getattr(model, "is_quantized", False))
    forget_unpacking(model, flagged=flagged)
    if not flagged:
        return False
    model.is_quantized = False
    for attribute in ("hf_quantizer", "quantization_method", "is_loaded_in_8bit", "is_loaded_in_4bit"):
        if attribute in vars(model):
            delattr(model, attribute)
    config = getattr(model, "config", None)
    if config is not None:
        if hasattr(config, "quantization_config"):
            del config.quantization_config
        for module in model.modules():
            inner = getattr(module, "config", None)
            if inner is not None and getattr(inner, "_is_quantized", False):
                inner._is_quantized = False
    return True


def forget_unpacking(model: Any, *, flagged: bool = False) -> None:
    """Drop the conversions by which a quantizer unpacked the files of a model whose weights are float now.

    transformers 5.23 reverses them when it saves the model: that fails, or packs the weights again, and the saved
    configuration no longer says so.

    Args:
        model: The model.
        flagged: Whether it is marked quantized; then conversions that cannot be reversed are the quantizer's too.
    """
    conversions = vars(model).get("_weight_conversions")
    if conversions:
        kept = [one for one in conversions if not _is_of_quantizer(one)]
        model._weight_conversions = [one for one in kept if _is_reversible(one)] if flagged else kept


def _is_of_quantizer(conversion: Any) -> bool:
    return any(getattr(one, "hf_quantizer", None) is not None for one in getattr(conversion, "operations", ()))


def _is_reversible(conversion: Any) -> bool:
    try:
        conversion.reverse_transform()
    except NotImplementedError:
        return False
    return True

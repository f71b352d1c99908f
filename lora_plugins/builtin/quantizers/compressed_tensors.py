"""The backend ``compressed-tensors``, for checkpoints that come so."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from lora_plugins import Quantizer, hookimpl

if TYPE_CHECKING:
    import torch
    from torch import nn

__all__ = ["CompressedTensors", "register_quantizers"]


#: Options and their defaults, as the library names them.
_DEFAULTS: Mapping[str, Any] = {"num_bits": 4, "group_size": 32, "symmetric": True, "type": "int"}


class CompressedTensors(Quantizer):
    """Weights as the library compressed-tensors stores them: packed integers, float8, NVFP4, MXFP4.

    The stored weight stays packed and is dequantized in every pass. Quantized activations of a checkpoint are computed
    in float in training, as its weights are what the adapters have to fit. A float base is quantized by rounding to the
    nearest value, without calibration.

    Options: ``num_bits`` (default 4), ``group_size`` (32; ``None`` for one scale per row), ``symmetric`` (true) and
    ``type`` (``"int"`` or ``"float"``). Source: https://github.com/vllm-project/compressed-tensors
    """

    name = "compressed-tensors"
    # The fewest that common checkpoints have; merging in place is refused below 8.
    bits = 4
    requires = ("compressed-tensors>=0.15",)
    options = tuple(_DEFAULTS)
    engines = ("ddp",)
    offered = False
    loss_note = "activations that the checkpoint's format quantizes are computed in float during training"

    def available(self, device: torch.device, dtype: torch.dtype, options: Mapping[str, Any]) -> str | None:
        return None

    def quantize_linear(self, linear: nn.Linear, options: Mapping[str, Any]) -> nn.Module:
        return _load_layers().compress(
            linear, {name: options.get(name, default) for name, default in _DEFAULTS.items()}
        )

    def owns(self, module: Any) -> bool:
        if "compressed_tensors" not in sys.modules or not hasattr(module, "in_features"):
            return False
        scheme = vars(module).get("quantization_scheme")
        return getattr(scheme, "weights", None) is not None

    def dequantize(self, module: Any) -> torch.Tensor:
        return _load_layers().read_weight(module)

    def unsuitable(self, in_features: int, out_features: int, options: Mapping[str, Any]) -> str | None:
        size = options.get("group_size", _DEFAULTS["group_size"])
        return f"its {in_features} inputs do not divide into groups of {size}" if size and in_features % size else None

    def layer_bytes(
        self, in_features: int, out_features: int, dtype: torch.dtype, options: Mapping[str, Any]
    ) -> int | None:
        bits, size, symmetric, kind = (options.get(name, default) for name, default in _DEFAULTS.items())
        groups = in_features // size if size else 1
        scales = groups * out_features * dtype.itemsize
        if kind != "int":
            return in_features * out_features + scales
        if not symmetric:
            return None
        # Whole int32 words in each row, and the two sizes as int64.
        return -(-in_features * bits // 32) * 4 * out_features + scales + 16

    def unready(self, module: Any) -> str | None:
        if module.quantization_status == "compressed":
            return None
        return "a pass has decompressed its layers, and compressed-tensors has put its offloading under every module"

    def reads(self, config: Any) -> bool:
        return getattr(config, "quantization_config", None) is not None and hasattr(config, "use_optimized_inference")

    def loaded_options(self, config: Any) -> Mapping[str, Any] | None:
        described: Any = getattr(config, "quantization_config", None)
        groups = list((getattr(described, "config_groups", None) or {}).values())
        if len(groups) != 1:
            return None
        scheme = groups[0]
        weights = scheme.weights
        plain = weights.strategy in ("group", "channel") and list(scheme.targets) == ["Linear"]
        if not plain or weights.actorder or weights.dynamic or (weights.type == "float" and weights.num_bits != 8):
            return None
        options = {name: getattr(weights, name) for name in _DEFAULTS}
        skip = list(described.ignore or ())
        return {**options, "skip_modules": skip} if skip else options

    def after_quantize(self, model: Any, options: Mapping[str, Any]) -> None:
        _load_layers().keep_packed(model, [module for module in model.modules() if self.owns(module)])


def _load_layers() -> Any:
    from lora_plugins.builtin.quantizers import compressed_tensors_layer

    return compressed_tensors_layer


@hookimpl
def register_quantizers() -> list[Quantizer]:
    return [CompressedTensors()]

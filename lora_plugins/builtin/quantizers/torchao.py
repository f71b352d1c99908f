"""The torchao backends ``int8-torchao`` and ``float8-torchao``."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from lora_plugins import ExpertsAsLayers, Quantizer, hookimpl

if TYPE_CHECKING:
    import torch
    from torch import nn

__all__ = ["Float8Torchao", "Int8Torchao", "Torchao", "register_quantizers"]


def _import_layer() -> Any:
    from lora_plugins.builtin.quantizers import torchao_layer

    return torchao_layer


class Torchao(Quantizer):
    """Weights as torchao's tensors, in the original layer.

    Options: ``config``, an object of torchao's with other settings, such as
    ``Int8WeightOnlyConfig(granularity=PerGroup(32))``; one that cannot be trained, such as dynamic
    activations, is refused by the self-test. ``compute_dtype`` is the dtype of the matrix products, by default that
    of the activations.

    Attributes:
        configuration: Name of the default class of settings in ``torchao.quantization``.
        tensor: Name of the class of the weight in ``torchao.quantization``.
        row_bytes: Bytes that the default settings keep for each output row, beside its weights.
    """

    configuration: str
    tensor: str
    row_bytes: int
    bits = 8
    requires = ("torchao>=0.18",)
    options = ("config", "compute_dtype")
    # Engines that replace the data of parameters, as DeepSpeed 0.19 does, cannot handle tensor subclasses.
    engines = ("ddp", "fsdp2")
    loggers = ("torchao",)

    def available(self, device: torch.device, dtype: torch.dtype, options: Mapping[str, Any]) -> str | None:
        return None

    def quantize_linear(self, linear: nn.Linear, options: Mapping[str, Any]) -> nn.Module:
        from torchao.quantization import quantize_

        linear.to(options.get("compute_dtype") or linear.weight.dtype)
        quantize_(linear, self.settings(options))
        ours = _import_layer()
        ours.restore_zeros(linear.weight)
        linear.__class__ = ours.TorchaoLinear
        return linear

    def settings(self, options: Mapping[str, Any]) -> Any:
        """Return torchao's configuration object for these options."""
        import torchao.quantization

        # By default torchao 0.18 changes how precisely the whole process multiplies float32 matrices.
        return options.get("config") or getattr(torchao.quantization, self.configuration)(set_inductor_config=False)

    def owns(self, module: Any) -> bool:
        # Only the module's own parameter: a LoRA layer has its base layer's weight as a property.
        weight = dict(module.named_parameters(recurse=False)).get("weight")
        loaded = sys.modules.get("torchao.quantization")
        # While torchao.quantization is being imported, it is in sys.modules but incomplete.
        tensor = getattr(loaded, self.tensor, None)
        return tensor is not None and isinstance(weight, tensor)

    def dequantize(self, module: Any) -> torch.Tensor:
        weight: torch.Tensor = _import_layer().dequantize_weight(module.weight)
        return weight

    def layer_bytes(
        self, in_features: int, out_features: int, dtype: torch.dtype, options: Mapping[str, Any]
    ) -> int | None:
        if options.get("config") is not None:
            return None
        return (in_features + self.row_bytes) * out_features

    def expert_format(self, options: Mapping[str, Any]) -> ExpertsAsLayers:
        return ExpertsAsLayers(self, options)

    def load_config(self, options: Mapping[str, Any]) -> Any:
        from transformers import TorchAoConfig

        return TorchAoConfig(self.settings(options), modules_to_not_convert=options.get("skip_modules"))

    def reads(self, config: Any) -> bool:
        return type(getattr(config, "quant_type", None)).__name__ == self.configuration

    def loaded_options(self, config: Any) -> Mapping[str, Any] | None:
        loaded = getattr(config, "quant_type", None)
        if loaded is None:
            return None
        skip = getattr(config, "modules_to_not_convert", None)
        options = {} if _are_same_settings(loaded, self.settings({})) else {"config": loaded}
        return {**options, "skip_modules": skip} if skip else options

    def after_quantize(self, model: nn.Module, options: Mapping[str, Any]) -> None:
        ours = _import_layer()
        for module in filter(self.owns, model.modules()):
            loaded: Any = module
            ours.restore_zeros(loaded.weight)
            # transformers 5.23 leaves the plain class on layers that it loads quantized.
            if type(loaded).__name__ == "Linear":
                loaded.__class__ = ours.TorchaoLinear


def _are_same_settings(one: Any, other: Any) -> bool:
    """Whether two settings of torchao quantize alike; ``set_inductor_config`` concerns the process and is ignored."""

    def fields(settings: Any) -> dict[str, Any]:
        return {name: value for name, value in vars(settings).items() if name != "set_inductor_config"}

    return type(one) is type(other) and fields(one) == fields(other)


class Int8Torchao(Torchao):
    """One int8 weight per value with a scale per output row; activations stay in float."""

    name = "int8-torchao"
    configuration = "Int8WeightOnlyConfig"
    tensor = "Int8Tensor"
    # A float32 scale and an int8 zero point.
    row_bytes = 5


class Float8Torchao(Torchao):
    """One float8 (e4m3) weight per value with a scale per output row; activations stay in float."""

    name = "float8-torchao"
    configuration = "Float8WeightOnlyConfig"
    tensor = "Float8Tensor"
    row_bytes = 4


@hookimpl
def register_quantizers() -> list[Quantizer]:
    return [Int8Torchao(), Float8Torchao()]

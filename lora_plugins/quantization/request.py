"""A backend with its options, asked for by users or found in a model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from lora_plugins.errors import QuantizationError
from lora_plugins.models.wrapping import adapter_modules, plain_path
from lora_plugins.plugins.host import PluginHost, plugin_host
from lora_plugins.plugins.types import Quantizer
from lora_plugins.text import did_you_mean

__all__ = [
    "CORE_OPTIONS",
    "FLOATS",
    "Quantization",
    "QuantizedLayers",
    "count_logical",
    "detect_quantization",
    "is_float",
    "is_unknown_layer",
    "options_known",
    "owner_of",
    "parse_quantization",
    "quantization_config",
    "quantization_of",
    "quantization_of_stacks",
    "remember",
    "unknown_layers",
    "with_compute_dtype",
]


#: Options that the core understands for every backend.
CORE_OPTIONS = ("name", "skip_modules")


#: Dtypes of weights that compute as they are; a float of 8 bits needs the scale beside it.
FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


#: Attribute of a quantized layer that holds its backend and options.
_MEMORY = "lora_plugins_quantization"


@dataclass(frozen=True)
class Quantization:
    """A backend together with the options it was asked for.

    Attributes:
        quantizer: The backend.
        options: What the backend's methods get; ``skip_modules`` is always there.
    """

    quantizer: Quantizer
    options: Mapping[str, Any] = field(default_factory=dict)

    @property
    def name(self) -> str:
        return self.quantizer.name

    def quantize(self, linear: nn.Linear) -> nn.Module:
        """Return the quantized form of a float layer, which remembers this backend and its options.

        It is frozen, except a trained bias that the backend keeps as a parameter.

        Raises:
            QuantizationError: The backend gave back a layer that is not its own, such as the float layer.
        """
        trains_bias = linear.bias is not None and linear.bias.requires_grad
        with torch.no_grad():
            layer = self.quantizer.quantize_linear(linear, self.options)
        if not self.quantizer.owns(layer):
            raise QuantizationError(
                f"The backend {self.name!r} left a layer of shape {linear.in_features} -> {linear.out_features} "
                f"unquantized, or does not know the {type(layer).__name__} that it made."
            )
        for parameter in layer.parameters():
            parameter.requires_grad_(False)
        if trains_bias and isinstance(layer.bias, nn.Parameter):
            layer.bias.requires_grad_(True)
        remember(layer, self)
        return layer


@dataclass(frozen=True)
class QuantizedLayers:
    """What one walk over a model did.

    Attributes:
        quantized: Dotted names of the layers that were quantized.
        skipped: Dotted names of the linear layers left alone, with the reason.
        stacks: Dotted names of the stacked expert weights that were quantized.
        skipped_stacks: Dotted names of the stacked expert weights left in float, with the reason.
    """

    quantized: list[str]
    skipped: dict[str, str]
    stacks: list[str] = field(default_factory=list)
    skipped_stacks: dict[str, str] = field(default_factory=dict)


def parse_quantization(
    value: str | Mapping[str, Any] | Quantizer | Quantization | None, host: PluginHost | None = None
) -> Quantization | None:
    """Turn what users write in ``quantization=`` into a backend and its options.

    Args:
        value: ``None``, a backend's name, ``{"name": …, option: value, …}``, or a `Quantizer`.
        host: Where to look names up; default is the process's plugin host.

    Raises:
        UnknownQuantizer: No plugin registers the name.
        QuantizationError: An option is unknown, or ``name`` is missing.
    """
    if value is None or isinstance(value, Quantization):
        return value
    if isinstance(value, Quantizer):
        return Quantization(value, {"skip_modules": []})
    host = host or plugin_host()
    if isinstance(value, str):
        return Quantization(host.quantizer(value), {"skip_modules": []})
    if not isinstance(value, Mapping) or not isinstance(value.get("name"), str):
        raise QuantizationError(
            f"quantization must be a backend's name, a mapping with 'name', or a Quantizer, not {value!r}. "
            f"Known backends: {', '.join(host.quantizer_names())}."
        )
    quantizer = host.quantizer(value["name"])
    known = (*CORE_OPTIONS, *quantizer.options)
    for option in value:
        if option not in known:
            hint = did_you_mean(option, known)
            raise QuantizationError(
                f"The backend {quantizer.name!r} has no option {option!r}.{hint} It has: {', '.join(known)}."
            )
    options = {key: option for key, option in value.items() if key != "name"}
    skip = options.get("skip_modules") or []
    options["skip_modules"] = [skip] if isinstance(skip, str) else list(skip)
    if isinstance(options.get("compute_dtype"), str):
        options["compute_dtype"] = _read_float_dtype(options["compute_dtype"])
    return Quantization(quantizer, options)


def _read_float_dtype(name: str) -> torch.dtype:
    dtype = getattr(torch, name.removeprefix("torch."), None)
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise QuantizationError(f"compute_dtype must be a float dtype such as 'bfloat16', not {name!r}")
    return dtype


def quantization_config(quantization: str | Mapping[str, Any] | Quantizer, *, host: PluginHost | None = None) -> Any:
    """Return the config that ``from_pretrained(quantization_config=…)`` takes, for a backend of ours.

    Args:
        quantization: A backend's name, or a mapping with ``name`` and options.
        host: Where to look names up; default is the process's plugin host.

    Returns:
        A config object of transformers, such as ``BitsAndBytesConfig``.

    Raises:
        UnknownQuantizer: No plugin registers the name.
        QuantizationError: The backend can only quantize a model in place.
    """
    parsed = parse_quantization(quantization, host)
    assert parsed is not None, "None stands for no quantization"  # noqa: S101 - narrows a type
    options = {**parsed.options, "skip_modules": parsed.options["skip_modules"] or None}
    config = parsed.quantizer.load_config(options)
    if config is None:
        raise QuantizationError(
            f"The backend {parsed.name!r} cannot quantize while loading. Load the model in float and "
            f"write LoraCallback(quantization={parsed.name!r}) or prepare_model(model, quantization={parsed.name!r})."
        )
    return config


def owner_of(module: nn.Module, host: PluginHost | None = None) -> Quantizer | None:
    """Return the backend that made a module, ``None`` for a module in float."""
    for quantizer in (host or plugin_host()).quantizers():
        if quantizer.owns(module):
            return quantizer
    return None


def unknown_layers(model: nn.Module, host: PluginHost | None = None) -> dict[str, str]:
    """Return the paths and class names of layers whose storage no backend here knows; see `is_unknown_layer`."""
    adapters = adapter_modules(model)
    return {
        plain_path(path): type(module).__name__
        for path, module in model.named_modules()
        if module not in adapters and is_unknown_layer(module, host)
    }


def is_unknown_layer(module: Any, host: PluginHost | None = None) -> bool:
    """Whether a module holds its weight in a form that is neither plain float nor made by a registered backend.

    Such a module has the class of a storage format; or it has the sizes of a linear layer or an embedding and no float
    tensor that could be its weight; or it has parameters of integers or of 8 and fewer bits.
    """
    host = host or plugin_host()
    if isinstance(module, BaseTunerLayer) or not (_has_known_class(module, host) or _is_packed(module)):
        return False
    return owner_of(module, host) is None


def _has_known_class(module: nn.Module, host: PluginHost) -> bool:
    names = host.format_layers()
    return any(f"{kind.__module__.partition('.')[0]}.{kind.__name__}" in names for kind in type(module).__mro__)


def _is_packed(module: Any) -> bool:
    parameters = list(module.parameters())
    tensors = [*parameters, *module.buffers()]
    size = _read_size(module)
    if size is not None and tensors:
        return not any(_could_be_weight(tensor, size) for tensor in tensors)
    own = (one for one in module._parameters.values() if one is not None and not hasattr(one, "quantization"))
    return any(one.dtype not in FLOATS and not one.is_complex() for one in own)


def _read_size(module: Any) -> int | None:
    """Return how many weights a linear layer or an embedding has, ``None`` for other modules."""
    for names in (("in_features", "out_features"), ("num_embeddings", "embedding_dim")):
        columns, rows = (getattr(module, name, None) for name in names)
        if isinstance(columns, int) and isinstance(rows, int):
            return columns * rows
    return None


def count_logical(module: nn.Module) -> int:
    """Return how many weights a packed layer stands for; of other modules, the elements that it stores."""
    size = _read_size(module)
    return size if size is not None else sum(one.numel() for one in module.parameters(recurse=False))


def is_float(model: nn.Module, host: PluginHost | None = None) -> bool:
    """Whether every module of a model holds plain float tensors, and none is a layer of a storage format."""
    return all(
        owner_of(module, host) is None
        and not is_unknown_layer(module, host)
        and not any(hasattr(one, "quantization") for one in module._parameters.values())
        for module in model.modules()
    )


def _could_be_weight(tensor: Any, size: int) -> bool:
    if tensor.dtype not in FLOATS or getattr(tensor, "ds_numel", tensor.numel()) < size:
        return False
    # A subclass that wraps packed tensors reports a float dtype; a sharded tensor does not wrap packed ones.
    return not hasattr(tensor, "__tensor_flatten__") or hasattr(tensor, "to_local")


def with_compute_dtype(quantization: Quantization, dtype: torch.dtype | None) -> Quantization:
    """Add the compute dtype to the options of a backend that has one, unless the user has set it."""
    if "compute_dtype" not in quantization.quantizer.options or dtype is None:
        return quantization
    return Quantization(quantization.quantizer, {"compute_dtype": dtype, **quantization.options})


def remember(layer: nn.Module, quantization: Quantization) -> None:
    """Record on a quantized layer which backend made it, and with which options."""
    setattr(layer, _MEMORY, quantization)


def quantization_of(module: nn.Module) -> Quantization | None:
    """Return the backend of one layer with its options, ``None`` for a module in float.

    A layer that was loaded quantized and never prepared has no recorded options.
    """
    known = getattr(module, _MEMORY, None)
    if known is not None and known.quantizer.owns(module):
        return known
    owner = owner_of(module)
    return None if owner is None else Quantization(owner, {"skip_modules": []})


def quantization_of_stacks(module: nn.Module) -> Quantization | None:
    """Return the backend of the quantized stacks of experts that a module holds, ``None`` if it holds none."""
    for parameter in module._parameters.values():
        found = getattr(parameter, "quantization", None)
        if isinstance(found, Quantization):
            return found
    return None


def detect_quantization(model: nn.Module, host: PluginHost | None = None) -> Quantization | None:
    """Return the backend of a model that arrives quantized, with its options; the first quantized layer decides.

    Options come from the layer's record, else from the config that transformers loaded the model with; if neither has
    them they are empty, which `options_known` tells apart.
    """
    for module in model.modules():
        if (stacked := quantization_of_stacks(module)) is not None:
            return stacked
        quantizer = owner_of(module, host)
        if quantizer is not None:
            known = getattr(module, _MEMORY, None)
            if known is not None and known.quantizer is quantizer:
                return known
            return Quantization(quantizer, {"skip_modules": [], **(_read_loaded(model, quantizer) or {})})
    return None


def options_known(model: nn.Module, quantization: Quantization) -> bool:
    """Whether the options in ``quantization`` are those that the model's layers were quantized with."""
    for module in model.modules():
        if quantization_of_stacks(module) is not None:
            return True
        if quantization.quantizer.owns(module):
            return hasattr(module, _MEMORY) or _read_loaded(model, quantization.quantizer) is not None
    return True


def _read_loaded(model: Any, quantizer: Quantizer) -> Mapping[str, Any] | None:
    config = getattr(getattr(model, "config", None), "quantization_config", None)
    return None if config is None else quantizer.loaded_options(config)

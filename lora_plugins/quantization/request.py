"""Quantizing a live model in place, layer by layer, and marking it as transformers marks a loaded one."""

from __future__ import annotations

import contextlib
import difflib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from lora_plugins.errors import (
    NothingQuantized,
    QuantizationError,
    QuantizerSelfTestFailed,
    QuantizerUnavailable,
)
from lora_plugins.models.sharding import whole
from lora_plugins.plugins.host import PluginHost, plugin_host
from lora_plugins.plugins.packages import missing_requirements
from lora_plugins.plugins.types import Quantizer

if TYPE_CHECKING:
    import torch
    from torch import nn

#: Options that the core understands for every backend.
CORE_OPTIONS = ("name", "skip_modules")

#: Why layers stay in float that nobody expects to be quantized; other reasons are worth a note.
EXPECTED_REASONS = (
    "never touched in this architecture",
    "head, tied weight or kept in float32 by the model",
    "skip_modules",
)

#: Where a quantized layer remembers its backend and options.
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
        """Return the quantized, frozen form of a float layer, which remembers this backend and its options.

        Raises:
            QuantizationError: The backend gave back a layer that is not its own, such as the float layer.
        """
        import torch

        with torch.no_grad():
            layer = self.quantizer.quantize_linear(linear, self.options)
        if not self.quantizer.owns(layer):
            raise QuantizationError(
                f"The backend {self.name!r} left a layer of shape {linear.in_features} -> {linear.out_features} "
                f"unquantized, or does not know the {type(layer).__name__} that it made."
            )
        for parameter in layer.parameters():
            parameter.requires_grad_(False)
        remember(layer, self)
        return layer


@dataclass(frozen=True)
class QuantizedLayers:
    """What one walk over a model did.

    Attributes:
        quantized: Dotted names of the layers that were quantized.
        skipped: Dotted names of the linear layers left alone, with the reason.
    """

    quantized: list[str]
    skipped: dict[str, str]


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
            near = difflib.get_close_matches(str(option), known, n=1)
            hint = f" Did you mean {near[0]!r}?" if near else ""
            raise QuantizationError(
                f"The backend {quantizer.name!r} has no option {option!r}.{hint} It has: {', '.join(known)}."
            )
    options = {key: option for key, option in value.items() if key != "name"}
    skip = options.get("skip_modules") or []
    options["skip_modules"] = [skip] if isinstance(skip, str) else list(skip)
    if isinstance(options.get("compute_dtype"), str):
        options["compute_dtype"] = _float_dtype(options["compute_dtype"])
    return Quantization(quantizer, options)


def _float_dtype(name: str) -> torch.dtype:
    import torch

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
    assert parsed is not None, "None is no backend"
    options = {**parsed.options, "skip_modules": parsed.options["skip_modules"] or None}
    config = parsed.quantizer.load_config(options)
    if config is None:
        raise QuantizationError(
            f"The backend {parsed.name!r} can't quantize while loading. Load the model in float and "
            f"write LoraCallback(quantization={parsed.name!r}) or prepare_model(model, quantization={parsed.name!r})."
        )
    return config


def base_of(model: Any) -> nn.Module:
    """Return the base model under a `peft.PeftModel`, and any other model as it is."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def owner_of(module: nn.Module, host: PluginHost | None = None) -> Quantizer | None:
    """Return the backend that made a module, ``None`` for a module in float."""
    for quantizer in _all_quantizers(host or plugin_host()):
        if quantizer.owns(module):
            return quantizer
    return None


def with_compute_dtype(quantization: Quantization, dtype: torch.dtype | None) -> Quantization:
    """Tell a backend that asks for it in which dtype its layers will be used, unless the user has said."""
    if "compute_dtype" not in quantization.quantizer.options or dtype is None:
        return quantization
    return Quantization(quantization.quantizer, {"compute_dtype": dtype, **quantization.options})


def remember(layer: nn.Module, quantization: Quantization) -> None:
    """Note on a quantized layer which backend made it, and with which options."""
    setattr(layer, _MEMORY, quantization)


def quantization_of(module: nn.Module) -> Quantization | None:
    """Return the backend of one layer with its options, ``None`` for a module in float.

    A layer that was loaded quantized and never prepared has no options noted.
    """
    known = getattr(module, _MEMORY, None)
    if known is not None and known.quantizer.owns(module):
        return known
    owner = owner_of(module)
    return None if owner is None else Quantization(owner, {"skip_modules": []})


def _all_quantizers(host: PluginHost) -> Iterator[Quantizer]:
    for name in host.quantizer_names():
        # A clash over one name must not hide the others; it is reported when that name is asked for.
        with contextlib.suppress(Exception):
            yield host.quantizer(name)


def detect_quantization(model: nn.Module, host: PluginHost | None = None) -> Quantization | None:
    """Return the backend of a model that arrives quantized; the first quantized layer decides."""
    for module in model.modules():
        quantizer = owner_of(module, host)
        if quantizer is not None:
            return Quantization(quantizer, {"skip_modules": []})
    return None


def check_arrived(model: nn.Module, quantization: Quantization) -> None:
    """Refuse a model that was loaded quantized where its backend can't compute one of the layers.

    Raises:
        QuantizationError: It has such layers.
    """
    quantizer = quantization.quantizer
    for path, module in model.named_modules():
        if not quantizer.owns(module):
            continue
        layer: Any = module
        reason = quantizer.unsuitable(layer.in_features, layer.out_features, quantization.options)
        if reason is not None:
            name = _plain_path(path)
            raise QuantizationError(
                f"{name} was loaded quantized and {quantization.name!r} can't compute it: {reason}. Load the model in "
                f"float, or with quantization_config({{'name': {quantization.name!r}, 'skip_modules': [{name!r}, …]}})."
            )


def why_unavailable(quantization: Quantization, device: torch.device, dtype: torch.dtype) -> str | None:
    """Say why a backend can't run here and what to install, ``None`` when it can.

    Its packages come first: a backend need not be able to say anything while they are missing.
    """
    quantizer = quantization.quantizer
    return missing_requirements(quantizer.requires) or quantizer.available(device, dtype, quantization.options)


def check_usable(quantization: Quantization, device: torch.device, dtype: torch.dtype) -> None:
    """Ask a backend whether it runs here and let it pass the self-test, once per process and device.

    Raises:
        QuantizerUnavailable: It can't run; the message has its reason.
        QuantizerSelfTestFailed: It runs and can't train.
    """
    reason = why_unavailable(quantization, device, dtype)
    if reason is not None:
        raise QuantizerUnavailable(f"The quantization backend {quantization.name!r} can't be used: {reason}")
    from lora_plugins.quantization.selftest import self_test

    failure = self_test(quantization, device, dtype)
    if failure is not None:
        raise QuantizerSelfTestFailed(f"The quantization backend {quantization.name!r} can't be trained on: {failure}")


def quantize_in_place(
    model: nn.Module,
    quantization: Quantization,
    *,
    never: Iterable[str] = (),
    progress: Callable[[Iterable[Any], int], Iterable[Any]] | None = None,
) -> QuantizedLayers:
    """Replace the linear layers of a model by quantized ones, one after the other.

    The float weight of a layer is dropped before the next one is quantized, so live tensors peak at the
    model plus one layer. Layers under LoRA adapters are reached too (the adapters stay as they are).

    Args:
        model: A float model on real devices; changed in place.
        quantization: The backend and its options.
        never: More module names to leave alone (names match at the end of the path, at a dot).
        progress: Wraps the iterable of layers and gets its length, for a progress bar.

    Returns:
        Which layers were quantized and which were skipped, with reasons.

    Raises:
        NothingQuantized: There was no layer to quantize.
        QuantizationError: The model has no data (meta device).
    """
    targets, skipped = layers_to_quantize(model, quantization, never)
    if not targets:
        raise NothingQuantized(
            f"The model has no linear layer for the backend {quantization.name!r}"
            + (
                f"; skipped: {', '.join(f'{name} ({why})' for name, why in list(skipped.items())[:5])}"
                if skipped
                else ""
            )
        )
    first = next(iter(targets.values()))
    if first.weight.device.type == "meta":
        raise QuantizationError("The model is on the meta device and has no weights to quantize.")
    check_usable(quantization, first.weight.device, first.weight.dtype)
    parents = module_places(model)
    names = list(targets)
    for name in progress(names, len(names)) if progress else names:
        layer = targets.pop(name)
        # ZeRO-3 may have partitioned the weight while the model was loaded.
        with whole(layer.parameters()):
            new = quantization.quantize(as_linear(layer))
        new.train(layer.training)
        if new is not layer:
            # transformers notes the same on layers that it quantizes while loading.
            setattr(new, "source_cls", type(layer))  # noqa: B010 - not a part of the module
        for parent, attribute in parents[id(layer)]:
            setattr(parent, attribute, new)
        if new is not layer:
            # Whoever else still holds the old layer object must not keep its weight alive.
            layer.weight = None
    return QuantizedLayers(names, skipped)


def as_linear(layer: Any) -> nn.Linear:
    """Return the layer itself, or for transformers' ``Conv1D`` the linear layer with the same function."""
    from torch import nn

    if isinstance(layer, nn.Linear):
        return layer
    in_features, out_features = layer.nx, layer.nf
    linear = nn.Linear(in_features, out_features, bias=layer.bias is not None, device="meta")
    linear.weight = nn.Parameter(layer.weight.data.T.contiguous(), requires_grad=False)
    if layer.bias is not None:
        linear.bias = nn.Parameter(layer.bias.data, requires_grad=False)
    return linear


def module_places(model: nn.Module) -> dict[int, list[tuple[nn.Module, str]]]:
    """Every place where each module hangs: a layer shared by two blocks is replaced in both."""
    places: dict[int, list[tuple[nn.Module, str]]] = {}
    for module in model.modules():
        for attribute, child in module._modules.items():
            if child is not None:
                places.setdefault(id(child), []).append((module, attribute))
    return places


def layers_to_quantize(
    model: nn.Module, quantization: Quantization, never: Iterable[str]
) -> tuple[dict[str, Any], dict[str, str]]:
    """Return the linear layers that would be quantized, by path, and the reason for each that would not.

    Args:
        model: A float model, on any device.
        quantization: The backend and its options.
        never: More module names to leave alone.
    """
    from torch import nn
    from transformers.pytorch_utils import Conv1D

    untouched, kept, told = EXPECTED_REASONS
    reasons = dict.fromkeys(never, untouched)
    reasons |= dict.fromkeys(_kept_by_model(model), kept)
    reasons |= dict.fromkeys(quantization.options.get("skip_modules", ()), told)
    trainable = adapter_modules(model)
    targets: dict[str, Any] = {}
    skipped: dict[str, str] = {}
    for path, module in model.named_modules():
        if not isinstance(module, (nn.Linear, Conv1D)) or module in trainable:
            continue
        name = _plain_path(path)
        reason = next((why for skip, why in reasons.items() if _matches(name, skip)), None)
        if type(module) not in (nn.Linear, Conv1D):
            if owner_of(module) is None:
                skipped[name] = f"{type(module).__name__} is read in its own way"
        else:
            reason = reason or quantization.quantizer.unsuitable(*_features(module), quantization.options)
            if reason:
                skipped[name] = reason
            else:
                targets[name] = module
    return targets, skipped


def _features(layer: Any) -> tuple[int, int]:
    """Input and output features of an ``nn.Linear`` or of transformers' ``Conv1D``."""
    return (layer.nx, layer.nf) if hasattr(layer, "nx") else (layer.in_features, layer.out_features)


def _plain_path(path: str) -> str:
    """The name that a module has in the base model, without what PEFT puts around it."""
    return path.removeprefix("base_model.model.").replace(".base_layer", "")


def _matches(name: str, skip: str) -> bool:
    # transformers matches its skip list the same way: a whole path, a prefix of it, or its last parts.
    return name == skip or name.endswith("." + skip) or name.startswith(skip + ".") or f".{skip}." in name


def adapter_modules(model: nn.Module) -> set[nn.Module]:
    """The modules that belong to adapters: LoRA's own small linears and heads that are trained whole."""
    import sys

    if "peft" not in sys.modules:
        return set()
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils import ModulesToSaveWrapper

    inside: set[nn.Module] = set()
    for module in model.modules():
        if isinstance(module, ModulesToSaveWrapper):
            inside.update(module.modules())
        elif isinstance(module, BaseTunerLayer):
            base = module.get_base_layer()
            inside.update(part for part in module.modules() if part is not base and part is not module)
    return inside


def _kept_by_model(model: nn.Module) -> list[str]:
    """Names that transformers itself would not quantize: output embeddings, tied weights, fp32-only modules."""
    from transformers import PreTrainedModel
    from transformers.quantizers.base import get_keys_to_not_convert

    base = base_of(model)
    if isinstance(base, PreTrainedModel):
        keep = list(base._keep_in_fp32_modules or []) + list(base._keep_in_fp32_modules_strict or [])
        return [_plain_path(name) for name in [*get_keys_to_not_convert(base), *keep]]
    return _tied_with_embeddings(base)


def _tied_with_embeddings(model: nn.Module) -> list[str]:
    from torch import nn

    embeddings = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    return [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and id(module.weight) in embeddings
    ]


def tag_quantized(model: Any, quantization: Quantization, layers: QuantizedLayers) -> None:
    """Set all the flags that transformers sets on a model that was loaded quantized, or none.

    Half of them is worse than none: with ``is_quantized`` alone the Trainer fails on a missing
    ``hf_quantizer``. A backend without a load-time config gets a `QuantizedInPlace`: without it, transformers
    would save the base in a form that it can't read back.
    """
    from transformers import PreTrainedModel
    from transformers.quantizers import AutoHfQuantizer

    from lora_plugins.quantization.in_place import QuantizedInPlace

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
    """Take the flags off a model that is marked quantized and holds only float weights.

    A model loaded from GGUF is dequantized by transformers and still marked, so the Trainer refuses it.

    Returns:
        Whether there was something to take off.
    """
    if not getattr(model, "is_quantized", False) or detect_quantization(model) is not None:
        return False
    if any(not parameter.is_floating_point() for parameter in model.parameters()):
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

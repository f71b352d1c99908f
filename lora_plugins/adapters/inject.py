"""Put LoRA adapters into a base model."""

from __future__ import annotations

import contextlib
import copy
import re
import warnings
from collections.abc import Mapping
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora.layer import LoraLayer, ParamWrapper
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import TrainableTokensWrapper
from torch import nn

from lora_plugins.adapters.routed.wrappers import is_served
from lora_plugins.adapters.settings import DEFAULTS, LoraSettings
from lora_plugins.errors import PreparationError, UnknownLayer, UnsupportedInitialization
from lora_plugins.models.randomness import seeded
from lora_plugins.models.wrapping import plain_path
from lora_plugins.plugins.host import plugin_host
from lora_plugins.quantization.lora_layer import QuantizedLoraLinear
from lora_plugins.quantization.request import Quantization, unknown_layers
from lora_plugins.targets.resolution import TargetPlan
from lora_plugins.text import one_line
from registry import shorten_tables

__all__ = [
    "build_config",
    "check_forward",
    "exchange_layers",
    "find_lora_layers",
    "has_adapters",
    "initializes_from_base",
    "inject",
    "set_fields",
]


#: How PEFT's warning about keys of ``rank_pattern`` and ``alpha_pattern`` begins, as a regular expression.
_PATTERN_WARNING = r"The following (rank|alpha)_pattern keys did not match"

#: Initialisations that rewrite the float base weight in place; the base is quantized afterwards.
_REWRITE_BASE = ("pissa", "olora")


#: Initialisations that need data or their own quantization.
_NEED_MORE = ("loftq", "eva", "corda", "lora_ga", "mica")


def initializes_from_base(init: Any, quantization: Quantization | None, *, already_quantized: bool) -> bool:
    """Whether the adapters must be made before the base is quantized.

    Args:
        init: ``init_lora_weights`` of the configuration.
        quantization: Backend that quantizes the base, or already has.
        already_quantized: Whether it arrived quantized.

    Raises:
        UnsupportedInitialization: The initialisation cannot be combined with a quantized base.
    """
    name = init.lower() if isinstance(init, str) else ""
    rewrites = name.startswith(_REWRITE_BASE)
    if quantization is None or not (rewrites or name.startswith(_NEED_MORE)):
        return False
    if already_quantized:
        raise UnsupportedInitialization(
            f"init_lora_weights={init!r} is computed from the float weights and the model arrived quantized "
            f"({quantization.name}). Load it in float and let quantization={quantization.name!r} quantize it, "
            "or use the default initialisation."
        )
    if not rewrites:
        raise UnsupportedInitialization(
            f"init_lora_weights={init!r} cannot be combined with quantization={quantization.name!r}: it needs data "
            "or a quantization of its own. Initialise with PEFT's own tool and pass the finished PeftModel, "
            "or use the default initialisation."
        )
    return True


def build_config(settings: LoraSettings, plan: TargetPlan) -> LoraConfig:
    """Make the configuration for PEFT: with explicit targets, spelled as the user wrote them where that is equivalent.

    The caller's ``peft_config=`` is copied, never modified.
    """
    if settings.peft_config is not None:
        config = copy.deepcopy(settings.peft_config)
    else:
        config = LoraConfig(**{**DEFAULTS, **settings.lora})
    set_fields(config, plan)
    for name, factor in plan.rank_factors.items():
        # Scaling is alpha / r: both grow, so each half is scaled like any other adapter.
        pattern = rf".*\.{re.escape(name)}"
        config.rank_pattern.setdefault(pattern, config.r * factor)
        config.alpha_pattern.setdefault(pattern, config.lora_alpha * factor)
    if "task_type" not in settings.lora:
        config.task_type = config.task_type or plan.task_type
    return config


def set_fields(config: LoraConfig, plan: TargetPlan) -> None:
    """Copy a plan's fields into a configuration."""
    for name, value in plan.fields.items():
        setattr(config, name, copy.copy(value))


def inject(model: nn.Module, config: LoraConfig, adapter_name: str, seed: int) -> tuple[PeftModel, list[str]]:
    """Wrap a base model in a `peft.PeftModel` with fresh adapters.

    Random numbers come from a fork of the generators, seeded with ``seed``: all processes get equal adapters
    whatever they drew before, and the caller's random state is unchanged.

    Returns:
        The wrapped model, and notes for the report.
    """
    dropout = config.lora_dropout
    notes = []
    # PEFT 0.21.2 initializes the adapters of a model on the meta device on the CPU before it moves them.
    meta = all(parameter.is_meta for parameter in model.parameters())
    if config.target_parameters and dropout:
        # PEFT 0.21.2 refuses a configuration with dropout and expert parameters, even for the other modules. Keep 0 in
        # the saved configuration, so that PEFT can load it, and set dropout on the modules that support it.
        config.lora_dropout = 0.0
    with seeded(model, seed), torch.device("meta") if meta else contextlib.nullcontext():
        wrapped = _wrap(model, config, adapter_name)
    held = wrapped.peft_config[adapter_name]
    if held.modules_to_save:
        # PEFT 0.21.2 appends a task's heads without checking for duplicates.
        held.modules_to_save = list(dict.fromkeys(held.modules_to_save))
    for module in wrapped.modules():
        if isinstance(module, TrainableTokensWrapper) and getattr(module.original_module, "bias", ...) is None:
            # PEFT 0.21.2's wrapper exposes only the weight; TRL 1.16's loss, fused with the head, reads the bias.
            module.bias = None
    if config.target_parameters and dropout:
        count, without = _set_dropout(wrapped, adapter_name, dropout)
        notes.append(
            f"lora_dropout={dropout} on {count} modules; the saved configuration says 0, because PEFT refuses dropout "
            "beside expert parameters"
        )
        if without:
            notes.append(
                f"no dropout on the expert parameters {', '.join(without)}: PEFT's own forward computes them, and it "
                "allows none"
            )
    return wrapped, notes


def _wrap(model: nn.Module, config: LoraConfig, adapter_name: str) -> PeftModel:
    unknown = unknown_layers(model)
    try:
        with warnings.catch_warnings(), shorten_tables(config, model):
            # PEFT 0.21.2 compares these keys with modules only; those of expert parameters take effect all the same.
            # Keys that touch nothing were named before.
            warnings.filterwarnings("ignore", message=_PATTERN_WARNING, category=RuntimeWarning)
            for kind in getattr(config, "_custom_modules", None) or {}:
                # PEFT 0.21.2 reads the sizes of a class that it does not know from the same attributes, and warns.
                warnings.filterwarnings("ignore", message=re.escape(f"Unsupported layer type '{kind}'"))
            # PEFT 0.21.2 asks transformers 5.24 by a deprecated name.
            warnings.filterwarnings(
                "ignore", message="`is_gradient_checkpointing` is deprecated", category=FutureWarning
            )
            # PEFT sets the field right where a layer is GPT-2's Conv1D, and the user has nothing to do.
            warnings.filterwarnings(
                "ignore", message="fan_in_fan_out is set to False but the target module is `Conv1D`"
            )
            # An adapter's base may stand in a folder here. Whether it is the one is compared before.
            warnings.filterwarnings("ignore", message=r"The PEFT config's `base_model_name_or_path` was renamed")
            return get_peft_model(model, config, adapter_name=adapter_name)
    except ValueError as error:
        # PEFT 0.21.2 has LoRA layers for some formats that no backend here reads, and refuses the rest.
        if not unknown or "is not supported" not in str(error):
            raise
        raise _make_unknown_layer_error(model, unknown) from error


def _make_unknown_layer_error(model: nn.Module, unknown: Mapping[str, str]) -> UnknownLayer:
    # PEFT 0.21.2 fails at the first target that it cannot wrap; the layers before it already have adapters.
    wrapped = {plain_path(path) for path, module in model.named_modules() if isinstance(module, BaseTunerLayer)}
    path = next((path for path in unknown if path not in wrapped), next(iter(unknown)))
    alike = sum(kind == unknown[path] for kind in unknown.values())
    return UnknownLayer(
        f"{path} ({unknown[path]}) is a linear layer whose weight is neither float nor stored by a registered "
        f"quantization backend, so PEFT has no LoRA layer for it ({alike} layers are of this class). Known backends: "
        f"{', '.join(plugin_host().quantizer_names())}. Load the model in float, choose other target_modules, or "
        f"register a Quantizer whose owns() knows {unknown[path]} through the hook register_quantizers "
        "(docs/plugins.md)."
    )


def _set_dropout(model: nn.Module, adapter_name: str, probability: float) -> tuple[int, list[str]]:
    """Return the number of adapters that got dropout, and the names of the parameters that cannot have it."""
    count = 0
    without: dict[str, None] = {}
    for module in model.modules():
        if not isinstance(module, LoraLayer):
            continue
        if isinstance(module, ParamWrapper) and not is_served(module):
            without[module.parameter_name] = None
            continue
        if adapter_name in module.lora_dropout:
            module.lora_dropout[adapter_name] = nn.Dropout(probability)
            count += 1
    return count, list(without)


def exchange_layers(model: nn.Module, quantization: Quantization) -> int:
    """Set the class of LoRA layers over a newly quantized base to the backend's, so that merging works.

    Only the class of a layer object changes; weights, names, hooks and trainability stay. Subclasses of the LoRA layer
    from other PEFT methods (AdaLoRA) or from third parties are left alone.

    Returns:
        Number of layers changed.
    """
    changed = 0
    for module in model.modules():
        if not isinstance(module, LoraLayer) or not _is_plain_lora(module):
            continue
        base = module.get_base_layer()
        if not quantization.quantizer.owns(base):
            continue
        wanted = _choose_lora_layer(quantization, base)
        if type(module) is not wanted:
            module.__class__ = wanted
            module.fan_in_fan_out = False
            module.is_target_conv_1d_layer = False
            changed += 1
    return changed


def check_forward(model: nn.Module, quantization: Quantization) -> None:
    """Run one layer of each other PEFT method over a quantized base: some read its weight as if it were float.

    Raises:
        PreparationError: Such a layer fails.
    """
    tried: set[type] = set()
    for path, module in model.named_modules():
        if not isinstance(module, BaseTunerLayer) or isinstance(module, QuantizedLoraLinear) or type(module) in tried:
            continue
        base: Any = module.get_base_layer()
        if not quantization.quantizer.owns(base):
            continue
        tried.add(type(module))
        try:
            with torch.no_grad():
                module(torch.zeros(1, base.in_features, device=next(base.parameters()).device))
        except (RuntimeError, ValueError, TypeError, AttributeError, NotImplementedError) as error:
            raise PreparationError(
                f"{type(module).__name__} of PEFT ({plain_path(path)}) fails over layers that are quantized with "
                f"{quantization.name!r}: {one_line(error)}. Use another backend, LoRA, or leave quantization out."
            ) from error


def _is_plain_lora(module: nn.Module) -> bool:
    kind = type(module)
    return kind is QuantizedLoraLinear or kind.__module__.startswith("peft.tuners.lora.")


def find_lora_layers(
    model: nn.Module, config: LoraConfig | None, quantization: Quantization
) -> dict[type[nn.Module], type[nn.Module]]:
    """Return the LoRA layer class for each quantized layer class in the model, for PEFT.

    Raises:
        PreparationError: The configuration sets a field that PEFT does not support over layers of this backend.
    """
    for name in quantization.quantizer.unsupported:
        if getattr(config, name, None):
            raise PreparationError(
                f"{name}={getattr(config, name)!r} cannot be combined with quantization={quantization.name!r}: PEFT "
                "cannot read the float weight out of its layers. Leave it out, or use another backend."
            )
    owned = [module for module in model.modules() if quantization.quantizer.owns(module)]
    return {type(module): _choose_lora_layer(quantization, module) for module in owned}


def _choose_lora_layer(quantization: Quantization, module: nn.Module) -> type[nn.Module]:
    return quantization.quantizer.lora_layer(module) or QuantizedLoraLinear


def has_adapters(model: nn.Module) -> bool:
    """Whether a model contains adapter layers of PEFT, wrapped or added with ``add_adapter``."""
    return any(isinstance(module, BaseTunerLayer) for module in model.modules())

"""Walk over a float model and quantize its linear layers, one at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D
from transformers.quantizers.base import get_keys_to_not_convert

from lora_plugins.errors import NothingQuantized, QuantizationError
from lora_plugins.models.experts import is_computable, is_transposed, list_expert_stacks, list_flat_stacks
from lora_plugins.models.sharding import gather
from lora_plugins.models.wrapping import adapter_modules, base_of, module_places, plain_path
from lora_plugins.quantization.request import Quantization, QuantizedLayers, owner_of
from lora_plugins.quantization.selftest import check_usable, check_usable_for_experts, find_spoiled_layers
from lora_plugins.quantization.stacks import QuantizedStack, replace_stack

__all__ = [
    "EXPECTED_REASONS",
    "as_linear",
    "layers_to_quantize",
    "quantize_arrived_experts",
    "quantize_in_place",
    "stacks_to_quantize",
]


#: Expected reasons for a layer to stay in float; other reasons are worth a note.
EXPECTED_REASONS = (
    "never touched in this architecture",
    "head, tied weight or kept in float32 by the model",
    "skip_modules",
)


def quantize_in_place(
    model: nn.Module,
    quantization: Quantization,
    *,
    never: Iterable[str] = (),
    progress: Callable[[Iterable[Any], int], Iterable[Any]] | None = None,
) -> QuantizedLayers:
    """Replace the linear layers and stacked experts of a model by quantized ones, one after the other.

    The float weight of a layer is dropped before the next one is quantized, so live tensors peak at the
    model plus one layer, or plus one stack of experts. Layers under LoRA adapters are reached too (the adapters stay
    as they are).

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
    stacks, skipped_stacks = stacks_to_quantize(model, quantization, never)
    if not targets and not stacks:
        raise NothingQuantized(
            f"The model has no linear layer for the backend {quantization.name!r}"
            + (
                f"; skipped: {', '.join(f'{name} ({why})' for name, why in list(skipped.items())[:5])}"
                if skipped
                else ""
            )
        )
    weights = [layer.weight for layer in targets.values()] + [getattr(*place) for place in stacks.values()]
    first = weights[0]
    del weights
    if first.device.type == "meta":
        raise QuantizationError("The model is on the meta device and has no weights to quantize.")
    check_usable(quantization, first.device, first.dtype)
    if stacks:
        check_usable_for_experts(quantization, first.device, first.dtype)
    del first
    names = list(targets)
    parents = module_places(model)
    work = [*names, *stacks]
    for name in progress(work, len(work)) if progress else work:
        if name in stacks:
            replace_stack(*stacks[name], quantization)
            continue
        layer = targets.pop(name)
        # ZeRO-3 may have partitioned the weight while the model was loaded.
        with gather(layer.parameters()):
            new = quantization.quantize(as_linear(layer))
        new.train(layer.training)
        if new is not layer:
            # transformers 5.23 notes the same on layers that it quantizes while loading.
            setattr(new, "source_cls", type(layer))  # noqa: B010 - not a part of the module
        for parent, attribute in parents[id(layer)]:
            setattr(parent, attribute, new)
        if new is not layer:
            # Other references to the old layer must not keep its weight alive.
            layer.weight = None
    return QuantizedLayers(names, skipped, list(stacks), skipped_stacks)


def quantize_arrived_experts(
    model: nn.Module,
    quantization: Quantization,
    *,
    never: Iterable[str] = (),
    progress: Callable[[Iterable[Any], int], Iterable[Any]] | None = None,
) -> QuantizedLayers | None:
    """Quantize the stacked experts of a model whose linear layers were loaded quantized.

    transformers 5.23 hands a backend's loader the linear layers only and loads stacks in float.

    Args:
        model: The model; changed in place.
        quantization: The backend of its layers.
        never: More names to leave alone.
        progress: Wraps the iterable of stacks and gets its length.

    Returns:
        What was done, ``None`` for a model without stacks.
    """
    stacks, skipped = stacks_to_quantize(model, quantization, never)
    if not stacks and not skipped:
        return None
    names = list(stacks)
    for name in progress(names, len(names)) if progress else names:
        module, attribute = stacks[name]
        weight = getattr(module, attribute)
        check_usable_for_experts(quantization, weight.device, weight.dtype)
        replace_stack(module, attribute, quantization)
    return QuantizedLayers([], {}, names, skipped)


def as_linear(layer: Any) -> nn.Linear:
    """Return the layer itself, or for transformers' ``Conv1D`` an equivalent linear layer."""
    if isinstance(layer, nn.Linear):
        return layer
    in_features, out_features = layer.nx, layer.nf
    linear = nn.Linear(in_features, out_features, bias=layer.bias is not None, device="meta")
    linear.weight = nn.Parameter(layer.weight.data.T.contiguous(), requires_grad=False)
    if layer.bias is not None:
        linear.bias = nn.Parameter(layer.bias.data, requires_grad=False)
    return linear


def layers_to_quantize(
    model: nn.Module, quantization: Quantization, never: Iterable[str]
) -> tuple[dict[str, Any], dict[str, str]]:
    """Return the linear layers that would be quantized, by path, and the reason for each that would not.

    Args:
        model: A float model, on any device.
        quantization: The backend and its options.
        never: More module names to leave alone.
    """
    untouched, kept, told = EXPECTED_REASONS
    reasons = dict.fromkeys(never, untouched)
    reasons |= dict.fromkeys(_find_kept_by_model(model), kept)
    reasons |= dict.fromkeys(quantization.options.get("skip_modules", ()), told)
    trainable = adapter_modules(model)
    spoiled = find_spoiled_layers(model, quantization)
    targets: dict[str, Any] = {}
    skipped: dict[str, str] = {}
    for path, module in model.named_modules():
        if not isinstance(module, (nn.Linear, Conv1D)) or module in trainable:
            continue
        name = plain_path(path)
        reason = next((why for skip, why in reasons.items() if _matches(name, skip)), None)
        if type(module) not in (nn.Linear, Conv1D):
            if owner_of(module) is None:
                skipped[name] = f"{type(module).__name__} is read in its own way"
        else:
            reason = reason or spoiled.get(name)
            reason = reason or quantization.quantizer.unsuitable(*_read_features(module), quantization.options)
            if reason:
                skipped[name] = reason
            else:
                targets[name] = module
    return targets, skipped


def stacks_to_quantize(
    model: nn.Module, quantization: Quantization, never: Iterable[str]
) -> tuple[dict[str, tuple[nn.Module, str]], dict[str, str]]:
    """Return the stacked expert weights that would be quantized, and the reason for each that would not.

    Args:
        model: A float model, on any device.
        quantization: The backend and its options.
        never: More names to leave alone.

    Returns:
        Module and attribute by path; reason by path.
    """
    untouched, _, told = EXPECTED_REASONS
    reasons = dict.fromkeys(never, untouched) | dict.fromkeys(quantization.options.get("skip_modules", ()), told)
    stacks: dict[str, tuple[nn.Module, str]] = {}
    skipped: dict[str, str] = {}
    for path, module, name, stack in list_expert_stacks(model):
        where = f"{plain_path(path)}.{name}"
        if isinstance(stack, QuantizedStack):
            continue
        asked = next((why for skip, why in reasons.items() if _matches(where, skip)), None)
        reason = asked or _find_reason(module, stack, quantization)
        if reason:
            skipped[where] = reason
        else:
            stacks[where] = (module, name)
    for where in list_flat_stacks(model):
        asked = next((why for skip, why in reasons.items() if _matches(where, skip)), None)
        skipped[where] = asked or "its experts are rows of one matrix, which no format here divides"
    return stacks, skipped


def _find_reason(module: nn.Module, stack: Any, quantization: Quantization) -> str | None:
    """Return why a stack of experts stays in float, ``None`` if it can be quantized."""
    if quantization.quantizer.expert_format(quantization.options) is None:
        return f"the backend {quantization.name!r} has no format for stacked experts"
    if not is_computable(module):
        return f"{type(module).__name__} computes its experts in a way of its own"
    _, *sizes = getattr(stack, "ds_shape", stack.shape)
    rows, columns = reversed(sizes) if is_transposed(module) else sizes
    return quantization.quantizer.unsuitable(columns, rows, quantization.options)


def _read_features(layer: Any) -> tuple[int, int]:
    """Return the input and output features of an ``nn.Linear`` or of transformers' ``Conv1D``."""
    return (layer.nx, layer.nf) if hasattr(layer, "nx") else (layer.in_features, layer.out_features)


def _matches(name: str, skip: str) -> bool:
    # transformers 5.23 matches its skip list the same way: a whole path, a prefix of it, or its last parts.
    return name == skip or name.endswith("." + skip) or name.startswith(skip + ".") or f".{skip}." in name


def _find_kept_by_model(model: nn.Module) -> list[str]:
    """Return the names that transformers would not quantize: output embeddings, tied weights, fp32-only modules."""
    base = base_of(model)
    if isinstance(base, PreTrainedModel):
        keep = list(base._keep_in_fp32_modules or []) + list(base._keep_in_fp32_modules_strict or [])
        return [plain_path(name) for name in [*get_keys_to_not_convert(base), *keep]]
    return _find_tied(base)


def _find_tied(model: nn.Module) -> list[str]:
    embeddings = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    return [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and id(module.weight) in embeddings
    ]

"""Load an adapter into its base and merge it layer by layer."""

from __future__ import annotations

import warnings
from collections import defaultdict
from collections.abc import Collection, Iterator, Mapping
from typing import Any

import torch
from peft import PeftConfig, PeftModel
from peft.tuners.lora.layer import ParamWrapper
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper, TrainableTokensWrapper
from safetensors.torch import load_file
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from lora_plugins.adapters.files import adapter_shapes, adapter_state, check_same_tensors
from lora_plugins.errors import AdapterMismatch, MergeError
from lora_plugins.merging.job import Job
from lora_plugins.merging.names import base_name, is_replaced
from lora_plugins.models.experts import is_transposed
from lora_plugins.models.wrapping import adapter_modules, base_of
from lora_plugins.plugins.host import plugin_host
from lora_plugins.quantization.request import Quantization, owner_of
from lora_plugins.quantization.selftest import check_usable, check_usable_for_experts
from lora_plugins.quantization.stacks import dequantize_stack, quantize_stack
from lora_plugins.quantization.walk import layers_to_quantize, stacks_to_quantize
from lora_plugins.targets.architectures import find_record
from lora_plugins.text import one_line
from registry import put_back, shorten_tables

__all__ = ["Wrapped", "adapter_layers", "choose_values", "merge_layers", "round_layers", "unquantized_layers", "wrap"]


class Wrapped:
    """A base model with its adapter, and the place of each tensor of the adapter's file.

    Attributes:
        model: The wrapped model.
        places: Name in the file -> the adapter's tensor that holds its values, ``None`` if a tensor of the base
            holds them.
        dtypes: Dtype of each of the base's tensors, before the adapter was added.
        tied: Ids of the weights that several modules of the base share, before the adapter was added, with the names
            under which they share each.
        tied_head: Whether output head and input embedding of the base share one weight.
        quantization: Backend of the base in training, if the merge uses its rounded weights.
        unrounded: Layers whose weights are still to be rounded by it.
        unrounded_stacks: Stacked experts that are still to be rounded: module and name of the parameter.
    """

    def __init__(
        self,
        model: PeftModel,
        places: Mapping[str, torch.Tensor | None],
        dtypes: Mapping[str, torch.dtype],
        tied: Mapping[int, list[str]],
    ) -> None:
        self.model = model
        self.places = places
        self.dtypes = dtypes
        self.tied = tied
        self.tied_head = _has_tied_head(base_of(model))
        self.quantization: Quantization | None = None
        self.unrounded: list[Any] = []
        self.unrounded_stacks: list[tuple[nn.Module, str]] = []


def wrap(model: PreTrainedModel, job: Job) -> Wrapped:
    """Load the adapter into the base, and check that every tensor of its file is in the model.

    Raises:
        AdapterMismatch: Names or shapes differ.
        MergeError: The model holds other values than the file.
    """
    dtypes = {name: tensor.dtype for name, tensor in model.state_dict().items()}
    tied = _shared_weights(model)
    stored = load_file(str(job.file), device="cpu")
    try:
        with warnings.catch_warnings():
            # Missing and unexpected tensors are errors below.
            warnings.filterwarnings("ignore", message="Found missing adapter keys")
            config = PeftConfig.from_pretrained(str(job.folder))
            with shorten_tables(config, model):
                wrapped = PeftModel.from_pretrained(model, str(job.folder), config=config)
    except (ValueError, RuntimeError, KeyError, TypeError, AttributeError) as error:
        text = one_line(error)
        raise AdapterMismatch(
            f"The adapter {job.file} does not fit the base {job.base}, a {type(model).__name__}: PEFT cannot put it in "
            f"({text})"
        ) from error
    # PEFT 0.21.2 saves a grown vocabulary under several names; `_find_places` handles the rest of the file.
    live = adapter_shapes(wrapped, "default")
    check_same_tensors({name: shape for name, shape in job.shapes.items() if name in live}, live, job.file)
    # PEFT 0.21.2 loses tensors of some model types; see registry.put_back.
    put_back(wrapped, stored, "default")
    wrapped.eval()
    own = {base_name(name): tensor for name, tensor in base_of(wrapped).state_dict().items()}
    own = {name: tensor for name, tensor in own.items() if name in dtypes}
    return Wrapped(wrapped, _find_places(wrapped, own, stored, job), dtypes, tied)


def _shared_weights(model: nn.Module) -> dict[int, list[str]]:
    held: defaultdict[int, list[str]] = defaultdict(list)
    for name, parameter in model.named_parameters(remove_duplicate=False):
        held[id(parameter)].append(name)
    return {one: names for one, names in held.items() if len(names) > 1}


def _separate(model: nn.Module, tied: Collection[int]) -> None:
    """Give layers that PEFT replicated their own copies of the weights, as a checkpoint of the model has."""
    seen: set[int] = set()
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None and id(parameter) in seen and id(parameter) not in tied:
                module._parameters[name] = nn.Parameter(parameter.detach().clone(), requires_grad=False)
            seen.add(id(parameter))


def _find_places(
    wrapped: PeftModel, own: Mapping[str, torch.Tensor], stored: Mapping[str, torch.Tensor], job: Job
) -> dict[str, torch.Tensor | None]:
    """Return `Wrapped.places`; ``own`` holds the base's tensors.

    Raises:
        AdapterMismatch: A tensor has no place.
        MergeError: The model holds other values there.
    """
    live = adapter_state(wrapped, "default")
    # With a grown vocabulary, PEFT 0.21.2 saves every tensor of the embedding modules under its name in the wrapper.
    whole = {name.replace(".default", ""): tensor for name, tensor in wrapped.state_dict().items()}
    of_base = {tensor.data_ptr() for tensor in own.values()}
    # `state_dict()` holds detached tensors that share memory with the model's.
    objects = {tensor.data_ptr(): tensor for tensor in wrapped.state_dict(keep_vars=True).values()}
    places: dict[str, torch.Tensor | None] = {}
    for name, value in stored.items():
        if is_replaced(name):
            continue
        here = _find_first((live, name), (whole, name), (own, base_name(name)))
        if here is None:
            raise AdapterMismatch(f"The adapter {job.file} has the tensor {name}, which has no place in {job.base}.")
        if not torch.equal(value.to(here.device, here.dtype), here):
            raise MergeError(f"The tensor {name} of {job.file} was loaded, and the model holds other values there.")
        places[name] = None if here.data_ptr() in of_base else objects[here.data_ptr()]
    return places


def _find_first(*places: tuple[Mapping[str, torch.Tensor], str]) -> torch.Tensor | None:
    return next((state[name] for state, name in places if name in state), None)


def adapter_layers(model: nn.Module) -> dict[str, nn.Module]:
    """Return the outermost modules that PEFT added to a model, by name."""
    found: dict[str, nn.Module] = {}
    for name, module in model.named_modules():
        inside = any(name.startswith(f"{outer}.") for outer in found)
        if isinstance(module, (BaseTunerLayer, AuxiliaryTrainingWrapper)) and not inside:
            found[name] = module
    return found


def choose_values(wrapped: Wrapped, quantization: Quantization, *, experts_only: bool = False) -> None:
    """Request the rounded weights that the quantized layers and experts had in training.

    `merge_layers` computes them layer by layer, `round_layers` all at once.

    Args:
        wrapped: The base with its adapter.
        quantization: Backend in training.
        experts_only: Whether the linear layers have their rounded weights, as those of a base that is stored quantized.

    Raises:
        QuantizationError: The backend cannot be used here.
    """
    never = list(_list_float(wrapped.model))
    layers, _ = layers_to_quantize(wrapped.model, quantization, never)
    stacks, _ = stacks_to_quantize(wrapped.model, quantization, never)
    wrapped.quantization, wrapped.unrounded = quantization, [] if experts_only else list(layers.values())
    wrapped.unrounded_stacks = list(stacks.values())
    if wrapped.unrounded:
        weight = wrapped.unrounded[0].weight
        check_usable(quantization, weight.device, weight.dtype)
    if wrapped.unrounded_stacks:
        stack = getattr(*wrapped.unrounded_stacks[0])
        check_usable_for_experts(quantization, stack.device, stack.dtype)


def _list_float(model: PeftModel) -> Iterator[str]:
    """Yield the names of what stays in float in training: routers, saved heads, layers adapted by bare weights."""
    record, config = find_record(base_of(model), plugin_host()), model.peft_config["default"]
    yield from record.never if record is not None else ()
    yield from config.modules_to_save or ()
    for name in getattr(config, "target_parameters", None) or ():
        if name.endswith(".weight"):
            yield name.removesuffix(".weight")


def round_layers(wrapped: Wrapped) -> None:
    """Replace every layer's weight by its quantized and dequantized values, in float32."""
    with torch.no_grad():
        while wrapped.unrounded:
            _round(wrapped.unrounded[-1], wrapped)
        for module, name in wrapped.unrounded_stacks[:]:
            _round_stack(module, name, wrapped)


def _round(layer: Any, wrapped: Wrapped) -> None:
    """Replace one layer's weight by its quantized and dequantized values, in float32, if that is still to be done."""
    if wrapped.quantization is not None and any(layer is one for one in wrapped.unrounded):
        wrapped.unrounded = [one for one in wrapped.unrounded if one is not layer]
        layer.weight.data = _make_rounded(layer, wrapped.quantization)


def _round_stack(module: Any, name: str, wrapped: Wrapped) -> None:
    """Replace stacked experts by their quantized and dequantized values, in float32, if that is still to be done."""
    if wrapped.quantization is None or not any(module is one and name == its for one, its in wrapped.unrounded_stacks):
        return
    wrapped.unrounded_stacks = [(one, its) for one, its in wrapped.unrounded_stacks if one is not module or its != name]
    stack = getattr(module, name)
    made = quantize_stack(stack.data, wrapped.quantization, transposed=is_transposed(module))
    stack.data = dequantize_stack(made, torch.float32)


def _make_rounded(layer: Any, quantization: Quantization) -> torch.Tensor:
    """Return a layer's weight after quantizing and dequantizing it, in float32 and the layer's own orientation."""
    transposed = not isinstance(layer, nn.Linear)
    weight = layer.weight.data.T.contiguous() if transposed else layer.weight.data
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    linear.weight = nn.Parameter(weight, requires_grad=False)
    made = quantization.quantizer.quantize_linear(linear, quantization.options)
    values = quantization.quantizer.dequantize(made).float()
    return values.T.contiguous() if transposed else values


def merge_layers(wrapped: Wrapped, job: Job) -> PreTrainedModel:
    """Merge the adapter into the weights, one layer at a time, in float32, rounded once.

    Returns:
        The base model without PEFT's modules.

    Raises:
        MergeError: A tensor of the adapter's file is not in the result.
    """
    base: PreTrainedModel = wrapped.model.get_base_model()
    used = set()
    with torch.no_grad():
        for layer in adapter_layers(wrapped.model).values():
            for part in _parts(layer):
                used |= _merge_part(part, base, wrapped)
        for rest in wrapped.unrounded[:]:
            dtype = rest.weight.dtype
            _round(rest, wrapped)
            rest.weight.data = rest.weight.data.to(dtype)
        for module, name in wrapped.unrounded_stacks[:]:
            dtype = getattr(module, name).dtype
            _round_stack(module, name, wrapped)
            getattr(module, name).data = getattr(module, name).data.to(dtype)
        merged: PreTrainedModel = wrapped.model.unload()
        result = {id(tensor) for tensor in merged.state_dict(keep_vars=True).values()}
        _check_used(wrapped, job, used | result)
        _check_plain(merged, wrapped, job)
        _restore_dtypes(merged, wrapped.dtypes)
        if job.config.layer_replication:
            _separate(merged, wrapped.tied)
        else:
            untied = wrapped.tied_head and not _has_tied_head(merged)
            _separate_ties(merged, wrapped.tied, untied=untied)
    return _finish(merged, tied_head=wrapped.tied_head)


def _parts(layer: nn.Module) -> Iterator[Any]:
    """Yield the adapter layers at one module: wrappers of expert parameters are nested, others stand alone."""
    while True:
        if isinstance(layer, TrainableTokensWrapper):
            yield layer.token_adapter
            return
        if isinstance(layer, BaseTunerLayer):
            yield layer
        if not isinstance(layer, ParamWrapper):
            return
        layer = layer.base_layer


def _merge_part(layer: Any, model: PreTrainedModel, wrapped: Wrapped) -> set[int]:
    """Merge one adapter layer; return the ids of the adapter's tensors in it."""
    base = layer.get_base_layer()
    own = {id(tensor) for tensor in base.state_dict(keep_vars=True).values()}
    parts = layer.state_dict(keep_vars=True).values()
    used = {id(tensor) for tensor in parts} - own
    if not isinstance(layer, ParamWrapper) and not _copies_rows(layer):
        _untie(base, model, wrapped.tied)
    weights = [layer.get_param()] if isinstance(layer, ParamWrapper) else list(base.parameters())
    dtypes = [weight.dtype for weight in weights]
    if isinstance(layer, ParamWrapper):
        _round_stack(base, layer.parameter_name, wrapped)
    _round(base, wrapped)
    for weight in weights:
        if weight.is_floating_point():
            weight.data = weight.data.float()
    try:
        layer.merge()
    except (NotImplementedError, ValueError) as error:
        raise MergeError(f"PEFT cannot merge a {type(layer).__name__} of this adapter: {error}") from error
    for weight, dtype in zip(weights, dtypes, strict=True):
        weight.data = weight.data.to(dtype)
    return used


def _copies_rows(layer: Any) -> bool:
    # In a tied model, trained tokens change the same rows of input embedding and head.
    return hasattr(layer, "trainable_tokens_delta")


def _check_used(wrapped: Wrapped, job: Job, used: set[int]) -> None:
    lost = [name for name, tensor in wrapped.places.items() if tensor is not None and id(tensor) not in used]
    if lost:
        raise MergeError(
            f"{len(lost)} of the {len(wrapped.places)} tensors in {job.file} are not in the merged model, first "
            f"{lost[0]}. Nothing was written; use the adapter on its base."
        )


def _check_plain(merged: PreTrainedModel, wrapped: Wrapped, job: Job) -> None:
    left = [name for name, module in merged.named_modules() if isinstance(module, BaseTunerLayer)]
    names = set(merged.state_dict())
    left += sorted(set(wrapped.dtypes) - names)
    if not job.config.layer_replication:
        left += sorted(names - set(wrapped.dtypes))
    if left:
        raise MergeError(
            f"The merged model is not an ordinary {type(merged).__name__}: {left[0]} and {len(left) - 1} others differ"
        )


def _separate_ties(merged: PreTrainedModel, tied: Mapping[int, list[str]], *, untied: bool) -> None:
    """Give weights that were one and differ now, because modules were saved, copies of their own.

    A file holds a shared weight under one name, and transformers gives its values to all names that are missing.
    It does so for none if the configuration is ``untied``, so that all weights get copies then, a head's bias included.
    """
    held = dict(merged.named_parameters(remove_duplicate=False))
    embedding = _find_end(merged, "get_input_embeddings") if _has_tied_head(merged) else None
    for names in tied.values():
        seen: set[int] = set()
        for name in names if untied or len({id(held[name]) for name in names}) > 1 else ():
            path, _, key = name.rpartition(".")
            if id(held[name]) in seen and held[name] is not embedding:
                merged.get_submodule(path).register_parameter(key, nn.Parameter(held[name].detach().clone()))
            seen.add(id(held[name]))


def _restore_dtypes(merged: PreTrainedModel, dtypes: Mapping[str, torch.dtype]) -> None:
    for name, parameter in merged.named_parameters():
        wanted = dtypes.get(name, dtypes.get(name.removesuffix("bias") + "weight"))
        if wanted is not None and parameter.is_floating_point():
            parameter.data = parameter.data.to(wanted)


def _finish(merged: PreTrainedModel, *, tied_head: bool) -> PreTrainedModel:
    """Freeze the result, and set it to untied if head and embedding no longer share their weight."""
    for parameter in merged.parameters():
        parameter.requires_grad_(False)
    if tied_head and not _has_tied_head(merged):
        merged.config.tie_word_embeddings = False
        text: Any = merged.config.get_text_config()
        text.tie_word_embeddings = False
    merged.eval()
    return merged


def _has_tied_head(model: Any) -> bool:
    head, embedding = _find_end(model, "get_output_embeddings"), _find_end(model, "get_input_embeddings")
    return head is not None and head is embedding


def _find_end(model: Any, get: str) -> Any:
    """Return the weight of the input or output embedding, inside PEFT's wrappers; ``None`` if there is none."""
    try:
        module = getattr(model, get)()
    except (AttributeError, NotImplementedError):
        return None
    if isinstance(module, AuxiliaryTrainingWrapper):
        module = module.original_module
    if isinstance(module, BaseTunerLayer):
        module = module.get_base_layer()
    return getattr(module, "weight", None)


def _untie(layer: Any, model: PreTrainedModel, tied: Collection[int]) -> None:
    """Give a head or embedding that shares its weight its own copy, because the adapter changes this module alone.

    Raises:
        MergeError: Other modules share the weight, and transformers would tie them again at loading.
    """
    weight = getattr(layer, "weight", None)
    if weight is None:
        return
    # A wrapper's `weight` property returns its layer's weight, so look at registered parameters only.
    sharing = [name for name, module in model.named_modules() if module._parameters.get("weight") is weight]
    if len(sharing) <= 1:
        return
    ends = [_find_end(model, "get_output_embeddings"), _find_end(model, "get_input_embeddings")]
    # Layers that PEFT 0.21.2 replicated also share weights, but transformers does not tie those again.
    if id(weight) in tied and (len(sharing) > 2 or not any(weight is end for end in ends)):
        names = " and ".join(name.replace(".base_layer", "") for name in sharing)
        raise MergeError(
            f"{names} share one weight and the adapter changes them differently: a merged model cannot hold both. Use "
            "the adapter on its base."
        )
    layer.weight = nn.Parameter(weight.detach().clone(), requires_grad=False)


def unquantized_layers(model: nn.Module) -> list[str]:
    """Return the names of a quantized model's linear layers that stayed in float, in the form of ``skip_modules``.

    Args:
        model: A quantized model, wrapped or not.
    """
    ours = adapter_modules(model)
    return [
        name.replace(".base_layer", "")
        for name, module in base_of(model).named_modules()
        if isinstance(module, (nn.Linear, Conv1D)) and module not in ours and owner_of(module) is None
    ]

"""Prepare and measure a model for each backend on the meta device."""

from __future__ import annotations

import contextlib
import copy
import functools
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from peft import LoraConfig
from peft.tuners.lora import Linear
from torch import nn

from lora_plugins.adapters.inject import build_config, set_fields
from lora_plugins.adapters.records import Preparation, preparation_of
from lora_plugins.adapters.settings import LoraSettings
from lora_plugins.adapters.steps import Job, run_steps
from lora_plugins.adapters.traits import traits_of
from lora_plugins.models.structure import Structure
from lora_plugins.models.wrapping import base_of, module_places
from lora_plugins.planning.amounts import Memory
from lora_plugins.planning.inputs import make_batch
from lora_plugins.planning.layers import (
    PlannedLinear,
    flat_bytes,
    keeps_input,
    make_stand_in,
    parameter_bytes,
    stored_bytes,
)
from lora_plugins.planning.optimizer import file_bytes
from lora_plugins.planning.sharing import Parts, Sizes
from lora_plugins.planning.source import copy_without_data
from lora_plugins.planning.stacks import list_planned, make_planned_stack, stack_bytes
from lora_plugins.planning.step import Block, activation_bytes, removable_blocks, shorten
from lora_plugins.plugins.servers import AdapterTraits
from lora_plugins.quantization.counting import ParameterCount, TensorBytes, count_parameters, tensor_bytes
from lora_plugins.quantization.division import find_read_layers
from lora_plugins.quantization.precision import activation_dtype, resolve_compute_dtype
from lora_plugins.quantization.request import Quantization, QuantizedLayers, with_compute_dtype
from lora_plugins.quantization.stacks import QuantizedStack
from lora_plugins.quantization.walk import layers_to_quantize, stacks_to_quantize
from lora_plugins.targets.resolution import TargetPlan
from lora_plugins.trainer.chunked_loss import chunked_loss

__all__ = ["Estimate", "Workbench"]


@dataclass(frozen=True)
class Estimate:
    """Bytes of activations, and how they were estimated.

    Attributes:
        size: Bytes.
        note: Empty when a step was simulated, else why the layers' sizes were used instead.
    """

    size: int
    note: str = ""


class Workbench:
    """Measures one model under each backend; builds each variant of it once.

    Args:
        base: The base model on the meta device, or a `peft.PeftModel` with its adapters.
        settings: The requested settings.
        targets: The chosen modules, ``None`` for a model that has its adapters.
        device: Device of the run.
        chunked: Whether the loss is computed in chunks where that is possible.
        config: Configuration of a stored adapter, instead of the settings' one.

    Attributes:
        notes: Remarks for the plan.
        comes_quantized: Whether the base's files are quantized; the model here is float, as nothing was loaded.
    """

    def __init__(
        self,
        base: nn.Module,
        settings: LoraSettings,
        targets: TargetPlan | None,
        device: torch.device,
        chunked: bool = False,
        config: LoraConfig | None = None,
    ) -> None:
        self.base = base
        self.settings = settings
        self.targets = targets
        self.device = device
        self.chunked = chunked
        self.structure = Structure(base_of(base))
        self.arrived = bool(_find_stand_ins(base))
        self.notes: list[str] = []
        self.comes_quantized = False
        self._config = config
        if targets is not None and config is not None:
            set_fields(config, targets)
        elif targets is not None:
            self._config = build_config(settings, targets)
        self._init = None if self._config is None else self._config.init_lora_weights
        if self._config is not None:
            # Initialization does not change sizes, and some methods need the weights' values.
            self._config.init_lora_weights = True
        self._layers: dict[str, frozenset[str]] = {}
        self._whole: dict[frozenset[str] | None, nn.Module] = {}
        self._divided: dict[frozenset[str] | None, tuple[list[PlannedLinear], int]] = {}
        self._weights: dict[str, int] = {}
        self._floats: dict[frozenset[str] | None, tuple[list[Sizes], int, int, list[int]]] = {}
        self._steps: dict[Any, tuple[nn.Module, list[Block]]] = {}
        self._estimates: dict[Any, Estimate] = {}

    # -- counting ------------------------------------------------------------------------------

    def whole(self, quantization: Quantization | None) -> Any:
        """Return the whole prepared model; backends that quantize the same layers share one."""
        key = self._find_quantized_layers(quantization)
        if key not in self._whole:
            self._whole[key] = self._prepare(copy_without_data(self.base), quantization)
        return self._whole[key]

    def _find_quantized_layers(self, quantization: Quantization | None) -> frozenset[str] | None:
        """Return the paths of the layers that a backend would quantize: some backends cannot take odd sizes."""
        if quantization is None:
            return None
        if quantization.name not in self._layers:
            found, _ = layers_to_quantize(self.base, quantization, self._list_never())
            stacks, _ = stacks_to_quantize(self.base, quantization, self._list_never())
            self._layers[quantization.name] = frozenset((*found, *stacks))
        return self._layers[quantization.name]

    def leaves_experts(self, quantization: Quantization) -> str:
        """Return why a backend leaves stacked experts in float, empty if it quantizes all of them."""
        _, skipped = stacks_to_quantize(self.base, quantization, self._list_never())
        return next(iter(skipped.values()), "")

    def _list_never(self) -> tuple[str, ...]:
        return (*self.targets.never, *self.heads()) if self.targets is not None else ()

    def count(self) -> ParameterCount:
        """Count the weights, which are the same under every backend."""
        return count_parameters(self.whole(None))

    @functools.cached_property
    def trained(self) -> list[nn.Parameter]:
        """The tensors that get gradients."""
        return [p for p in self.whole(None).parameters() if p.requires_grad]

    def weight_bytes(self, quantization: Quantization | None) -> int:
        """Return the bytes of all weights and buffers, including the scales of quantized layers."""
        name = quantization.name if quantization is not None else ""
        if name not in self._weights:
            layers, in_float = self._divide(quantization)
            told = self._add_compute_dtype(quantization)
            stacks = sum(stack_bytes(stack, told) for _, stack, _ in list_planned(self.whole(quantization)))
            self._weights[name] = in_float + stacks + sum(stored_bytes(layer, told) for layer in layers)
        return self._weights[name]

    def _divide(self, quantization: Quantization | None) -> tuple[list[PlannedLinear], int]:
        """Return the layers that a backend quantizes, and the bytes of everything else."""
        key = self._find_quantized_layers(quantization)
        if key not in self._divided:
            model = self.whole(quantization)
            layers = _find_stand_ins(model)
            self._divided[key] = layers, tensor_bytes(model).total - sum(layer.weight.numel() for layer in layers)
        return self._divided[key]

    @functools.cached_property
    def _base_bytes(self) -> int:
        return tensor_bytes(self.base).total

    def quantized_share(self, quantization: Quantization | None) -> float:
        """Return the share of the float base's bytes that a backend quantizes, 0 to 1."""
        layers = self._divide(quantization)[0]
        replaced = sum(layer.weight.numel() * layer.float_dtype.itemsize for layer in layers)
        stacks = list_planned(self.whole(quantization))
        replaced += sum(stack.numel() * form.float_dtype.itemsize for _, stack, form in stacks)
        # In the base, stand-ins of layers that arrived quantized count one byte per weight.
        there = [layer for layer in layers if layer.stored_bytes is not None]
        arrived = sum(layer.weight.numel() * (layer.float_dtype.itemsize - 1) for layer in there)
        stored = [(stack, form) for _, stack, form in stacks if form.stored_bytes is not None]
        arrived += sum(stack.numel() * form.float_dtype.itemsize for stack, form in stored)
        return replaced / (self._base_bytes + arrived or 1)

    def parts(self, quantization: Quantization | None, alone: Memory, optim: str, strategy: str) -> Parts:
        """Return the parts of memory that several devices can divide.

        Args:
            quantization: The backend.
            alone: What one device alone would hold.
            optim: Name of the optimizer.
            strategy: How devices share the work.
        """
        floats, block, outside, units = self._list_float_weights(quantization)
        parts = Parts(alone, floats, _read_sizes(self.trained), block, outside, optim, units=units)
        if strategy not in ("fsdp", "zero3"):
            return parts
        flat, flat_block, unflat = self._list_flat_weights(quantization)
        parts = replace(parts, flat=flat, flat_block=flat_block, unflat=unflat)
        if strategy == "fsdp":
            return parts
        # ZeRO-3 divides the parameters of other quantized layers too.
        total, largest, copied = self._count_packed_weights(quantization)
        return replace(parts, packed=total, packed_block=largest, copied=copied)

    def _list_float_weights(self, quantization: Quantization | None) -> tuple[list[Sizes], int, int, list[int]]:
        """Return the sizes of float parameters, and the bytes of those in the largest block and outside blocks.

        Last come the bytes of the embedding and the head, which are outside blocks.
        """
        key = self._find_quantized_layers(quantization)
        known = self._floats.get(key)
        if known is not None:
            return known
        model = base_of(self.whole(quantization))
        floats = {
            path: parameter
            for path, parameter in model.named_parameters()
            if parameter.is_floating_point() and not isinstance(parameter, QuantizedStack)
        }
        inside: dict[str, int] = {}
        outside = 0
        for path, parameter in floats.items():
            block = self.structure.block_of(path.replace(".base_layer", ""))
            size = parameter.numel() * parameter.element_size()
            if block is None:
                outside += size
            else:
                inside[block.path] = inside.get(block.path, 0) + size
        units = _measure_units(model)
        found = _read_sizes(floats.values()), max(inside.values(), default=0), outside, units
        self._floats[key] = found
        return found

    def _list_flat_weights(self, quantization: Quantization | None) -> tuple[list[int], int, int]:
        """Return the bytes of quantized layers that are divided whole, of those in the largest block, and undivided."""
        flat, unflat = [], 0
        blocks: dict[str, int] = {}
        for path, _, found in self._list_stand_ins(quantization):
            if found is not None:
                flat.append(found[0])
                unflat += found[1]
                self._add_to_block(blocks, path, found[0])
        return flat, max(blocks.values(), default=0), unflat

    def _list_stand_ins(
        self, quantization: Quantization | None
    ) -> Iterator[tuple[str, PlannedLinear, tuple[int, int] | None]]:
        """Yield the path of each stand-in, the stand-in, and its `flat_bytes` if engines divide it."""
        told = self._add_compute_dtype(quantization)
        model = base_of(self.whole(quantization))
        read = find_read_layers(model)
        for path, module in model.named_modules():
            if isinstance(module, PlannedLinear):
                yield path, module, None if id(module) in read else flat_bytes(module, told)

    def _count_packed_weights(self, quantization: Quantization | None) -> tuple[int, int, int]:
        """Return the bytes of other quantized parameters, of those in the largest block, and of those held twice."""
        told = self._add_compute_dtype(quantization)
        total = copied = 0
        blocks: dict[str, int] = {}
        for path, layer, flat in self._list_stand_ins(quantization):
            if flat is None:
                size, again = parameter_bytes(layer, told)
                total += size
                copied += size if again else 0
                self._add_to_block(blocks, path, size)
        for path, stack, _ in list_planned(base_of(self.whole(quantization))):
            size = stack_bytes(stack, told)
            total += size
            self._add_to_block(blocks, path, size)
        return total, max(blocks.values(), default=0), copied

    def _add_to_block(self, blocks: dict[str, int], path: str, size: int) -> None:
        block = self.structure.block_of(path.replace(".base_layer", ""))
        if block is not None:
            blocks[block.path] = blocks.get(block.path, 0) + size

    def file_bytes(self) -> int:
        """Return the size of the adapter file."""
        return file_bytes(self.whole(None), self._find_adapter_name())

    def traits(self) -> AdapterTraits:
        """Return what servers will ask of the adapter."""
        return traits_of(self.whole(None), self._find_adapter_name(), init=self._init)

    # -- simulating ----------------------------------------------------------------------------

    def activations(
        self, quantization: Quantization | None, batch_size: int, length: int, checkpointing: bool
    ) -> Estimate | None:
        """Return the activations of a step, ``None`` if the model does not support checkpointing."""
        key = (self._make_signature(quantization), batch_size, length, checkpointing)
        if key not in self._estimates:
            found = self._simulate(quantization, batch_size, length, checkpointing)
            if found is None:
                return None
            self._estimates[key] = found
        return self._estimates[key]

    def _make_signature(self, quantization: Quantization | None) -> Any:
        """Return a key of everything about a backend that affects activations."""
        if quantization is None:
            return None
        layer: Any = _find_lora_layer(quantization)
        return (
            self._find_quantized_layers(quantization),
            keeps_input(quantization.quantizer, self.device),
            layer.forward,
        )

    def _simulate(
        self, quantization: Quantization | None, batch_size: int, length: int, checkpointing: bool
    ) -> Estimate | None:
        reason = ""
        for short in (True, False):
            try:
                size = self.simulate(quantization, batch_size, length, checkpointing, short=short)
                return None if size is None else Estimate(size)
            except Exception as error:
                # A model's own code may raise anything without data.
                reason = f"{type(error).__name__}: {' '.join(str(error).split())[:120]}"
        size = self._estimate_roughly(batch_size * length, checkpointing)
        return Estimate(size, f"activations are estimated from the sizes of the layers, as no step ran ({reason})")

    def simulate(
        self, quantization: Quantization | None, batch_size: int, length: int, checkpointing: bool, *, short: bool
    ) -> int | None:
        """Simulate a step; return its activations, ``None`` if the model does not support checkpointing.

        Args:
            quantization: The backend.
            batch_size: Examples.
            length: Tokens per example.
            checkpointing: Whether blocks are recomputed in the backward pass.
            short: Whether repeated blocks are left out and their share is added afterwards.
        """
        model, removed = self._make_step_model(quantization, short)
        if not _set_checkpointing(model, checkpointing):
            return None
        with chunked_loss(model) if self.chunked else contextlib.nullcontext():
            return activation_bytes(model, make_batch(model, batch_size, length), removed)

    def _estimate_roughly(self, tokens: int, checkpointing: bool) -> int:
        """Estimate activations from the linear layers' inputs and outputs, if no step can be simulated."""
        item = 4 if self.settings.compute_dtype == "float32" else 2
        sizes: dict[str, int] = {}
        for linear in self.structure.linears.values():
            where = linear.block.path if linear.block is not None else ""
            sizes[where] = sizes.get(where, 0) + (linear.in_features + linear.out_features) * item
        if not checkpointing:
            return tokens * sum(sizes.values())
        width = min((linear.in_features for linear in self.structure.linears.values()), default=0)
        return tokens * (max(sizes.values(), default=0) + sizes.get("", 0) + width * item * len(sizes))

    def _make_step_model(self, quantization: Quantization | None, short: bool) -> tuple[Any, list[Block]]:
        key = (self._make_signature(quantization), short)
        if key not in self._steps:
            model = copy_without_data(self.base)
            removed = shorten(base_of(model), removable_blocks(self.structure)) if short else []
            self._steps[key] = (self._prepare(model, quantization).train(), removed)
        return self._steps[key]

    # -- preparing -----------------------------------------------------------------------------

    def _prepare(self, model: nn.Module, quantization: Quantization | None) -> Any:
        """Run the steps of `prepare_model` on a model without data, with stand-ins for quantized layers."""
        if quantization is None and self._config is None and preparation_of(model) is not None:
            # `prepare_model` made it: there is nothing left to do.
            return model
        record = Preparation(
            self._find_adapter_name(), self.targets, quantization, None, TensorBytes(), heads=self.heads()
        )
        job = Job(
            model,
            replace(self.settings, quantization=quantization),
            record,
            quantize=quantize_by_stand_ins,
            config=copy.deepcopy(self._config),
            is_quantized=self.arrived,
            device=self.device,
        )
        wrapped = run_steps(job)
        base: Any = job.base
        if hasattr(base, "config"):
            base.config.use_cache = False
        return wrapped

    def _find_adapter_name(self) -> str:
        wrapped: Any = self.base
        return self.settings.adapter_name if self._config is not None else wrapped.active_adapters[0]

    @property
    def by_hardware(self) -> bool:
        """Whether the device decides the dtype of activations."""
        return self.settings.compute_dtype == "auto"

    def compute_dtype(self, quantization: Quantization | None, base: nn.Module | None = None) -> torch.dtype | None:
        """Return the dtype that the frozen float weights are cast to, ``None`` to leave them."""
        base = base if base is not None else base_of(self.base)
        wanted, quantized = self.settings.compute_dtype, quantization is not None or self.arrived
        return resolve_compute_dtype(wanted, base, quantized=quantized, autocast=False, device=self.device)

    def _add_compute_dtype(self, quantization: Quantization | None) -> Quantization | None:
        """Return a backend with the dtype of activations, if it needs to know it."""
        if quantization is None:
            return None
        dtype = self.compute_dtype(quantization)
        return with_compute_dtype(quantization, dtype or activation_dtype(base_of(self.base), autocast=False))

    def heads(self) -> tuple[str, ...]:
        """Return the names of the heads that are trained in full."""
        wrapped: Any = self.base
        config = self._config or wrapped.peft_config[wrapped.active_adapters[0]]
        return tuple(config.modules_to_save or ())


def _read_sizes(tensors: Iterable[torch.Tensor]) -> list[Sizes]:
    return [(tuple(tensor.shape), tensor.element_size()) for tensor in tensors]


def _measure_units(model: Any) -> list[int]:
    """Return the bytes of the input embedding and of the output head; of one that holds both, if they are tied."""
    seen: set[int] = set()
    units = []
    for name in ("get_input_embeddings", "get_output_embeddings"):
        module = None
        # Models without such a part raise, or have no method.
        with contextlib.suppress(AttributeError, NotImplementedError):
            module = getattr(model, name)()
        new = [p for p in module.parameters() if id(p) not in seen] if isinstance(module, nn.Module) else []
        seen.update(id(p) for p in new)
        units.append(sum(p.numel() * p.element_size() for p in new if p.is_floating_point()))
    return [size for size in units if size]


def _find_stand_ins(model: nn.Module) -> list[PlannedLinear]:
    return [module for module in model.modules() if isinstance(module, PlannedLinear)]


def _find_lora_layer(quantization: Quantization | None) -> type[nn.Module]:
    if quantization is None:
        return Linear
    try:
        wanted = quantization.quantizer.lora_layer(PlannedLinear(1, 1, None, False, _float32()))
    except Exception:
        # The stand-in is not a layer of the backend, whose choice of a class may depend on the layer.
        return Linear
    return wanted or Linear


def _float32() -> torch.dtype:
    return torch.float32


def quantize_by_stand_ins(job: Job) -> None:
    """Replace the layers that the job's backend would quantize by stand-ins, as the job's ``quantize`` step."""
    quantization = job.asked_quantization
    if quantization is not None:
        targets, skipped = layers_to_quantize(job.model, quantization, job.never_quantized())
        places = module_places(job.model)
        for layer in targets.values():
            new = make_stand_in(layer, quantization, job.device or layer.weight.device)
            for parent, attribute in places[id(layer)]:
                setattr(parent, attribute, new)
        stacks, left = stacks_to_quantize(job.model, quantization, job.never_quantized())
        for module, name in stacks.values():
            module._parameters[name] = make_planned_stack(module, getattr(module, name), quantization)
        job.record.layers = QuantizedLayers(list(targets), skipped, list(stacks), left)
    if _find_stand_ins(job.base):
        job.lora_layers = {PlannedLinear: _find_lora_layer(job.record.quantization)}


def _set_checkpointing(model: Any, wanted: bool) -> bool:
    """Switch gradient checkpointing as the Trainer does; return false if the model does not support it."""
    with warnings.catch_warnings():
        # transformers 5.23 has other names and warns of these, which releases from 5.5 on have.
        former = r"`\w*gradient_checkpointing\w*` is deprecated"
        warnings.filterwarnings("ignore", message=former, category=FutureWarning)
        if not wanted:
            if getattr(model, "is_gradient_checkpointing", False):
                model.gradient_checkpointing_disable()
            return True
        if not hasattr(model, "gradient_checkpointing_enable"):
            return False
        try:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        except ValueError:
            return False
        return True

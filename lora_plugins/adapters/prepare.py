"""From a base model to a `peft.PeftModel` that is ready to train: resolve, quantize, prepare, inject, record."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import peft
import torch
from peft import PeftModel
from torch import nn

from lora_plugins.adapters import files as adapters
from lora_plugins.adapters.fused import fuse_adapters
from lora_plugins.adapters.inject import (
    build_config,
    exchange_layers,
    has_adapters,
    initializes_from_base,
    inject,
    register_lora_layers,
)
from lora_plugins.adapters.reloading import check_loadable
from lora_plugins.adapters.settings import LoraSettings
from lora_plugins.errors import PreparationError
from lora_plugins.models.wrapping import base_of
from lora_plugins.plugins.types import Quantizer
from lora_plugins.quantization.counting import TensorBytes, tensor_bytes
from lora_plugins.quantization.facts import record_facts
from lora_plugins.quantization.marks import tag_quantized, untag_dequantized
from lora_plugins.quantization.precision import (
    activation_dtype,
    cast_frozen,
    resolve_compute_dtype,
    slow_products_note,
    upcast_frozen,
)
from lora_plugins.quantization.request import Quantization, QuantizedLayers, detect_quantization, with_compute_dtype
from lora_plugins.quantization.selftest import check_arrived
from lora_plugins.quantization.walk import quantize_in_place
from lora_plugins.targets.resolution import TargetPlan, resolve_targets, task_heads

__all__ = [
    "RECORD_ATTRIBUTE",
    "Preparation",
    "Progress",
    "preparation_of",
    "prepare",
    "prepare_base",
    "prepare_model",
    "prepare_plain",
]


#: Where the record of a preparation is kept on the prepared model.
RECORD_ATTRIBUTE = "lora_plugins_preparation"

Progress = Callable[[Iterable[Any], int], Iterable[Any]]


@dataclass
class Preparation:
    """What was done to a model, for the report and the checks during training.

    Attributes:
        adapter_name: Name of the trained adapter, ``None`` when the model got none from us.
        plan: Which modules were chosen and why.
        quantization: Backend of the base, ``None`` for a float base.
        layers: Which layers were quantized here; ``None`` when the model arrived quantized or in float.
        before: Bytes before anything was done.
        after: Bytes when everything was done.
        compute_dtype: Dtype that the frozen float weights were cast to, ``None`` when they were left.
        upcast: Names of the modules held in float32 on purpose.
        heads: Names of the heads that must be trained.
        notes: Sentences for the report.
    """

    adapter_name: str | None
    plan: TargetPlan | None
    quantization: Quantization | None
    layers: QuantizedLayers | None
    before: TensorBytes
    after: TensorBytes = field(default_factory=TensorBytes)
    compute_dtype: torch.dtype | None = None
    upcast: list[str] = field(default_factory=list)
    heads: tuple[str, ...] = ()
    notes: list[str] = field(default_factory=list)


def preparation_of(model: nn.Module) -> Preparation | None:
    """Return the record that preparing left on a model, ``None`` for a model prepared elsewhere."""
    return getattr(model, RECORD_ATTRIBUTE, None)


def prepare_model(
    model: nn.Module,
    *,
    quantization: str | Mapping[str, Any] | Quantizer | None = None,
    peft_config: peft.LoraConfig | None = None,
    adapter: str | os.PathLike[str] | None = None,
    compute_dtype: str | torch.dtype = "auto",
    upcast: str = "none",
    adapter_name: str = "default",
    experts: str = "default",
    strict: bool = True,
    seed: int = 42,
    **lora: Any,
) -> peft.PeftModel:
    """Quantize a base model if asked, freeze it, put LoRA adapters at the right modules.

    Give the result to a Trainer. A model that was loaded quantized must take this way, because the Trainer
    refuses it before any callback exists.

    Args:
        model: A base model in float or loaded quantized; or a `peft.PeftModel`, whose adapters then stay as
            they are while its base is quantized if asked. Changed in place.
        quantization: A backend's name, or a mapping with ``name`` and options.
        peft_config: A ready configuration, instead of LoRA arguments.
        adapter: Adapter to continue from: a folder, or a registry reference such as ``"org/name@1.2"``.
        compute_dtype: Dtype of the frozen float weights; ``"auto"`` gives a quantized base
            bfloat16 where the hardware is fast at it, float32 on a CPU that is slow at 16 bits, and leaves a
            model without quantization.
        upcast: What is held in float32: ``"none"``, ``"norms"``, or ``"all"`` that is not quantized.
        adapter_name: Name of the adapter in the model.
        experts: What happens to routed experts: ``"none"``, ``"routed"``, ``"shared"``, or ``"default"`` for
            the architecture's own policy.
        strict: Whether problems with targets are errors; with ``False`` they are warnings.
        seed: Seed of the adapters' initial values; the caller's random state does not move.
        **lora: Any field of ``peft.LoraConfig``; defaults are ``r=8, lora_alpha=32, lora_dropout=0.05``.

    Returns:
        The wrapped model.

    Raises:
        UnknownArgument: A keyword is no field of ``peft.LoraConfig``.
        TargetError: Targets match nothing, or cover the blocks unevenly.
        QuantizationError: The backend is unknown or can't be used here.
        PreparationError: The model is in a state that can't be prepared.
    """
    settings = LoraSettings.from_arguments(
        quantization=quantization,
        peft_config=peft_config,
        adapter=adapter,
        compute_dtype=compute_dtype,
        upcast=upcast,
        adapter_name=adapter_name,
        experts=experts,
        strict=strict,
        **lora,
    )
    return prepare(model, settings, seed=seed)


def prepare(
    model: nn.Module, settings: LoraSettings, *, seed: int, autocast: bool = False, progress: Progress | None = None
) -> peft.PeftModel:
    """Do what `prepare_model` says, with checked settings.

    Args:
        model: The model.
        settings: What was asked for.
        seed: Seed of the adapters' initial values.
        autocast: Whether the Trainer runs the model under autocast, which then decides the activations' dtype.
        progress: Wraps the layers while they are quantized.
    """
    if isinstance(model, PeftModel):
        return _prepare_wrapped(model, settings, autocast=autocast, progress=progress)
    _refuse_unwrapped_adapters(model)
    return _Pipeline(model, settings, seed, autocast, progress).run()


def prepare_plain(
    model: nn.Module, settings: LoraSettings, *, autocast: bool = False, progress: Progress | None = None
) -> nn.Module:
    """Quantize and prepare a base, and leave adapters to somebody else.

    Args:
        model: A plain model, which comes back frozen and quantized; or a `peft.PeftModel`, whose base is
            quantized under its adapters.
        settings: What was asked for.
        autocast: Whether the Trainer runs the model under autocast.
        progress: Wraps the layers while they are quantized.
    """
    if isinstance(model, PeftModel):
        return _prepare_wrapped(model, settings, autocast=autocast, progress=progress)
    _refuse_unwrapped_adapters(model)
    untag_dequantized(model)
    arrived = _check_arrived(model, settings.quantization)
    record = Preparation(None, None, arrived, None, tensor_bytes(model))
    record.heads = tuple(task_heads(model))
    prepare_base(
        model,
        record,
        quantize=settings.quantization if arrived is None else None,
        compute_dtype=settings.compute_dtype,
        upcast=settings.upcast,
        autocast=autocast,
        progress=progress,
    )
    return _finish(model, record)


class _Pipeline:
    """The steps from a plain base model to a wrapped one, in their order."""

    def __init__(
        self, model: nn.Module, settings: LoraSettings, seed: int, autocast: bool, progress: Progress | None
    ) -> None:
        self.model = model
        self.settings = settings
        self.seed = seed
        self.autocast = autocast
        self.progress = progress

    def run(self) -> peft.PeftModel:
        settings = self.settings
        notes = ["the flags of a quantized model were taken off: its weights are float"] * untag_dequantized(self.model)
        arrived = _check_arrived(self.model, settings.quantization)
        stored = adapters.adapter_folder(settings.adapter) if settings.adapter is not None else None
        config = adapters.load_config(stored) if stored else None
        plan = self._resolve(config)
        record = Preparation(
            settings.adapter_name, plan, arrived or settings.quantization, None, tensor_bytes(self.model)
        )
        record.notes += notes
        if config is None:
            config = build_config(settings, plan)
        record.heads = tuple(config.modules_to_save or ())
        base_first = initializes_from_base(
            config.init_lora_weights, record.quantization, already_quantized=arrived is not None
        )
        if not base_first:
            self._prepare_base(record, arrived)
        register_lora_layers(self.model, config, record.quantization)
        wrapped, inject_notes = inject(self.model, config, settings.adapter_name, self.seed)
        record.notes += inject_notes
        if plan.input_gradients:
            self.model.enable_input_require_grads()  # type: ignore[operator]
            record.notes.append("the embeddings, which stay frozen, hand a gradient through: the blocks need it")
        lost = check_loadable(wrapped, settings.adapter_name, strict=settings.strict)
        record.notes += [lost] if lost else []
        if base_first:
            record.notes.append(
                f"adapters were initialised from the float base ({config.init_lora_weights}), then quantized under"
            )
            self._prepare_base(record, arrived)
            exchange_layers(wrapped, _required(record.quantization))
        if stored:
            self._load(wrapped, stored, record)
        return _finish(wrapped, record)

    def _resolve(self, stored: peft.LoraConfig | None) -> TargetPlan:
        source = stored or self.settings.peft_config
        lora = self.settings.lora

        def asked(name: str) -> Any:
            return getattr(source, name) if source is not None else lora.get(name)

        return resolve_targets(
            self.model,
            asked("target_modules"),
            experts=self.settings.experts,
            exclude_modules=asked("exclude_modules"),
            layers_to_transform=asked("layers_to_transform"),
            target_parameters=asked("target_parameters"),
            literal=stored is not None,
            strict=self.settings.strict,
        )

    def _prepare_base(self, record: Preparation, arrived: Quantization | None) -> None:
        prepare_base(
            self.model,
            record,
            quantize=self.settings.quantization if arrived is None else None,
            compute_dtype=self.settings.compute_dtype,
            upcast=self.settings.upcast,
            autocast=self.autocast,
            progress=self.progress,
        )

    def _load(self, wrapped: peft.PeftModel, folder: Any, record: Preparation) -> None:
        file = adapters.find_adapter_file(folder, "default")
        if file is None:
            raise PreparationError(f"The folder {folder} has no {adapters.ADAPTER_FILE}")
        adapters.load_weights(wrapped, file, self.settings.adapter_name)
        record.notes.append(f"continues from the adapter in {folder}")


def prepare_base(
    model: nn.Module,
    record: Preparation,
    *,
    quantize: Quantization | None,
    compute_dtype: str | torch.dtype,
    upcast: str,
    autocast: bool,
    progress: Progress | None,
) -> None:
    """Freeze a base, quantize it if asked and choose the dtype of what stays float; writes into ``record``.

    Adapters and trained heads that the model already has keep their trainability, names and values.
    """
    base = base_of(model)
    wrapped = base is not model
    if not wrapped:
        base.requires_grad_(False)
    dtype = resolve_compute_dtype(
        compute_dtype, base, quantized=quantize is not None or record.quantization is not None, autocast=autocast
    )
    if quantize is not None:
        quantize = with_compute_dtype(quantize, dtype or activation_dtype(base, autocast=autocast))
        never = record.plan.never if record.plan is not None else ()
        record.layers = quantize_in_place(model, quantize, never=(*never, *record.heads), progress=progress)
        record.quantization = quantize
        if wrapped:
            exchange_layers(model, quantize)
    elif record.quantization is not None:
        # Loaded quantized: let the backend set what makes its layers trainable.
        check_arrived(base, record.quantization)
        record.quantization.quantizer.after_quantize(base, record.quantization.options)
        if wrapped:
            exchange_layers(model, record.quantization)
    if dtype is not None:
        cast_frozen(base, dtype)
        record.compute_dtype = dtype
    if quantize is not None and record.layers is not None:
        tag_quantized(base, quantize, record.layers)
    record.upcast = upcast_frozen(base, upcast)
    slow = slow_products_note(base, autocast=autocast)
    record.notes += [slow] if slow else []


def _prepare_wrapped(
    model: peft.PeftModel, settings: LoraSettings, *, autocast: bool, progress: Progress | None
) -> peft.PeftModel:
    """Recognise a model that has its adapters: nothing is wrapped twice, its base is quantized if asked."""
    name = model.active_adapter if isinstance(model.active_adapter, str) else model.active_adapters[0]
    _check_same_config(model.peft_config[name], settings, name)
    known = preparation_of(model)
    if known is not None and (settings.quantization is None or known.quantization is not None):
        _check_arrived(model, settings.quantization)
        return model
    arrived = _check_arrived(model, settings.quantization)
    record = Preparation(name, known.plan if known else None, arrived, None, tensor_bytes(model))
    record.heads = tuple(getattr(model.peft_config[name], "modules_to_save", None) or ())
    record.notes.append("the model came with its adapters; they were left as they are")
    lost = check_loadable(model, name, strict=settings.strict)
    record.notes += [lost] if lost else []
    prepare_base(
        model,
        record,
        quantize=settings.quantization if arrived is None else None,
        compute_dtype=settings.compute_dtype,
        upcast=settings.upcast,
        autocast=autocast,
        progress=progress,
    )
    return _finish(model, record)


def _finish(model: Any, record: Preparation) -> Any:
    fuse_adapters(model)
    record.after = tensor_bytes(model)
    setattr(model, RECORD_ATTRIBUTE, record)
    record_facts(model)
    return model


def _check_arrived(model: nn.Module, wanted: Quantization | None) -> Quantization | None:
    """Return the backend of a model that arrived quantized.

    Raises:
        PreparationError: Another one was asked for.
    """
    arrived = detect_quantization(model)
    if arrived is not None and wanted is not None and arrived.name != wanted.name:
        raise PreparationError(
            f"quantization={wanted.name!r} was asked for and the model is already quantized with {arrived.name!r}. "
            "Load it in float, or leave quantization out."
        )
    return arrived


def _check_same_config(config: Any, settings: LoraSettings, name: str) -> None:
    """Refuse LoRA arguments that contradict the adapters a model already has: they would be ignored."""
    asked = dict(settings.lora)
    if settings.peft_config is not None:
        asked = {
            key: value
            for key, value in settings.peft_config.to_dict().items()
            if key in ("r", "lora_alpha", "lora_dropout")
        }
    if settings.adapter is not None:
        raise PreparationError(
            f"adapter={settings.adapter!r} was given and the model already has the adapter {name!r}. "
            "Pass the base model."
        )
    different = {
        key: (value, getattr(config, key, None))
        for key, value in asked.items()
        if key != "target_modules" and getattr(config, key, None) != value
    }
    if different:
        text = "; ".join(f"{key}={value!r}, the adapter has {has!r}" for key, (value, has) in different.items())
        raise PreparationError(
            f"The model already has the adapter {name!r} and other arguments were given: {text}. "
            "Pass the base model, or leave these arguments out."
        )


def _refuse_unwrapped_adapters(model: nn.Module) -> None:
    if has_adapters(model):
        raise PreparationError(
            "The model has adapters that were put in with add_adapter() or inject_adapter_in_model(). The Trainer can "
            "neither resume nor load the best checkpoint of such a model. Pass the base model, or wrap it with "
            "peft.get_peft_model()."
        )


def _required(quantization: Quantization | None) -> Quantization:
    assert quantization is not None, "only called for a quantized base"
    return quantization

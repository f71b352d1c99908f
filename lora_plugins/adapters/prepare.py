"""Turn a base model into a `peft.PeftModel` that is ready to train."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import peft
import torch
from peft import PeftModel
from torch import nn

from lora_plugins.adapters import files as adapters
from lora_plugins.adapters.fused import unfuse_adapters
from lora_plugins.adapters.inject import (
    build_config,
    has_adapters,
    set_fields,
)
from lora_plugins.adapters.lineage.parents import describe_parent
from lora_plugins.adapters.records import Preparation, preparation_of
from lora_plugins.adapters.saving import find_wrapper
from lora_plugins.adapters.settings import LoraSettings
from lora_plugins.adapters.steps import Job, Progress, run_steps
from lora_plugins.errors import PreparationError
from lora_plugins.models.wrapping import base_of
from lora_plugins.plugins.types import Quantizer
from lora_plugins.quantization.counting import count_parameters, tensor_bytes
from lora_plugins.quantization.facts import RECORD_ATTRIBUTE, record_facts
from lora_plugins.quantization.formats import check_format
from lora_plugins.quantization.marks import untag_dequantized
from lora_plugins.quantization.request import Quantization, detect_quantization
from lora_plugins.targets.resolution import TargetPlan, check_names, find_required, resolve_targets, task_heads

__all__ = [
    "Preparation",
    "choose_targets",
    "preparation_of",
    "prepare",
    "prepare_model",
    "prepare_plain",
]


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
    trainable_dtype: str | torch.dtype | None = "float32",
    fused: bool = True,
    frozen: Sequence[str] = (),
    allow_format: str | None = None,
    seed: int = 42,
    recipe: str | None = None,
    **lora: Any,
) -> peft.PeftModel:
    """Quantize a base model if requested, freeze it, and add LoRA adapters to its target modules.

    Pass the result to a Trainer. A model that was loaded quantized must be prepared this way, because the Trainer
    (transformers 5.23) refuses it before any callback exists.

    Args:
        model: A base model in float or loaded quantized; or a `peft.PeftModel`, which keeps its adapters while its
            base is quantized if requested. Modified in place.
        quantization: A backend's name, a mapping with ``name`` and options, or a backend.
        peft_config: A complete configuration, instead of LoRA arguments.
        adapter: Adapter to continue from: a folder, or a registry reference such as ``"org/name@1.2"``.
        compute_dtype: Dtype of the frozen float weights. With ``"auto"``, a quantized base gets bfloat16 where the
            hardware is fast at it and float32 on a CPU that is slow at 16 bits; other bases keep their dtype.
        upcast: What is held in float32: ``"none"``, ``"norms"``, or ``"all"`` weights that are not quantized.
        adapter_name: Name of the adapter in the model.
        experts: How routed experts are adapted: ``"none"``, ``"routed"``, ``"shared"``, or ``"default"`` for
            the architecture's own policy.
        strict: Whether problems with targets are errors; with ``False`` they are warnings.
        trainable_dtype: Dtype of all trained tensors (adapters, heads, saved modules, tokens), independent of the
            base's; ``None`` keeps the dtype in which each tensor is created.
        fused: Whether LoRA layers compute their branch as one function during training, which saves less for the
            backward pass and gives the same results. ``False`` keeps PEFT's own ``forward``.
        frozen: Names of newly initialized parts, such as a head, that are deliberately not trained.
        allow_format: Storage format (``quant_method``) of a base that is trained although the table of formats refuses
            it. No gradient of such a base was ever checked.
        seed: Seed of the adapters' initial values; the caller's random state is unchanged.
        recipe: Name of fields that are known together, such as ``"bloomz-2023"``: what the recipe of that year trains,
            whatever the defaults are. Fields that are passed as well win.
        **lora: Any field of ``peft.LoraConfig``; defaults are ``r=8, lora_alpha=32, lora_dropout=0.05``.

    Returns:
        The wrapped model.

    Raises:
        UnknownArgument: A keyword is not a field of ``peft.LoraConfig``.
        TargetError: Targets match nothing, or cover the blocks unevenly.
        QuantizationError: The backend is unknown or cannot be used here.
        UntrainableFormat: The base is stored in a format that cannot train adapters, or that is not known.
        PreparationError: The model is in a state that cannot be prepared.
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
        trainable_dtype=trainable_dtype,
        fused=fused,
        frozen=frozen,
        allow_format=allow_format,
        recipe=recipe,
        **lora,
    )
    return prepare(model, settings, seed=seed)


def prepare(
    model: nn.Module, settings: LoraSettings, *, seed: int, autocast: bool = False, progress: Progress | None = None
) -> peft.PeftModel:
    """Prepare a model as `prepare_model` does, with checked settings.

    Args:
        model: The model.
        settings: The checked arguments.
        seed: Seed of the adapters' initial values.
        autocast: Whether the Trainer runs the model under autocast, which then determines the activations' dtype.
        progress: Wraps the layers while they are quantized.
    """
    if isinstance(model, PeftModel):
        return _prepare_wrapped(model, settings, autocast=autocast, progress=progress)
    _refuse_unwrapped_adapters(model)
    stored_notes = check_format(model, settings.allow_format)
    untagged = untag_dequantized(model)
    arrived = _check_arrived(model, settings.quantization)
    stored = adapters.adapter_folder(settings.adapter) if settings.adapter is not None else None
    checked = adapters.check_base(stored, model) if stored else None
    config = adapters.load_config(stored) if stored else None
    plan = choose_targets(model, settings, config)
    record = Preparation(settings.adapter_name, plan, arrived or settings.quantization, None, tensor_bytes(model))
    record.notes += stored_notes
    if untagged:
        record.notes.append("the flags of a quantized model were taken off: its weights are float")
    record.notes += [f"adapter and base are {checked}"] if checked else []
    record.parent = describe_parent(settings.adapter, stored) if settings.adapter is not None and stored else "none"
    job = Job(model, settings, record, seed=seed, autocast=autocast, progress=progress, stored=stored)
    job.is_quantized = arrived is not None
    if config is not None:
        set_fields(config, plan)
    job.config = config or build_config(settings, plan)
    record.required = plan.required
    record.heads = tuple(job.config.modules_to_save or ())
    return _finish(run_steps(job), record)


def prepare_plain(
    model: nn.Module, settings: LoraSettings, *, autocast: bool = False, progress: Progress | None = None
) -> nn.Module:
    """Quantize and prepare a base without adding adapters.

    Args:
        model: A plain model, which is returned frozen and quantized; or a `peft.PeftModel`, whose base is
            quantized under its adapters.
        settings: The checked arguments.
        autocast: Whether the Trainer runs the model under autocast.
        progress: Wraps the layers while they are quantized.
    """
    if isinstance(model, PeftModel):
        return _prepare_wrapped(model, settings, autocast=autocast, progress=progress)
    _refuse_unwrapped_adapters(model)
    stored_notes = check_format(model, settings.allow_format)
    untag_dequantized(model)
    arrived = _check_arrived(model, settings.quantization)
    record = Preparation(None, None, arrived or settings.quantization, None, tensor_bytes(model))
    record.notes += stored_notes
    record.heads = tuple(task_heads(model))
    record.required = find_required(model, settings.frozen)
    job = Job(model, settings, record, autocast=autocast, progress=progress, is_quantized=arrived is not None)
    return _finish(run_steps(job), record)


def _prepare_wrapped(
    model: peft.PeftModel, settings: LoraSettings, *, autocast: bool, progress: Progress | None
) -> peft.PeftModel:
    """Prepare a model that already has adapters: keep them, and quantize its base if requested."""
    stored_notes = check_format(model, settings.allow_format)
    name = model.active_adapter if isinstance(model.active_adapter, str) else model.active_adapters[0]
    check_names(model, model.peft_config[name], strict=settings.strict)
    _check_same_config(model.peft_config[name], settings, name)
    known = preparation_of(model)
    if known is not None and (settings.quantization is None or known.quantization is not None):
        _check_arrived(model, settings.quantization)
        if not settings.fused and unfuse_adapters(model):
            known.notes.append("the LoRA layers compute their branch with PEFT's own forward (fused=False)")
        return model
    arrived = _check_arrived(model, settings.quantization)
    plan = known.plan if known else None
    record = Preparation(name, plan, arrived or settings.quantization, None, tensor_bytes(model))
    record.parent = known.parent if known else record.parent
    record.heads = tuple(getattr(model.peft_config[name], "modules_to_save", None) or ())
    record.required = find_required(base_of(model), settings.frozen)
    record.notes += [*stored_notes, "the model came with its adapters; they were left as they are"]
    job = Job(model, settings, record, autocast=autocast, progress=progress, is_quantized=arrived is not None)
    return _finish(run_steps(job), record)


def _finish(model: Any, record: Preparation) -> Any:
    record.after = tensor_bytes(model)
    setattr(model, RECORD_ATTRIBUTE, record)
    count = count_parameters(model)
    record_facts(model, count.quantized / count.total if count.total else None)
    return model


def choose_targets(model: nn.Module, settings: LoraSettings, stored: peft.LoraConfig | None = None) -> TargetPlan:
    """Choose the modules of a base model that get adapters, from the settings or a stored adapter's configuration.

    Raises:
        TargetError: Targets match nothing, or cover the blocks unevenly.
    """
    plan = resolve_targets(
        model,
        **settings.asked(stored),
        experts=settings.experts,
        frozen=settings.frozen,
        literal=stored is not None,
        strict=settings.strict,
    )
    return _name_recipe(plan, settings) if settings.recipe else plan


def _name_recipe(plan: TargetPlan, settings: LoraSettings) -> TargetPlan:
    """Return the plan with a note on what the recipe gave, and the recipe as source if it named the targets."""
    recipe = f"the recipe {settings.recipe!r}"
    gave = [(name, settings.lora[name]) for name in settings.from_recipe]
    shown = [f"{name}={', '.join(value) if isinstance(value, list) else value}" for name, value in gave]
    plan.notes.append(
        f"{recipe} gave {'; '.join(shown)}" if shown else f"every field of {recipe} was passed explicitly"
    )
    return replace(plan, source=recipe) if "target_modules" in settings.from_recipe else plan


def _check_arrived(model: nn.Module, wanted: Quantization | None) -> Quantization | None:
    """Return the backend of a model that was loaded quantized, ``None`` for a float model.

    Raises:
        PreparationError: Another backend was requested.
    """
    arrived = detect_quantization(model)
    if arrived is not None and wanted is not None and arrived.name != wanted.name:
        raise PreparationError(
            f"quantization={wanted.name!r} was asked for and the model is already quantized with {arrived.name!r}. "
            "Load it in float, or leave quantization out."
        )
    return arrived


def _check_same_config(config: Any, settings: LoraSettings, name: str) -> None:
    """Refuse LoRA arguments that contradict the adapter a model already has; they would be ignored."""
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
            f"The model already has the adapter {name!r} and other arguments were given: {text}. To train the adapter "
            "that is there, leave these arguments out: LoraCallback() adds nothing and watches the run. For a new "
            "adapter, pass the base model."
        )


def _refuse_unwrapped_adapters(model: nn.Module) -> None:
    wrapper = find_wrapper(model)
    if wrapper is not None:
        names = ", ".join(map(repr, wrapper.peft_config))
        raise PreparationError(
            f"This {type(model).__name__} already holds the adapter {names}: an earlier LoraCallback, attach() or "
            "prepare_model() put it in, perhaps in a notebook cell that ran twice. For a new adapter load the model "
            "again, or take the old one out with lora_plugins.detach(that_trainer). To train on with the old one, "
            "give the Trainer the model that holds it (that_trainer.model, or what prepare_model() returned) and "
            "LoraCallback() without arguments."
        )
    if has_adapters(model):
        raise PreparationError(
            "The model has adapters that were put in with add_adapter() or inject_adapter_in_model(), or with "
            "get_peft_model(), which returns another object. The Trainer can neither resume nor load the best "
            "checkpoint of such a model. Pass a base model without adapters, or "
            "what peft.get_peft_model() returned."
        )

"""The steps that prepare a model, shared by training and `plan`."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import peft
import torch
from torch import nn

from lora_plugins.adapters import files as adapters
from lora_plugins.adapters.fused import fuse_adapters
from lora_plugins.adapters.inject import (
    check_forward,
    exchange_layers,
    find_lora_layers,
    initializes_from_base,
    inject,
)
from lora_plugins.adapters.records import Preparation
from lora_plugins.adapters.reloading import check_loadable
from lora_plugins.adapters.routed.wrappers import use_experts_function
from lora_plugins.adapters.saving import guard_saving
from lora_plugins.adapters.settings import LoraSettings
from lora_plugins.errors import PreparationError
from lora_plugins.logs import say_once
from lora_plugins.models.statistics import keep_statistics
from lora_plugins.models.wrapping import base_of
from lora_plugins.quantization.casting import cast_trained, meet_inputs
from lora_plugins.quantization.marks import tag_quantized
from lora_plugins.quantization.precision import (
    activation_dtype,
    cast_frozen,
    resolve_compute_dtype,
    resolve_trainable_dtype,
    slow_products_note,
    upcast_frozen,
)
from lora_plugins.quantization.request import Quantization, with_compute_dtype
from lora_plugins.quantization.selftest import check_arrived
from lora_plugins.quantization.stacks import list_quantized_stacks
from lora_plugins.quantization.walk import quantize_arrived_experts, quantize_in_place

__all__ = ["Job", "Progress", "find_steps", "run_steps"]


Progress = Callable[[Iterable[Any], int], Iterable[Any]]


@dataclass
class Job:
    """One model on its way through the steps.

    Attributes:
        model: The base model, or its `peft.PeftModel` once it has adapters. On the meta device for `plan`.
        settings: The requested settings.
        record: What was done; the steps fill it in.
        quantize: The step that quantizes the base; `plan` passes one that uses placeholder layers.
        config: Configuration of the adapters to create, ``None`` if the job creates none.
        stored: Folder of the adapter to continue from.
        is_quantized: Whether the base was loaded quantized.
        seed: Seed of the adapters' initial values.
        autocast: Whether the Trainer runs the model under autocast.
        device: Device that the model will run on; by default the one it is on.
        progress: Wraps the layers while they are quantized.
        lora_layers: LoRA layer class by class of quantized layer; ``quantize`` fills it in.
        trained: Parameters that get gradients, by name.
    """

    model: Any
    settings: LoraSettings
    record: Preparation
    quantize: Callable[[Job], None] = field(default_factory=lambda: quantize_base)
    config: peft.LoraConfig | None = None
    stored: Path | None = None
    is_quantized: bool = False
    seed: int = 42
    autocast: bool = False
    device: torch.device | None = None
    progress: Progress | None = None
    lora_layers: dict[type, type] = field(default_factory=dict)
    trained: dict[str, nn.Parameter] = field(default_factory=dict)

    @property
    def base(self) -> nn.Module:
        """The base model, with or without adapters around it."""
        return base_of(self.model)

    @property
    def has_adapters(self) -> bool:
        """Whether the model has adapters."""
        return self.base is not self.model

    @property
    def asked_quantization(self) -> Quantization | None:
        """Backend to quantize the base with; ``None`` if it was loaded quantized or stays in float."""
        return None if self.is_quantized else self.settings.quantization

    def never_quantized(self) -> tuple[str, ...]:
        """Return the names of modules that stay in float."""
        plan = self.record.plan
        return (*(plan.never if plan is not None else ()), *self.record.heads)


def run_steps(job: Job) -> Any:
    """Run every step, for `prepare_model` and `plan` alike; return the prepared model."""
    for step in find_steps(job):
        step(job)
    return job.model


def find_steps(job: Job) -> list[Step]:
    """Return the steps of a job in order.

    Adapters that are initialized from the float weights are created before the base is quantized.
    """
    adapters_first = not job.has_adapters and job.config is not None and _starts_from_base(job)
    middle = [*ADAPTER_STEPS, *BASE_STEPS] if adapters_first else [*BASE_STEPS, *ADAPTER_STEPS]
    return [freeze_base, *middle, *LAST_STEPS]


def _starts_from_base(job: Job) -> bool:
    init = getattr(job.config, "init_lora_weights", True)
    first = initializes_from_base(init, job.record.quantization, already_quantized=job.is_quantized)
    if first:
        job.record.notes.append(f"adapters were initialised from the float base ({init}), then quantized under")
    return first


def freeze_base(job: Job) -> None:
    """Freeze a base without adapters; if there are adapters, leave ``requires_grad`` of all parameters unchanged."""
    if not job.has_adapters:
        job.base.requires_grad_(False)
    job.trained = _find_trained(job.model)


def _find_trained(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def choose_dtype(job: Job) -> None:
    """Choose the dtype of the frozen float weights."""
    job.record.compute_dtype = resolve_compute_dtype(
        job.settings.compute_dtype,
        job.base,
        quantized=job.is_quantized or job.settings.quantization is not None,
        autocast=job.autocast,
        device=job.device,
    )


def quantize(job: Job) -> None:
    """Quantize the base with the job's own step, which also fills ``lora_layers``."""
    job.quantize(job)


def quantize_base(job: Job) -> None:
    """Quantize the base in place; for a base that was loaded quantized, run the backend's ``after_quantize``."""
    record, model, wanted = job.record, job.model, job.asked_quantization
    if wanted is not None:
        dtype = record.compute_dtype or activation_dtype(job.base, autocast=job.autocast)
        wanted = with_compute_dtype(wanted, dtype)
        record.layers = quantize_in_place(model, wanted, never=job.never_quantized(), progress=job.progress)
        record.quantization = wanted
        tag_quantized(job.base, wanted, record.layers)
    elif record.quantization is not None:
        check_arrived(job.base, record.quantization)
        dtype = record.compute_dtype or activation_dtype(job.base, autocast=job.autocast)
        record.layers = quantize_arrived_experts(
            model, with_compute_dtype(record.quantization, dtype), never=job.never_quantized(), progress=job.progress
        )
        if record.layers is not None and record.layers.stacks:
            record.notes.append(
                f"{len(record.layers.stacks)} stacked expert weights were loaded in float, as transformers' loader "
                "quantizes linear layers only, and quantized afterwards"
            )
        record.quantization.quantizer.after_quantize(job.base, record.quantization.options)
    if record.quantization is not None:
        say_once(record.quantization.quantizer.loggers)
        exchange_layers(model, record.quantization)
        check_forward(model, record.quantization)
        job.lora_layers = find_lora_layers(model, job.config, record.quantization)


def cast_base(job: Job) -> None:
    """Cast the frozen float weights."""
    if job.record.compute_dtype is not None:
        cast_frozen(job.base, job.record.compute_dtype)


def upcast_base(job: Job) -> None:
    """Cast norms, or all weights that are not quantized, to float32 if requested."""
    job.record.upcast = upcast_frozen(job.base, job.settings.upcast)
    slow = slow_products_note(job.base, autocast=job.autocast)
    job.record.notes += [slow] if slow else []


def inject_adapters(job: Job) -> None:
    """Add new adapters to a base that has none."""
    config, record = job.config, job.record
    if config is None:
        return
    if job.lora_layers:
        config._register_custom_module(job.lora_layers)
    base = job.base
    job.model, notes = inject(base, config, job.settings.adapter_name, job.seed)
    record.notes += notes
    if record.plan is not None and record.plan.input_gradients:
        base.enable_input_require_grads()  # type: ignore[operator]
        record.notes.append("the embeddings, which stay frozen, hand a gradient through: the blocks need it")


def check_adapters(job: Job) -> None:
    """Check that PEFT will find the adapters in their own file, and note which parameters are trained."""
    if job.has_adapters:
        lost = check_loadable(job.model, str(job.record.adapter_name), strict=job.settings.strict)
        job.record.notes += [lost] if lost else []
    job.trained |= _find_trained(job.model)


def cast_trainable(job: Job) -> None:
    """Cast the trained tensors to ``trainable_dtype``, except adapters that the model came with."""
    wanted = resolve_trainable_dtype(job.settings.trainable_dtype)
    if wanted is None:
        return
    kept = cast_trained(job.model, wanted, adapters=job.config is not None)
    if kept:
        job.record.notes.append(
            f"{len(kept)} trained biases beside frozen weights keep the dtype of those, first {kept[0]}"
        )


def let_inputs_in(job: Job) -> None:
    """Let 16-bit layers accept audio, images and other inputs in float32."""
    head = getattr(job.base, "get_output_embeddings", lambda: None)()
    # A language model's head gets hidden states only; a hook on it would prevent the chunked loss.
    meet_inputs(job.model, keep=head)


def keep_norms(job: Job) -> None:
    """Let frozen norms with running statistics leave those as they are."""
    count = keep_statistics(job.model)
    if count:
        job.record.notes.append(
            f"{count} frozen norms use their running statistics in training and leave them as they are: no adapter "
            "file would hold new ones (modules_to_save trains and saves whole modules)"
        )


def load_stored(job: Job) -> None:
    """Load the adapter to continue from."""
    if job.stored is None:
        return
    file = adapters.find_adapter_file(job.stored, "default")
    if file is None:
        raise PreparationError(f"The folder {job.stored} has no {adapters.ADAPTER_FILE}")
    adapters.load_weights(job.model, file, job.settings.adapter_name)
    job.record.notes.append(f"continues from the adapter in {job.stored}")


def compute_experts(job: Job) -> None:
    """Let our experts function compute the experts that are quantized or adapted."""
    use_experts_function(job.model)
    stacks = [path for path, *_ in list_quantized_stacks(job.model)]
    if stacks:
        # DDP would send every parameter of the first process to the others, and these have no storage of their own.
        job.model._ddp_params_and_buffers_to_ignore = [
            *getattr(job.model, "_ddp_params_and_buffers_to_ignore", ()),
            *stacks,
        ]


def fuse(job: Job) -> None:
    """Let the LoRA layers compute their branch as one function."""
    if job.settings.fused:
        fuse_adapters(job.model)
    elif job.has_adapters:
        job.record.notes.append("the LoRA layers compute their branch with PEFT's own forward (fused=False)")


def keep_saving(job: Job) -> None:
    """Make ``save_pretrained`` save all trained tensors without network access."""
    guard_saving(job.model)


def check_trained(job: Job) -> None:
    """Check that every trained parameter is still in the model and trained.

    Raises:
        PreparationError: A later step froze or replaced a trained tensor.
    """
    now = {id(parameter) for parameter in job.model.parameters() if parameter.requires_grad}
    lost = [name for name, parameter in job.trained.items() if id(parameter) not in now]
    if lost:
        raise PreparationError(
            f"{len(lost)} tensors that are trained would be frozen by preparing the model, first {lost[0]}. Name their "
            "modules in skip_modules (quantization={'name': …, 'skip_modules': […]}), or freeze them first."
        )


Step = Callable[[Job], None]

#: Steps on the base.
BASE_STEPS: tuple[Step, ...] = (choose_dtype, quantize, cast_base, upcast_base)
#: Steps that create and check the adapters.
ADAPTER_STEPS: tuple[Step, ...] = (inject_adapters, check_adapters)
#: Steps that need both.
LAST_STEPS: tuple[Step, ...] = (
    cast_trainable,
    let_inputs_in,
    keep_norms,
    load_stored,
    compute_experts,
    fuse,
    keep_saving,
    check_trained,
)

"""Check, adapt to, and save under DDP, FSDP2 and DeepSpeed."""

from __future__ import annotations

import contextlib
import os
import re
import warnings
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

from accelerate.utils import gather_object
from torch import nn
from transformers import Trainer

from lora_plugins import errors
from lora_plugins.errors import (
    LoraPluginsError,
    PreparationWarning,
    ProcessMissing,
    UnsupportedPacking,
    UnsupportedTraining,
)
from lora_plugins.models.sharding import is_sharded, write_adapters
from lora_plugins.plugins.host import plugin_host
from lora_plugins.quantization.division import divide_layers, find_replaced_layer
from lora_plugins.quantization.request import Quantization, owner_of
from lora_plugins.quantization.stacks import list_quantized_stacks

__all__ = [
    "MEETING_TIME",
    "check_engine",
    "hides_gradients",
    "meet",
    "meet_to_save",
    "place_whole",
    "prepare_quantized",
    "raise_together",
    "read_gradient_norm",
    "write_whole_adapters",
]


#: How long the processes wait for each other before saving a model that is sharded over them.
MEETING_TIME = timedelta(minutes=10)


def check_engine(trainer: Trainer, quantization: Quantization | None) -> None:
    """Refuse settings that cannot work under the Trainer's engine, before anything is changed.

    Args:
        trainer: The Trainer as its user configured it.
        quantization: What the base will be quantized with.

    Raises:
        UnsupportedTraining: Names the setting and the way out.
    """
    _check_processes(trainer)
    _check_device_map(trainer)
    plugin = _find_fsdp_plugin(trainer)
    if plugin is None:
        if trainer.args.fsdp:
            warnings.warn(
                f"fsdp={trainer.args.fsdp!r} was asked for and accelerate runs {_name_engine(trainer)} instead: "
                "every process will hold the whole model. FSDP needs an accelerator and several processes.",
                PreparationWarning,
                stacklevel=4,
            )
    elif getattr(plugin, "fsdp_version", 1) != 2:
        raise UnsupportedTraining(
            "FSDP version 1 flattens parameters, so frozen and trained, float and quantized ones cannot be told apart "
            "any more. Use version 2: leave 'version' out of fsdp_config, or set it to 2."
        )
    elif quantization is not None and plugin.cpu_ram_efficient_loading:
        raise UnsupportedTraining(
            f"cpu_ram_efficient_loading moves the model over the meta device, where {quantization.name} layers lose "
            "their scales. Set cpu_ram_efficient_loading to false in fsdp_config, or leave quantization out."
        )
    if quantization is not None and any(hasattr(p, "to_local") for p in trainer.model.parameters()):
        raise UnsupportedTraining(
            f"The model was sharded while it was loaded (distributed_config=), so its layers cannot be quantized with "
            f"{quantization.name} any more. Load it without distributed_config= and give the Trainer fsdp=True, "
            "or leave quantization out."
        )


def _check_processes(trainer: Trainer) -> None:
    started = int(os.environ.get("WORLD_SIZE", "1"))
    if "TORCHELASTIC_RUN_ID" in os.environ and started > trainer.args.world_size:
        raise UnsupportedTraining(
            f"torchrun started {started} processes and this Trainer knows of {trainer.args.world_size}: each would "
            "train alone and overwrite the others' files. On a machine without accelerator pass use_cpu=True in the "
            "TrainingArguments."
        )


def _check_device_map(trainer: Trainer) -> None:
    offloaded = [name for name, p in trainer.model.named_parameters() if p.is_meta]
    if offloaded:
        raise UnsupportedTraining(
            f"{len(offloaded)} parameters of the model have no values in memory, first {offloaded[0]}: its device_map "
            "keeps them on disk or in another memory, where they cannot be prepared or trained. Load the model with "
            "device_map={'': 0} or without device_map; quantization= makes it smaller."
        )
    devices = {str(device) for device in (getattr(trainer.model, "hf_device_map", None) or {}).values()}
    if len(devices) > 1 and trainer.args.world_size > 1:
        raise UnsupportedTraining(
            f"The model is spread over {', '.join(sorted(devices))} by its device_map, and {trainer.args.world_size} "
            f"processes train it. Load it in each process with device_map={{'': {trainer.args.local_process_index}}} "
            "(the number is that of the process on its machine), or start one process."
        )


def prepare_quantized(trainer: Trainer, model: nn.Module) -> None:
    """Let an engine divide quantized layers, exclude those that it cannot, and warn of weights that stay whole.

    FSDP2 replaces each parameter by a shard, and a quantized weight is more than its parameter: a backend puts all of
    it into one (`Quantizer.divide`), or its layers are left out. The scales that a backend keeps beside the parameters
    must stay out of the engine's checkpoints too: FSDP2 (torch 2.13) looks up every name among the parameters, and a
    backend may refuse to load a scale that it has moved.

    Args:
        trainer: The Trainer.
        model: Its prepared model.

    Raises:
        UnsupportedTraining: The engine cannot handle the layers or the experts.
    """
    quantized = [module for module in model.modules() if owner_of(module) is not None]
    plugin = _find_fsdp_plugin(trainer)
    _refuse_stacks(trainer, model, sharded=plugin is not None or trainer.is_deepspeed_enabled)
    if not quantized or (plugin is None and not trainer.is_deepspeed_enabled):
        return
    _check_layers(trainer, quantized)
    module: Any
    for module in quantized:
        module.register_state_dict_post_hook(_keep_plain_state)
    if plugin is None and _read_zero_stage(trainer) != 3:
        return
    if plugin is None:
        _refuse_replaced(model)
    whole = divide_layers(model)
    if plugin is not None and whole:
        plugin.ignored_modules = [*_find_ignored(plugin.ignored_modules, model), *whole]
    _warn_of_undivided(trainer, [module for module in whole if plugin is not None or _keeps_copy(module)])


def _refuse_stacks(trainer: Trainer, model: nn.Module, *, sharded: bool) -> None:
    """Refuse quantized stacks of experts under an engine that divides parameters: they have no storage to divide."""
    path = next((path for path, *_ in list_quantized_stacks(model)), None)
    if sharded and path is not None:
        raise UnsupportedTraining(
            f"{_name_engine(trainer)} cannot handle experts that are stored quantized, first {path}. Train with DDP or "
            "in one process, or leave the experts in float: {'name': …, 'skip_modules': ['experts']}."
        )


def _refuse_replaced(model: nn.Module) -> None:
    """Refuse DoRA over weights that PEFT puts anew: ZeRO-3 keeps its own notes on the parameter that it was given."""
    found = find_replaced_layer(model)
    if found is not None:
        path, layer = found
        owner = owner_of(layer)
        name = "quantized" if owner is None else owner.name
        raise UnsupportedTraining(
            f"ZeRO-3 cannot train DoRA over {name} layers, first {path}: DoRA reads their weights itself, and PEFT "
            "then puts them anew, without what DeepSpeed keeps on them. Train with FSDP2, or without DoRA."
        )


def _warn_of_undivided(trainer: Trainer, layers: list[nn.Module]) -> None:
    if not layers:
        return
    size = sum(p.numel() * p.element_size() for module in layers for p in module.parameters())
    warnings.warn(
        f"{_name_engine(trainer)} does not divide these quantized weights: each of the {trainer.args.world_size} "
        f"processes holds all {len(layers)} layers ({size:,} bytes). Everything else is sharded.",
        PreparationWarning,
        stacklevel=5,
    )


def _keeps_copy(module: nn.Module) -> bool:
    owner = owner_of(module)
    return owner is not None and owner.copies_weight


def _check_layers(trainer: Trainer, quantized: list[nn.Module]) -> None:
    """Refuse layers that the engine cannot handle; its own error would name neither backend nor engine."""
    first = quantized[0]
    owner = owner_of(first)
    engine = "deepspeed" if trainer.is_deepspeed_enabled else "fsdp2"
    if owner is None or (engine in owner.engines and not _fails_under(engine, first)):
        return
    others = [quantizer.name for quantizer in plugin_host().quantizers() if engine in quantizer.engines]
    ways = "DDP or FSDP2" if engine == "deepspeed" else "DDP or DeepSpeed"
    raise UnsupportedTraining(
        f"Layers of {owner.name} cannot be trained under {_name_engine(trainer)}. Backends that can: "
        f"{', '.join(others)}. Use one of them, or train with {ways}."
    )


def _fails_under(engine: str, layer: nn.Module) -> bool:
    """Whether an engine cannot handle a layer, whatever its backend says."""
    from torch.utils._python_dispatch import is_traceable_wrapper_subclass

    if engine == "deepspeed":
        # DeepSpeed 0.19 replaces the data of every parameter, which tensor subclasses do not allow.
        return any(is_traceable_wrapper_subclass(parameter) for parameter in layer.parameters())
    # FSDP2 (torch 2.13) looks up every tensor by name, which a custom state dict does not have.
    return type(layer).state_dict is not nn.Module.state_dict


def _keep_plain_state(module: nn.Module, state: dict[str, Any], prefix: str, metadata: Any) -> None:
    """Reduce a quantized layer's state to its parameters and buffers, each under its own name."""
    own = {prefix + name: tensor for name, tensor in (*module.named_parameters(), *module.named_buffers())}
    for key in [key for key in state if key.startswith(prefix) and key not in own]:
        del state[key]
    for key, tensor in own.items():
        state.setdefault(key, tensor.detach())


def _find_ignored(given: Any, model: nn.Module) -> list[nn.Module]:
    """Return the modules that the user has already excluded from sharding, by a pattern or as a list."""
    if isinstance(given, str):
        return [module for name, module in model.named_modules() if re.fullmatch(given, name)]
    return list(given or ())


def meet_to_save(trainer: Trainer) -> None:
    """Wait for all processes if saving needs them because parameters are sharded.

    Raises:
        ProcessMissing: Another process did not come in `MEETING_TIME`.
    """
    if is_sharded(trainer.model):
        meet(trainer, "save_model()")


def write_whole_adapters(trainer: Trainer, folder: Path) -> None:
    """Write the adapter that FSDP2's sharded checkpoint lacks; under any other engine the Trainer has written it."""
    plugin = _find_fsdp_plugin(trainer)
    if plugin is not None and "FULL_STATE_DICT" not in str(plugin.state_dict_type):
        write_adapters(trainer.model, folder, write=trainer.args.should_save)


def meet(trainer: Trainer, what: str) -> None:
    """Wait until every process has come here; after `MEETING_TIME`, raise an error that names the missing ones.

    Raises:
        ProcessMissing: Another process did not come in `MEETING_TIME`.
    """
    import torch.distributed as dist

    if trainer.accelerator.num_processes == 1:
        return
    try:
        dist.monitored_barrier(_find_meeting_point(trainer), timeout=MEETING_TIME, wait_all_ranks=True)
    except RuntimeError as error:
        raise ProcessMissing(
            f"{what} gathers a model that is spread over {trainer.args.world_size} processes, so each of them must "
            f"call it, and not all have come (this is number {trainer.args.process_index}). Call it outside of "
            f"`if trainer.is_world_process_zero():`; only the main process writes anyway. ({error})"
        ) from error


def _find_meeting_point(trainer: Trainer) -> Any:
    """Return a gloo group of all processes, made once, when all are there; gloo knows which ones are missing."""
    group = vars(trainer).get("_lora_plugins_meeting_point")
    if group is None:
        import torch.distributed as dist

        group = dist.group.WORLD if dist.get_backend() == "gloo" else dist.new_group(backend="gloo")
        trainer._lora_plugins_meeting_point = group
    return group


@contextlib.contextmanager
def raise_together(trainer: Trainer) -> Iterator[None]:
    """Let an error of this package on one process end the others too, which would otherwise wait forever.

    Raises:
        LoraPluginsError: Another process failed; type and message are from there.
    """
    own: LoraPluginsError | None = None
    try:
        yield
    except LoraPluginsError as error:
        own = error
    if trainer.accelerator.num_processes > 1:
        problems = [problem for problem in gather_object([_describe_error(own) if own else None]) if problem]
        if problems and own is None:
            name, message = problems[0]
            raise getattr(errors, name)(f"On another process: {message}")
    if own is not None:
        raise own


def _describe_error(error: LoraPluginsError) -> tuple[str, str]:
    """Return the name of an error's nearest type in `lora_plugins.errors`, and its message."""
    known = (kind.__name__ for kind in type(error).__mro__ if getattr(errors, kind.__name__, None) is kind)
    return next(known), str(error)


def place_whole(trainer: Trainer) -> None:
    """Put the model on the device that it is trained on, so that packing can run it before the training.

    Raises:
        UnsupportedPacking: The engine divides the model, so that no process holds it whole on its device.
    """
    if trainer.is_fsdp_enabled or _read_zero_stage(trainer) == 3:
        raise UnsupportedPacking(
            "Best-fit packing runs the model before the training, to measure how it keeps examples apart, and "
            f"{_name_engine(trainer)} leaves no process with the whole model on its device. Use --packing none or "
            "wrapped, or train with DDP, ZeRO-1 or ZeRO-2."
        )
    # The Trainer (transformers 5.23) leaves it to DeepSpeed, which moves it when the training begins.
    trainer.model.to(trainer.args.device)


def hides_gradients(trainer: Trainer) -> bool:
    """Whether the engine reduces gradients into buffers of its own and steps within the backward pass."""
    return bool(trainer.is_deepspeed_enabled)


def read_gradient_norm(trainer: Trainer) -> float | None:
    """Return the norm of the last step's gradient if the engine hides gradients and knows it, else ``None``."""
    if not hides_gradients(trainer):
        return None
    norm = trainer.model_wrapped.get_global_grad_norm()
    return None if norm is None else float(norm)


def _find_fsdp_plugin(trainer: Trainer) -> Any:
    return trainer.accelerator.state.fsdp_plugin if trainer.is_fsdp_enabled else None


def _read_zero_stage(trainer: Trainer) -> int:
    plugin = trainer.accelerator.state.deepspeed_plugin if trainer.is_deepspeed_enabled else None
    return int(plugin.zero_stage) if plugin is not None else 0


def _name_engine(trainer: Trainer) -> str:
    """Return the engine's name as users know it."""
    stage = _read_zero_stage(trainer)
    if stage:
        return f"ZeRO-{stage}"
    return "FSDP2" if trainer.is_fsdp_enabled else str(trainer.accelerator.distributed_type.value)

"""Restore a whole model on every process after FSDP2 or DeepSpeed.

Neither engine can undo its changes to a model, so this module knows where they keep them (torch 2.13, DeepSpeed
0.19). The tests under both engines fail when that changes.
"""

from __future__ import annotations

from types import FunctionType
from typing import Any

import torch
from torch import nn
from transformers import Trainer

from lora_plugins.models.sharding import gather, is_part
from lora_plugins.quantization.division import undivide_layers

__all__ = ["leave_engine"]


def leave_engine(trainer: Trainer) -> None:
    """Restore the Trainer's whole model, as it was before the engine of an earlier ``train()`` sharded it.

    A model that was sharded while it was loaded stays sharded. Every process must call, and each holds the whole
    model afterwards.
    """
    engine = trainer.deepspeed
    if engine is not None:
        engine.destroy()
        trainer.deepspeed = None
        _leave_zero(trainer.model)
    elif trainer.is_fsdp_enabled:
        _leave_fsdp(trainer.model)
    # Layers are prepared for an engine when adapters are attached, whether it has trained or not.
    undivide_layers(trainer.model)


def _leave_zero(model: nn.Module) -> None:
    for parameter in list(model.parameters()):
        if not is_part(parameter):
            continue
        with gather([parameter]):
            data = parameter.data.clone()
        parameter.data = data
        # DeepSpeed keeps its state and functions as attributes of the parameter.
        for name, value in list(vars(parameter).items()):
            if name.startswith("ds_") or isinstance(value, FunctionType):
                delattr(parameter, name)
    for module in model.modules():
        if type(module._parameters) is not dict:
            # DeepSpeed's own dict class gathers parameters that are missing.
            module._parameters = dict(module._parameters.items())
        vars(module).pop("_original_parameters", None)


def _leave_fsdp(model: nn.Module) -> None:
    from torch.distributed.fsdp import FSDPModule

    sharded = [module for module in model.modules() if isinstance(module, FSDPModule)]
    for module in sharded:
        # The outermost one may have been left gathered.
        module.reshard()
    full: dict[Any, nn.Parameter] = {}
    for holder in model.modules():
        for name, parameter in list(holder.named_parameters(recurse=False)):
            if not hasattr(parameter, "full_tensor"):
                continue
            if parameter not in full:
                data = parameter.full_tensor().detach()
                full[parameter] = torch.nn.Parameter(data, requires_grad=parameter.requires_grad)
            setattr(holder, name, full[parameter])
    for module in sharded:
        _forget_fsdp(module)
    for holder in model.modules():
        for name in ("_is_fsdp_managed_module", "_fsdp_use_orig_params"):
            vars(holder).pop(name, None)


def _forget_fsdp(module: Any) -> None:
    """Remove the hooks, the class and the state that ``fully_shard`` has left on one module."""
    from torch.distributed._composable.contract import REGISTRY_KEY, STATE_KEY
    from torch.distributed._composable_state import _module_state_mapping

    state = module._get_fsdp_state()
    state._pre_forward_hook_handle.remove()
    state._post_forward_hook_handle.remove()
    module.__class__ = type(module).__mro__[module._orig_cls_mro_index]
    _module_state_mapping.pop(module, None)
    for key in (STATE_KEY, REGISTRY_KEY):
        notes = vars(module)[key]
        for name in [name for name in notes if getattr(name, "__name__", name) == "fully_shard"]:
            del notes[name]

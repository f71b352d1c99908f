"""Keep running statistics that no adapter file would hold."""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.nn.modules.batchnorm import _NormBase

__all__ = ["keep_statistics"]


def keep_statistics(model: nn.Module) -> int:
    """Let frozen norms use their running statistics in training too, instead of changing them.

    In training mode a batch norm updates its mean and variance whether or not its weight is frozen. They are buffers of
    the base: PEFT 0.21.2 saves them with modules in ``modules_to_save`` only, and the adapter would be loaded on a base
    with other statistics than it was evaluated with.

    Args:
        model: The prepared model.

    Returns:
        How many norms keep their statistics.
    """
    count = 0
    for path, module in model.named_modules():
        if isinstance(module, _NormBase) and module.running_mean is not None and not _is_saved(path, module):
            if _use_statistics not in module._forward_pre_hooks.values():
                module.register_forward_pre_hook(_use_statistics)
            count += 1
    return count


def _is_saved(path: str, module: nn.Module) -> bool:
    return ".modules_to_save." in path or _is_trained(module)


def _is_trained(module: nn.Module) -> bool:
    return any(parameter.requires_grad for parameter in module.parameters(recurse=False))


def _use_statistics(module: nn.Module, args: Any) -> None:
    # Whoever unfreezes a norm later, or takes the adapters out, trains it as usual.
    if not _is_trained(module):
        module.training = False

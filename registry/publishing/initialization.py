"""Convert adapters whose initialization changed the base to plain LoRA."""

from __future__ import annotations

import copy
import math
import warnings
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from registry.base.files import BaseFiles, find_base_folder
from registry.checks.configuration import changes_base, describe_lost
from registry.errors import InvalidAdapter
from registry.formats.tensors import PREFIX

if TYPE_CHECKING:
    import torch
    from peft import LoraConfig, PeftModel

__all__ = ["make_plain"]

#: Values of ``init_lora_weights`` that change the base's weights. PEFT repeats these two on loading.
_REPEATED = ("pissa", "olora")
#: Values that do not change the base but read its weights or need data; the results are in the file.
_FROM_BASE = ("eva", "orthogonal", "mica")


def make_plain(
    model: PeftModel, adapter_name: str, state: Mapping[str, torch.Tensor]
) -> tuple[dict[str, torch.Tensor], LoraConfig]:
    """Return tensors and configuration of a plain LoRA with the same effect on the original base.

    Such an initialization subtracts a product ``B0 A0`` from the base's weight. Concatenating ``-B0 A0`` to the trained
    ``B A`` gives an adapter of twice the rank for the original base, exact to rounding.

    Args:
        model: The trained model.
        adapter_name: Name of the adapter in the model.
        state: The tensors of the adapter, under their names in its file.

    Raises:
        InvalidAdapter: The base's original weights are not on this machine, or differ by more than such a product.
    """
    config = copy.deepcopy(model.peft_config[adapter_name])
    init = config.init_lora_weights
    if isinstance(init, str) and init.lower() in _FROM_BASE:
        config.init_lora_weights = True
        config.eva_config = None
        return dict(state), config
    if not changes_base(init):
        return dict(state), config
    originals = _find_originals(model)
    if originals is None:
        if describe_lost(init) is None:
            return dict(state), config
        raise InvalidAdapter(
            f"init_lora_weights={init!r} has changed the weights of the base, and the base's own are not on this "
            "machine to make a plain LoRA of the adapter. Load the base from a folder or by its id, then push."
        )
    changed = dict(state)
    for name, layer in _find_layers(model, adapter_name):
        _widen(changed, name, layer, adapter_name, originals, config)
    return changed, _make_plain_config(config)


def _find_originals(model: PeftModel) -> BaseFiles | None:
    folder = find_base_folder(model.get_base_model())
    return BaseFiles.in_folder(folder) if folder is not None else None


def _find_layers(model: PeftModel, adapter_name: str) -> Iterator[tuple[str, Any]]:
    from peft.tuners.lora import LoraLayer

    for name, module in model.named_modules():
        if isinstance(module, LoraLayer) and adapter_name in module.lora_A:
            yield name, module


def _widen(
    state: dict[str, torch.Tensor],
    name: str,
    layer: Any,
    adapter_name: str,
    originals: BaseFiles,
    config: LoraConfig,
) -> None:
    """Concatenate the product that was subtracted from one layer's base to the trained one."""
    import torch

    base, scaling, rank = layer.get_base_layer(), layer.scaling[adapter_name], layer.r[adapter_name]
    own = originals.rows(f"{name.removeprefix(PREFIX)}.weight", 2**40)
    if own is None:
        raise InvalidAdapter(
            f"{name}: the base's own weight cannot be read from {originals.name}; it is needed to undo "
            f"init_lora_weights={config.init_lora_weights!r}"
        )
    own = own.float().T if layer.fan_in_fan_out else own.float()
    now = base.weight.detach().cpu()
    floating = now.is_floating_point() and now.shape == base.weight.shape and now.ndim == 2
    here = (now.float().T if layer.fan_in_fan_out else now.float()) if floating else None
    if str(config.init_lora_weights).lower() in _REPEATED:
        first, second = _repeat(own, layer, adapter_name, config)
    elif here is None or here.shape != own.shape:
        raise InvalidAdapter(
            f"{name}: its base is quantized, and what init_lora_weights={config.init_lora_weights!r} took out of it "
            "cannot be told from rounding"
        )
    else:
        first, second = _decompose((own - here) / scaling, rank)
    left = (
        0.0 if here is None or here.shape != own.shape else float((own - scaling * second @ first - here).abs().max())
    )
    if left > 64 * torch.finfo(now.dtype if floating else torch.float32).eps * max(1.0, float(own.abs().max())):
        raise InvalidAdapter(
            f"{name}: its base differs from {originals.name} by more than init_lora_weights="
            f"{config.init_lora_weights!r} takes out of it (LoftQ, or another base): publish the base that it was "
            "trained on, too, and name it"
        )
    one, other = f"{name}.lora_A.weight", f"{name}.lora_B.weight"
    state[one] = torch.cat([state[one].cpu().float(), first])
    state[other] = torch.cat([state[other].cpu().float(), -second], dim=1)


def _repeat(
    weight: torch.Tensor, layer: Any, adapter_name: str, config: LoraConfig
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the initial A and B as PEFT computes them from the base's original weight."""
    import torch
    from peft import LoraConfig, get_peft_model
    from torch import nn

    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    linear.weight = nn.Parameter(weight.clone())
    # Saving during a training must not change its random numbers.
    with warnings.catch_warnings(), torch.random.fork_rng(devices=[]):
        warnings.simplefilter("ignore")
        made: Any = get_peft_model(
            nn.Sequential(OrderedDict(layer=linear)),
            LoraConfig(
                r=layer.r[adapter_name],
                lora_alpha=layer.lora_alpha[adapter_name],
                use_rslora=config.use_rslora,
                init_lora_weights=config.init_lora_weights,
                target_modules=["layer"],
            ),
        )
    found = made.base_model.model.layer
    return found.lora_A["default"].weight.detach(), found.lora_B["default"].weight.detach()


def _decompose(product: torch.Tensor, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return A and B whose product ``B A`` is the given one, if its rank is at most ``rank``."""
    import torch

    left, values, right = torch.linalg.svd(product, full_matrices=False)
    root = values[:rank].sqrt()
    return root[:, None] * right[:rank], left[:, :rank] * root


def _make_plain_config(config: LoraConfig) -> LoraConfig:
    """Return the configuration with twice the rank and the same scaling."""
    factor = math.sqrt(2) if config.use_rslora else 2
    config.r *= 2
    config.lora_alpha = config.lora_alpha * factor
    config.rank_pattern = {name: 2 * rank for name, rank in (config.rank_pattern or {}).items()}
    config.alpha_pattern = {name: alpha * factor for name, alpha in (config.alpha_pattern or {}).items()}
    config.init_lora_weights = True
    config.corda_config = config.lora_ga_config = None
    config.loftq_config = {}
    return config

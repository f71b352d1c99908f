"""Putting LoRA adapters into a base model, quantizing under them, reading them back from a file."""

from __future__ import annotations

import contextlib
import copy
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lora_plugins.adapters.settings import DEFAULTS, LoraSettings
from lora_plugins.errors import (
    AdapterMismatch,
    BrokenCheckpoint,
    PreparationError,
    UnsupportedInitialization,
)
from lora_plugins.models.sharding import gathered_state, is_sharded
from lora_plugins.quantization.request import Quantization, owner_of
from registry.pulling.peft_loading import put_back

if TYPE_CHECKING:
    import torch
    from peft import LoraConfig, PeftModel
    from torch import nn

    from lora_plugins.targets.resolution import TargetPlan

ADAPTER_FILE = "adapter_model.safetensors"
ADAPTER_CONFIG = "adapter_config.json"

#: Initialisations that rewrite the float base weight and leave it a plain weight: quantize afterwards.
_REWRITE_BASE = ("pissa", "olora")
#: Initialisations that need data or a quantization of their own.
_NEED_MORE = ("loftq", "eva", "corda", "lora_ga", "mica")


def initializes_from_base(init: Any, quantization: Quantization | None, *, already_quantized: bool) -> bool:
    """Whether the adapters must be made before the base is quantized.

    Args:
        init: ``init_lora_weights`` of the configuration.
        quantization: What the base will be quantized to, or already is.
        already_quantized: Whether it arrived quantized.

    Raises:
        UnsupportedInitialization: The initialisation can't be combined with a quantized base.
    """
    name = init.lower() if isinstance(init, str) else ""
    rewrites = name.startswith(_REWRITE_BASE)
    if quantization is None or not (rewrites or name.startswith(_NEED_MORE)):
        return False
    if already_quantized:
        raise UnsupportedInitialization(
            f"init_lora_weights={init!r} is computed from the float weights and the model arrived quantized "
            f"({quantization.name}). Load it in float and let quantization={quantization.name!r} quantize it, "
            "or use the default initialisation."
        )
    if not rewrites:
        raise UnsupportedInitialization(
            f"init_lora_weights={init!r} can't be combined with quantization={quantization.name!r}: it needs data "
            "or a quantization of its own. Initialise with PEFT's own tool and pass the finished PeftModel, "
            "or use the default initialisation."
        )
    return True


def build_config(settings: LoraSettings, plan: TargetPlan) -> LoraConfig:
    """Make the configuration that PEFT gets: explicit targets, never ``None``.

    The caller's ``peft_config=`` is copied, never changed.
    """
    from peft import LoraConfig

    if settings.peft_config is not None:
        config = copy.deepcopy(settings.peft_config)
    else:
        config = LoraConfig(**{**DEFAULTS, **settings.lora})
    config.target_modules = set(plan.target_modules)
    if plan.target_parameters:
        config.target_parameters = list(plan.target_parameters)
        for name, factor in plan.rank_factors.items():
            # Scaling is alpha / r: both grow, so that each half is scaled as any other adapter.
            pattern = rf".*\.{re.escape(name)}"
            config.rank_pattern.setdefault(pattern, config.r * factor)
            config.alpha_pattern.setdefault(pattern, config.lora_alpha * factor)
    config.task_type = config.task_type or plan.task_type
    heads = [*(config.modules_to_save or []), *plan.modules_to_save]
    config.modules_to_save = list(dict.fromkeys(heads)) or None
    config.exclude_modules = None
    config.layers_to_transform = None
    config.layers_pattern = None
    return config


def inject(model: nn.Module, config: LoraConfig, adapter_name: str, seed: int) -> tuple[PeftModel, list[str]]:
    """Wrap a base model in a `peft.PeftModel` with fresh adapters.

    The random numbers come from a fork of the generators seeded with ``seed``: ranks that have drawn
    different numbers so far get equal adapters, and the caller's own generators do not move.

    Returns:
        The wrapped model, and notes for the report.
    """
    from peft import get_peft_model

    dropout = config.lora_dropout
    notes = []
    if config.target_parameters and dropout:
        # PEFT refuses dropout on expert parameters, for all modules at once. What plain PEFT can load is
        # saved; the modules that can have dropout get it here.
        config.lora_dropout = 0.0
    with seeded(model, seed):
        wrapped = get_peft_model(model, config, adapter_name=adapter_name)
    if config.target_parameters and dropout:
        count = _set_dropout(wrapped, adapter_name, dropout)
        notes.append(
            f"lora_dropout={dropout} on {count} modules; none on the expert parameters "
            f"{', '.join(config.target_parameters)}, where PEFT allows none"
        )
    return wrapped, notes


@contextlib.contextmanager
def seeded(model: nn.Module, seed: int) -> Iterator[None]:
    """Fork the random generators of the CPU and of the model's devices, and seed the fork."""
    import torch

    devices = {p.device for p in model.parameters() if p.device.type not in ("cpu", "meta")}
    kinds = {device.type for device in devices}
    indices = sorted({device.index or 0 for device in devices})
    kind = kinds.pop() if len(kinds) == 1 else "cuda"
    with torch.random.fork_rng(devices=indices, device_type=kind):
        torch.manual_seed(seed)
        yield


def _set_dropout(model: nn.Module, adapter_name: str, probability: float) -> int:
    from peft.tuners.lora.layer import LoraLayer, ParamWrapper
    from torch import nn

    count = 0
    for module in model.modules():
        if not isinstance(module, LoraLayer) or isinstance(module, ParamWrapper):
            continue
        if adapter_name in module.lora_dropout:
            module.lora_dropout[adapter_name] = nn.Dropout(probability)
            count += 1
    return count


def exchange_layers(model: nn.Module, quantization: Quantization) -> int:
    """Give LoRA layers over a freshly quantized base the class that fits it, so that merging works.

    The layer object, its weights, names, hooks and trainability stay; only its class changes.

    Returns:
        How many layers were changed.
    """
    from peft.tuners.lora.layer import LoraLayer

    changed = 0
    for module in model.modules():
        if not isinstance(module, LoraLayer):
            continue
        base = module.get_base_layer()
        if not quantization.quantizer.owns(base):
            continue
        wanted = _lora_layer(quantization, base)
        if type(module) is not wanted:
            module.__class__ = wanted
            module.fan_in_fan_out = False
            module.is_target_conv_1d_layer = False
            changed += 1
    return changed


def register_lora_layers(model: nn.Module, config: LoraConfig, quantization: Quantization | None) -> None:
    """Tell PEFT which LoRA layer goes over each kind of quantized layer in the model.

    Raises:
        PreparationError: The configuration asks for what PEFT can't do over layers of this backend.
    """
    if quantization is None:
        return
    for name in quantization.quantizer.unsupported:
        if getattr(config, name, None):
            raise PreparationError(
                f"{name}={getattr(config, name)!r} can't be combined with quantization={quantization.name!r}: PEFT "
                "can't read the float weight out of its layers. Leave it out, or use another backend."
            )
    owned = [module for module in model.modules() if quantization.quantizer.owns(module)]
    classes: dict[type, type] = {type(module): _lora_layer(quantization, module) for module in owned}
    if classes:
        config._register_custom_module(classes)


def _lora_layer(quantization: Quantization, module: nn.Module) -> type[nn.Module]:
    from lora_plugins.quantization.lora_layer import QuantizedLoraLinear

    return quantization.quantizer.lora_layer(module) or QuantizedLoraLinear


def find_adapter_file(folder: Path, adapter_name: str) -> Path | None:
    """Return an adapter's weights in a folder that PEFT or the Trainer wrote, ``None`` if there are none.

    PEFT writes the adapter called "default" into the folder and every other one into a subfolder.
    """
    places = [folder / adapter_name, folder] if adapter_name != "default" else [folder, folder / adapter_name]
    for place in places:
        if (place / ADAPTER_FILE).is_file():
            return place / ADAPTER_FILE
    return None


def adapter_folder(adapter: str | os.PathLike[str]) -> Path:
    """Return the local folder of an adapter that is given as folder or as registry reference.

    A path object, an absolute path, and a string beginning with ``./``, ``../`` or ``~`` are folders;
    any other string is a reference like ``org/name@1.2`` and is pulled. What happens to exist on disk
    decides nothing.

    Raises:
        PreparationError: The folder holds no adapter.
    """
    if isinstance(adapter, str) and not os.path.isabs(adapter) and not adapter.startswith((".", "~")):
        from registry import pull_adapter

        return Path(os.fspath(pull_adapter(adapter)))
    folder = Path(adapter).expanduser()
    if not (folder / ADAPTER_CONFIG).is_file():
        nested = sorted(path.parent.name for path in folder.glob(f"*/{ADAPTER_CONFIG}"))
        hint = f" It has adapters in the subfolders {', '.join(nested)}: name one of them." if nested else ""
        raise PreparationError(f"The folder {folder} has no {ADAPTER_CONFIG}.{hint}")
    return folder


def load_config(folder: Path) -> LoraConfig:
    """Read the configuration of a stored LoRA adapter.

    Raises:
        PreparationError: It is not a LoRA adapter.
    """
    from peft import LoraConfig, PeftConfig

    config = PeftConfig.from_pretrained(str(folder))
    if not isinstance(config, LoraConfig):
        raise PreparationError(f"The adapter in {folder} is of type {config.peft_type}, not LoRA.")
    config.inference_mode = False
    return config


def load_weights(model: PeftModel, file: Path, adapter_name: str) -> None:
    """Load stored adapter weights into an adapter of the model; every key must match, every value arrive.

    Args:
        model: A wrapped model that has the adapter.
        file: A safetensors file that ``save_pretrained`` wrote.
        adapter_name: Which adapter of the model gets them.

    Raises:
        AdapterMismatch: Names or shapes differ.
        BrokenCheckpoint: The model does not hold the file's values afterwards.
    """
    from peft import set_peft_model_state_dict
    from safetensors.torch import load_file

    stored = load_file(str(file), device="cpu")
    check_same_tensors({k: tuple(v.shape) for k, v in stored.items()}, adapter_shapes(model, adapter_name), file)
    set_peft_model_state_dict(model, stored, adapter_name=adapter_name)
    put_back(model, stored, adapter_name)
    wrong = differing_tensors(stored, adapter_state(model, adapter_name))
    if wrong:
        raise BrokenCheckpoint(f"{file} was loaded and {len(wrong)} tensors differ afterwards, first {wrong[0]}")


def copy_adapter(model: PeftModel, source: str, copy: str, seed: int) -> None:
    """Add an adapter with the configuration and the values of another one; it is frozen, the other stays active.

    Args:
        model: A wrapped model.
        source: Name of the adapter that is there.
        copy: Name of the new one.
        seed: Seed of the values that are overwritten, so that the caller's generators do not move.

    Raises:
        ValueError: PEFT can't hold two adapters of this kind.
    """
    from peft import set_peft_model_state_dict

    active = model.active_adapter
    with seeded(model, seed):
        model.add_adapter(copy, model.peft_config[source])
    state = {name: tensor.detach().clone() for name, tensor in adapter_state(model, source).items()}
    set_peft_model_state_dict(model, state, adapter_name=copy)
    put_back(model, state, copy)
    model.set_adapter(active)


def adapter_state(
    model: PeftModel, adapter_name: str, state: Mapping[str, torch.Tensor] | None = None
) -> dict[str, torch.Tensor]:
    """Return the tensors of an adapter under the names that its file has.

    Args:
        model: The wrapped model.
        adapter_name: Which of its adapters.
        state: What `gathered_state` returned, when it was called before. It is called here otherwise, where
            parameters are spread over processes, and then each of them must come here.
    """
    from peft import get_peft_model_state_dict

    if state is None and is_sharded(model):
        # PEFT would gather the whole base model as well.
        state = gathered_state(model)
    # "auto" asks the Hub for the base's vocabulary size, which a check must never do.
    return get_peft_model_state_dict(
        model, None if state is None else dict(state), adapter_name=adapter_name, save_embedding_layers=False
    )


def adapter_shapes(model: PeftModel, adapter_name: str) -> dict[str, tuple[int, ...]]:
    """Return the shape of each tensor of an adapter under the names that its file has."""
    return {name: tuple(tensor.shape) for name, tensor in adapter_state(model, adapter_name).items()}


def check_same_tensors(
    stored: Mapping[str, tuple[int, ...]], live: Mapping[str, tuple[int, ...]], source: Path
) -> None:
    """Compare names and shapes of a stored adapter with those in the model.

    Embeddings that PEFT saved along (names without ``lora_`` that the adapter does not have) are allowed.

    Raises:
        AdapterMismatch: They differ; the message has counts and the first examples.
    """
    missing = sorted(set(live) - set(stored))
    extra = sorted(name for name in set(stored) - set(live) if "lora_" in name or "modules_to_save" in name)
    shapes = [
        f"{n}: stored {stored[n]}, model {live[n]}" for n in sorted(set(stored) & set(live)) if stored[n] != live[n]
    ]
    problems = []
    if missing:
        problems.append(f"{len(missing)} tensors of the model are not in it, first {missing[0]}")
    if extra:
        problems.append(f"it has {len(extra)} tensors that the model lacks, first {extra[0]}")
    if shapes:
        problems.append(f"{len(shapes)} shapes differ, first {shapes[0]}")
    if problems:
        raise AdapterMismatch(f"The adapter {source} does not fit this model: {'; '.join(problems)}.")


def differing_tensors(stored: Mapping[str, torch.Tensor], live: Mapping[str, torch.Tensor]) -> list[str]:
    """Names of the tensors whose bytes are not equal."""
    import torch

    return [
        name
        for name, tensor in live.items()
        if name in stored and not torch.equal(stored[name], tensor.detach().cpu().to(stored[name].dtype))
    ]


def has_adapters(model: nn.Module) -> bool:
    """Whether a model holds adapter layers of PEFT, wrapped or put in with ``add_adapter``."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    return any(isinstance(module, BaseTunerLayer) for module in model.modules())


def bare_quantized(model: nn.Module) -> bool:
    """Whether a model has quantized layers and no adapters over them."""
    return not has_adapters(model) and any(owner_of(module) is not None for module in model.modules())

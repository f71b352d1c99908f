"""The dtype of a model's frozen float weights."""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import nn

from lora_plugins.errors import PreparationError
from lora_plugins.models.sharding import is_part
from lora_plugins.models.wrapping import adapter_modules
from lora_plugins.quantization.casting import return_input_dtype
from lora_plugins.quantization.request import FLOATS, owner_of
from lora_plugins.quantization.stacks import QuantizedStack, find_stacks
from lora_plugins.text import dtype_name

__all__ = [
    "Upcast",
    "activation_dtype",
    "cast_frozen",
    "fast_bfloat16",
    "loading_dtype",
    "resolve_compute_dtype",
    "resolve_trainable_dtype",
    "slow_dtype",
    "slow_products_note",
    "upcast_frozen",
]


Upcast = Literal["none", "norms", "all"]

_DTYPE_NAMES = ("float32", "bfloat16", "float16")


def fast_bfloat16(device: torch.device) -> bool:
    """Whether a device multiplies matrices in bfloat16 natively.

    True on CPUs with AVX512-BF16 or AMX and on CUDA devices of compute capability 8.0 and newer; without
    CUDA on this machine, a planned CUDA device is assumed to be new enough.
    """
    if device.type == "cpu":
        probe = getattr(torch.cpu, "get_capabilities", None)
        flags = probe() if probe is not None else {}
        return bool(flags.get("avx512_bf16") or flags.get("amx_bf16"))
    if device.type == "cuda":
        return not torch.cuda.is_available() or torch.cuda.get_device_capability(device) >= (8, 0)
    return False


def slow_dtype(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether a device has no fast matrix product for a 16-bit dtype.

    PyTorch hands 16-bit products on a CPU to oneDNN where that supports the dtype, and otherwise to a plain loop: on
    a CPU with AVX2 alone, 5 (forward) to 30 times (backward) slower than the product in float32.
    """
    if device.type != "cpu" or dtype not in (torch.bfloat16, torch.float16):
        return False
    name = "_is_mkldnn_bf16_supported" if dtype == torch.bfloat16 else "_is_mkldnn_fp16_supported"
    supported = getattr(torch.ops.mkldnn, name, None)
    return supported is not None and not supported()


def loading_dtype() -> torch.dtype:
    """Return the dtype of matrix products for a model to load: bfloat16, or float32 if there is only a slow CPU."""
    only_cpu = not torch.accelerator.is_available()
    return torch.float32 if only_cpu and slow_dtype(torch.bfloat16, torch.device("cpu")) else torch.bfloat16


def resolve_compute_dtype(
    wanted: str | torch.dtype,
    model: nn.Module,
    *,
    quantized: bool,
    autocast: bool,
    device: torch.device | None = None,
) -> torch.dtype | None:
    """Return the dtype that the frozen float weights are cast to, ``None`` to leave them.

    ``"auto"`` leaves a model without quantization, one that was sharded while it was loaded, and a model under
    autocast as it is. A quantized float32 base gets bfloat16 activations if `fast_bfloat16` holds, a 16-bit one gets
    float32 activations if `slow_dtype` holds.

    Args:
        wanted: The requested dtype, or ``"auto"``.
        model: The base model.
        quantized: Whether it is quantized, or will be.
        autocast: Whether the Trainer runs it under autocast.
        device: Where it will run, for a model on the meta device; by default where it is.

    Raises:
        PreparationError: ``wanted`` is not a known float dtype.
    """
    if isinstance(wanted, torch.dtype):
        wanted = dtype_name(wanted)
    if wanted == "auto":
        parameters = [p for p in model.parameters() if p.dtype in FLOATS]
        if not quantized or autocast or not parameters or any(is_part(p) for p in parameters):
            return None
        device = device or parameters[0].device
        if any(slow_dtype(p.dtype, device) for p in parameters):
            return torch.float32
        floats = all(p.dtype == torch.float32 for p in parameters)
        return torch.bfloat16 if floats and fast_bfloat16(device) else None
    if wanted not in _DTYPE_NAMES:
        raise PreparationError(
            f"compute_dtype must be 'auto', {', '.join(map(repr, _DTYPE_NAMES))} or a torch dtype, not {wanted!r}"
        )
    return getattr(torch, wanted)


def resolve_trainable_dtype(wanted: str | torch.dtype | None) -> torch.dtype | None:
    """Return the dtype of everything that is trained, ``None`` to leave it as it is.

    Raises:
        PreparationError: ``wanted`` is not a float dtype.
    """
    if wanted is None:
        return None
    name = dtype_name(wanted)
    if name not in _DTYPE_NAMES:
        known = ", ".join(map(repr, _DTYPE_NAMES))
        raise PreparationError(f"trainable_dtype must be {known}, a torch dtype of these or None, not {wanted!r}")
    dtype: torch.dtype = getattr(torch, name)
    return dtype


def activation_dtype(model: nn.Module, *, autocast: bool) -> torch.dtype | None:
    """Return the dtype that the matrix products of a model will mostly see, ``None`` for a model without floats."""
    parameter = next((p for p in model.parameters() if p.is_floating_point()), None)
    if parameter is None:
        return None
    if autocast and parameter.dtype == torch.float32 and fast_bfloat16(parameter.device):
        return torch.bfloat16
    return parameter.dtype


def slow_products_note(model: nn.Module, *, autocast: bool) -> str | None:
    """Return a sentence for the report if a model will multiply in a dtype that its device is slow at, or ``None``."""
    parameter = next((p for p in model.parameters() if p.is_floating_point()), None)
    if parameter is None:
        return None
    device = parameter.device
    dtype = torch.get_autocast_dtype(device.type) if autocast else parameter.dtype
    if not slow_dtype(dtype, device):
        return None
    name = dtype_name(dtype)
    way = "train without autocast (bf16=True)" if autocast else "load the model in float32"
    return f"this CPU multiplies {name} many times slower than float32; to train faster, {way}"


def cast_frozen(model: nn.Module, dtype: torch.dtype) -> None:
    """Cast the frozen float weights of a base model, except those the model keeps in float32.

    Quantized layers, trainable tensors (adapters, heads) and buffers such as rotary frequencies stay.
    """
    keep = tuple(getattr(model, "_keep_in_fp32_modules", None) or ()) + tuple(
        getattr(model, "_keep_in_fp32_modules_strict", None) or ()
    )
    adapters = adapter_modules(model)
    for path, module in model.named_modules():
        if module in adapters or owner_of(module) is not None or any(name in path.split(".") for name in keep):
            continue
        for name, stack in find_stacks(module).items():
            # Only the dtype in which the experts are multiplied changes.
            module._parameters[name] = torch.nn.Parameter(stack.to(dtype), requires_grad=False)
        for parameter in module.parameters(recurse=False):
            if isinstance(parameter, QuantizedStack):
                continue
            if parameter.dtype in FLOATS and not parameter.requires_grad and parameter.dtype != dtype:
                _refuse_partitioned(parameter, dtype)
                parameter.data = parameter.data.to(dtype)


def _refuse_partitioned(parameter: torch.nn.Parameter, dtype: torch.dtype) -> None:
    """Refuse to cast a sharded weight: the other shards would keep their dtype."""
    if is_part(parameter):
        raise PreparationError(
            f"The weights were sharded in {str(parameter.dtype).removeprefix('torch.')} while the model was loaded and "
            f"cannot be cast to {str(dtype).removeprefix('torch.')} any more. Load it with dtype={dtype}, or leave "
            "compute_dtype and upcast out."
        )


def upcast_frozen(model: nn.Module, upcast: str) -> list[str]:
    """Cast norms (``"norms"``) or everything that is not quantized (``"all"``) to float32.

    With ``"norms"`` each norm computes in float32 and returns its input's dtype; otherwise the next 16-bit linear
    layer would refuse the float32 activations.

    Returns:
        Names of the modules that were cast.

    Raises:
        PreparationError: ``upcast`` is not one of the three.
    """
    if upcast not in get_args(Upcast):
        raise PreparationError(f"upcast must be 'none', 'norms' or 'all', not {upcast!r}")
    if upcast == "none":
        return []
    changed = []
    adapters = adapter_modules(model)
    for path, module in model.named_modules():
        is_norm = _is_norm(module)
        if module in adapters or owner_of(module) is not None or (upcast == "norms" and not is_norm):
            continue
        floats = (p for p in module.parameters(recurse=False) if not isinstance(p, QuantizedStack))
        own = [p for p in floats if p.dtype in (torch.float16, torch.bfloat16)]
        if not own:
            continue
        for parameter in own:
            _refuse_partitioned(parameter, torch.float32)
            parameter.data = parameter.data.to(torch.float32)
        changed.append(path)
        if upcast == "norms":
            return_input_dtype(module)
    return changed


def _is_norm(module: nn.Module) -> bool:
    """Whether a module is a norm, by its class name and by holding vectors only: norms share no base class."""
    parameters = list(module.parameters(recurse=False))
    return "norm" in type(module).__name__.lower() and bool(parameters) and all(p.dim() == 1 for p in parameters)

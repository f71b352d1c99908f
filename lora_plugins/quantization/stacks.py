"""Stacked expert weights, quantized and dequantized one by one."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import nn

from lora_plugins.errors import QuantizationError
from lora_plugins.models.experts import is_transposed
from lora_plugins.models.sharding import gather
from lora_plugins.plugins.types import ExpertFormat
from lora_plugins.quantization.request import Quantization

__all__ = [
    "QuantizedStack",
    "dequantize_stack",
    "find_stacks",
    "list_parts",
    "list_quantized_stacks",
    "quantize_stack",
    "replace_stack",
]


class QuantizedStack(torch.Tensor):
    """A stack of quantized experts that looks like the float parameter it replaces.

    It has the shape of the float stack and the dtype in which the experts are multiplied. ``stack[number]`` dequantizes
    one expert; any other operation dequantizes all of them, and nothing can be written into it.

    Args:
        experts: The packed experts, as ``form`` made them from ``[out, in]``.
        form: How they are stored.
        quantization: The backend and its options.
        transposed: Whether the stack's last two axes are in and out.
        dtype: Dtype in which the experts are multiplied.
        device: Where they are.
        shape: Shape of the float stack.
    """

    experts: Sequence[Any]
    form: ExpertFormat
    quantization: Quantization
    transposed: bool

    @staticmethod
    def __new__(
        cls,
        experts: Sequence[Any],
        form: ExpertFormat,
        quantization: Quantization,
        transposed: bool,
        dtype: torch.dtype,
        device: torch.device,
        shape: Sequence[int],
    ) -> QuantizedStack:
        made: Any = torch.Tensor._make_wrapper_subclass
        self: QuantizedStack = made(cls, tuple(shape), dtype=dtype, device=device, requires_grad=False)
        self.experts, self.form, self.quantization, self.transposed = experts, form, quantization, transposed
        return self

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        """Do nothing: ``__new__`` has set everything."""

    def read_expert(self, number: int, dtype: torch.dtype | None = None) -> torch.Tensor:
        """Return the weight of one expert, dequantized, shape ``[out, in]``; by default in the backend's dtype."""
        with torch.no_grad():
            expert = self.experts[number]
            return self.form.unpack(expert) if dtype is None else self.form.unpack_as(expert, dtype)

    def list_tensors(self) -> list[torch.Tensor]:
        """Return the plain tensors that the stack holds."""
        tensors = (tensor for expert in self.experts for tensor in self.form.tensors(expert))
        return [part for tensor in tensors for part in list_parts(tensor)]

    def __tensor_flatten__(self) -> tuple[list[str], Any]:
        parts = self.list_tensors()
        for number, part in enumerate(parts):
            setattr(self, f"part_{number}", part)
        return [f"part_{number}" for number in range(len(parts))], None

    @staticmethod
    def __tensor_unflatten__(inner: Any, context: Any, size: Any, stride: Any) -> torch.Tensor:
        raise QuantizationError(
            "A quantized stack of experts cannot be traced; our experts function is left out of graphs."
        )

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]
        name = self.quantization.name
        return f"QuantizedStack({name!r}, shape={tuple(self.shape)}, dtype={self.dtype}, device={self.device})"

    def __deepcopy__(self, memo: dict[int, Any]) -> QuantizedStack:
        if id(self) not in memo:
            memo[id(self)] = self.copy_with(copy.deepcopy(self.experts, memo))
        made: QuantizedStack = memo[id(self)]
        return made

    def __reduce_ex__(self, protocol: Any) -> Any:
        state = (
            self.experts,
            self.form,
            self.quantization,
            self.transposed,
            self.dtype,
            self.device,
            tuple(self.shape),
        )
        return _restore, (*state, isinstance(self, nn.Parameter))

    def copy_with(
        self, experts: Sequence[Any], dtype: torch.dtype | None = None, device: torch.device | None = None
    ) -> QuantizedStack:
        """Return a stack like this one with other experts; a parameter if this is one."""
        made = QuantizedStack(
            experts,
            self.form,
            self.quantization,
            self.transposed,
            dtype or self.dtype,
            device or self.device,
            self.shape,
        )
        setattr(made, "_is_param", isinstance(self, nn.Parameter))  # noqa: B010 - how torch marks a parameter
        return made

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        stack = args[0]
        if func in _ALIASES and isinstance(stack, cls):
            return stack._as_plain(stack.experts)
        if func is torch.ops.aten.clone.default:
            return stack._as_plain(copy.deepcopy(stack.experts))
        if func is torch.ops.aten._to_copy.default:
            return stack._move(kwargs.get("dtype"), kwargs.get("device"))
        if func is torch.ops.aten.select.int and args[1] == 0:
            weight = stack.read_expert(int(args[2]), stack.dtype)
            return weight.T if stack.transposed else weight
        if func._schema.is_mutable:
            raise QuantizationError(
                f"{func} would write into experts that are stored quantized ({stack!r}). Call "
                "lora_plugins.dequantize_model(model) first."
            )
        return func(*_dequantize_all(args), **_dequantize_all(kwargs))

    def _as_plain(self, experts: Sequence[Any]) -> QuantizedStack:
        made = self.copy_with(experts)
        setattr(made, "_is_param", False)  # noqa: B010
        return made

    def _move(self, dtype: torch.dtype | None, device: torch.device | None) -> QuantizedStack:
        if device is None or torch.device(device) == self.device:
            moved = self.experts
        else:
            moved = [_move_packed(expert, torch.device(device)) for expert in self.experts]
        made = self.copy_with(moved, dtype, None if device is None else torch.device(device))
        setattr(made, "_is_param", False)  # noqa: B010
        return made


def list_parts(tensor: torch.Tensor) -> Iterator[torch.Tensor]:
    """Yield the plain tensors inside a tensor: some backends wrap weight and scales in a tensor subclass."""
    flatten = getattr(tensor, "__tensor_flatten__", None)
    # A sharded tensor can be flattened too, but is measured by its local part.
    if flatten is not None and not hasattr(tensor, "to_local"):
        for name in flatten()[0]:
            yield from list_parts(getattr(tensor, name))
    else:
        yield tensor


_ALIASES = (torch.ops.aten.detach.default, torch.ops.aten.alias.default)


def _restore(*state: Any) -> QuantizedStack:
    *fields, is_parameter = state
    made = QuantizedStack(*fields)
    setattr(made, "_is_param", is_parameter)  # noqa: B010
    return made


def _move_packed(packed: Any, device: torch.device) -> Any:
    if isinstance(packed, (tuple, list)):
        return type(packed)(_move_packed(part, device) for part in packed)
    return packed.to(device)


def _dequantize_all(values: Any) -> Any:
    if isinstance(values, QuantizedStack):
        return dequantize_stack(values)
    if isinstance(values, (tuple, list)):
        return type(values)(_dequantize_all(value) for value in values)
    if isinstance(values, dict):
        return {key: _dequantize_all(value) for key, value in values.items()}
    return values


def dequantize_stack(stack: QuantizedStack, dtype: torch.dtype | None = None) -> torch.Tensor:
    """Return all experts of a stack in float, in the shape of the stack."""
    whole = torch.empty(tuple(stack.shape), dtype=dtype or stack.dtype, device=stack.device)
    for number in range(len(stack.experts)):
        weight = stack.read_expert(number)
        whole[number] = weight.T if stack.transposed else weight
    return whole


def quantize_stack(
    values: torch.Tensor, quantization: Quantization, *, transposed: bool = False, dtype: torch.dtype | None = None
) -> QuantizedStack:
    """Quantize a stack one expert after the other.

    Args:
        values: Float weights, shape ``[experts, out, in]``, or ``[experts, in, out]`` if ``transposed``.
        quantization: A backend that has a format for experts.
        transposed: The order of the last two axes.
        dtype: Dtype in which the experts will be multiplied; by default that of ``values``.

    Raises:
        QuantizationError: The backend has no format for experts.
    """
    form = quantization.quantizer.expert_format(quantization.options)
    if form is None:
        raise QuantizationError(f"The backend {quantization.name!r} has no format for stacked experts.")
    values = values.detach()
    with torch.no_grad():
        experts = [form.pack((one.T if transposed else one).contiguous()) for one in values]
    return QuantizedStack(
        experts, form, quantization, transposed, dtype or values.dtype, values.device, tuple(values.shape)
    )


def replace_stack(module: nn.Module, name: str, quantization: Quantization) -> None:
    """Replace a float stack of a module by a quantized one."""
    old: Any = getattr(module, name)
    with gather([old]):
        new = quantize_stack(old.data, quantization, transposed=is_transposed(module))
    module._parameters[name] = nn.Parameter(new, requires_grad=False)


def find_stacks(module: nn.Module) -> dict[str, QuantizedStack]:
    """Return the quantized stacks that a module itself holds, by name."""
    own: dict[str, Any] = dict(module._parameters)
    return {name: value for name, value in own.items() if isinstance(value, QuantizedStack)}


def list_quantized_stacks(model: nn.Module) -> Iterator[tuple[str, nn.Module, str, QuantizedStack]]:
    """Yield the path, module, name and value of every quantized stack of a model."""
    for path, module in model.named_modules():
        for name, value in find_stacks(module).items():
            yield f"{path}.{name}" if path else name, module, name, value

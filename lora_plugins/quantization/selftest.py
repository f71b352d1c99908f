"""A short training run that every backend must pass before it is used."""

from __future__ import annotations

import contextlib
import functools
import logging
import warnings
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import nn

from lora_plugins.errors import QuantizationError, QuantizerSelfTestFailed, QuantizerUnavailable
from lora_plugins.models.casts import find_cast_inputs
from lora_plugins.models.wrapping import plain_path
from lora_plugins.plugins.packages import missing_requirements
from lora_plugins.plugins.types import Quantizer
from lora_plugins.quantization.request import Quantization
from lora_plugins.quantization.stacks import QuantizedStack, dequantize_stack, quantize_stack
from lora_plugins.text import dtype_name

__all__ = [
    "check_arrived",
    "check_usable",
    "check_usable_for_experts",
    "find_spoiled_layers",
    "self_test",
    "weight_error",
    "why_unavailable",
]


#: Wide enough for the kernels that take weights in groups of 128.
_IN, _OUT = 256, 192

_FAILURES = (
    RuntimeError,
    AttributeError,
    TypeError,
    ValueError,
    AssertionError,
    NotImplementedError,
    ImportError,
    OSError,
)


def self_test(quantization: Quantization, device: torch.device, dtype: torch.dtype) -> str | None:
    """Train a small layer, evaluate it and train it again, once per process, device and dtype.

    Returns:
        The problem, ``None`` when the backend can be trusted.
    """
    options = {key: value for key, value in quantization.options.items() if key != "skip_modules"}
    return _run_self_test(_Case(quantization.quantizer, options), device, dtype)


def weight_error(quantization: Quantization, device: torch.device, dtype: torch.dtype) -> float:
    """Return how far a backend's dequantized weight is from the original, relative to its norm; infinite if it fails.

    Measured on one small layer with normally distributed weights, once per process, device and dtype.
    """
    options = {key: value for key, value in quantization.options.items() if key != "skip_modules"}
    return _measure_error(_Case(quantization.quantizer, options), device, dtype)


def find_spoiled_layers(model: nn.Module, quantization: Quantization) -> dict[str, str]:
    """Return the layers whose input a model would cast to integers or eight bits if they were quantized, and why.

    Where the dtype of its weights is not known, because the backend cannot run here or its layers have no ``weight``, a
    layer counts as spoiled.
    """
    casts = find_cast_inputs(model)
    if not casts:
        return {}
    options = {key: value for key, value in quantization.options.items() if key != "skip_modules"}
    dtype = _read_weight_dtype(_Case(quantization.quantizer, options))
    reasons = {path: _explain_cast(dtype, exempt) for path, exempt in casts.items()}
    return {path: reason for path, reason in reasons.items() if reason is not None}


def _explain_cast(dtype: torch.dtype | None, exempt: frozenset[str]) -> str | None:
    """Return why a layer with a weight of this dtype spoils its input, ``None`` if it does not."""
    cast = "the model casts its input to the dtype of its weight, which is"
    if dtype is None:
        return f"{cast} not known for this backend"
    # A float of eight bits spoils activations, too.
    if dtype_name(dtype) in exempt or (dtype.is_floating_point and dtype.itemsize > 1):
        return None
    return f"{cast} {dtype_name(dtype)} where it is quantized"


class _Case:
    """A backend with options, hashable even if its options are not."""

    def __init__(self, quantizer: Quantizer, options: Mapping[str, Any]) -> None:
        self.quantizer = quantizer
        self.options = options
        self._key = (quantizer, tuple(sorted((key, repr(value)) for key, value in options.items())))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Case) and self._key == other._key

    def __hash__(self) -> int:
        return hash(self._key)


@functools.lru_cache(maxsize=64)
def _run_self_test(case: _Case, device: torch.device, dtype: torch.dtype) -> str | None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        linear = nn.Linear(_IN, _OUT, bias=False, dtype=dtype).requires_grad_(False)
        inputs = torch.randn(4, 7, _IN, dtype=dtype)
        upstream = torch.randn(4, 7, _OUT, dtype=dtype)
    original = linear.weight.detach().float().clone()
    linear, inputs, upstream = linear.to(device), inputs.to(device), upstream.to(device)
    with _silence(case.quantizer.loggers):
        try:
            with torch.no_grad():
                layer = case.quantizer.quantize_linear(linear, {**case.options, "skip_modules": []})
            if not case.quantizer.owns(layer):
                return "owns() does not know the layer that quantize_linear() made"
            stored, after = _train(case.quantizer, layer, inputs, upstream)
        except _Untrainable as failure:
            return str(failure)
        except _FAILURES as error:
            return f"{type(error).__name__}: {error}"
    if not torch.equal(stored, after):
        return "the stored weight changed during training and evaluation"
    distance = ((stored.cpu() - original).norm() / original.norm()).item()
    if not distance < 0.5:
        return f"the dequantized weight is {distance:.0%} away from the original"
    return None


@functools.lru_cache(maxsize=64)
def _measure_error(case: _Case, device: torch.device, dtype: torch.dtype) -> float:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        values = torch.randn(_OUT, _IN, dtype=dtype).to(device)
    linear = nn.Linear(_IN, _OUT, bias=False, device="meta")
    linear.weight = nn.Parameter(values.clone(), requires_grad=False)
    with _silence(case.quantizer.loggers):
        try:
            with torch.no_grad():
                layer = case.quantizer.quantize_linear(linear, {**case.options, "skip_modules": []})
                stored = case.quantizer.dequantize(layer).float()
        except _FAILURES:
            return float("inf")
    return float((stored - values.float()).norm() / values.float().norm())


@functools.lru_cache(maxsize=64)
def _read_weight_dtype(case: _Case) -> torch.dtype | None:
    """Return the dtype that the weight of a quantized layer says it has, ``None`` if that cannot be found out here."""
    if missing_requirements(case.quantizer.requires):
        return None
    with _silence(case.quantizer.loggers), contextlib.suppress(*_FAILURES), torch.no_grad():
        linear = nn.Linear(_IN, _OUT, bias=False).requires_grad_(False)
        layer: Any = case.quantizer.quantize_linear(linear, {**case.options, "skip_modules": []})
        dtype: torch.dtype = layer.weight.dtype
        return dtype
    return None


class _Untrainable(Exception):
    """A layer cannot be trained; the message says why."""


def _train(
    quantizer: Quantizer, layer: nn.Module, inputs: torch.Tensor, upstream: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Train, evaluate, train; return the dequantized weight before and after.

    The evaluation in the middle is the point: some kernels repack the weight there and lose the gradient.
    """
    # If dequantize() fails, a forward pass without a gradient would still be the better reason to report.
    stored = None
    with contextlib.suppress(*_FAILURES):
        stored = quantizer.dequantize(layer).detach().float()
    for phase in ("training", "evaluation", "training after an evaluation"):
        layer.train(phase != "evaluation")
        if phase == "evaluation":
            with torch.no_grad():
                layer(inputs)
        else:
            _check_gradient(quantizer, layer, inputs, upstream, phase)
    if stored is None:
        raise _Untrainable("dequantize() fails on a layer that was never used")
    return stored, quantizer.dequantize(layer).detach().float()


def _check_gradient(
    quantizer: Quantizer, layer: nn.Module, inputs: torch.Tensor, upstream: torch.Tensor, phase: str
) -> None:
    """Compare the gradient of the layer's input with ``upstream @ dequantize(layer)``."""
    x = inputs.detach().clone().requires_grad_(True)
    output = layer(x)
    if not output.requires_grad:
        raise _Untrainable(f"its output has no grad_fn in {phase}, so no adapter below it would ever get a gradient")
    output.backward(upstream.to(output.dtype))
    if x.grad is None:
        raise _Untrainable(f"its input gets no gradient in {phase}")
    expected = upstream.float() @ quantizer.dequantize(layer).detach().float()
    error = ((x.grad.float() - expected).norm() / expected.norm()).item()
    if not error < 0.05:
        raise _Untrainable(
            f"the gradient of its input in {phase} is {error:.0%} away from that of the dequantized weight"
        )


@functools.lru_cache(maxsize=64)
def _run_expert_test(case: _Case, device: torch.device, dtype: torch.dtype) -> str | None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        values, inputs = torch.randn(3, _OUT, _IN).to(device, dtype), torch.randn(5, _IN).to(device, dtype)
        upstream = torch.randn(5, _OUT).to(device, dtype)
    original = values.float()
    with _silence(case.quantizer.loggers):
        try:
            stack = quantize_stack(values, Quantization(case.quantizer, {**case.options, "skip_modules": []}))
            stored = dequantize_stack(stack, torch.float32)
            for number in (2, 0, 2):
                _check_expert(stack, number, stored[number], inputs, upstream)
            after = dequantize_stack(stack, torch.float32)
        except _Untrainable as failure:
            return str(failure)
        except _FAILURES as error:
            return f"{type(error).__name__}: {error}"
    if not torch.equal(stored, after):
        return "the stored weights changed during training and evaluation"
    distance = ((stored - original).norm(dim=(1, 2)) / original.norm(dim=(1, 2))).max().item()
    if not distance < 0.5:
        return f"the dequantized weight of an expert is {distance:.0%} away from the original"
    if not 0 < sum(part.nbytes for part in stack.list_tensors()) < values.nbytes:
        return f"the stored experts do not take fewer bytes than in {dtype_name(dtype)}"
    return None


def _check_expert(
    stack: QuantizedStack, number: int, stored: torch.Tensor, inputs: torch.Tensor, upstream: torch.Tensor
) -> None:
    """Compare gradient and output of one expert with those of its dequantized weight; evaluate it afterwards."""
    x = inputs.detach().clone().requires_grad_(True)
    output = nn.functional.linear(x, stack[number])
    output.backward(upstream)  # type: ignore[no-untyped-call]
    if x.grad is None:
        raise _Untrainable("the input of an expert gets no gradient")
    pairs = {"output": (output.detach(), inputs.float() @ stored.T), "gradient": (x.grad, upstream.float() @ stored)}
    for name, (found, expected) in pairs.items():
        error = ((found.float() - expected).norm() / expected.norm()).item()
        if not error < 0.05:
            raise _Untrainable(f"the {name} of an expert is {error:.0%} away from that of its dequantized weight")
    with torch.no_grad():
        nn.functional.linear(inputs, stack[number])


@contextlib.contextmanager
def _silence(names: Iterable[str]) -> Iterator[None]:
    """Hide the log messages and warnings of a backend's libraries during the self-test."""
    levels = {logging.getLogger(name): logging.getLogger(name).level for name in names}
    for logger in levels:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in levels.items():
            logger.setLevel(level)


def check_arrived(model: nn.Module, quantization: Quantization) -> None:
    """Refuse a model that was loaded quantized if its backend cannot compute one of the layers.

    Raises:
        QuantizationError: The model has such a layer.
    """
    quantizer = quantization.quantizer
    casts = find_cast_inputs(model)
    for path, module in model.named_modules():
        if not quantizer.owns(module):
            continue
        layer: Any = module
        name = plain_path(path)
        reason = quantizer.unsuitable(layer.in_features, layer.out_features, quantization.options)
        if reason is None and name in casts:
            reason = _explain_cast(getattr(getattr(layer, "weight", None), "dtype", None), casts[name])
        if reason is not None:
            raise QuantizationError(
                f"{name} was loaded quantized and {quantization.name!r} cannot compute it: {reason}. Load the model in "
                f"float, or with quantization_config({{'name': {quantization.name!r}, 'skip_modules': [{name!r}, …]}})."
            )


def why_unavailable(quantization: Quantization, device: torch.device, dtype: torch.dtype) -> str | None:
    """Return why a backend cannot run here and what to install, ``None`` when it can.

    Its packages are checked first: a backend may not be able to answer while they are missing.
    """
    quantizer = quantization.quantizer
    return missing_requirements(quantizer.requires) or quantizer.available(device, dtype, quantization.options)


def check_usable(quantization: Quantization, device: torch.device, dtype: torch.dtype) -> None:
    """Check that a backend runs here and passes the self-test, once per process and device.

    Raises:
        QuantizerUnavailable: It cannot run; the message has its reason.
        QuantizerSelfTestFailed: It runs but cannot train.
    """
    reason = why_unavailable(quantization, device, dtype)
    if reason is not None:
        raise QuantizerUnavailable(f"The quantization backend {quantization.name!r} cannot be used: {reason}")

    failure = self_test(quantization, device, dtype)
    if failure is not None:
        raise QuantizerSelfTestFailed(f"The quantization backend {quantization.name!r} cannot be trained on: {failure}")


def check_usable_for_experts(quantization: Quantization, device: torch.device, dtype: torch.dtype) -> None:
    """Train and evaluate a small stack of experts, once per process, device and dtype.

    Raises:
        QuantizerSelfTestFailed: The backend's format for experts cannot be trained through.
    """
    options = {key: value for key, value in quantization.options.items() if key != "skip_modules"}
    failure = _run_expert_test(_Case(quantization.quantizer, options), device, dtype)
    if failure is not None:
        raise QuantizerSelfTestFailed(
            f"The quantization backend {quantization.name!r} cannot be trained on with stacked experts: {failure}. "
            "skip_modules=['experts'] leaves them in float."
        )

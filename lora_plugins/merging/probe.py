"""Measure the distance of two models' outputs on the same inputs."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from lora_plugins.merging.inputs import Batch
from lora_plugins.text import one_line

__all__ = [
    "Distance",
    "Reading",
    "compare_logits",
    "compare_readings",
    "count_calls",
    "in_float32",
    "read_outputs",
    "usable_batches",
    "worst_row",
]


@dataclass(frozen=True)
class Distance:
    """The difference between two models' outputs on the same inputs.

    Attributes:
        divergence: Mean Kullback-Leibler divergence of the second model's predictions from the first's, in nats;
            ``None`` if the outputs are not predictions (a score, a hidden state).
        largest: Largest absolute difference of an output.
        relative: Norm of the difference over the norm of the first model's outputs; logits are centred.
        agreement: Share of predictions with the same argmax, ``None`` if the outputs are not predictions.
        tokens: Number of predictions compared (tokens or examples), or of values if there are no predictions.
    """

    divergence: float | None
    largest: float
    relative: float
    agreement: float | None
    tokens: int

    def line(self) -> str:
        """Return the distance as a sentence."""
        text = f"logits differ by {self.relative:.2%} ({self.largest:.3f} at most)"
        if self.divergence is None or self.agreement is None:
            return f"outputs differ by {self.relative:.2%} ({self.largest:.3f} at most) in {self.tokens} values"
        return (
            f"{text}, KL divergence {self.divergence:.2e} nats a token, same favourite in {self.agreement:.1%} of "
            f"{self.tokens} tokens"
        )


@dataclass(frozen=True)
class Reading:
    """A model's outputs for one input.

    Attributes:
        values: Float32 on the CPU, of shape ``[positions, values]``.
        predicts: Whether the values of a position are logits over choices.
    """

    values: torch.Tensor
    predicts: bool


def read_outputs(model: nn.Module, batches: Sequence[Batch]) -> list[Reading]:
    """Run a model on each batch, without gradients.

    Raises:
        Exception: Any error of the model for inputs that it does not accept.
    """
    return [_read(model, batch) for batch in batches]


def usable_batches(model: nn.Module, batches: Sequence[Batch]) -> tuple[list[Batch], str]:
    """Return the batches that a model accepts, and its error for the first one that it rejects."""
    usable, reason = [], ""
    for batch in batches:
        try:
            values = _read(model, batch).values
            if not bool(values.isfinite().all()):
                raise ValueError(f"the outputs for {batch.name} are not finite")
            usable.append(batch)
        except Exception as error:
            # A model's forward may raise anything for inputs that it does not accept.
            reason = reason or f"{type(error).__name__}: {one_line(error)[:200]}"
    return usable, reason


def _read(model: nn.Module, batch: Batch) -> Reading:
    device = next(model.parameters()).device
    dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)
    # Some models also draw random numbers in evaluation.
    with torch.random.fork_rng(devices=[]), torch.inference_mode():
        torch.manual_seed(0)
        given = {
            name: value.to(device, dtype if value.is_floating_point() else None) for name, value in batch.inputs.items()
        }
        values, predicts = _take_main_output(model(**given))
    return Reading(values.float().cpu(), predicts)


def _take_main_output(output: Any) -> tuple[torch.Tensor, bool]:
    """Return a model's main output as ``[positions, values]``, and whether it holds logits over several choices."""
    logits = getattr(output, "logits", None)
    if isinstance(logits, torch.Tensor) and logits.dim() in (2, 3) and logits.shape[-1] > 1:
        return logits.reshape(-1, logits.shape[-1]), True
    if isinstance(logits, torch.Tensor):
        return logits.reshape(logits.shape[0], -1), False
    values = list(output.values()) if hasattr(output, "values") else list(output)
    floats = [value for value in values if isinstance(value, torch.Tensor) and value.is_floating_point()]
    if not floats:
        raise TypeError(f"{type(output).__name__} has no floating point output")
    # Question answering returns start and end logits: two outputs of the same shape.
    alike = [value for value in floats if value.shape == floats[0].shape]
    first = torch.cat([value.reshape(value.shape[0], -1) for value in alike])
    return (floats[0].reshape(-1, floats[0].shape[-1]), False) if len(alike) == 1 else (first, False)


def compare_readings(first: Sequence[Reading], second: Sequence[Reading]) -> Distance:
    """Compare two models' outputs on the same inputs."""
    widths = {reading.values.shape[-1] for reading in first}
    if len(widths) == 1 and all(reading.predicts for reading in first):
        return compare_logits(torch.cat([one.values for one in first]), torch.cat([one.values for one in second]))
    a, b = (torch.cat([reading.values.flatten() for reading in readings]) for readings in (first, second))
    return Distance(None, float((a - b).abs().max()), _compute_ratio(a - b, a), None, len(a))


def compare_logits(first: torch.Tensor, second: torch.Tensor) -> Distance:
    """Compare two models' logits on the same tokens, each of shape ``[tokens, vocabulary]``."""
    # Centre: a constant added to all logits of a token does not change the prediction.
    a, b = (logits - logits.mean(-1, keepdim=True) for logits in (first, second))
    p, q = a.log_softmax(-1), b.log_softmax(-1)
    divergence = (p.exp() * (p - q)).sum(-1).mean()
    return Distance(
        divergence=max(0.0, float(divergence)),
        largest=float((a - b).abs().max()),
        relative=_compute_ratio(a - b, a),
        agreement=float((a.argmax(-1) == b.argmax(-1)).float().mean()),
        tokens=len(a),
    )


def worst_row(first: Sequence[Reading], second: Sequence[Reading]) -> float:
    """Return the largest difference of an input, as the median over its positions of the relative difference.

    An expert router may decide differently at a tie, which changes single positions much; a lost part of the adapter
    changes most of them.
    """
    rows = []
    for one, other in zip(first, second, strict=True):
        off = torch.linalg.vector_norm(one.values - other.values, dim=-1)
        rows.append(float((off / torch.linalg.vector_norm(one.values, dim=-1).clamp(min=1e-12)).median()))
    return max(rows)


def _compute_ratio(difference: torch.Tensor, whole: torch.Tensor) -> float:
    return float(torch.linalg.vector_norm(difference) / torch.linalg.vector_norm(whole).clamp(min=1e-12))


@contextlib.contextmanager
def in_float32(model: nn.Module) -> Iterator[None]:
    """Compute in float32 inside the block; 16-bit weights are restored exactly."""
    tensors = [*model.parameters(), *model.buffers()]
    small = [(tensor, tensor.dtype) for tensor in tensors if tensor.dtype in (torch.float16, torch.bfloat16)]
    for tensor, _ in small:
        tensor.data = tensor.data.float()
    try:
        yield
    finally:
        for tensor, dtype in small:
            tensor.data = tensor.data.to(dtype)


@contextlib.contextmanager
def count_calls(modules: dict[str, nn.Module]) -> Iterator[set[str]]:
    """Collect the names of the modules that are called inside the block."""
    called: set[str] = set()

    def note(name: str) -> Any:
        return lambda *_: called.add(name)

    handles = [module.register_forward_pre_hook(note(name)) for name, module in modules.items()]
    try:
        yield called
    finally:
        for handle in handles:
            handle.remove()

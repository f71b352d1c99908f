"""Detect NaN, infinite and dead losses, which the Trainer's log hides."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from transformers import Trainer

from lora_plugins.errors import DeadLoss, NonFiniteLoss

__all__ = ["DEAD_STEPS", "LATE_STEPS", "MASKED_STEPS", "LossWatch", "around_training_step", "is_models_own"]


#: Steps in a row with zero loss and zero gradient before a run is called dead: one empty batch proves nothing.
DEAD_STEPS = 3
#: The same once the run has learned something.
LATE_STEPS = 20
#: A Trainer of TRL (1.16) whose ``compute_loss`` takes that of transformers.
_PASSES_ON = ("trl.trainer.sft_trainer", "SFTTrainer")
#: The same for batches in which every label is -100: truncated long prompts may fill several in a row.
MASKED_STEPS = 20


@dataclass(frozen=True)
class _Batch:
    """One batch's loss, with what might explain it; the tensors stay on the device, unsynchronised."""

    loss: torch.Tensor
    ignored: torch.Tensor | None
    finite_inputs: dict[str, torch.Tensor]


@dataclass
class LossWatch:
    """Reads the loss of every batch of a step, and stops a run that cannot learn from it.

    Attributes:
        fp16: Whether the run is under float16 autocast, for the message.
        label_names: Names of the inputs that are labels.
        own: Whether the loss is a model's own, see `is_models_own`.
        learned: Whether some loss of the run was not zero.
        dead_steps: Steps in a row with labels that count, zero loss and zero gradients.
        masked_steps: The same with labels that are all -100.
    """

    fp16: bool = False
    label_names: frozenset[str] = frozenset({"labels"})
    own: bool = False
    learned: bool = False
    dead_steps: int = 0
    masked_steps: int = 0
    _batches: list[_Batch] = field(default_factory=list, repr=False)

    def start(self, *, fp16: bool, label_names: Iterable[str] = (), own: bool = False) -> None:
        """Forget an earlier run.

        Args:
            fp16: Whether the run is under float16 autocast.
            label_names: Names of inputs that are labels, beside ``"labels"``.
            own: Whether the loss is a model's own.
        """
        self.fp16, self.own, self.learned = fp16, own, False
        self.dead_steps, self.masked_steps, self._batches = 0, 0, []
        self.label_names = frozenset({"labels", *label_names})

    def add(self, loss: Any, inputs: Any) -> None:
        """Record one batch's loss, without synchronising with the device and without keeping the batch.

        Args:
            loss: What the Trainer's ``training_step`` returned.
            inputs: The batch.
        """
        if not isinstance(loss, torch.Tensor):
            return
        tensors = {
            name: value
            for name, value in (inputs.items() if isinstance(inputs, Mapping) else ())
            if isinstance(value, torch.Tensor) and value.numel()
        }
        ignored = [(tensors[name] == -100).all() for name in self.label_names if name in tensors]
        self._batches.append(
            _Batch(
                loss.detach().float().mean(),
                torch.stack(ignored).all() if ignored else None,
                {name: value.isfinite().all() for name, value in tensors.items() if value.is_floating_point()},
            )
        )

    def step(self, number: int, *, zero_gradients: Callable[[], bool], distributed: bool, moved: bool = False) -> None:
        """Judge the batches of one optimizer step.

        Args:
            number: The step's number, for the message.
            zero_gradients: Called when every loss is zero: whether every gradient is zero too, or NaN, which is what
                a loss of NaN leaves behind when it is taken for zero.
            distributed: Whether other ranks wait for this one, so that all must stop together.
            moved: Whether an earlier step of this run had a gradient.

        Raises:
            NonFiniteLoss: A loss is NaN or infinite, here or on another rank.
            DeadLoss: Loss and gradients are exactly zero for several steps, although there are labels. A loss without
                labels may be zero for long in a sound run (rewards that are equal), and one of the user's own may be
                zero because the run has learned (a margin that is satisfied).
        """
        batches, self._batches = self._batches, []
        if not batches:
            return
        losses = torch.stack([batch.loss for batch in batches])
        bad = (~torch.isfinite(losses)).any()
        if distributed:
            flag = bad.to(torch.float32)
            torch.distributed.all_reduce(flag, op=torch.distributed.ReduceOp.MAX)
            bad = flag > 0
        values = losses.tolist()
        if bool(bad):
            raise NonFiniteLoss(self._explain(values, batches, number))
        self.learned = self.learned or moved or any(values)
        if any(values) or (self.learned and not self.own) or not zero_gradients():
            self.dead_steps = self.masked_steps = 0
            return
        self._count_dead(batches, number, LATE_STEPS if self.learned else DEAD_STEPS)

    def _count_dead(self, batches: list[_Batch], number: int, most: int) -> None:
        ignored = [batch.ignored for batch in batches if batch.ignored is not None]
        if len(ignored) < len(batches):
            return
        if all(map(bool, ignored)):
            self.masked_steps += 1
            cause = "every label is -100: the prompt fills the rows, or the template for the labels matches nothing"
        else:
            self.dead_steps += 1
            cause = "a loss that does not depend on the adapters, or that takes NaN from an overflow for zero"
        if self.dead_steps >= most or self.masked_steps >= MASKED_STEPS:
            raise DeadLoss(
                f"Loss and every gradient were exactly zero in {self.dead_steps + self.masked_steps} steps in a row, "
                f"up to step {number}. Usual cause: {cause}."
            )

    def _explain(self, values: list[float], batches: list[_Batch], number: int) -> str:
        index = next((i for i, value in enumerate(values) if not math.isfinite(value)), None)
        if index is None:
            return f"The loss became non-finite on another rank in step {number}; its message has the cause."
        return (
            f"The loss is {values[index]} in step {number}, batch {index + 1} of {len(values)} in the step. "
            f"{self._find_cause(batches[index])} The Trainer's log would have shown the mean of earlier losses instead."
        )

    def _find_cause(self, batch: _Batch) -> str:
        if batch.ignored is not None and bool(batch.ignored):
            return "Every label of this batch is -100, so there is nothing to average over: drop such examples."
        for name, finite in batch.finite_inputs.items():
            if not bool(finite):
                return f"The input {name!r} of this batch is itself not finite."
        if self.fp16:
            return "Activations probably overflowed in float16: use bf16=True, or upcast='norms'."
        return "The learning rate may be too high, or the weights are damaged; try a lower rate or upcast='norms'."


def is_models_own(trainer: Trainer, base: nn.Module) -> bool:
    """Whether the loss is the one that a class of transformers computes from its logits and the labels.

    Such a loss falls for ever and never becomes exactly zero with gradients that are exactly zero; a margin does.

    Args:
        trainer: The Trainer.
        base: Its base model, without adapters.
    """
    owner = next(cls for cls in type(trainer).__mro__ if "compute_loss" in vars(cls))
    plain = owner.__module__.startswith("transformers.") or (owner.__module__, owner.__name__) == _PASSES_ON
    replaced = "compute_loss" in vars(trainer) or trainer.compute_loss_func is not None
    return plain and not replaced and type(base).__module__.startswith("transformers.")


def around_training_step(
    trainer: Any, callback: Any, step: Callable[..., Any], model: Any, inputs: Any, *args: Any, **kwargs: Any
) -> Any:
    """Record the loss that ``training_step`` returns; custom losses pass through it too."""
    loss = step(model, inputs, *args, **kwargs)
    callback.losses.add(loss, inputs)
    return loss

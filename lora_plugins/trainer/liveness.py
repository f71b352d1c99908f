"""Check that a run trains: trainable tensors, optimizer, movement."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from lora_plugins.errors import (
    AdapterNotMoving,
    LivenessWarning,
    NothingTrainable,
    OptimizerMismatch,
)
from lora_plugins.models.wrapping import is_lora

__all__ = [
    "PATIENT_STEPS",
    "VISIBLE_RATE",
    "WATCHED_STEPS",
    "MovementWatch",
    "Watched",
    "check_optimizer",
    "check_trainable",
    "has_finite_gradient",
    "has_gradient",
]


#: Sum of learning rates from which a tensor that did not start as zero must show a change. Below it, as in
#: the first steps of a long warm-up, updates drown in the optimizer's epsilon or in float16's smallest number.
VISIBLE_RATE = 1e-6
#: Counted steps after which tensors that are unreached (experts, towers) are no longer watched.
WATCHED_STEPS = 20
#: Counted steps after which a tensor is called stuck if its gradient was zero each time, as stochastic depth makes it,
#: or if its whole layer may be left out.
PATIENT_STEPS = 20


def check_trainable(model: nn.Module) -> None:
    """Raise `NothingTrainable` for a model in which no parameter requires a gradient."""
    if any(parameter.requires_grad for parameter in model.parameters()):
        return
    raise NothingTrainable(
        "No parameter of the model requires a gradient, so training would change nothing. Usual causes: "
        "PeftModel.from_pretrained() without is_trainable=True; prepare_model_for_kbit_training() or "
        "requires_grad_(False) called after the adapters were added."
    )


def check_optimizer(optimizer: Any, model: nn.Module) -> None:
    """Raise `OptimizerMismatch` unless an optimizer holds every trainable tensor of a model and no frozen base weight.

    Frozen tensors of an adapter may be in it: LoRA-FA's optimizer computes with A, which stays as it is. Engines that
    keep flat copies of the parameters (DeepSpeed) are skipped.
    """
    groups = getattr(optimizer, "param_groups", None)
    if groups is None or _is_deepspeed(optimizer):
        return
    held = {id(parameter) for group in groups for parameter in group["params"]}
    named = dict(model.named_parameters())
    missing = [name for name, p in named.items() if p.requires_grad and id(p) not in held]
    frozen = [name for name, p in named.items() if not p.requires_grad and id(p) in held and not is_lora(name)]
    foreign = len(held - {id(p) for p in named.values()})
    problems = []
    if missing:
        problems.append(f"{len(missing)} trainable tensors are not in the optimizer, first {missing[0]}")
    if frozen:
        problems.append(f"{len(frozen)} frozen tensors are in it, first {frozen[0]}")
    if foreign:
        problems.append(f"{foreign} tensors in it belong to no parameter of the model")
    if problems:
        raise OptimizerMismatch(
            "; ".join(problems) + ". The adapters were added after the optimizer was made, or it was made for "
            "another model: call lora_plugins.attach(trainer, …) before train()."
        )


def _is_deepspeed(optimizer: Any) -> bool:
    inner = getattr(optimizer, "optimizer", optimizer)
    return "deepspeed" in type(inner).__module__ or "deepspeed" in type(optimizer).__name__.lower()


@dataclass
class Watched:
    """One trainable adapter tensor until it has been seen to move.

    Attributes:
        name: Its name in the model.
        parameter: The tensor itself.
        due: After how many counted steps it must have moved: 1 for B, 2 for A (whose first gradient is zero),
            `PATIENT_STEPS` where layers are left out at random.
        unreached: Whether it may wait until a gradient reaches it (experts, towers).
        from_zero: Whether it started as zero, so that any update at all shows.
        visible: Whether its gradient, taken once at the learning rate, changes at least one of its values.
        reached: Whether the backward pass reached it at all, with a gradient of zero or not.
    """

    name: str
    parameter: torch.Tensor
    due: int
    unreached: bool
    from_zero: bool
    before: tuple[float, float] = (0.0, 0.0)
    had_gradient: bool = False
    visible: bool = False
    reached: bool = False

    def is_stuck(self, counted: int, rate: float) -> bool:
        """Whether a tensor that has not moved should have moved by now in any sound run.

        Args:
            counted: Steps that count, including the one just taken.
            rate: Sum of the learning rates before that step.
        """
        if self.had_gradient:
            return self.visible and (self.from_zero or rate >= VISIBLE_RATE)
        if self.unreached or not (self.from_zero or rate >= VISIBLE_RATE):
            return False
        # A gradient of zero shows that the tensor is part of the loss: stochastic depth leaves a branch out by chance.
        return counted >= (PATIENT_STEPS if self.reached else self.due)


@dataclass
class MovementWatch:
    """Checks that the adapters move in the first steps that can move them.

    A step counts when its learning rate is above zero, it was not skipped, and some gradient is not zero.
    """

    watched: list[Watched]
    tensors: list[torch.Tensor] = field(default_factory=list, repr=False)
    counted: int = 0
    steps: int = 0
    zero_gradients: int = 0
    skipped: int = 0
    no_rate: int = 0
    rate: float = 0.0
    unmoved: int = 0
    held_back: int = 0
    _pending: bool = field(default=False, repr=False)
    _rate: float = field(default=0.0, repr=False)

    @classmethod
    def over(cls, model: nn.Module, unreached: Iterable[str] = ()) -> MovementWatch:
        """Watch the trainable LoRA tensors of a model.

        Args:
            model: The model in the Trainer.
            unreached: Path parts of modules that a batch may not reach: experts, vision towers.
        """
        parts = set(unreached)
        everything = _drops_layers(model)
        watched = []
        for name, parameter in model.named_parameters():
            # A rank may hold no part of a sharded tensor.
            if not parameter.requires_grad or not is_lora(name) or not _take_local_part(parameter).numel():
                continue
            is_b = "lora_B" in name or "lora_embedding_B" in name
            by_chance = _is_reached_by_chance(name, parts)
            from_zero = not bool(torch.count_nonzero(_take_local_part(parameter)))
            due = PATIENT_STEPS if everything else 1 if is_b else 2
            watched.append(Watched(name, parameter, due, by_chance, from_zero))
        return cls(watched, [item.parameter for item in watched])

    def before_step(self, rate: float, *, hidden: bool = False, rates: Mapping[int, float] | None = None) -> None:
        """Record gradients and values before the optimizer moves anything.

        Args:
            rate: The largest learning rate of the optimizer's groups.
            hidden: Whether the engine hides gradients, so that only `after_step` learns of them.
            rates: The learning rate of each tensor by its ``id``; ``rate`` for those that are not in it.
        """
        self._pending = False
        if not self.watched:
            return
        self.steps += 1
        if not rate > 0:
            self.no_rate += 1
        elif not hidden and not any(has_gradient(tensor) for tensor in self.tensors):
            self.zero_gradients += 1
        else:
            self._pending = True
            self._rate = rate
            for item in self.watched:
                item.had_gradient = not hidden and has_gradient(item.parameter)
                # A hidden gradient may be too small to show in a tensor that did not start as zero.
                item.reached = not item.from_zero if hidden else item.parameter.grad is not None
                item.visible = item.had_gradient and _is_visible(
                    item.parameter, (rates or {}).get(id(item.parameter), rate)
                )
                item.before = _sum_values(item.parameter)

    def after_step(self, skipped: bool, *, norm: float | None = None, state: Mapping[Any, Any] | None = None) -> None:
        """Compare the tensors with their values before the step.

        Args:
            skipped: Whether the gradient scaler skipped this step.
            norm: Norm of the gradient, from an engine that hides gradients.
            state: The optimizer's state by tensor.

        Raises:
            AdapterNotMoving: A tensor that must have moved has not.
        """
        if not self._pending:
            return
        if skipped:
            self.skipped += 1
            return
        if norm == 0:
            self.zero_gradients += 1
            return
        self.counted += 1
        still: list[Watched] = []
        stuck: list[Watched] = []
        for item in self.watched:
            if _sum_values(item.parameter) != item.before:
                continue
            still.append(item)
            if item.is_stuck(self.counted, self.rate):
                stuck.append(item)
        self.rate += self._rate
        if stuck and not self._is_held_back(still, stuck, state or {}):
            raise AdapterNotMoving(self._explain(stuck))
        self.unmoved = len(still)
        self.watched = [] if self.counted >= WATCHED_STEPS else still

    def _is_held_back(self, still: list[Watched], stuck: list[Watched], state: Mapping[Any, Any]) -> bool:
        """Whether the optimizer collects gradients and moves nothing at first, as rectified Adam does for five steps.

        An optimizer that works on copies keeps no state for the tensors themselves.
        """
        silent = len(still) == len(self.tensors) and all(item.had_gradient for item in stuck)
        self.held_back += 1
        return (
            silent and self.held_back < PATIENT_STEPS and all(_has_state(state.get(item.parameter)) for item in stuck)
        )

    @property
    def seen(self) -> bool:
        """Whether every tensor has been seen to move."""
        return self.counted > 0 and self.unmoved == 0

    def scalars(self) -> dict[str, float]:
        """Return the counts so far, for experiment trackers."""
        return {
            "liveness/tensors": len(self.tensors),
            "liveness/tensors_moved": len(self.tensors) - self.unmoved if self.counted else 0,
            "liveness/steps_counted": self.counted,
            "liveness/steps_without_gradient": self.zero_gradients,
            "liveness/steps_without_rate": self.no_rate,
            "liveness/steps_skipped": self.skipped,
        }

    def _explain(self, stuck: list[Watched]) -> str:
        names = ", ".join(item.name for item in stuck[:3])
        if any(item.had_gradient for item in stuck):
            cause = "they have a gradient and the optimizer left them as they were: it may hold copies of them"
        else:
            cause = "no gradient reaches them: the layers around them may be detached, or read the base weight directly"
        return (
            f"{len(stuck)} adapter tensors have not moved after {self.counted} steps that should have moved them "
            f"(first {names}); {cause}."
        )

    def at_end(self) -> None:
        """Judge a run that ended before any step counted, or before the optimizer moved anything.

        Raises:
            AdapterNotMoving: Steps were taken with a learning rate above zero and nothing has moved.
        """
        if self.held_back and self.unmoved == len(self.tensors):
            raise AdapterNotMoving(
                f"The optimizer has moved none of the {self.unmoved} adapter tensors in {self.counted} steps with a "
                "gradient: nothing was trained. It may need more steps before it begins, or another learning rate."
            )
        if self.counted or not self.steps:
            return
        if self.zero_gradients:
            raise AdapterNotMoving(
                f"All {self.zero_gradients} steps with a learning rate above zero had no gradient at any adapter: "
                "nothing was trained."
            )
        warnings.warn(
            f"None of the {self.steps} steps could move the adapters (learning rate zero in {self.no_rate}, skipped "
            f"by the gradient scaler in {self.skipped}): nothing was trained. Train longer or shorten the warm-up.",
            LivenessWarning,
            stacklevel=2,
        )


def _has_state(values: Any) -> bool:
    """Whether an optimizer's state of one tensor holds anything but zeros."""
    tensors = values.values() if isinstance(values, Mapping) else ()
    return any(isinstance(value, torch.Tensor) and bool(torch.count_nonzero(value)) for value in tensors)


#: Attributes of a model or configuration that hold the probability of leaving a whole layer out.
_LAYER_DROP = re.compile(r"layer_?drop|drop_?layer|skip_?layer|layer_?skip")


def _is_reached_by_chance(name: str, parts: set[str]) -> bool:
    path = name.split(".")
    return "experts" in path or any(part in path or f".{part}." in f".{name}." for part in parts)


def _drops_layers(model: nn.Module) -> bool:
    """Whether the model leaves whole layers out at random while training."""
    places = [vars(module) for module in model.modules()]
    config = getattr(model, "config", None)
    places += [vars(config)] if config is not None else []
    rates = [value for place in places for name, value in place.items() if _LAYER_DROP.search(name)]
    return any(isinstance(rate, (int, float)) and rate > 0 for rate in rates)


def _take_local_part(parameter: torch.Tensor) -> torch.Tensor:
    """Return this rank's part of a parameter that may be sharded by FSDP2 or ZeRO-3."""
    if hasattr(parameter, "ds_tensor"):
        # The gathered values may still be there, and out of date.
        return parameter.ds_tensor
    return parameter.to_local() if hasattr(parameter, "to_local") else parameter


def has_gradient(parameter: torch.Tensor) -> bool:
    """Whether any value of a parameter's gradient is not zero."""
    gradient = parameter.grad
    return gradient is not None and bool(torch.count_nonzero(_take_local_part(gradient)))


def has_finite_gradient(parameter: torch.Tensor) -> bool:
    """Whether any value of a parameter's gradient is finite and not zero."""
    if parameter.grad is None:
        return False
    gradient = _take_local_part(parameter.grad)
    return bool((gradient.isfinite() & (gradient != 0)).any())


def _is_visible(parameter: torch.Tensor, rate: float) -> bool:
    """Whether a plain step with the gradient, capped at 1, changes any value in the parameter's precision."""
    values = _take_local_part(parameter).detach()
    gradient = _take_local_part(parameter.grad) if parameter.grad is not None else torch.zeros_like(values)
    step = gradient.to(values.dtype).clamp(-1, 1) * rate
    return not torch.equal(values - step, values)


def _sum_values(parameter: torch.Tensor) -> tuple[float, float]:
    """Return two sums that differ when any value has changed, without keeping a copy of the tensor."""
    values = _take_local_part(parameter).detach().to(torch.float64).flatten()
    # Weights that depend on the position make a swap of two values visible as well.
    positions = torch.arange(1, values.numel() + 1, device=values.device, dtype=torch.float64)
    return (values.sum().item(), (values * positions.sqrt()).sum().item())

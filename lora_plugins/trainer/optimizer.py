"""Rebuild a Trainer's optimizer around the adapters."""

from __future__ import annotations

import contextlib
import pickle
import pydoc
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from accelerate.optimizer import AcceleratedOptimizer
from torch import nn
from transformers import Trainer

from lora_plugins.errors import BrokenCheckpoint, OptimizerConflict
from lora_plugins.models.wrapping import is_lora

__all__ = ["OptimizerRebuild", "allow_state", "around_create_optimizer", "release_optimizer"]


class OptimizerRebuild:
    """Keeps a Trainer's optimizer consistent with its model while the model is replaced.

    Make it before the model is prepared, so that it sees which group holds which weight, and call `apply` afterwards.
    An optimizer that the Trainer made itself is dropped and made anew. One that the user passed in is kept: frozen
    base weights leave it, and each adapter joins the group that held its layer's weight, else the first group. Lists
    with one entry per tensor stay aligned with the group's tensors.

    Raises:
        OptimizerConflict: The user's optimizer already holds state for weights that will be frozen.
    """

    def __init__(self, trainer: Trainer) -> None:
        self._trainer = trainer
        self._given = _find_given_optimizer(trainer)
        self._groups: dict[str, int] = {}
        self._values: dict[str, dict[str, Any]] = {}
        if self._given is None:
            return
        if self._given.state:
            raise OptimizerConflict(
                f"The {type(self._given).__name__} passed in optimizers= already holds state of "
                f"{len(self._given.state)} tensors, which would be lost. Pass a fresh optimizer, or none."
            )
        places = {id(p): (i, j) for i, group in enumerate(self._groups_of_user) for j, p in enumerate(group["params"])}
        for name, parameter in trainer.model.named_parameters():
            if id(parameter) in places:
                index, position = places[id(parameter)]
                group = self._groups_of_user[index]
                self._groups[_find_module(name)] = index
                self._values[_find_module(name)] = {
                    key: group[key][position] for key in _find_lists(self._given, group)
                }

    @property
    def is_given(self) -> bool:
        """Whether the optimizer is one that the user passed in."""
        return self._given is not None

    def apply(self) -> None:
        """Make the optimizer consistent with the model that is in the Trainer now."""
        if self._given is None:
            _drop_optimizer(self._trainer)
            return
        missing = {id(p): (name, p) for name, p in self._trainer.model.named_parameters() if p.requires_grad}
        for parameter in (p for group in self._groups_of_user for p in group["params"]):
            missing.pop(id(parameter), None)
        _drop_frozen(self._given, self._trainer.model)
        for name, parameter in missing.values():
            self._join(name, parameter)

    @property
    def _groups_of_user(self) -> list[dict[str, Any]]:
        assert self._given is not None, "only called for an optimizer of the user's"  # noqa: S101 - narrows a type
        return self._given.param_groups

    def _join(self, name: str, parameter: torch.Tensor) -> None:
        """Add a tensor to the group of its layer's weight, with that weight's entries in the group's lists.

        Raises:
            OptimizerConflict: The group has a list with one entry per tensor, and none is known for this tensor.
        """
        module = _find_module(name)
        group = self._groups_of_user[self._groups.get(module, 0)]
        known = {**self._values.get(module, {}), "param_names": name}
        lists = {key for values in self._values.values() for key in values if isinstance(group.get(key), list)}
        unknown = sorted(lists - known.keys())
        if unknown:
            raise OptimizerConflict(
                f"The optimizer passed in optimizers= holds {', '.join(unknown)} for each of its tensors, which is not "
                f"known for {name}. Make the optimizer after prepare_model(…), for the model that it returns."
            )
        group["params"].append(parameter)
        for key in lists:
            group[key].append(known[key])


def _find_lists(optimizer: torch.optim.Optimizer, group: dict[str, Any]) -> list[str]:
    """Return the keys of a group's other lists with one entry per tensor, such as ``param_names``."""
    size = len(group["params"])
    others = (key for key in group if key != "params" and key not in optimizer.defaults)
    return [key for key in others if isinstance(group[key], list) and len(group[key]) == size and size]


def _drop_frozen(optimizer: torch.optim.Optimizer, model: nn.Module) -> None:
    """Remove frozen tensors of the base from an optimizer's groups, and their entries in the groups' lists."""
    # Optimizers such as LoRA-FA's hold frozen matrices of an adapter on purpose.
    kept = {id(p) for name, p in model.named_parameters() if p.requires_grad or is_lora(name)}
    for group in optimizer.param_groups:
        places = [place for place, p in enumerate(group["params"]) if id(p) in kept]
        lists = ["params", *_find_lists(optimizer, group)]
        group.update({key: [group[key][place] for place in places] for key in lists})


def around_create_optimizer(
    trainer: Trainer, callback: Any, create: Callable[..., torch.optim.Optimizer], *args: Any, **kwargs: Any
) -> torch.optim.Optimizer:
    """Make the optimizer; frozen tensors leave one that projects gradients (GaLore, APOLLO).

    For these, transformers 5.23 collects all parameters of the model, whether they are trained or not.
    """
    optimizer = create(*args, **kwargs)
    if trainer.args.optim_target_modules is not None:
        _drop_frozen(optimizer, trainer.model)
    return optimizer


@contextlib.contextmanager
def allow_state(trainer: Trainer, file: Path) -> Iterator[None]:
    """Let torch load the objects that an optimizer's own package keeps in its state, such as GaLore's projectors.

    Args:
        trainer: The Trainer, whose optimizer has been made.
        file: The optimizer's state.

    Raises:
        BrokenCheckpoint: The state holds objects of another package.
    """
    inner = getattr(trainer.optimizer, "optimizer", trainer.optimizer)
    package = type(inner).__module__.partition(".")[0]
    names = torch.serialization.get_unsafe_globals_in_checkpoint(file) if file.is_file() else []
    found = [pydoc.locate(name) for name in names if name.partition(".")[0] == package]
    with torch.serialization.safe_globals([item for item in found if isinstance(item, type)]):
        try:
            yield
        except pickle.UnpicklingError as error:
            raise BrokenCheckpoint(
                f"The optimizer's state {file} holds objects that torch does not load unless they are allowed: "
                f"{', '.join(names)}. If you trust the file, call torch.serialization.add_safe_globals([…]) with them."
            ) from error


def release_optimizer(trainer: Trainer) -> None:
    """Remove detached adapters from a Trainer's optimizer; an optimizer that has trained them is dropped.

    This includes one that the user passed in: it held nothing else. One that has not trained yet is kept.
    """
    if isinstance(trainer.optimizer, AcceleratedOptimizer):
        _drop_optimizer(trainer)
    else:
        OptimizerRebuild(trainer).apply()


def _drop_optimizer(trainer: Trainer) -> None:
    """Let the Trainer make its optimizer and its schedule anew."""
    trainer.optimizer = None
    trainer.lr_scheduler = None
    trainer._created_lr_scheduler = False
    trainer.callback_handler.optimizer = None
    trainer.callback_handler.lr_scheduler = None


def _find_module(parameter_name: str) -> str:
    """Return the base model's module that a parameter belongs to or adapts.

    ``base_model.model.layers.0.q.lora_A.default.weight`` and ``layers.0.q.weight`` are both ``layers.0.q``.
    """
    name = parameter_name.removeprefix("base_model.model.").replace(".base_layer.", ".")
    for marker in (".lora_", ".modules_to_save."):
        name = name.partition(marker)[0] if marker in name else name
    module, _, last = name.rpartition(".")
    return module if last in ("weight", "bias") else name


def _find_given_optimizer(trainer: Trainer) -> torch.optim.Optimizer | None:
    """Return the optimizer that the user passed in, ``None`` when the Trainer makes (or made) its own.

    Raises:
        OptimizerConflict: The user's own optimizer has already been trained with.
    """
    optimizer = trainer.optimizer
    if optimizer is None:
        return None
    if not isinstance(optimizer, AcceleratedOptimizer):
        return optimizer
    if type(trainer).create_optimizer is not Trainer.create_optimizer or trainer.optimizer_cls_and_kwargs is not None:
        return None
    expected, kwargs = Trainer.get_optimizer_cls_and_kwargs(trainer.args, trainer.model)
    inner = optimizer.optimizer
    same = type(inner) is expected and all(inner.defaults.get(k, v) == v for k, v in kwargs.items())
    if not same:
        raise OptimizerConflict(
            f"This Trainer has already trained with an optimizer of its user ({type(inner).__name__}); adapters cannot "
            "join it now. Make a new Trainer."
        )
    return None

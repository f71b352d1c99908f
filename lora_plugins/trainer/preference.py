"""Give TRL's preference trainers the reference that they compare with."""

from __future__ import annotations

from typing import Any

import torch
from peft import PeftModel
from torch import nn
from transformers import Trainer

from lora_plugins.adapters.files import copy_adapter
from lora_plugins.adapters.prepare import preparation_of
from lora_plugins.adapters.settings import LoraSettings
from lora_plugins.errors import UnsupportedTraining

__all__ = [
    "REFERENCE",
    "MissingReference",
    "check_reference",
    "has_reference",
    "keep_reference",
    "miss_reference",
    "release_copy",
    "release_loaded",
]


#: Name under which TRL's trainers (trl 1.16) make and look up the frozen copy of the adapter they start from.
REFERENCE = "ref"
#: Trainers that read their reference from the policy's own model: the adapter called "ref", or no adapter.
_TRAINERS = ("DPOTrainer", "KTOTrainer", "GRPOTrainer", "RLOOTrainer")
#: Those of them that load the base again as reference if the model had no adapters when they were called.
_LOADERS = ("GRPOTrainer", "RLOOTrainer")
#: Trainers that copy the base as reference before any callback exists, and without a copy switch the adapter off.
_COPIERS = ("OnlineDPOTrainer",)


def has_reference(trainer: Trainer) -> bool:
    """Whether a Trainer compares its model with a reference, as TRL's preference trainers do."""
    return _is_one_of(trainer, _TRAINERS)


def _is_one_of(trainer: Trainer, names: tuple[str, ...]) -> bool:
    return any(cls.__name__ in names and cls.__module__.startswith("trl.") for cls in type(trainer).__mro__)


def check_reference(trainer: Trainer, settings: LoraSettings) -> None:
    """Refuse settings under which a model with adapters has no valid reference.

    Raises:
        UnsupportedTraining: Policy and reference would be the same, so nothing could be learned; or the reference
            would be mixed with the policy, whose tensors differ.
    """
    if getattr(trainer.args, "sync_ref_model", False):
        raise UnsupportedTraining(
            "sync_ref_model=True mixes the policy's tensors into those of the reference one by one, and a model with "
            "adapters has other tensors. Use sync_ref_model=False, or train without adapters."
        )
    if has_reference(trainer) and settings.adapter_name == REFERENCE:
        raise UnsupportedTraining(
            f"{type(trainer).__name__} takes the adapter called {REFERENCE!r} for its reference, so an adapter trained "
            "under that name would be compared with itself. Choose another adapter_name."
        )
    if settings.adapter is not None and not has_reference(trainer) and _holds_copy(trainer):
        raise UnsupportedTraining(
            f"{type(trainer).__name__} copied its reference from the model before the adapter was in it, so the run "
            "would be compared with the bare base model and not with the adapter that it continues from. Pass "
            f"model=prepare_model(base, adapter={settings.adapter!r}, …) and callbacks=[LoraCallback()]: the copy then "
            "holds the adapter too."
        )


def release_copy(trainer: Trainer) -> None:
    """Drop a reference that is a copy of the base model, or that says none is there; call it before preparing.

    The Trainer then switches the adapter off, which computes the same without a second model in memory, and on a
    quantized base compares like with like.
    """
    reference: Any = getattr(trainer, "ref_model", None)
    if isinstance(reference, MissingReference) or (_is_one_of(trainer, _COPIERS) and _holds_copy(trainer)):
        trainer.ref_model = None


def release_loaded(trainer: Trainer) -> None:
    """Drop a reference that the Trainer loaded by the base model's name although its model has adapters.

    TRL 1.16 looks at the model that it was given, not at the one that the callback made of it. Without the second model
    the Trainer switches to the adapter called "ref", or to none: where the run started.
    """
    if _is_one_of(trainer, _LOADERS) and isinstance(trainer.model, PeftModel):
        trainer.ref_model = None


class MissingReference(nn.Module):
    """The reference of a Trainer that has neither adapters nor a copy of the base any more; every use is refused."""

    def __init__(self, trainer: str) -> None:
        super().__init__()
        self.trainer = trainer

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Refuse to compute anything.

        Raises:
            UnsupportedTraining: Always.
        """
        raise UnsupportedTraining(
            f"This {self.trainer} compares its model with a reference, and has none: its reference was the base model "
            "without the adapters, which detach() took out. Put adapters in with lora_plugins.attach(trainer, …), "
            f"set trainer.ref_model to a model of your own, or make a new {self.trainer} with this base model."
        )


def miss_reference(trainer: Trainer) -> None:
    """Say so when a Trainer without adapters is used without a reference: TRL would look for the adapters.

    Before adapters are put in again, call `release_copy`.
    """
    needed = _is_one_of(trainer, (*_TRAINERS, *_COPIERS)) and getattr(trainer.args, "beta", 1.0) != 0.0
    if needed and getattr(trainer, "ref_model", None) is None:
        trainer.ref_model = MissingReference(type(trainer).__name__)


def _holds_copy(trainer: Trainer) -> bool:
    """Whether the Trainer's reference has the values of its model, which has no adapters yet."""
    reference: Any = getattr(trainer, "ref_model", None)
    if not isinstance(reference, nn.Module) or isinstance(trainer.model, PeftModel):
        return False
    ours, theirs = dict(trainer.model.named_parameters()), dict(reference.named_parameters())
    return ours.keys() == theirs.keys() and all(_are_equal(value, theirs[name]) for name, value in ours.items())


def _are_equal(one: torch.Tensor, other: torch.Tensor) -> bool:
    return one.shape == other.shape and one.device == other.device and torch.equal(one, other)


def keep_reference(trainer: Trainer, model: PeftModel, settings: LoraSettings) -> None:
    """Add a frozen copy of the adapter that a preference run continues from, as its reference.

    Without the copy the Trainer would switch the adapter off and compare with the bare base model. A run
    with a fresh adapter needs no copy: its starting point is the model without the adapter.

    Args:
        trainer: The Trainer.
        model: Its wrapped model, with the stored adapter's weights already in it.
        settings: The settings of the run.

    Raises:
        UnsupportedTraining: PEFT cannot hold a second adapter of this kind.
    """
    if settings.adapter is None or not has_reference(trainer) or REFERENCE in model.peft_config:
        return
    try:
        copy_adapter(model, settings.adapter_name, REFERENCE, trainer.args.seed)
    except ValueError as error:
        raise UnsupportedTraining(
            "A preference run that continues from an adapter needs a frozen copy of it as reference, and PEFT cannot "
            f"add one: {error} Merge the adapter into the base model and start from that."
        ) from error
    record = preparation_of(model)
    assert record is not None, "the model was just prepared"  # noqa: S101 - narrows a type
    record.notes.append(f"the reference is a frozen copy of the adapter that the run continues from ({REFERENCE!r})")

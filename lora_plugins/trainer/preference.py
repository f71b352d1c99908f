"""Give TRL's preference trainers the reference that they compare with."""

from __future__ import annotations

from peft import PeftModel
from transformers import Trainer

from lora_plugins.adapters.files import copy_adapter
from lora_plugins.adapters.prepare import preparation_of
from lora_plugins.adapters.settings import LoraSettings
from lora_plugins.errors import UnsupportedTraining

__all__ = ["REFERENCE", "check_reference", "has_reference", "keep_reference"]


#: Name under which TRL's trainers (trl 1.16) make and look up the frozen copy of the adapter they start from.
REFERENCE = "ref"
#: Trainers that read their reference from the policy's own model: the adapter called "ref", or no adapter.
_TRAINERS = ("DPOTrainer", "KTOTrainer", "GRPOTrainer", "RLOOTrainer")


def has_reference(trainer: Trainer) -> bool:
    """Whether a Trainer compares its model with a reference, as TRL's preference trainers do."""
    return any(cls.__name__ in _TRAINERS and cls.__module__.startswith("trl.") for cls in type(trainer).__mro__)


def check_reference(trainer: Trainer, adapter_name: str) -> None:
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
    if has_reference(trainer) and adapter_name == REFERENCE:
        raise UnsupportedTraining(
            f"{type(trainer).__name__} takes the adapter called {REFERENCE!r} for its reference, so an adapter trained "
            "under that name would be compared with itself. Choose another adapter_name."
        )


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

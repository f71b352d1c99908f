"""Attach a LoraCallback to an existing Trainer, and detach it."""

from __future__ import annotations

from typing import Any

from torch import nn
from transformers import Trainer

from lora_plugins.adapters.saving import release_saving
from lora_plugins.errors import AttachError
from lora_plugins.models.sharding import is_sharded
from lora_plugins.trainer import preference
from lora_plugins.trainer.callbacks import LoraCallback
from lora_plugins.trainer.engines import meet
from lora_plugins.trainer.optimizer import release_optimizer
from lora_plugins.trainer.seam import is_training, put_model
from lora_plugins.trainer.unsharding import leave_engine

__all__ = ["attach", "detach"]


def attach(trainer: Trainer, **arguments: Any) -> LoraCallback:
    """Put LoRA adapters into a Trainer that already exists, before or between calls of ``train()``.

    ```python
    attach(trainer, r=8, quantization="int8")
    trainer.train()
    ```

    Args:
        trainer: The Trainer. One that has a `LoraCallback` may be attached to again, without arguments, after its model
            got another adapter.
        **arguments: Those of `LoraCallback`.

    Returns:
        The callback that now belongs to the Trainer.

    Raises:
        AttachError: The Trainer is inside ``train()``, already has one, or its optimizer cannot be kept.
        PreparationError: The model cannot be prepared.
    """
    handler = trainer.callback_handler
    present = [known for known in handler.callbacks if isinstance(known, LoraCallback)]
    active = [known for known in present if known._trainer is not None]
    if active and arguments:
        raise AttachError(
            "This Trainer already has a LoraCallback. lora_plugins.detach(trainer) takes its adapters out. To train "
            "another adapter beside them, call trainer.model.add_adapter(name, config), "
            "trainer.model.set_adapter(name), and attach(trainer) without arguments."
        )
    callback = present[0] if present and not active and not arguments else LoraCallback(**arguments)
    callback.take(trainer)
    for known in active:
        known.release()
        release_optimizer(trainer)
    for known in present:
        # One that was added too late, or that watched other adapters, is replaced by this one.
        handler.callbacks.remove(known)
    handler.callbacks.append(callback)
    return callback


def detach(trainer: Trainer) -> nn.Module:
    """Take the adapters out of a Trainer and give the base model back, without merging them.

    The base stays as it was prepared (quantized, frozen). After training under FSDP2 or DeepSpeed its shards are
    gathered: every process must call this, and holds the whole model afterwards. A Trainer of TRL whose reference was
    the base without the adapters has none afterwards, and says so when it needs one.

    Args:
        trainer: A Trainer with a `LoraCallback`, not inside ``train()``.

    Returns:
        The base model, which is in the Trainer again.

    Raises:
        AttachError: The Trainer has no `LoraCallback`, or is inside ``train()``.
        ProcessMissing: The model is sharded over processes and not all of them call this.
    """
    if is_training(trainer):
        raise AttachError("The Trainer is inside train(); detach before or after it.")
    callbacks = [known for known in trainer.callback_handler.callbacks if isinstance(known, LoraCallback)]
    if not callbacks:
        raise AttachError("This Trainer has no LoraCallback.")
    if is_sharded(trainer.model):
        meet(trainer, "detach()")
    leave_engine(trainer)
    base: nn.Module = trainer.model.unload()
    release_saving(base)
    for callback in callbacks:
        callback.release()
        trainer.callback_handler.callbacks.remove(callback)
    put_model(trainer, base)
    preference.miss_reference(trainer)
    release_optimizer(trainer)
    return base

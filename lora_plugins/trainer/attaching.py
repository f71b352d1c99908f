"""Attach a LoraCallback to a Trainer that exists, and detach it."""

from __future__ import annotations

from typing import Any

from torch import nn
from transformers import Trainer

from lora_plugins.errors import AttachError
from lora_plugins.models.sharding import is_sharded
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
        trainer: The Trainer.
        **arguments: Those of `LoraCallback`.

    Returns:
        The callback that now belongs to the Trainer.

    Raises:
        AttachError: The Trainer is inside ``train()``, already has one, or its optimizer can't be kept.
        PreparationError: The model can't be prepared.
    """
    handler = trainer.callback_handler
    present = [known for known in handler.callbacks if isinstance(known, LoraCallback)]
    if any(known._trainer is not None for known in present):
        raise AttachError("This Trainer already has a LoraCallback; call lora_plugins.detach(trainer) first.")
    callback = present[0] if present and not arguments else LoraCallback(**arguments)
    callback.take(trainer)
    for waiting in present:
        # One that was added too late is replaced by this one.
        handler.callbacks.remove(waiting)
    handler.callbacks.append(callback)
    return callback


def detach(trainer: Trainer) -> nn.Module:
    """Take the adapters out of a Trainer and give the base model back, without merging them.

    The base stays as it was prepared (quantized, frozen). Where FSDP2 or DeepSpeed has trained it, its parts are put
    together, so that each process holds the whole of it, and each must call this.

    Args:
        trainer: A Trainer with a `LoraCallback`, not inside ``train()``.

    Returns:
        The base model, which is in the Trainer again.

    Raises:
        AttachError: The Trainer has none, or is inside ``train()``.
        ProcessMissing: The model is spread over processes and not all of them call this.
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
    for callback in callbacks:
        callback.release()
        trainer.callback_handler.callbacks.remove(callback)
    put_model(trainer, base)
    release_optimizer(trainer)
    return base

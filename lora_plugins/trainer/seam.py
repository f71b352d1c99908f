"""The seam into ``transformers.Trainer``: finding it, putting the model in, keeping its optimizer right."""

from __future__ import annotations

import sys
from collections.abc import Callable
from types import FrameType
from typing import Any

from torch import nn
from transformers import Trainer, TrainerCallback

from lora_plugins.errors import TrainerNotFound
from lora_plugins.models.wrapping import base_of

__all__ = [
    "find_trainer",
    "is_training",
    "keep_generation_config",
    "put_model",
    "shadow_method",
    "uses_autocast",
    "wrap_model_init",
]


def find_trainer(callback: TrainerCallback) -> Trainer:
    """Return the Trainer that is calling a callback.

    transformers hands callbacks no reference to their Trainer. While ``on_init_end`` or any other event
    runs, the Trainer is the ``self`` of one of the calling frames, and it is ours when its
    ``callback_handler`` holds this very callback.

    Raises:
        TrainerNotFound: No calling frame belongs to such a Trainer.
    """
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        owner = frame.f_locals.get("self")
        handler = getattr(owner, "callback_handler", None)
        if handler is not None and any(known is callback for known in getattr(handler, "callbacks", ())):
            return owner
        frame = frame.f_back
    raise TrainerNotFound(
        f"{type(callback).__name__} can't find the Trainer that it belongs to. "
        "Make the Trainer first and call lora_plugins.attach(trainer, …) instead of passing the callback."
    )


def is_training(trainer: Trainer) -> bool:
    """Whether we are being called from inside the Trainer's ``train()``.

    ``trainer.is_in_train`` stays true after a ``train()`` that raised, so the calling frames are asked.
    """
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        if frame.f_code.co_name == "_inner_training_loop" and frame.f_locals.get("self") is trainer:
            return True
        frame = frame.f_back
    return False


def put_model(trainer: Trainer, model: nn.Module) -> None:
    """Make ``model`` the one that a Trainer trains, saves and reports.

    The Trainer must not be inside ``train()``.
    """
    trainer.model = model
    trainer.model_wrapped = model
    trainer.callback_handler.model = model
    # An evaluation or an earlier train() leaves the old model prepared in accelerate.
    trainer.accelerator._models.clear()
    # Names of the forward arguments are cached per model.
    trainer._signature_columns = None


def uses_autocast(trainer: Trainer) -> bool:
    """Whether the Trainer runs forward passes under autocast."""
    return bool(trainer.args.bf16 or trainer.args.fp16)


def keep_generation_config(trainer: Trainer, model: nn.Module) -> None:
    """Let ``generate`` use the configuration in ``Seq2SeqTrainingArguments``.

    The Trainer sets it on the model it holds, and PEFT's wrapper for sequence-to-sequence models generates
    with that of the base.
    """
    config = getattr(trainer.args, "generation_config", None)
    if config is not None:
        base_of(model).generation_config = trainer.load_generation_config(config)


def wrap_model_init(trainer: Trainer, prepare: Callable[[nn.Module], nn.Module]) -> Callable[[], None]:
    """Prepare every model that ``model_init`` makes: ``train()`` and each search trial ask for a new one.

    Returns:
        A function that undoes it.
    """
    original = trainer.call_model_init

    def call_model_init(trial: Any = None) -> nn.Module:
        model = original(trial)
        if trainer.place_model_on_device:
            # Quantize where the layers will live: moving them afterwards is not safe in every backend.
            trainer._move_model_to_device(model, trainer.args.device)
        return prepare(model)

    return shadow_method(trainer, "call_model_init", call_model_init)


def shadow_method(trainer: Trainer, name: str, function: Callable[..., Any]) -> Callable[[], None]:
    """Put a function over a method of one Trainer.

    Returns:
        A function that takes it away again, and whatever was put over it since.
    """
    before = vars(trainer).get(name)
    setattr(trainer, name, function)

    def undo() -> None:
        if before is None:
            vars(trainer).pop(name, None)
        else:
            setattr(trainer, name, before)

    return undo

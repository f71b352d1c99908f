"""Find the Trainer, put the model in, wrap the Trainer's methods."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

from peft import PeftModel
from torch import nn
from transformers import Trainer, TrainerCallback
from transformers.trainer import OPTIMIZER_NAME

from lora_plugins.adapters import files as adapters
from lora_plugins.adapters.lineage.recording import update_lineage, write_lineage
from lora_plugins.errors import BrokenCheckpoint, TrainerNotFound
from lora_plugins.models.wrapping import base_of
from lora_plugins.trainer import checkpoints, chunked_loss, engines, losses, optimizer, resuming

__all__ = [
    "WRAPPERS",
    "Wrapper",
    "find_trainer",
    "is_training",
    "keep_generation_config",
    "put_model",
    "uses_autocast",
    "wrap_methods",
]


def find_trainer(callback: TrainerCallback) -> Trainer:
    """Return the Trainer that is calling a callback.

    transformers 5.23 gives callbacks no reference to their Trainer. While ``on_init_end`` or any other event
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
        f"{type(callback).__name__} cannot find the Trainer that it belongs to. "
        "Make the Trainer first and call lora_plugins.attach(trainer, …) instead of passing the callback."
    )


def is_training(trainer: Trainer) -> bool:
    """Whether the caller runs inside the Trainer's ``train()``.

    In transformers 5.23 ``trainer.is_in_train`` stays true after a ``train()`` that raised, so this reads the frames.
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
    # An evaluation or an earlier train() leaves the old model in accelerate (1.15).
    trainer.accelerator._models.clear()
    # transformers 5.23 caches the names of the old model's forward arguments.
    trainer._signature_columns = None


def uses_autocast(trainer: Trainer) -> bool:
    """Whether the Trainer runs forward passes under autocast."""
    return bool(trainer.args.bf16 or trainer.args.fp16)


def keep_generation_config(trainer: Trainer, model: nn.Module) -> None:
    """Let ``generate`` use the configuration in ``Seq2SeqTrainingArguments``.

    The Trainer sets it on the model it holds, and PEFT's wrapper for sequence-to-sequence models (0.21.2) generates
    with that of the base.
    """
    config = getattr(trainer.args, "generation_config", None)
    if config is not None:
        base_of(model).generation_config = trainer.load_generation_config(config)


@dataclass(frozen=True)
class Wrapper:
    """A function that wraps a method of a Trainer.

    Attributes:
        method: Name of the method.
        around: Called instead, with the Trainer, the preparing callback, the method, and the method's arguments.
        why: What would go wrong without it.
    """

    method: str
    around: Callable[..., Any]
    why: str


def _prepare_made_model(
    trainer: Trainer, callback: Any, make: Callable[..., nn.Module], trial: Any = None
) -> nn.Module:
    """Prepare the model that ``model_init`` has made."""
    model = make(trial)
    if trainer.place_model_on_device:
        # Quantize where the layers will live: moving them afterwards is not safe in every backend.
        trainer._move_model_to_device(model, trainer.args.device)
    prepared: nn.Module = callback.make_model(trainer, model)
    return prepared


def _around_save_model(
    trainer: Trainer,
    callback: Any,
    save: Callable[..., None],
    output_dir: str | None = None,
    *args: Any,
    **kwargs: Any,
) -> None:
    """Save, on all processes if parameters are sharded, and compare the files with the model.

    Raises:
        BrokenCheckpoint: A file does not hold the model's values.
        ProcessMissing: The model is sharded over processes and not all of them call this.
    """
    engines.meet_to_save(trainer)
    update_lineage(trainer)
    save(output_dir, *args, **kwargs)
    folder = Path(output_dir or trainer.args.output_dir)
    engines.write_whole_adapters(trainer, folder)
    if trainer.args.should_save:
        write_lineage(trainer.model, folder)
    with callback.checks.report(), engines.raise_together(trainer):
        checkpoints.check_checkpoint(trainer.model, folder, read=trainer.args.should_save)


def _around_load_best_model(trainer: Trainer, callback: Any, load: Callable[[], None]) -> None:
    """Restore every adapter of the best checkpoint.

    The Trainer of transformers 5.23 finds only an adapter called "default", and one of several; for others it keeps the
    last step's weights and still reports the best checkpoint: https://github.com/huggingface/transformers/pull/36201
    """
    best = Path(trainer.state.best_model_checkpoint)
    if not checkpoints.is_loadable(trainer):
        load()
    if isinstance(trainer.model, PeftModel):
        with callback.checks.report(), engines.raise_together(trainer):
            checkpoints.restore_best(trainer.model, best)


def _around_load_from_checkpoint(
    trainer: Trainer, callback: Any, load: Callable[..., None], checkpoint: str, model: Any = None
) -> None:
    """Compare this run with the checkpoint's, then load every adapter of it.

    In transformers 5.23 the Trainer makes only the first active adapter trainable and switches the others off.

    Raises:
        ResumeConflict: The runs differ.
        BrokenCheckpoint: The adapters cannot be loaded.
    """
    folder = Path(checkpoint)
    with callback.checks.report():
        resuming.compare_runs(trainer, folder)
    ours = checkpoints.is_loadable(trainer)
    if ours and adapters.find_adapter_file(folder, trainer.model.active_adapters[0]) is not None:
        checkpoints.load_adapters(trainer.model, folder, f"The checkpoint {folder} cannot be resumed")
    else:
        load(checkpoint, *(() if model is None else (model,)))


def _around_load_optimizer(trainer: Trainer, callback: Any, load: Callable[..., None], checkpoint: str | None) -> None:
    """Load the optimizer's state, which must be in the checkpoint.

    Raises:
        BrokenCheckpoint: The checkpoint has no such state.
    """
    with callback.checks.report():
        if checkpoint is not None and not resuming.has_optimizer(Path(checkpoint)):
            raise BrokenCheckpoint(
                f"The checkpoint {checkpoint} has no state of the optimizer (save_only_model=True?), so this would be "
                f"another run and not the rest of that one. To start anew from its adapter, use "
                f"LoraCallback(adapter={checkpoint!r})."
            )
        if checkpoint is not None and trainer.is_deepspeed_enabled:
            # Under DeepSpeed, transformers 5.23 loads without the method in which other runs are compared.
            resuming.compare_runs(trainer, Path(checkpoint))
    with optimizer.allow_state(trainer, Path(checkpoint or ".", OPTIMIZER_NAME)):
        load(checkpoint)


#: All wrappers of a Trainer's methods (seen in transformers 5.23). Of two rows for one method, the later is the outer
#: one.
WRAPPERS = (
    Wrapper("call_model_init", _prepare_made_model, "train() and each search trial make a new, plain model"),
    Wrapper("create_optimizer", optimizer.around_create_optimizer, "some optimizers get frozen weights too"),
    Wrapper("training_step", chunked_loss.around_training_step, "the logits of a whole batch are a step's largest"),
    Wrapper("prediction_step", chunked_loss.around_prediction_step, "so they are in an evaluation of the loss alone"),
    Wrapper("training_step", losses.around_training_step, "the log shows earlier losses in place of one that is NaN"),
    Wrapper("save_model", _around_save_model, "PEFT's files lack what it does not know to be trained"),
    Wrapper("_load_best_model", _around_load_best_model, "it finds one adapter, if it is called default"),
    Wrapper("_load_from_checkpoint", _around_load_from_checkpoint, "it loads one adapter, compares nothing"),
    Wrapper("_load_optimizer_and_scheduler", _around_load_optimizer, "it passes over a state that is missing"),
)


def wrap_methods(trainer: Trainer, callback: Any) -> list[Callable[[], None]]:
    """Wrap a Trainer's methods with every function of `WRAPPERS`.

    Args:
        trainer: The Trainer.
        callback: The preparing callback; each function gets it.

    Returns:
        Functions that undo it, to be called last to first.
    """
    return [_wrap_method(trainer, row.method, functools.partial(row.around, trainer, callback)) for row in WRAPPERS]


def _wrap_method(trainer: Trainer, name: str, around: Callable[..., Any]) -> Callable[[], None]:
    """Wrap a method of one Trainer with a function.

    Returns:
        A function that undoes it. Wrappers that others have added since stay, and then call the plain method.
    """
    original = getattr(trainer, name)
    before = vars(trainer).get(name)
    active = True

    @functools.wraps(original)
    def method(*args: Any, **kwargs: Any) -> Any:
        return around(original, *args, **kwargs) if active else original(*args, **kwargs)

    def undo() -> None:
        nonlocal active
        active = False
        if vars(trainer).get(name) is not method:
            return
        if before is None:
            delattr(trainer, name)
        else:
            setattr(trainer, name, before)

    setattr(trainer, name, method)
    return undo

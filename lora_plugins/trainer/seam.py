"""The seam into ``transformers.Trainer``: finding it, putting the model in, keeping its optimizer right."""

from __future__ import annotations

import sys
from collections.abc import Callable
from types import FrameType
from typing import TYPE_CHECKING, Any

from lora_plugins.errors import OptimizerConflict, TrainerNotFound, UnsupportedTraining
from lora_plugins.quantization.request import base_of

if TYPE_CHECKING:
    import torch
    from torch import nn
    from transformers import Trainer, TrainerCallback

#: Optimizers that update weights inside the backward pass or keep one optimizer per layer: they have no
#: parameter groups that could be checked against the adapters.
_UNCHECKABLE_OPTIMIZERS = ("lomo", "adalomo", "galore_adamw_layerwise", "apollo_adamw_layerwise")


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


def check_supported(trainer: Trainer, adapter_name: str) -> None:
    """Refuse what can't be made to work with adapters, before anything is changed.

    Args:
        trainer: The Trainer as its user configured it.
        adapter_name: Name that the adapter will have.

    Raises:
        UnsupportedTraining: Names the option and the way out.
    """
    args = trainer.args
    optimizer = str(getattr(args.optim, "value", args.optim))
    if any(optimizer == name for name in _UNCHECKABLE_OPTIMIZERS):
        raise UnsupportedTraining(
            f"optim={optimizer!r} updates weights outside its parameter groups, so nobody can tell whether it holds "
            "the adapters. Use adamw_torch, adafactor, or a bitsandbytes optimizer."
        )
    if getattr(args, "fp16_full_eval", False) or getattr(args, "bf16_full_eval", False):
        name = "fp16_full_eval" if getattr(args, "fp16_full_eval", False) else "bf16_full_eval"
        raise UnsupportedTraining(
            f"{name}=True casts the whole model for an evaluation outside training, adapters included, and they "
            "would stay in 16 bits. Use bf16=True or fp16=True."
        )
    strategy = str(getattr(args.hub_strategy, "value", args.hub_strategy))
    if args.push_to_hub and strategy != "end" and adapter_name != "default":
        raise UnsupportedTraining(
            f"hub_strategy={strategy!r} pushes only an adapter called 'default' and this one is called "
            f"{adapter_name!r}: the repository would stay without it. "
            "Use hub_strategy='end', or leave adapter_name out."
        )
    if getattr(args, "n_gpu", 1) > 1 and not trainer.is_model_parallel:
        raise UnsupportedTraining(
            f"This process sees {args.n_gpu} GPUs and the Trainer would use torch.nn.DataParallel, where LoRA layers "
            "don't work. Start with `torchrun --nproc_per_node` or set CUDA_VISIBLE_DEVICES to one GPU."
        )


class OptimizerRebuild:
    """Keeps a Trainer's optimizer right while the model under it is exchanged.

    Made before the model is prepared, because it must see which group held which weight; `apply` comes
    after. An optimizer that the Trainer made itself is dropped and made anew. One that the user passed in
    is kept: frozen tensors leave it, and each adapter joins the group that held its layer's weight, else
    the first.

    Raises:
        OptimizerConflict: The user's optimizer already holds state for weights that will be frozen.
    """

    def __init__(self, trainer: Trainer) -> None:
        self._trainer = trainer
        self._given = _given_optimizer(trainer)
        self._groups: dict[str, int] = {}
        if self._given is None:
            return
        if self._given.state:
            raise OptimizerConflict(
                f"The {type(self._given).__name__} passed in optimizers= already holds state of "
                f"{len(self._given.state)} tensors, which would be lost. Pass a fresh optimizer, or none."
            )
        places = {id(p): i for i, group in enumerate(self._given.param_groups) for p in group["params"]}
        for name, parameter in trainer.model.named_parameters():
            if id(parameter) in places:
                self._groups[_module_of(name)] = places[id(parameter)]

    @property
    def is_given(self) -> bool:
        """Whether the optimizer is one that the user passed in."""
        return self._given is not None

    def apply(self) -> None:
        """Bring the optimizer in line with the model that is in the Trainer now."""
        if self._given is None:
            _drop_optimizer(self._trainer)
            return
        trainable = {id(p): (name, p) for name, p in self._trainer.model.named_parameters() if p.requires_grad}
        for group in self._given.param_groups:
            group["params"] = [p for p in group["params"] if id(p) in trainable]
            for parameter in group["params"]:
                del trainable[id(parameter)]
        for name, parameter in trainable.values():
            self._given.param_groups[self._groups.get(_module_of(name), 0)]["params"].append(parameter)


def release_optimizer(trainer: Trainer) -> None:
    """Take adapters that are gone out of a Trainer's optimizer; one that has trained them is dropped.

    That goes for one that the user passed in, too: it held nothing else. One that has not trained yet stays.
    """
    from accelerate.optimizer import AcceleratedOptimizer

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


def _module_of(parameter_name: str) -> str:
    """The base model's module that a parameter belongs to or adapts.

    ``base_model.model.layers.0.q.lora_A.default.weight`` and ``layers.0.q.weight`` are both ``layers.0.q``.
    """
    name = parameter_name.removeprefix("base_model.model.").replace(".base_layer.", ".")
    for marker in (".lora_", ".modules_to_save."):
        name = name.partition(marker)[0] if marker in name else name
    module, _, last = name.rpartition(".")
    return module if last in ("weight", "bias") else name


def _given_optimizer(trainer: Trainer) -> torch.optim.Optimizer | None:
    """Return the optimizer that the user passed in, ``None`` when the Trainer makes (or made) its own.

    Raises:
        OptimizerConflict: The user's own optimizer has already been trained with.
    """
    from accelerate.optimizer import AcceleratedOptimizer
    from transformers import Trainer

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
            f"This Trainer has already trained with an optimizer of its user ({type(inner).__name__}); adapters can't "
            "join it now. Make a new Trainer."
        )
    return None

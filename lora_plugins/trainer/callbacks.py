"""The three Trainer callbacks."""

from __future__ import annotations

import copy
import os
import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import nn
from tqdm.auto import tqdm
from transformers import (
    PrinterCallback,
    ProgressCallback,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

from lora_plugins.adapters.lineage.recording import begin_lineage, update_lineage
from lora_plugins.adapters.prepare import Preparation, preparation_of, prepare, prepare_plain
from lora_plugins.adapters.report import ParameterReport, make_report
from lora_plugins.adapters.saving import allow_unsaved, check_everything_is_saved
from lora_plugins.adapters.settings import LoraSettings
from lora_plugins.adapters.traits import warn_unserved
from lora_plugins.errors import (
    AdapterNotMoving,
    AttachError,
    ModelReplaced,
    PreparationError,
    TrainerNotFound,
    UnsavedTensors,
)
from lora_plugins.logs import get_logger, is_shown
from lora_plugins.models.tokens import find_new_tokens
from lora_plugins.models.wrapping import base_of
from lora_plugins.plugins.traits import check_servers
from lora_plugins.plugins.types import Quantizer
from lora_plugins.quantization.request import detect_quantization
from lora_plugins.targets.resolution import check_names, check_trained, set_new_tokens
from lora_plugins.trainer import engines, liveness, preference
from lora_plugins.trainer.checkpoints import check_checkpoint, restore_best
from lora_plugins.trainer.checks import Checks
from lora_plugins.trainer.engines import raise_together
from lora_plugins.trainer.losses import LossWatch, is_models_own
from lora_plugins.trainer.optimizer import OptimizerRebuild
from lora_plugins.trainer.refusals import check_supported
from lora_plugins.trainer.resuming import write_run
from lora_plugins.trainer.seam import (
    find_trainer,
    is_training,
    keep_generation_config,
    put_model,
    uses_autocast,
    wrap_methods,
)


class _PreparingCallback(TrainerCallback):  # type: ignore[misc]
    """Base of both preparing callbacks: find the Trainer, put the model in, check the run."""

    settings: LoraSettings

    def __init__(self, chunked_loss: bool = True, skip_checks: Iterable[str] = ()) -> None:
        self.chunked_loss = chunked_loss
        self.checks = Checks(skip_checks)
        self._trainer: weakref.ref[Trainer] | None = None
        self._undo: list[Callable[[], None]] = []
        self._forget_run()
        self.report: ParameterReport | None = None

    def _forget_run(self) -> None:
        """Reset the watches: what they have seen belongs to one run of one Trainer."""
        self.movement = liveness.MovementWatch([])
        self.losses = LossWatch()
        self._sent = False

    def __getstate__(self) -> dict[str, Any]:
        # A copy in another process belongs to no Trainer yet.
        run = ("_trainer", "_undo", "movement", "losses", "_sent")
        return {name: value for name, value in self.__dict__.items() if name not in run}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._trainer, self._undo = None, []
        self._forget_run()

    def __deepcopy__(self, memo: dict[int, Any]) -> _PreparingCallback:
        copied = type(self).__new__(type(self))
        memo[id(self)] = copied
        copied.__setstate__(copy.deepcopy(self.__getstate__(), memo))
        return copied

    # -- getting hold of the Trainer -----------------------------------------------------------

    @property
    def trainer(self) -> Trainer:
        """The Trainer that this callback prepared a model in.

        Raises:
            TrainerNotFound: It has not prepared one, or the Trainer is gone.
        """
        trainer = self._trainer() if self._trainer is not None else None
        if trainer is None:
            raise TrainerNotFound(
                f"This {type(self).__name__} was added to a Trainer that already existed, so it never saw its start: "
                "no adapter was made and the optimizer is not ours. Call lora_plugins.attach(trainer, …) before "
                "train(), or pass the callback in Trainer(callbacks=[…])."
            )
        return trainer

    def take(self, trainer: Trainer) -> None:
        """Prepare the model of a Trainer that is not training, and every model its ``model_init`` will make.

        Raises:
            AttachError: The Trainer is inside ``train()``, or its optimizer cannot be kept.
            PreparationError: The model cannot be prepared.
        """
        if is_training(trainer):
            raise AttachError("The Trainer is inside train(); adapters can be attached before or between calls of it.")
        check_supported(trainer, self.settings.adapter_name)
        engines.check_engine(trainer, self.settings.quantization)
        preference.check_reference(trainer, self.settings)
        self.release()
        optimizer = OptimizerRebuild(trainer)
        preference.release_copy(trainer)
        before = trainer.model
        model = self.make_model(trainer, before)
        self._trainer = weakref.ref(trainer)
        put_model(trainer, model)
        if model is not before or optimizer.is_given:
            optimizer.apply()
        self._undo += wrap_methods(trainer, self)

    def release(self) -> None:
        """Unwrap the Trainer's methods; the model stays as it is."""
        while self._undo:
            self._undo.pop()()
        self._trainer = None

    def make_model(self, trainer: Trainer, model: nn.Module) -> nn.Module:
        """Prepare one model and adapt it to this Trainer's engine and generation settings."""
        _read_new_tokens(trainer, model)
        prepared = self._prepare(trainer, model)
        if not self.checks.run(UnsavedTensors):
            allow_unsaved(prepared)
        keep_generation_config(trainer, prepared)
        engines.prepare_quantized(trainer, prepared)
        return prepared

    def _prepare(self, trainer: Trainer, model: nn.Module) -> nn.Module:
        raise NotImplementedError

    def _make_progress(self, trainer: Trainer) -> Callable[[Iterable[Any], int], Iterable[Any]]:
        def bar(items: Iterable[Any], total: int) -> Iterable[Any]:
            hidden = trainer.args.disable_tqdm or not trainer.is_local_process_zero()
            return tqdm(items, total=total, desc="Quantizing", unit="layer", leave=False, disable=hidden)

        return bar

    # -- events --------------------------------------------------------------------------------

    def on_init_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self.take(find_trainer(self))

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        trainer = self.trainer
        if "model" in kwargs and kwargs["model"] is not trainer.callback_handler.model:
            raise AttachError(
                f"This {type(self).__name__} was passed to another Trainer after this one, and watches only that one. "
                f"Make a {type(self).__name__} for each Trainer."
            )
        model = trainer.model
        preference.release_loaded(trainer)
        _read_new_tokens(trainer, model)
        record = preparation_of(model) or preparation_of(base_of(model))
        checks: tuple[Callable[[], None], ...] = (
            lambda: self._check_model(model),
            lambda: liveness.check_trainable(model),
            lambda: check_trained(base_of(model), record.required) if record is not None else None,
            lambda: check_everything_is_saved(model),
            lambda: liveness.check_optimizer(trainer.optimizer, model),
        )
        for check in checks:
            with self.checks.report():
                check()
        begin_lineage(trainer, self.checks.describe())
        self._forget_run()
        if self.checks.run(AdapterNotMoving):
            unreached = record.plan.unreached if record is not None and record.plan is not None else ()
            self.movement = liveness.MovementWatch.over(model, unreached)
        own = is_models_own(trainer, base_of(model))
        self.losses.start(fp16=bool(args.fp16), label_names=trainer.label_names or (), own=own)

    def _check_model(self, model: nn.Module) -> None:
        """Raise `ModelReplaced` unless the Trainer's model has been prepared."""
        if preparation_of(model) is None:
            raise ModelReplaced(
                f"The model in the Trainer ({type(model).__name__}) is not the one that was prepared: something put "
                "another one in after the Trainer was made. Call lora_plugins.attach(trainer, …) after that."
            )

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if engines.hides_gradients(self.trainer):
            # Such an engine moves the weights within the backward pass, before any later event.
            self.movement.before_step(_find_highest_rate(self.trainer), hidden=True)

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        trainer = self.trainer
        hidden = engines.hides_gradients(trainer)
        if not hidden:
            self.movement.before_step(_find_highest_rate(trainer), rates=_read_rates(trainer))
        with self.checks.report():
            self.losses.step(
                state.global_step + 1,
                zero_gradients=lambda: (
                    not hidden
                    and not any(liveness.has_finite_gradient(p) for p in trainer.model.parameters() if p.requires_grad)
                ),
                distributed=trainer.accelerator.num_processes > 1,
                moved=self.movement.counted > 0,
            )

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        trainer = self.trainer
        skipped = bool(trainer.accelerator.optimizer_step_was_skipped)
        with self.checks.report():
            state = getattr(trainer.optimizer, "state", None)
            self.movement.after_step(skipped, norm=engines.read_gradient_norm(trainer), state=state)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        # Trackers close before on_train_end reaches this callback.
        if state.is_world_process_zero and (control.should_training_stop or self.movement.seen != self._sent):
            self._sent = self.movement.seen
            _send_scalars(self.trainer, self, self.movement.scalars(), kwargs)

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        trainer = self.trainer
        folder = Path(trainer._get_output_dir(trial=getattr(trainer, "_trial", None)))
        folder /= f"checkpoint-{state.global_step}"
        with self.checks.report(), raise_together(trainer):
            check_checkpoint(trainer.model, folder, read=args.should_save)
        if args.should_save:
            write_run(trainer, folder)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        update_lineage(self.trainer)
        with self.checks.report():
            self.movement.at_end()


def _read_new_tokens(trainer: Trainer, model: nn.Module) -> None:
    """Note in the base model which tokens of the Trainer's tokenizer its own tokenizer does not have."""
    base = base_of(model)
    set_new_tokens(base, find_new_tokens(base, trainer.processing_class))


def _read_rates(trainer: Trainer) -> dict[int, float]:
    """Return the learning rate of each tensor in the optimizer, by the tensor's ``id``."""
    groups = trainer.optimizer.param_groups
    return {id(p): float(group.get("lr") or 0) for group in groups for p in group["params"]}


def _find_highest_rate(trainer: Trainer) -> float:
    """Return the largest learning rate of the optimizer's groups."""
    return max((float(group.get("lr") or 0) for group in trainer.optimizer.param_groups), default=0.0)


class LoraCallback(_PreparingCallback):
    """Turns the model of a Trainer into a LoRA model: quantized if asked, frozen, adapted, counted, checked.

    ```python
    trainer = Trainer(model=model, args=args, train_dataset=ds,
                      callbacks=[LoraCallback(r=8, quantization="int8")])
    trainer.train()
    ```

    Pass it when the Trainer is made. For one that exists already, call `attach`.

    Args:
        quantization: Backend for the frozen base, ``"int8"``, ``"nf4"``, …, or a mapping with ``name`` and
            options; ``None`` leaves it in float.
        peft_config: A ready ``peft.LoraConfig``, instead of LoRA arguments.
        adapter: Adapter to continue from: a folder, or a registry reference such as ``"org/name@1.2"``.
        compute_dtype: See `prepare_model`.
        upcast: See `prepare_model`.
        adapter_name: Name of the adapter in the model.
        experts: See `prepare_model`.
        strict: Whether problems with targets are errors; with ``False`` they are warnings.
        trainable_dtype: See `prepare_model`.
        frozen: See `prepare_model`.
        fused: See `prepare_model`.
        allow_format: See `prepare_model`.
        chunked_loss: Whether a causal language model computes its loss some rows at a time, never holding the
            logits of a whole batch.
        skip_checks: Names of checks that are switched off, such as ``"dead-loss"``; docs/checks.md lists them.
        serve: Servers that the adapter is for, such as ``"vllm"``: warns before training if one will not take it.
        recipe: Name of fields that are known together, such as ``"bloomz-2023"``: what the recipe of that year trains,
            whatever the defaults are. Fields that are passed as well win.
        **lora: Any field of ``peft.LoraConfig``; defaults are ``r=8, lora_alpha=32, lora_dropout=0.05``.

    Raises:
        UnknownArgument: A keyword is neither an argument nor a field of ``peft.LoraConfig``.
        QuantizationError: The backend is unknown.
        UnknownCheck: ``skip_checks`` has a name that is not that of a check.
        UnknownServer: ``serve`` has a name that is not that of a server.
    """

    def __init__(
        self,
        *,
        quantization: str | Mapping[str, Any] | Quantizer | None = None,
        peft_config: Any = None,
        adapter: str | os.PathLike[str] | None = None,
        compute_dtype: Any = "auto",
        upcast: str = "none",
        adapter_name: str = "default",
        experts: str = "default",
        strict: bool = True,
        trainable_dtype: Any = "float32",
        frozen: Sequence[str] = (),
        fused: bool = True,
        allow_format: str | None = None,
        chunked_loss: bool = True,
        skip_checks: Iterable[str] = (),
        serve: str | Iterable[str] = (),
        recipe: str | None = None,
        **lora: Any,
    ) -> None:
        super().__init__(chunked_loss, skip_checks)
        self.serve = check_servers(serve)
        self.settings = LoraSettings.from_arguments(
            quantization=quantization,
            peft_config=peft_config,
            adapter=adapter,
            compute_dtype=compute_dtype,
            upcast=upcast,
            adapter_name=adapter_name,
            experts=experts,
            strict=strict,
            trainable_dtype=trainable_dtype,
            frozen=frozen,
            fused=fused,
            allow_format=allow_format,
            recipe=recipe,
            **lora,
        )

    def _prepare(self, trainer: Trainer, model: nn.Module) -> nn.Module:
        prepared = prepare(
            model,
            self.settings,
            seed=trainer.args.seed,
            autocast=uses_autocast(trainer),
            progress=self._make_progress(trainer),
        )
        preference.keep_reference(trainer, prepared, self.settings)
        self.report = make_report(prepared)
        if trainer.is_world_process_zero():
            get_logger().info(self.report.line())
            warn_unserved(prepared, self.settings.adapter_name, self.serve)
        return prepared


class Int8PreparationCallback(_PreparingCallback):
    """Quantizes and prepares the base model of a Trainer, for models that get their adapters elsewhere.

    A plain model is quantized, frozen, and marked as transformers marks a model that was loaded quantized.
    In a `peft.PeftModel` (TRL's ``peft_config=`` makes one) the base layers under the adapters are quantized; the
    adapters' weights, names and trainability stay, and merging works.

    Args:
        quantization: The backend, by default ``"int8"``.
        compute_dtype: See `prepare_model`.
        upcast: See `prepare_model`.
        strict: Whether a name in the adapters' configuration that matches nothing is an error; else it is a warning.
        frozen: See `prepare_model`.
        fused: See `prepare_model`.
        allow_format: See `prepare_model`.
        chunked_loss: Whether a causal language model computes its loss some rows at a time, never holding the
            logits of a whole batch.
        skip_checks: Names of checks that are switched off, such as ``"dead-loss"``; docs/checks.md lists them.
    """

    def __init__(
        self,
        quantization: str | Mapping[str, Any] | Quantizer = "int8",
        *,
        compute_dtype: Any = "auto",
        upcast: str = "none",
        strict: bool = True,
        frozen: Sequence[str] = (),
        fused: bool = True,
        allow_format: str | None = None,
        chunked_loss: bool = True,
        skip_checks: Iterable[str] = (),
    ) -> None:
        super().__init__(chunked_loss, skip_checks)
        self.settings = LoraSettings.from_arguments(
            quantization=quantization,
            compute_dtype=compute_dtype,
            upcast=upcast,
            strict=strict,
            frozen=frozen,
            fused=fused,
            allow_format=allow_format,
        )

    def _prepare(self, trainer: Trainer, model: nn.Module) -> nn.Module:
        prepared = prepare_plain(
            model, self.settings, autocast=uses_autocast(trainer), progress=self._make_progress(trainer)
        )
        self.report = make_report(prepared)
        return prepared

    def _check_model(self, model: nn.Module) -> None:
        """Raise `ModelReplaced` unless the model is quantized; adapters may have wrapped it since."""
        found = detect_quantization(model)
        if found is None:
            raise ModelReplaced(
                f"The model in the Trainer ({type(model).__name__}) is not quantized: something put another one in "
                "after the Trainer was made."
            )


class ParameterReportCallback(TrainerCallback):  # type: ignore[misc]
    """Reports at the start of training what will be trained and what it weighs.

    A table on the terminal (elsewhere one line, unless `LoraCallback` has printed it),
    ``parameter_report.json`` in the output folder, and scalars to whatever the Trainer reports to; on the main
    process only. Names in an adapter's configuration that match nothing are an error.

    Args:
        strict: Whether such names are an error; else they are a warning.

    Attributes:
        report: The last report; displays as a table in a notebook.
    """

    def __init__(self, *, strict: bool = True) -> None:
        self.strict = strict
        self.report: ParameterReport | None = None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        model: Any = kwargs.get("model")
        for config in getattr(model, "peft_config", {}).values():
            check_names(model, config, strict=self.strict)
        if not state.is_world_process_zero:
            return
        trainer = find_trainer(self)
        self.report = make_report(trainer.model)
        told = any(isinstance(known, LoraCallback) for known in trainer.callback_handler.callbacks)
        if is_shown():
            self.report.print(table_only=told)
        self.report.save(Path(args.output_dir) / "parameter_report.json")
        _send_scalars(trainer, self, self.report.scalars(), kwargs)


def _send_scalars(trainer: Trainer, sender: TrainerCallback, scalars: dict[str, float], kwargs: dict[str, Any]) -> None:
    """Send scalars to all trackers, transformers' own and others, through ``on_log``.

    ``trainer.log`` would do, and would also print them as one long dictionary between the progress bars.
    """
    for callback in trainer.callback_handler.callbacks:
        if callback is not sender and not _is_display(callback):
            callback.on_log(trainer.args, trainer.state, trainer.control, logs=dict(scalars), **kwargs)


def _is_display(callback: TrainerCallback) -> bool:
    """Whether a callback shows logs on the screen, as the progress bars of transformers and TRL do."""
    place = type(callback).on_log.__module__
    own = place.startswith(("transformers.", "trl.")) and not place.startswith("transformers.integrations")
    return own or isinstance(callback, (PrinterCallback, ProgressCallback))


__all__ = [
    "Int8PreparationCallback",
    "LoraCallback",
    "ParameterReportCallback",
    "Preparation",
    "PreparationError",
    "check_checkpoint",
    "restore_best",
]

"""`PushToRegistryCallback`: publish the adapter when training ends."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from peft import PeftModel
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from registry.errors import InvalidAdapter, RegistryError
from registry.formats.paths import ADAPTER_CONFIG
from registry.formats.references import BUMPS, check_name, parse_version
from registry.hubs.protocol import Hub
from registry.publishing.collected import Run
from registry.publishing.publish import Published
from registry.publishing.push import check_push, push_adapter
from registry.publishing.training_facts import metrics_in

__all__ = ["PushToRegistryCallback"]

_log = logging.getLogger(__name__)
#: Folder below the output folder for an adapter that could not be published.
UNPUBLISHED = "unpublished-adapter"
#: Options of `push_adapter` that can be checked before training.
_CHECKED = ("adapter_name", "allow", "base_aliases", "base_model", "serve", "token")


class PushToRegistryCallback(TrainerCallback):  # type: ignore[misc]
    """Publishes the adapter when training ends: one push from one process, with metrics, card and loss curve.

    Name, version and base model are checked when training begins. If the push fails, the adapter is saved below the
    output folder and the error names the folder.

    Args:
        name: ``org/name``.
        version: A version, or ``"patch"``, ``"minor"``, ``"major"`` to increment the newest one.
        when: ``"end"`` publishes the state after the last step (or the best checkpoint, if the Trainer loads that at
            the end); ``"best"`` always publishes the best checkpoint.
        metrics: Results for manifest and card; by default, with the best checkpoint those of its evaluation, else those
            of the last evaluation.
        hub: The registry; see `push_adapter`.
        **options: For `push_adapter`: ``token``, ``private``, ``base_model``, ``allow``, ``commit_message``, …

    Attributes:
        published: The published release; ``None`` before, and on all processes but the first.
    """

    def __init__(
        self,
        name: str,
        *,
        version: str = "patch",
        when: Literal["end", "best"] = "end",
        metrics: Mapping[str, float] | None = None,
        hub: Hub | str | os.PathLike[str] | None = None,
        **options: Any,
    ) -> None:
        check_name(name)
        if version not in BUMPS:
            parse_version(version)
        if when not in ("end", "best"):
            raise ValueError(f"when={when!r} must be 'end' or 'best'")
        self.name = name
        self.version = version
        self.when = when
        self.metrics = metrics
        self.hub = hub
        self.options = options
        self.published: Published | None = None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Check that the adapter can be published later."""
        if self.when == "best" and args.eval_strategy == "no":
            raise InvalidAdapter("when='best' needs evaluations that say which checkpoint is best: set eval_strategy")
        if not state.is_world_process_zero:
            return
        told = {key: self.options[key] for key in _CHECKED if key in self.options}
        check_push(_find_peft_model(kwargs.get("model")), self.name, version=self.version, hub=self.hub, **told)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Publish the adapter."""
        if not state.is_world_process_zero:
            return
        model = kwargs.get("model")
        try:
            source = self._choose_source(args, state, model, kwargs.get("processing_class"))
            metrics = (
                self.metrics if self.metrics is not None else _find_best_metrics(state) if self._is_best(args) else None
            )
            self.published = push_adapter(
                source, self.name, version=self.version, hub=self.hub, metrics=metrics, **self.options
            )
        except RegistryError as error:
            raise self._keep(error, args, model) from error
        _log.info("Published %s (%s)", self.published, self.published.commit[:12])

    def _is_best(self, args: TrainingArguments) -> bool:
        return self.when == "best" or bool(args.load_best_model_at_end)

    def _choose_source(self, args: TrainingArguments, state: TrainerState, model: Any, tokenizer: Any) -> Run | Path:
        loaded = self.when == "end" or args.load_best_model_at_end
        if loaded and not _is_spread(model):
            return Run(_find_peft_model(model), args, state, tokenizer)
        folder = state.best_model_checkpoint if self._is_best(args) else None
        folder = folder or Path(args.output_dir, f"checkpoint-{state.global_step}")
        if self.when == "best" and state.best_model_checkpoint is None:
            raise InvalidAdapter(
                "The run has no best checkpoint: set metric_for_best_model, and save where it evaluates"
            )
        if not Path(folder, ADAPTER_CONFIG).is_file():
            raise InvalidAdapter(
                f"The model is spread over processes and {folder} holds no adapter: let the Trainer save at its last "
                "step (save_strategy)"
            )
        return Path(folder)

    def _keep(self, error: RegistryError, args: TrainingArguments, model: Any) -> RegistryError:
        """Save the adapter, and return the error with its folder in the message."""
        folder = Path(args.output_dir, UNPUBLISHED)
        if _is_spread(model):
            return error
        try:
            _find_peft_model(model).save_pretrained(str(folder))
        except Exception as other:
            return type(error)(f"{error} The adapter could not be saved to {folder} either: {other}")
        return type(error)(
            f"{error} The adapter was not published; it is in {folder}. Publish it with: lora-plugins push "
            f"{folder} {self.name} --version {self.version}"
        )


def _find_peft_model(model: Any) -> Any:
    while model is not None and not isinstance(model, PeftModel):
        model = getattr(model, "module", getattr(model, "_orig_mod", None))
    if model is None:
        raise InvalidAdapter("The Trainer's model has no adapters; put LoraCallback before PushToRegistryCallback")
    return model


def _is_spread(model: Any) -> bool:
    """Whether the weights are sharded across processes."""
    return any(hasattr(parameter, "placements") or hasattr(parameter, "ds_id") for parameter in model.parameters())


def _find_best_metrics(state: TrainerState) -> dict[str, float] | None:
    """Return the metrics of the best checkpoint's evaluation."""
    step = getattr(state, "best_global_step", None)
    entries: Sequence[Mapping[str, Any]] = [entry for entry in state.log_history if entry.get("step") == step]
    found = {key: value for entry in entries for key, value in metrics_in(entry).items()}
    return found or None

"""Find run id and address in the experiment trackers of a Trainer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from transformers import Trainer
from transformers.integrations import get_reporting_integration_callbacks

__all__ = ["describe_trackers"]

#: transformers' callbacks end in this; the rest of the name is the tracker's.
_ENDING = "Callback"


def describe_trackers(trainer: Trainer) -> list[dict[str, str]] | str:
    """Return name, run id and address of each tracker; ``"none"`` for a run that reports to none."""
    found = [entry for callback in trainer.callback_handler.callbacks if (entry := _describe(callback))]
    return found or "none"


def _describe(callback: Any) -> dict[str, str] | None:
    place, name = type(callback).__module__, type(callback).__name__
    if not place.startswith(get_reporting_integration_callbacks.__module__.rpartition(".")[0]):
        return None
    read = _READERS.get(name, _read_nothing)
    return {"name": name.removesuffix(_ENDING).lower(), **{k: str(v) for k, v in read(callback).items() if v}}


def _read_nothing(callback: Any) -> dict[str, Any]:
    return {}


def _read_wandb(callback: Any) -> dict[str, Any]:
    run = getattr(getattr(callback, "_wandb", None), "run", None)
    return {} if run is None else {"id": run.id, "url": run.url}


def _read_mlflow(callback: Any) -> dict[str, Any]:
    library = getattr(callback, "_ml_flow", None)
    run = library.active_run() if library is not None else None
    if library is None or run is None:
        return {}
    place = f"/#/experiments/{run.info.experiment_id}/runs/{run.info.run_id}"
    return {"id": run.info.run_id, "url": library.get_tracking_uri() + place}


#: What is read from the callbacks of transformers 5.23 that know a run id.
_READERS: dict[str, Callable[[Any], dict[str, Any]]] = {"MLflowCallback": _read_mlflow, "WandbCallback": _read_wandb}

"""Collect facts about a training from a Trainer or a checkpoint."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

from registry.formats.fields import is_finite

__all__ = [
    "LINEAGE",
    "UNKNOWN",
    "last_evaluation",
    "libraries",
    "metrics_in",
    "of_checkpoint",
    "of_run",
    "read_base_format",
    "read_quantization",
    "read_quantized_share",
]

#: Arguments that describe the training; others may hold paths, machine names or tokens.
_ARGUMENTS = (
    "adam_beta1", "adam_beta2", "adam_epsilon", "bf16", "fp16", "gradient_accumulation_steps", "gradient_checkpointing",
    "label_smoothing_factor", "learning_rate", "lr_scheduler_type", "max_grad_norm", "neftune_noise_alpha",
    "num_train_epochs", "optim", "per_device_train_batch_size", "seed", "warmup_ratio", "warmup_steps", "weight_decay",
)  # fmt: skip
_LIBRARIES = ("lora-plugins", "torch", "transformers", "peft", "accelerate", "bitsandbytes", "datasets", "trl")
#: Attribute of a prepared model that says how its base is stored.
_FACTS = "lora_plugins_facts"
#: Attribute of a model in training that says what it is trained from.
LINEAGE = "lora_plugins_lineage"
#: Recorded for a model that was not prepared by lora-plugins.
UNKNOWN = "not known"
_MAX_STATE = 64 * 1024 * 1024
_STATE = "trainer_state.json"
_TIMES = ("_runtime", "_per_second")


def of_run(args: Any, state: Any) -> tuple[dict[str, Any], list[Any]]:
    """Return facts about a training so far, and its log, from the Trainer's arguments and state."""
    facts = _read_state_facts(vars(state))
    arguments = {key: _convert_to_json(getattr(args, key, None)) for key in _ARGUMENTS}
    facts["arguments"] = {key: value for key, value in arguments.items() if value is not None}
    facts["processes"] = int(getattr(args, "world_size", 1))
    return facts, list(state.log_history)


def of_checkpoint(folder: Path) -> tuple[dict[str, Any], list[Any]]:
    """Return facts and log of a checkpoint; both empty if it has no readable state."""
    file = folder / _STATE
    try:
        if file.is_symlink() or file.stat().st_size > _MAX_STATE:
            return {}, []
        # The Trainer (transformers 5.23) writes NaN for a loss that is not finite, so the strict parser cannot be used.
        state = json.loads(file.read_bytes())
    except (OSError, ValueError, RecursionError):
        return {}, []
    if not isinstance(state, dict):
        return {}, []
    log = state.get("log_history")
    return _read_state_facts(state), log if isinstance(log, list) else []


def _read_state_facts(state: Mapping[str, Any]) -> dict[str, Any]:
    names = {"global_step": "steps", "epoch": "epochs", "num_input_tokens_seen": "tokens", "total_flos": "flos"}
    found = {names[key]: state.get(key) for key in names}
    facts = {name: value for name, value in found.items() if is_finite(value) and value}
    return {**facts, "batch_size": state["train_batch_size"]} if is_finite(state.get("train_batch_size")) else facts


def read_quantization(model: Any) -> str | dict[str, Any]:
    """Return how the base of a model was quantized in training, as recorded when the model was prepared.

    A prepared model carries this as plain data in ``lora_plugins_facts``. Layers are not inspected, because their class
    names do not reveal their options.

    Returns:
        Name and options of a backend, ``"none"`` for a float base, or ``"not known"`` for a model prepared elsewhere.
    """
    facts = getattr(model, _FACTS, None)
    if not isinstance(facts, dict) or facts.get("known") is not True or "quantization" not in facts:
        return UNKNOWN
    stored = facts["quantization"]
    if stored is None:
        return "none"
    if not isinstance(stored, dict) or not isinstance(stored.get("name"), str):
        return UNKNOWN
    options = stored.get("options")
    return {**(options if isinstance(options, dict) else {}), "name": stored["name"]}


def read_quantized_share(model: Any) -> float | None:
    """Return the share of a model's weights that quantized layers hold, 0 to 1; ``None`` if it is not known or none."""
    facts = getattr(model, _FACTS, None)
    share = facts.get("share") if isinstance(facts, dict) else None
    return share if isinstance(share, float) and 0 <= share <= 1 else None


def read_base_format(model: Any) -> str | None:
    """Return the storage format of the base's files where its weights were dequantized while it was loaded."""
    facts = getattr(model, _FACTS, None)
    stored = facts.get("stored") if isinstance(facts, dict) else None
    return stored if isinstance(stored, str) else None


def libraries() -> dict[str, str]:
    """Return the installed versions of the libraries used in training."""
    return {name: version for name in _LIBRARIES if (version := _find_version(name)) is not None}


def _find_version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def last_evaluation(log: Sequence[Any]) -> dict[str, float]:
    """Return the metrics of the last evaluation in a log."""
    for entry in reversed(log):
        found = metrics_in(entry) if isinstance(entry, Mapping) else {}
        if found:
            return found
    return {}


def metrics_in(entry: Mapping[str, Any]) -> dict[str, float]:
    """Return the evaluation results in one log entry, without timings."""
    return {
        str(key): float(value)
        for key, value in entry.items()
        if str(key).startswith("eval_") and not str(key).endswith(_TIMES) and is_finite(value)
    }


def _convert_to_json(value: Any) -> Any:
    value = getattr(value, "value", value)
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value if isinstance(value, (bool, int, float, str)) else None

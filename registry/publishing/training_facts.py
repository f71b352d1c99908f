"""What a release says about its training: read from a Trainer, or from what one left in a checkpoint."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from functools import cached_property
from importlib import metadata
from pathlib import Path
from typing import Any

__all__ = ["Training", "finite", "libraries", "of_checkpoint", "of_run", "quantization_of"]

#: Arguments that describe the training; others hold paths, names of machines, tokens.
_ARGUMENTS = (
    "adam_beta1", "adam_beta2", "adam_epsilon", "bf16", "fp16", "gradient_accumulation_steps", "gradient_checkpointing",
    "label_smoothing_factor", "learning_rate", "lr_scheduler_type", "max_grad_norm", "neftune_noise_alpha",
    "num_train_epochs", "optim", "per_device_train_batch_size", "seed", "warmup_ratio", "warmup_steps", "weight_decay",
)  # fmt: skip
_LIBRARIES = ("lora-plugins", "torch", "transformers", "peft", "accelerate", "bitsandbytes", "datasets", "trl")
#: Packages whose layers or tensors are quantized.
_QUANTIZERS = ("bitsandbytes", "hqq", "optimum", "torchao")
_MAX_STATE = 64 * 1024 * 1024
_STATE = "trainer_state.json"


class Training:
    """Facts about a training, and its log.

    Attributes:
        facts: What the manifest gets, JSON values.
        log: The Trainer's log history, for the loss curve.
        metrics: The last evaluation's.
    """

    def __init__(self, facts: Mapping[str, Any] | None = None, log: Sequence[Mapping[str, Any]] = ()) -> None:
        self.facts = dict(facts or {})
        self.log = [dict(entry) for entry in log if isinstance(entry, Mapping)]
        self.metrics = _last_evaluation(self.log)

    @cached_property
    def curve(self) -> bytes | None:
        """The loss curve as a picture, if there is one; drawn once, however often a push is tried."""
        from registry.publishing.card import loss_curve

        return loss_curve(self.log)


def of_run(args: Any, state: Any) -> Training:
    """The facts about a training so far, from the Trainer's arguments and state."""
    facts = _state_facts(vars(state))
    arguments = {key: _plain(getattr(args, key, None)) for key in _ARGUMENTS}
    facts["arguments"] = {key: value for key, value in arguments.items() if value is not None}
    facts["processes"] = int(getattr(args, "world_size", 1))
    return Training(facts, state.log_history)


def of_checkpoint(folder: Path) -> Training:
    """The facts in a checkpoint; none where there is no readable state."""
    file = folder / _STATE
    try:
        if file.is_symlink() or file.stat().st_size > _MAX_STATE:
            return Training()
        # The Trainer writes NaN for a loss that is none.
        state = json.loads(file.read_bytes())
    except (OSError, ValueError, RecursionError):
        return Training()
    if not isinstance(state, dict):
        return Training()
    log = state.get("log_history")
    return Training(_state_facts(state), log if isinstance(log, list) else ())


def _state_facts(state: Mapping[str, Any]) -> dict[str, Any]:
    names = {"global_step": "steps", "epoch": "epochs", "num_input_tokens_seen": "tokens", "total_flos": "flos"}
    found = {names[key]: state.get(key) for key in names}
    facts = {name: value for name, value in found.items() if finite(value) and value}
    return {**facts, "batch_size": state["train_batch_size"]} if finite(state.get("train_batch_size")) else facts


def quantization_of(model: Any) -> str | None:
    """How the base of a model is quantized: the name of the method, and its bits where it says so."""
    config = getattr(getattr(model, "config", None), "quantization_config", None)
    if config is not None:
        values = config if isinstance(config, Mapping) else vars(config)
        method = values.get("quant_method", "unknown")
        bits = "4-bit" if values.get("load_in_4bit") or values.get("_load_in_4bit") else ""
        bits = "8-bit" if values.get("load_in_8bit") or values.get("_load_in_8bit") else bits
        return " ".join(filter(None, (str(getattr(method, "value", method)), bits)))
    packages = {_package(module) for module in model.modules() if hasattr(module, "weight")}
    kinds = {type(module).__name__ for module in model.modules()}
    bits = "8-bit" if "Linear8bitLt" in kinds else "4-bit" if "Linear4bit" in kinds else ""
    return " ".join(filter(None, (*sorted(packages & set(_QUANTIZERS)), bits))) or None


def _package(module: Any) -> str:
    """The package that a layer's weight, or the layer itself, comes from."""
    own = type(module.weight).__module__.partition(".")[0]
    return own if own in _QUANTIZERS else type(module).__module__.partition(".")[0]


def libraries() -> dict[str, str]:
    """The versions of the libraries that took part."""
    return {name: version for name in _LIBRARIES if (version := _version(name)) is not None}


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def finite(value: object) -> bool:
    """Whether it is a number that JSON has."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _last_evaluation(log: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    told = ("_runtime", "_per_second")
    for entry in reversed(log):
        found = {k: float(v) for k, v in entry.items() if str(k).startswith("eval_") and finite(v)}
        if found:
            return {key: value for key, value in found.items() if not key.endswith(told)}
    return {}


def _plain(value: Any) -> Any:
    value = getattr(value, "value", value)
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value if isinstance(value, (bool, int, float, str)) else None

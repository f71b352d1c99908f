"""Record a run's lineage on its model, and write it beside the adapter."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from peft import PeftModel
from transformers import Trainer

from lora_plugins.adapters.files import find_adapter_file
from lora_plugins.adapters.lineage.environment import describe_code, describe_hardware, describe_libraries
from lora_plugins.adapters.lineage.facts import Facts, NotKnown, explain
from lora_plugins.adapters.lineage.parents import read_parent
from lora_plugins.adapters.lineage.rows import describe_rows
from lora_plugins.adapters.lineage.trackers import describe_trackers
from lora_plugins.quantization.request import detect_quantization
from lora_plugins.text import write_json
from registry import LINEAGE_FILE, LINEAGE_WEIGHTS, clean_lineage, read_lineage

__all__ = [
    "begin_lineage",
    "continue_lineage",
    "declare_lineage",
    "describe_log",
    "read_recorded",
    "update_lineage",
    "write_lineage",
]

#: Attribute of a model in training; the registry publishes it.
_ATTRIBUTE = "lora_plugins_lineage"
#: Attribute with what the program that trains knows better than its Trainer.
_DECLARED = "lora_plugins_lineage_declared"
#: Attribute with the lineage of the checkpoint that the run goes on from.
_BEFORE = "lora_plugins_lineage_before"
#: Key of the names of the adapters that were trained; only on the model.
_ADAPTERS = "adapters"
#: Losses that are recorded; the log of a longer run is thinned, except for its first steps.
_MOST_LOSSES, _FIRST_LOSSES = 400, 200
#: What may differ in a part of a run that was resumed.
_COMPARED = ("libraries", "hardware", "code")
_SCRIPT = "the Trainer was made by a script, not by lora-plugins train"


def declare_lineage(model: Any, facts: Mapping[str, Any] | Callable[[], Mapping[str, Any]]) -> None:
    """Note before a training what its program knows better than the Trainer: fields of the lineage.

    Args:
        model: The model in the Trainer.
        facts: Fields, such as ``recipe``; ``not_recorded`` has reasons. Or what returns them: if it fails, the recipe
            is not recorded.
    """
    try:
        declared = dict(facts() if callable(facts) else facts)
    except Exception as error:
        declared = {"not_recorded": {"recipe": explain(error)}}
    setattr(model, _DECLARED, declared)


def continue_lineage(model: Any, folder: Path, *, finished: bool = False) -> None:
    """Note the lineage in the checkpoint that a run goes on from.

    Args:
        model: The model in the Trainer.
        folder: The checkpoint.
        finished: Whether nothing is left to train, so that its lineage is that of the model.
    """
    names = _list_adapters(model)
    files = [file for name in names if (file := find_adapter_file(folder, name)) is not None]
    place = next((file.parent for file in files if (file.parent / LINEAGE_FILE).is_file()), None)
    if place is not None:
        found = read_lineage(place)
        setattr(model, _ATTRIBUTE if finished else _BEFORE, {**found, _ADAPTERS: names} if finished else found)


def begin_lineage(trainer: Trainer, checks: Mapping[str, Any] | None = None) -> None:
    """Record on the Trainer's model what the run is trained from; on the main process only.

    What cannot be read is not recorded, with the reason; the run goes on.

    Args:
        trainer: The Trainer, at the beginning of its training.
        checks: Names of the checks that are on, and of those that are switched off.
    """
    if not trainer.is_world_process_zero():
        return
    model = trainer.model
    declared: Mapping[str, Any] = getattr(model, _DECLARED, {})
    facts = Facts(reasons={"recipe": _SCRIPT, "losses": "nothing was logged yet"})
    facts.read("seed", lambda: _describe_seed(trainer.args))
    _read_data(facts, trainer, "inputs" if "dataset" in declared else "dataset")
    facts.read("code", lambda: _require(declared.get("code") or describe_code(None, "the script")))
    facts.read("tracker", lambda: describe_trackers(trainer))
    facts.read("hardware", lambda: describe_hardware(trainer.args))
    facts.read("libraries", lambda: describe_libraries(_list_required(model)))
    facts.read("parent", lambda: read_parent(model, trained=hasattr(model, _ATTRIBUTE)))
    facts.found |= {"checks": dict(checks)} if checks is not None else {}
    facts.reasons |= declared.get("not_recorded", {})
    facts.found |= {name: value for name, value in declared.items() if name not in ("not_recorded", "code")}
    before = vars(model).pop(_BEFORE, None)
    if trainer.state.global_step and before is None:
        facts.take("parent", {"not_recorded": {"parent": "the checkpoint that the run goes on from has no lineage"}})
    elif trainer.state.global_step:
        change = _compare(before, facts.found, trainer.state.global_step)
        facts.found["resumed"] = [*before.get("resumed", []), change]
        facts.take("parent", before)
    setattr(model, _ATTRIBUTE, {**facts.found, "not_recorded": facts.reasons, _ADAPTERS: _list_adapters(model)})


def _list_adapters(model: Any) -> list[str]:
    """Return the names of the adapters that a model trains."""
    return list(model.active_adapters) if isinstance(model, PeftModel) else []


def _list_required(model: Any) -> Sequence[str]:
    """Return the distributions that the quantization backend of a model's base needs."""
    quantization = detect_quantization(model)
    return quantization.quantizer.requires if quantization is not None else ()


def _require(value: Any) -> Any:
    """Return a value; raise `NotKnown` for a text, which is the reason why there is none."""
    if isinstance(value, str):
        raise NotKnown(value)
    return value


def _read_data(facts: Facts, trainer: Trainer, name: str) -> None:
    parts = {"train": trainer.train_dataset, "eval": trainer.eval_dataset}
    described = Facts()
    described.read(name, lambda: describe_rows({part: data for part, data in parts.items() if data is not None}))
    facts.reasons |= described.reasons
    if name in described.found:
        facts.found[name], missing = described.found[name]
        # What the program declared about its rows, it has declared about the tokenized ones as well.
        facts.reasons |= {f"{name}.{key}": why for key, why in missing.items()} if name == "dataset" else {}


def _describe_seed(args: Any) -> Any:
    return args.seed if args.data_seed is None else {"seed": args.seed, "data": args.data_seed}


def _compare(before: Mapping[str, Any], now: Mapping[str, Any], step: int) -> dict[str, Any]:
    """Return what is other in the rest of a run than in the part up to a step."""
    changed = {}
    for name in _COMPARED:
        one, two = before.get(name, {}), now.get(name, {})
        for key in sorted({*one, *two}):
            if one.get(key) != two.get(key):
                changed[f"{name}.{key}"] = [one.get(key, "none"), two.get(key, "none")]
    return {"step": step, "changed": changed}


def describe_log(history: Sequence[Mapping[str, Any]]) -> dict[str, list[Any]]:
    """Return step, loss and norm of the gradient of the training steps in a Trainer's log, thinned if they are many."""
    entries = [entry for entry in history if "loss" in entry and "step" in entry]
    rest = entries[_FIRST_LOSSES:]
    stride = max(1, -(-len(rest) // (_MOST_LOSSES - _FIRST_LOSSES)))
    entries = entries[:_FIRST_LOSSES] + rest[stride - 1 :: stride]
    return {name: [entry.get(name) for entry in entries] for name in ("step", "loss", "grad_norm") if entries}


def update_lineage(trainer: Trainer) -> None:
    """Add the losses so far to the lineage of the Trainer's model."""
    found = getattr(trainer.model, _ATTRIBUTE, None)
    losses = describe_log(trainer.state.log_history)
    if found is not None and losses:
        found["losses"] = losses


def read_recorded(model: Any) -> dict[str, Any] | None:
    """Return the lineage on a model, without names of this machine; ``None`` if no training recorded one."""
    found = getattr(model, _ATTRIBUTE, None)
    if found is None:
        return None
    try:
        return clean_lineage(found)
    except Exception as error:
        return clean_lineage(None, explain(error))


def write_lineage(model: Any, folder: Path, names: Sequence[str] | None = None) -> None:
    """Write the lineage of a model beside each trained adapter in a folder; remove those of other weights there.

    Args:
        model: The model.
        folder: The folder that it was saved in.
        names: Names of the adapters that were saved; all by default.

    Raises:
        OSError: The folder cannot be written.
    """
    if not isinstance(model, PeftModel):
        return
    found = read_recorded(model)
    trained = getattr(model, _ATTRIBUTE, {}).get(_ADAPTERS, ())
    for name in model.peft_config if names is None else names:
        file = find_adapter_file(folder, name)
        if file is None or (name != "default" and file.parent == folder and "default" in model.peft_config):
            continue
        with open(file, "rb") as weights:
            digest = hashlib.file_digest(weights, "sha256").hexdigest()
        if found is not None and name in trained:
            write_json(file.parent / LINEAGE_FILE, {**found, LINEAGE_WEIGHTS: digest})
        else:
            _remove_other(file.parent / LINEAGE_FILE, digest)


def _remove_other(file: Path, digest: str) -> None:
    """Remove the lineage of other weights."""
    try:
        known = json.loads(file.read_bytes())
    except FileNotFoundError:
        return
    except (OSError, ValueError, RecursionError):
        known = None
    if not isinstance(known, dict) or known.get(LINEAGE_WEIGHTS) != digest:
        file.unlink(missing_ok=True)

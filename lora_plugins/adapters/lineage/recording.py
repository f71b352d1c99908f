"""Record a run's lineage on its model, and write it beside the adapter."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from peft import PeftModel
from transformers import Trainer

from lora_plugins.adapters.files import ADAPTER_FILE, adapter_folder, find_adapter_file
from lora_plugins.adapters.lineage.environment import describe_code, describe_hardware, describe_libraries
from lora_plugins.adapters.lineage.rows import describe_rows
from lora_plugins.adapters.lineage.trackers import describe_trackers
from lora_plugins.quantization.request import detect_quantization
from lora_plugins.text import write_json
from registry import LINEAGE_FILE, clean_lineage, is_path, read_lineage

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
#: Losses that are recorded; the log of a longer run is thinned, except for its first steps.
_MOST_LOSSES, _FIRST_LOSSES = 400, 200
#: What may differ in a part of a run that was resumed.
_COMPARED = ("libraries", "hardware", "code")
_SCRIPT = "the Trainer was made by a script, not by lora-plugins train"


def declare_lineage(model: Any, facts: Mapping[str, Any]) -> None:
    """Note before a training what its program knows better than the Trainer: fields of the lineage.

    Args:
        model: The model in the Trainer.
        facts: Fields, such as ``recipe``; ``not_recorded`` has reasons.
    """
    setattr(model, _DECLARED, dict(facts))


def continue_lineage(model: Any, folder: Path, *, finished: bool = False) -> None:
    """Note the lineage in the checkpoint that a run goes on from.

    Args:
        model: The model in the Trainer.
        folder: The checkpoint.
        finished: Whether nothing is left to train, so that its lineage is that of the model.
    """
    if (folder / LINEAGE_FILE).is_file():
        setattr(model, _ATTRIBUTE if finished else _BEFORE, read_lineage(folder))


def begin_lineage(trainer: Trainer, adapter: Any = None, checks: Mapping[str, Any] | None = None) -> None:
    """Record on the Trainer's model what the run is trained from; on the main process only.

    Args:
        trainer: The Trainer, at the beginning of its training.
        adapter: The adapter that the run continues from: a folder or a reference.
        checks: Names of the checks that run, and of those that are switched off.
    """
    if not trainer.is_world_process_zero():
        return
    model = trainer.model
    declared: Mapping[str, Any] = getattr(model, _DECLARED, {})
    found: dict[str, Any] = {"seed": _describe_seed(trainer.args)}
    reasons: dict[str, str] = {}
    _add_data(found, reasons, trainer, "inputs" if "dataset" in declared else "dataset")
    reasons["recipe"] = _SCRIPT
    _add(found, reasons, "code", describe_code(None, "the script") if "code" not in declared else declared["code"])
    found["tracker"] = describe_trackers(trainer)
    found["hardware"], found["libraries"] = describe_hardware(trainer.args), describe_libraries(_list_required(model))
    found["parent"] = _describe_parent(adapter)
    found |= {"checks": dict(checks)} if checks is not None else {}
    reasons["losses"] = "nothing was logged yet"
    reasons |= declared.get("not_recorded", {})
    found |= {name: value for name, value in declared.items() if name not in ("not_recorded", "code")}
    before = vars(model).pop(_BEFORE, None)
    if before is not None and trainer.state.global_step:
        found["resumed"] = [*before.get("resumed", []), _compare(before, found, trainer.state.global_step)]
        found |= {"parent": before["parent"]} if "parent" in before else {}
    setattr(model, _ATTRIBUTE, {**found, "not_recorded": reasons})


def _list_required(model: Any) -> Sequence[str]:
    """Return the distributions that the quantization backend of a model's base needs."""
    quantization = detect_quantization(model)
    return quantization.quantizer.requires if quantization is not None else ()


def _add(found: dict[str, Any], reasons: dict[str, str], name: str, facts: Any) -> None:
    """Put facts under a name; a text is the reason why there are none."""
    if isinstance(facts, str):
        reasons[name] = facts
    else:
        found[name] = facts


def _add_data(found: dict[str, Any], reasons: dict[str, str], trainer: Trainer, name: str) -> None:
    found[name] = {}
    for part, data in (("train", trainer.train_dataset), ("eval", trainer.eval_dataset)):
        if data is not None:
            found[name][part], missing = describe_rows(data)
            if name == "dataset":
                reasons.update({f"{name}.{part}.{key}": why for key, why in missing.items()})


def _describe_seed(args: Any) -> Any:
    return args.seed if args.data_seed is None else {"seed": args.seed, "data": args.data_seed}


def _describe_parent(adapter: str | os.PathLike[str] | None) -> dict[str, Any] | str:
    """Return which adapter the run continues from."""
    if adapter is None:
        return "none"
    folder = adapter_folder(adapter)
    with open(folder / ADAPTER_FILE, "rb") as file:
        found: dict[str, Any] = {"sha256": hashlib.file_digest(file, "sha256").hexdigest()}
    manifest = folder / "adapter_manifest.json"
    if not manifest.is_file():
        return found
    content = manifest.read_bytes()
    found |= {"version": json.loads(content).get("version"), "manifest": hashlib.sha256(content).hexdigest()}
    return {"name": str(adapter).partition("@")[0], **found} if not is_path(adapter) else found


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
    names = {"step": "step", "loss": "loss", "grad_norm": "grad_norm"}
    return {name: [entry.get(key) for entry in entries] for name, key in names.items() if entries}


def update_lineage(trainer: Trainer) -> None:
    """Add the losses so far to the lineage of the Trainer's model."""
    found = getattr(trainer.model, _ATTRIBUTE, None)
    losses = describe_log(trainer.state.log_history)
    if found is not None and losses:
        found["losses"] = losses


def read_recorded(model: Any) -> dict[str, Any] | None:
    """Return the lineage on a model, without names of this machine; ``None`` if no training recorded one."""
    found = getattr(model, _ATTRIBUTE, None)
    return None if found is None else clean_lineage(found)


def write_lineage(model: Any, folder: Path) -> None:
    """Write the lineage of a model beside each trained adapter in a folder.

    Raises:
        OSError: The folder cannot be written.
    """
    found = read_recorded(model)
    if found is None or not isinstance(model, PeftModel):
        return
    for name in model.active_adapters:
        file = find_adapter_file(folder, name)
        if file is not None:
            write_json(file.parent / LINEAGE_FILE, found)

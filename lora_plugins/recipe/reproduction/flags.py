"""Describe a run as flags of ``train``, without its folders."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

from transformers import TrainingArguments

import lora_plugins
from lora_plugins.adapters.lineage.environment import describe_code
from lora_plugins.adapters.lineage.rows import describe_rows
from lora_plugins.recipe.arguments import RecipeArguments
from lora_plugins.recipe.data import is_local
from lora_plugins.recipe.output import DECISIVE, make_plain
from lora_plugins.recipe.parser import make_parser
from registry import is_path

__all__ = ["LOCAL_FLAGS", "UNRECORDED", "describe_recipe", "describe_run", "is_local_flag"]

#: Flags that say where a run reads and writes, how much it says, and whom it tells. They are never recorded, and never
#: taken from a recording. All but `UNRECORDED` leave the weights as they are. ``eval_on_start`` is not one of them: an
#: evaluation draws random numbers.
LOCAL_FLAGS = frozenset(
    {
        "adapter_folder", "ddp_timeout", "deepspeed", "disable_tqdm", "fsdp_config", "hub_always_push",
        "hub_model_id", "hub_private_repo", "hub_revision", "hub_strategy", "hub_token",
        "include_num_input_tokens_seen", "local_rank", "log_level", "log_level_replica", "logging_dir", "merge",
        "model_folder", "num_proc", "output_dir", "project", "push", "push_base_model", "push_to_hub", "report_folder",
        "report_to", "resume", "resume_from_checkpoint", "run_name", "samples", "save_total_limit",
        "skip_memory_metrics", "trackio_bucket_id", "trackio_space_id", "trackio_static_space_id", "world_size",
    }
)  # fmt: skip
#: How the names of such flags begin and end, for those that a later transformers adds.
_LOCAL_STARTS = ("hub_", "push", "report_", "trackio_")
_LOCAL_ENDS = ("_dir", "_folder", "_token")
#: Local flags that affect the weights, and why they are not recorded.
UNRECORDED = {
    "deepspeed": "a configuration of DeepSpeed may name places on the machine",
    "fsdp_config": "a configuration of FSDP may name places on the machine",
}


def is_local_flag(name: str) -> bool:
    """Whether a flag is for the machine that a run is on to decide, so that no recording has it."""
    return name in LOCAL_FLAGS or name.startswith(_LOCAL_STARTS) or name.endswith(_LOCAL_ENDS)


def describe_run(
    recipe: RecipeArguments, training: TrainingArguments, rows: Mapping[str, Any], commit: str | None
) -> dict[str, Any]:
    """Return what the command knows of its run, fields of the lineage: recipe, data set, code.

    Args:
        recipe: Our own arguments.
        training: Arguments of the Trainer.
        rows: The data sets as they were read, by ``"train"`` and ``"eval"``.
        commit: Commit of the base model, if it is known.
    """
    flags, reasons = describe_recipe(recipe, training, commit)
    data, missing = describe_rows(dict(rows))
    reasons |= {f"dataset.{key}": why for key, why in missing.items()}
    code = describe_code(Path(lora_plugins.__file__), "lora-plugins")
    if isinstance(code, str):
        code = "lora-plugins is installed from a package; its version is among the libraries"
    return {"recipe": flags, "dataset": data, "code": code, "not_recorded": reasons}


def describe_recipe(
    recipe: RecipeArguments, training: TrainingArguments, commit: str | None = None
) -> tuple[dict[str, Any], dict[str, str]]:
    """Return the flags that define a run, as ``--config`` takes them, and why one of them is not told.

    Args:
        recipe: Our own arguments.
        training: Arguments of the Trainer.
        commit: Commit of the base model, if it is known.
    """
    ours = {item.name: getattr(recipe, item.name) for item in fields(recipe) if not is_local_flag(item.name)}
    found = {name: value for name, value in ours.items() if value is not None}
    reasons = {}
    if is_path(recipe.model) or Path(recipe.model).exists():
        reasons["recipe.model"] = "the base was read from a folder; its fingerprint is in the manifest"
        del found["model"]
    elif commit is not None:
        found["revision"] = commit
    for name in ("dataset", "eval_dataset"):
        if name in found and is_local(found[name]):
            reasons[f"recipe.{name}"] = "the data were read from a path; their sha256 is recorded"
            del found[name]
    # FSDP without one fills in its defaults.
    used = [name for name in UNRECORDED if getattr(training, "fsdp" if name == "fsdp_config" else name)]
    reasons |= {f"recipe.{name}": UNRECORDED[name] for name in used}
    for name, value in _list_changed(training).items():
        if isinstance(value, (str, int, float, bool, dict, list)):
            found[name] = value
        else:
            reasons[f"recipe.{name}"] = f"a {type(value).__name__} cannot be a flag"
    return found, reasons


def _list_changed(training: TrainingArguments) -> dict[str, Any]:
    """Return the arguments that affect the weights, or are not what the command's defaults make them."""
    # Another TrainingArguments would have the defaults too, and resets the state that this run trains with.
    usual = make_parser()
    # transformers 5.23 moves the value of this flag to another field.
    moved = "activation_checkpointing"
    found = {"gradient_checkpointing": bool(getattr(training, moved, None) or training.gradient_checkpointing)}
    for item in fields(training):
        name, value = item.name, make_plain(getattr(training, item.name))
        usually = make_plain(usual.get_default(name))
        if (
            item.init
            and name not in (*found, moved)
            and not is_local_flag(name)
            and value not in (None, [], {})
            and (name in DECISIVE or value != usually)
        ):
            found[name] = value
    return found

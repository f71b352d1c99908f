"""Read which recorded flags a repeated run takes, and refuse the others."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from transformers import TrainingArguments

from lora_plugins.errors import ReproductionError
from lora_plugins.recipe.arguments import RecipeArguments, extra_lora_fields
from lora_plugins.recipe.data import is_local
from lora_plugins.recipe.parser import flag_names, make_parser
from lora_plugins.recipe.reproduction.flags import UNRECORDED, is_local_flag
from lora_plugins.recipe.reproduction.source import Original
from registry import is_path, visible_lines

__all__ = ["Recorded", "check_lora_imports", "check_no_output", "list_flags", "read_recorded_flags"]

#: What cannot be left out, and what it is in words.
_WORDS = {"model": "the base model", "dataset": "the data set", "eval_dataset": "the data set to evaluate on"}
#: Flags whose value is a name on a hub.
_NAMES = frozenset(_WORDS)
#: Flags whose text is no path, whatever it looks like: a regular expression, a prompt.
_TEXTS = frozenset({"template", "target_modules", "optim_target_modules", "lora", "quantization"})
#: A text for one of these is the path of a file.
_MAPPINGS = frozenset({"accelerator_config", "parallelism_config", "liger_kernel_config"})
_HASH_LENGTH = 40
#: Flags by which a run publishes, reports, or reads and writes elsewhere, with their values when they are off.
_OFF: Mapping[str, tuple[Any, ...]] = {
    "push": (None,),
    "push_base_model": (None,),
    "push_to_hub": (False, None),
    "report_to": ([], "none", None),
    "adapter_folder": (None,),
    "model_folder": (None,),
    "report_folder": (None,),
    "merge": ("none",),
    "resume": (False,),
    "resume_from_checkpoint": (None,),
}


@dataclass(frozen=True)
class Recorded:
    """A recipe as a repeated run takes it.

    Attributes:
        flags: The flags.
        missing: Flags that were not recorded and must be given, each with the reason.
        unknown: Flags that are left out, each with the reason.
    """

    flags: dict[str, Any]
    missing: dict[str, str]
    unknown: dict[str, str]

    def check_complete(self, original: Original) -> None:
        """Check that nothing is missing.

        Raises:
            ReproductionError: Something is.
        """
        if self.missing:
            text = "; ".join(f"{key}: {why}" for key, why in self.missing.items())
            raise ReproductionError(f"{original.name} cannot be trained again: {visible_lines(text, 2000)}")


def list_flags(words: Sequence[str]) -> set[str]:
    """Return the names of the flags on a command line."""
    return {word.partition("=")[0].lstrip("-").replace("-", "_") for word in words if word.startswith("-")}


def read_recorded_flags(
    original: Original,
    given: Collection[str],
    known: Collection[str] | None = None,
    required: Sequence[str] = ("model", "dataset"),
) -> Recorded:
    """Return the flags of a recipe that a recording may hold.

    Args:
        original: The adapter with its lineage, which others may have written.
        given: Flags that the user gives, which replace recorded ones.
        known: Flags that the command records; those of ``train`` by default.
        required: Flags that the run cannot do without.

    Raises:
        ReproductionError: There is no recipe, or it has a flag that says where a run reads and writes or whom it tells,
            a path instead of a name, or a value that would be read as a flag.
    """
    recipe = original.lineage.get("recipe")
    if not isinstance(recipe, Mapping) or not recipe:
        raise ReproductionError(
            f"{original.name} cannot be trained again: its recipe is not recorded "
            f"({visible_lines(original.find_reason('recipe'), 300)})"
        )
    names = {name for name in (known or flag_names(make_parser())) if not is_local_flag(name)}
    # As it was written: a path that cleaning removes is still refused by name.
    for key, value in original.recipe.items():
        _check_flag(original.name, key, value, given)
    flags, unknown = {}, {}
    for key, value in recipe.items():
        name = _spell(key)
        if name in names:
            flags[name] = value
        elif name != "command":
            unknown[f"recipe.{key}"] = "the command has no such flag here; it is left out"
    _pin_data(original, flags)
    return Recorded(flags, _find_missing(original, flags, given, names, required), unknown)


def _spell(key: object) -> str:
    return str(key).replace("-", "_")


def _check_flag(name: str, key: object, value: Any, given: Collection[str]) -> None:
    flag = _spell(key)
    start = f"The recipe of {name} cannot be used: it sets {flag!r}"
    if is_local_flag(flag):
        raise ReproductionError(
            f"{start}, which is for this machine to decide and which no recording has. Do not trust this release."
        )
    items = value if isinstance(value, (list, tuple)) else [value]
    for item in (item for item in items if isinstance(item, str)):
        if isinstance(value, (list, tuple)) and item.startswith("-"):
            raise ReproductionError(f"{start} to {item[:200]!r}, which would be read as another flag.")
        if flag not in given and _names_place(flag, item):
            raise ReproductionError(
                f"{start} to {item[:200]!r}, a place on this machine, which no recording has. Give --{flag} yourself."
            )


def _names_place(flag: str, text: str) -> bool:
    if flag in _MAPPINGS or (flag not in _TEXTS and is_path(text)):
        return True
    if flag not in _NAMES:
        return False
    return Path(text).exists() if flag == "model" else is_local(text)


def _pin_data(original: Original, flags: dict[str, Any]) -> None:
    """Name the recorded commit of each data set of the Hub."""
    recorded = original.lineage.get("dataset")
    for flag, part in (("dataset", "train"), ("eval_dataset", "eval")):
        entry = recorded.get(part) if isinstance(recorded, Mapping) else None
        plain = str(flags.get(flag)).partition("@")[0]
        if not isinstance(entry, Mapping) or entry.get("id") != plain:
            continue
        revision = str(entry.get("revision"))
        if len(revision) == _HASH_LENGTH and revision.isalnum():
            flags[flag] = f"{plain}@{revision}"


def _find_missing(
    original: Original,
    flags: Mapping[str, Any],
    given: Collection[str],
    names: Collection[str],
    required: Sequence[str],
) -> dict[str, str]:
    reasons = dict(_list_reasons(original))
    found = {}
    for name in dict.fromkeys([*required, *reasons]):
        if name in given or name not in {*names, *UNRECORDED} or (name in flags and name not in reasons):
            continue
        what = _WORDS.get(name, f"--{name}")
        why = reasons.get(name, "the recipe does not have it")
        found[name] = f"{what} is not recorded ({why}); give --{name.replace('_', '-')}"
    return found


def _list_reasons(original: Original) -> Iterator[tuple[str, str]]:
    """Yield the flags that were left out of the recipe, or have parts that were, with the reason."""
    reasons = original.lineage.get("not_recorded")
    for key, why in (reasons if isinstance(reasons, Mapping) else {}).items():
        if key.startswith("recipe."):
            yield _spell(key.split(".")[1]), str(why)


def check_no_output(recipe: RecipeArguments, training: TrainingArguments) -> None:
    """Check that a repeated run publishes, merges, resumes and reports nothing, and writes to its own folder only.

    Raises:
        ReproductionError: A flag asks for it.
    """
    ours = {item.name for item in fields(recipe)}
    asked = [
        f"--{name}" for name, off in _OFF.items() if getattr(recipe if name in ours else training, name) not in off
    ]
    if asked:
        raise ReproductionError(
            f"A repeated run takes no {', '.join(asked)}: it publishes, merges and reports nothing, and writes to one "
            "folder, which --output_dir keeps. Leave it out; `lora-plugins push` publishes an adapter."
        )


def check_lora_imports(recipe: RecipeArguments) -> None:
    """Check that a recorded ``--lora`` names no library to import.

    Raises:
        ReproductionError: It does.
        ArgumentsError: It is not a JSON object.
    """
    named = sorted(name for name in extra_lora_fields(recipe) if name.startswith("megatron"))
    if named:
        raise ReproductionError(
            f"The recipe cannot be used: its --lora sets {', '.join(named)}, by which PEFT imports the library that it "
            "names. Give --lora yourself."
        )

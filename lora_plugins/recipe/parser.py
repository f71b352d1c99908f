"""Parse flags and a YAML file; unknown or abbreviated flags are errors."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from lora_plugins.errors import ArgumentsError, UnknownArgument
from lora_plugins.plugins.recipes import read_recipe
from lora_plugins.recipe.arguments import (
    FORMER_NAMES,
    TRAINING_DEFAULTS,
    RecipeArguments,
    extra_lora_fields,
    held_out_share,
    read_packing,
)
from lora_plugins.recipe.config_file import read_flags
from lora_plugins.text import ELSEWHERE, did_you_mean, suggest_arguments
from registry import expand_path

if TYPE_CHECKING:
    from transformers import HfArgumentParser, TrainingArguments

__all__ = [
    "CONFIG_FLAG",
    "JSON_FLAG",
    "PROGRAM",
    "flag_names",
    "make_parser",
    "parse",
]

#: Rows whose text the report page shows at most.
_MOST_SAMPLES = 100


PROGRAM = "lora-plugins train"

CONFIG_FLAG = "--config"

#: Read by the command itself; here for the help.
JSON_FLAG = "--json"

#: Flags of ``TrainingArguments`` that may be paths to read.
_INPUTS = ("deepspeed", "fsdp_config", "resume_from_checkpoint")

_DESCRIPTION = (
    "Fine-tune a causal language model with LoRA. The defaults are the recipe: int8 base, rank 8, chunks of 1536 "
    "tokens, three epochs, merged model in fp16."
)

_EPILOG = (
    "All flags of transformers.TrainingArguments work, too; --help-all lists them. Their defaults here: "
    + ", ".join(f"{name} {value}" for name, value in TRAINING_DEFAULTS.items())
    + ", bf16 if the hardware is fast at it."
)


def parse(arguments: Sequence[str]) -> tuple[RecipeArguments, TrainingArguments]:
    """Read a command line.

    Args:
        arguments: Flags and values, with at most one ``--config FILE``.

    Raises:
        ArgumentsError: A flag is unknown or misspelt, a value has the wrong type, or something is missing.
    """
    from transformers import TrainingArguments

    parser = make_parser()
    config, flags = _take_config(list(arguments))
    tokens = [*(_read_tokens(config, parser) if config else []), *flags]
    values, unknown = parser.parse_known_args(tokens)
    from_recipe = _apply_recipe(values, parser, tokens) if values.recipe is not None else frozenset()
    if unknown:
        raise _describe_unknown(unknown, parser)
    given = {name: value for name, value in vars(values).items() if name not in ("help", "config")}
    _apply_hardware(given)
    recipe = RecipeArguments(**{item.name: given.pop(item.name) for item in fields(RecipeArguments)})
    recipe.from_recipe = from_recipe
    _expand_inputs(recipe, given)
    _check(recipe)
    _check_steps(given)
    _apply_evaluation(recipe, given)
    try:
        training = TrainingArguments(**given)
    except (ValueError, TypeError, ImportError) as error:
        raise ArgumentsError(f"TrainingArguments refuses these values: {error}") from error
    return recipe, training


def make_parser(*, everything: bool = True) -> HfArgumentParser:
    """Return the parser of all flags; without ``everything``, of our own only, for a short help."""
    from transformers import HfArgumentParser

    class Parser(HfArgumentParser):  # type: ignore[misc]
        """Raises `ArgumentsError` instead of exiting."""

        def error(self, message: str) -> NoReturn:
            raise ArgumentsError(f"{message[:1].upper()}{message[1:]}. See `{PROGRAM} --help`.")

        def _check_value(self, action: argparse.Action, value: Any) -> None:
            if action.choices is not None and value not in action.choices:
                raise ArgumentsError(_describe_choice(f"--{action.dest}", value, [str(one) for one in action.choices]))

    # With abbreviations, a misspelt flag could be taken for another one.
    parser = Parser(
        _list_dataclasses(everything=everything),
        prog=PROGRAM,
        allow_abbrev=False,
        description=_DESCRIPTION,
        epilog=_EPILOG,
        usage=f"{PROGRAM} --model MODEL --dataset DATASET [options]",
        formatter_class=_Formatter,
    )
    parser.add_argument(CONFIG_FLAG, metavar="FILE", help="YAML file of flags; the command line overrides it.")
    parser.add_argument(
        JSON_FLAG, action="store_true", default=argparse.SUPPRESS, help="Print the result as JSON, the rest to stderr."
    )
    if everything:
        parser.set_defaults(**TRAINING_DEFAULTS, bf16=None)
    return parser


def _apply_recipe(values: argparse.Namespace, parser: HfArgumentParser, tokens: Sequence[str]) -> frozenset[str]:
    """Set the fields of the recipe that no flag set, and return their names."""
    found = _read_recipe(values.recipe)
    # A flag may repeat the usual default: only a default that no flag can have tells what was given.
    unset = object()
    parser.set_defaults(**dict.fromkeys(found, unset))
    again, _ = parser.parse_known_args(tokens)
    gave = frozenset(name for name in found if getattr(again, name) is unset)
    for name in gave:
        setattr(values, name, found[name])
    return gave


def _read_recipe(name: str) -> dict[str, Any]:
    try:
        return read_recipe(name)
    except UnknownArgument as error:
        raise ArgumentsError(f"--{error}") from error


def _describe_choice(flag: str, value: Any, choices: list[str]) -> str:
    hint = did_you_mean(value, choices)
    return f"{flag} cannot be {value!r}.{hint} Known: {', '.join(choices)}."


def _list_dataclasses(*, everything: bool) -> list[Any]:
    if not everything:
        return [RecipeArguments]
    from transformers import TrainingArguments

    return [RecipeArguments, TrainingArguments]


class _Formatter(argparse.HelpFormatter):
    """Spells each flag once, and shows its default if it has one."""

    def _format_action_invocation(self, action: argparse.Action) -> str:
        flags = [flag for flag in action.option_strings if "_" not in flag]
        if action.nargs == 0:
            return ", ".join(flags)
        flags = [flag for flag in flags if flag.startswith("--")]
        name = action.metavar if isinstance(action.metavar, str) else action.dest.upper()
        value = "|".join(map(str, action.choices)) if action.choices else name
        return f"{flags[-1]} {value}" + (" …" if action.nargs == "+" else "")

    def _expand_help(self, action: argparse.Action) -> str:
        # No %-formatting: some help texts of TrainingArguments hold a bare percent sign.
        text = " ".join((action.help or "").split())
        if action.nargs == 0 or action.default in (None, argparse.SUPPRESS, ""):
            return text
        return f"{text} [default: {_format_default(action.default)}]"


def _format_default(value: Any) -> str:
    return str(getattr(value, "value", value)).replace("\n", "\\n")


def flag_names(parser: HfArgumentParser) -> list[str]:
    """Return all long flags without their dashes, as they are spelt in a YAML file."""
    return sorted(action.dest for action in parser._actions if action.dest not in ("help", "config", "json"))


def _take_config(arguments: list[str]) -> tuple[Path | None, list[str]]:
    """Split off ``--config FILE``."""
    paths, rest, position = [], [], 0
    while position < len(arguments):
        name, equals, value = arguments[position].partition("=")
        position += 1
        if name != CONFIG_FLAG:
            rest.append(arguments[position - 1])
            continue
        if not equals:
            if position == len(arguments):
                raise ArgumentsError(f"{CONFIG_FLAG} must be followed by the path of a YAML file.")
            value = arguments[position]
            position += 1
        paths.append(expand_path(value))
    if len(paths) > 1:
        raise ArgumentsError(f"{CONFIG_FLAG} was given {len(paths)} times: {', '.join(map(str, paths))}. Give one.")
    return (paths[0] if paths else None), rest


def _read_tokens(path: Path, parser: HfArgumentParser) -> list[str]:
    """Turn a YAML file into flags, so that its values are checked like those of the command line."""
    actions = {action.dest: action for action in parser._actions}
    names = flag_names(parser)
    tokens: list[str] = []
    for key, (value, line) in read_flags(path).items():
        name = key.replace("-", "_")
        if name not in names:
            raise ArgumentsError(f"{path}, line {line}: {key!r} is not a flag.{_make_hint(name, names)}")
        tokens += _make_tokens(name, value, actions[name], f"{path}, line {line}")
    return tokens


def _make_tokens(name: str, value: Any, action: argparse.Action, place: str) -> list[str]:
    if value is None:
        return []
    if isinstance(value, bool):
        return [f"--{name}={str(value).lower()}"]
    if isinstance(value, Mapping):
        return [f"--{name}={json.dumps(dict(value))}"]
    if isinstance(value, Sequence) and not isinstance(value, str):
        if action.nargs != "+":
            raise ArgumentsError(f"{place}: {name} takes one value, not the list {value!r}.")
        return [f"--{name}", *map(str, value)]
    return [f"--{name}={value}"]


def _describe_unknown(unknown: Sequence[str], parser: HfArgumentParser) -> ArgumentsError:
    flags = [word.partition("=")[0] for word in unknown if word.startswith("-")]
    if not flags:
        return ArgumentsError(f"{unknown[0]!r} stands where a flag was expected. See `{PROGRAM} --help`.")
    names = flag_names(parser)
    hints = [f"{flag} is not a flag.{_make_hint(flag.lstrip('-').replace('-', '_'), names)}" for flag in flags]
    return ArgumentsError(" ".join(hints) + f" See `{PROGRAM} --help` and `--help-all`.")


def _make_hint(name: str, names: Sequence[str]) -> str:
    if name in FORMER_NAMES:
        return f" Use {FORMER_NAMES[name]}."
    near = [f"{flag} {value}" if value else flag for flag, value in suggest_arguments(name, names, most=3, cutoff=0.7)]
    if name not in ELSEWHERE:
        near += [known for known in names if len(name) > 3 and name in known and known not in near][: 3 - len(near)]
    return f" Did you mean {' or '.join('--' + other for other in near)}?" if near else ""


def _expand_inputs(recipe: RecipeArguments, given: dict[str, Any]) -> None:
    """Find inputs that begin with ``~`` in the home folder: no shell expands what stands in a YAML file.

    Data sets are expanded where they are read, and output folders in `recipe.output.Folders`.
    """
    if recipe.model.startswith("~"):
        recipe.model = str(expand_path(recipe.model))
    for name in _INPUTS:
        if isinstance(given[name], str) and given[name].startswith("~"):
            given[name] = str(expand_path(given[name]))


def _check(recipe: RecipeArguments) -> None:
    """Reject values that would otherwise fail only later in the run, and call each packing by its name."""
    recipe.packing = read_packing(recipe.packing)
    if recipe.over_long is not None and recipe.packing != "best-fit":
        raise ArgumentsError(f"--over_long {recipe.over_long} belongs to --packing best-fit. Give both, or neither.")
    if recipe.chunk_length < 1:
        raise ArgumentsError(f"--chunk_length must be at least 1, not {recipe.chunk_length}")
    if recipe.r < 1:
        raise ArgumentsError(f"--r must be at least 1, not {recipe.r}")
    if not 0 <= recipe.lora_dropout < 1:
        raise ArgumentsError(f"--lora_dropout must be at least 0 and below 1, not {recipe.lora_dropout}")
    if recipe.num_proc is not None and recipe.num_proc < 1:
        raise ArgumentsError(f"--num_proc must be at least 1, not {recipe.num_proc}")
    if recipe.revision is not None and Path(recipe.model).exists():
        raise ArgumentsError(
            f"--revision {recipe.revision} was given and --model {recipe.model} is a folder here, which has no "
            "revisions. Leave one of them out."
        )
    if held_out_share(recipe) is not None and recipe.eval_dataset:
        raise ArgumentsError(
            f"--eval_split {recipe.eval_split} holds out a part of --dataset, and --eval_dataset "
            f"{recipe.eval_dataset} is given too. Give one of them."
        )
    if recipe.lora is not None:
        extra_lora_fields(recipe)
    if recipe.early_stopping_patience is not None and recipe.early_stopping_patience < 1:
        raise ArgumentsError(f"--early_stopping_patience must be at least 1, not {recipe.early_stopping_patience}")
    if not 0 <= recipe.samples <= _MOST_SAMPLES:
        raise ArgumentsError(f"--samples must be 0 to {_MOST_SAMPLES}, not {recipe.samples}")


def _check_steps(given: Mapping[str, Any]) -> None:
    """Reject a run that would train nothing: no step, or a learning rate of 0 or less."""
    if given["max_steps"] < 0 and given["num_train_epochs"] <= 0:
        raise ArgumentsError(f"--num_train_epochs must be above 0, not {given['num_train_epochs']}")
    if given["max_steps"] == 0:
        raise ArgumentsError("--max_steps must be above 0, not 0. Leave it out to train for --num_train_epochs.")
    if given["learning_rate"] <= 0:
        raise ArgumentsError(f"--learning_rate must be above 0, not {given['learning_rate']}")


def _apply_evaluation(recipe: RecipeArguments, given: dict[str, Any]) -> None:
    """Evaluate once per epoch by default if there is evaluation data; early stopping keeps the best adapter."""
    held_out = recipe.eval_split is not None or recipe.eval_dataset is not None
    strategy = str(getattr(given["eval_strategy"], "value", given["eval_strategy"]))
    if held_out and strategy == "no":
        given["eval_strategy"] = "epoch"
    if not held_out and (strategy != "no" or recipe.early_stopping_patience or given["load_best_model_at_end"]):
        raise ArgumentsError("There is nothing to evaluate on. Give --eval_split or --eval_dataset.")
    metric = given["metric_for_best_model"]
    if metric not in (None, "loss", "eval_loss"):
        raise ArgumentsError(f"--metric_for_best_model cannot be {metric!r}: only the loss is measured.")
    if recipe.early_stopping_patience:
        given["load_best_model_at_end"] = True
        # A resumed run has the patience that was left when it was interrupted.
        given["restore_callback_states_from_checkpoint"] = True
        given["save_strategy"] = given["eval_strategy"]
        given["save_steps"] = given["eval_steps"] or given["save_steps"]


def _apply_hardware(given: dict[str, Any]) -> None:
    """Set ``bf16`` by default if the device is fast at it, and ``use_cpu`` if there is only a CPU."""
    import torch

    from lora_plugins.quantization.precision import fast_bfloat16

    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    given["use_cpu"] = given["use_cpu"] or accelerator is None
    device = torch.device("cpu") if accelerator is None or given["use_cpu"] else accelerator
    if given["disable_tqdm"] is None:
        # Without a terminal, progress bars only fill log files.
        given["disable_tqdm"] = not sys.stderr.isatty()
    if given["bf16"] is None:
        given["bf16"] = not given["fp16"] and fast_bfloat16(device)

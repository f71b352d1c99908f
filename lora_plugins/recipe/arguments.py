"""Define the flags of ``lora-plugins train`` and the recipe's values."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, Literal

from lora_plugins.errors import ArgumentsError
from lora_plugins.plugins.recipes import RECIPES
from lora_plugins.text import did_you_mean

__all__ = [
    "CHAT",
    "FORMER_NAMES",
    "TEMPLATE",
    "TRAINING_DEFAULTS",
    "RecipeArguments",
    "extra_lora_fields",
    "held_out_share",
    "json_object",
    "read_packing",
]


#: The prompt of the recipe, in the columns of the samsum data set.
TEMPLATE = "Summarize the chat dialogue:\n{dialogue}\n---\nSummary:\n{summary}{eos_token}"

#: Value of ``--template`` that selects the tokenizer's own chat template.
CHAT = "chat"

#: The recipe's values for flags of ``TrainingArguments`` that have another default. Checkpoints are an addition: the
#: recipe wrote none, and those of an adapter are small.
TRAINING_DEFAULTS = MappingProxyType(
    {
        "output_dir": "lora-output",
        "num_train_epochs": 3.0,
        "learning_rate": 2e-4,
        "per_device_train_batch_size": 1,
        "per_device_eval_batch_size": 1,
        "gradient_accumulation_steps": 2,
        "gradient_checkpointing": True,
        "optim": "adafactor",
        "logging_steps": 10.0,
        "save_strategy": "epoch",
        "save_total_limit": 2,
        "seed": 42,
        "report_to": "none",
        "prediction_loss_only": True,
    }
)


@dataclass
class RecipeArguments:
    """The recipe's arguments besides ``TrainingArguments``; the metadata hold the help texts.

    Fields that are ``None`` are decided later: from the template, the output folder, or the data.

    Attributes:
        from_recipe: Names of the fields that neither a flag nor a line of a file set and that ``recipe`` gave. It is
            not a field: no flag sets it, and no record of a run has it.
    """

    def __post_init__(self) -> None:
        self.from_recipe: frozenset[str] = frozenset()

    model: str = field(metadata={"help": "Base model: Hub id or folder."})
    dataset: str = field(
        metadata={"help": "Hub id, .json, .jsonl, .csv or .parquet file, a folder of such files, or of save_to_disk."}
    )
    revision: str | None = field(default=None, metadata={"help": "Branch, tag or commit of the base model."})
    train_split: str = field(default="train", metadata={"help": "Split of the data set to train on."})
    eval_split: str | None = field(
        default=None,
        metadata={"help": "Split to evaluate on; a number below 1 holds out this share of the training split."},
    )
    eval_dataset: str | None = field(default=None, metadata={"help": "Data set to evaluate on, as for --dataset."})
    template: str = field(
        default=TEMPLATE,
        metadata={
            "help": (
                "Text of an example: columns in braces, {eos_token}, \\n for a new line. The last column is the "
                "completion. 'chat' renders the column messages with the tokenizer's chat template."
            )
        },
    )
    loss_on: Literal["all", "completion"] | None = field(
        default=None,
        metadata={"help": "Tokens that count in the loss; default: all, with --template chat the assistant's."},
    )
    packing: str | None = field(
        default=None,
        metadata={
            "help": (
                "wrapped (or true) joins examples and cuts them into chunks; best-fit packs whole examples that do not "
                "see each other; none (or false) pads each. Default: wrapped if the loss is on all tokens, else "
                "none."
            )
        },
    )
    over_long: Literal["drop", "cut"] | None = field(
        default=None,
        metadata={"help": "For --packing best-fit: what to do with examples longer than a chunk [default: drop]."},
    )
    chunk_length: int = field(
        default=1536, metadata={"help": "Tokens in a chunk; without packing, the maximum of an example."}
    )
    num_proc: int | None = field(default=None, metadata={"help": "Processes for preparing the data."})
    quantization: str = field(
        default="int8",
        metadata={
            "help": (
                "Backend of the frozen base, 'none', or 'auto' for the least lossy one that fits into memory; with "
                "options as JSON: "
                '\'{"name": "nf4", "double_quant": true}\'.'
            )
        },
    )
    allow_format: str | None = field(
        default=None,
        metadata={
            "help": (
                "Storage format (quant_method) to train on although it is refused; the gradients of such a base "
                "are not checked."
            )
        },
    )
    recipe: str | None = field(
        default=None,
        metadata={"help": (f"Named set of LoRA settings: {', '.join(RECIPES)}. Flags override it.")},
    )
    r: int = field(default=8, metadata={"help": "Rank of the adapters.", "aliases": ["-r"]})
    lora_alpha: int = field(default=32, metadata={"help": "Scale: the update is multiplied by alpha / r."})
    lora_dropout: float = field(default=0.05, metadata={"help": "Dropout before the adapters."})
    target_modules: list[str] | None = field(
        default=None,
        metadata={
            "help": (
                "Modules that get adapters: names, a scope such as attention, or a regular expression. Default: "
                "those registered for the architecture."
            )
        },
    )
    lora: str | None = field(
        default=None, metadata={"help": "More fields of peft.LoraConfig as JSON: '{\"use_dora\": true}'."}
    )
    early_stopping_patience: int | None = field(
        default=None, metadata={"help": "Stop after this many evaluations without improvement."}
    )
    merge: Literal["none", "fp16", "bf16", "same"] = field(
        default="fp16",
        metadata={
            "help": (
                "Also write the merged model. fp16 and bf16 reload the base in 16 bits; same uses the dequantized "
                "weights of the training."
            )
        },
    )
    adapter_folder: str | None = field(
        default=None, metadata={"help": "Folder of the adapter; default: adapter/ in the output folder."}
    )
    model_folder: str | None = field(
        default=None, metadata={"help": "Folder of the merged model; default: model/ in the output folder."}
    )
    report_folder: str | None = field(
        default=None, metadata={"help": "Folder of reports and loss curve; default: the output folder."}
    )
    samples: int = field(
        default=0,
        metadata={
            "help": (
                "Number of (if possible held-out) rows for which the report page shows the model's text before and "
                "after training. Their text is in no other file."
            )
        },
    )
    push: str | None = field(
        default=None, metadata={"help": "Publish the adapter as org/name@1.2.0, or org/name@patch, @minor or @major."}
    )
    push_base_model: str | None = field(
        default=None, metadata={"help": "For --push, if --model is a folder: the base on the Hub, org/base@revision."}
    )
    resume: bool = field(
        default=False,
        metadata={"help": "Resume from the newest complete checkpoint in the output folder, if there is one."},
    )


#: Value of ``--packing`` -> the words for it.
_PACKINGS = MappingProxyType(
    {
        "wrapped": ("wrapped", "true", "yes", "t", "y", "1"),
        "best-fit": ("best-fit", "best_fit"),
        "none": ("none", "false", "no", "f", "n", "0"),
    }
)

#: Name in the recipe's script or in earlier releases of transformers -> today's flag.
FORMER_NAMES = MappingProxyType(
    {
        "model_id": "--model",
        "model_name_or_path": "--model",
        "dataset_path": "--dataset",
        "dataset_name": "--dataset",
        "train_file": "--dataset",
        "epochs": "--num_train_epochs",
        "lr": "--learning_rate",
        "merge_weights": "--merge",
        "block_size": "--chunk_length",
        "max_seq_length": "--chunk_length",
        "evaluation_strategy": "--eval_strategy",
        "logging_dir": "TENSORBOARD_LOGGING_DIR in the environment",
        "overwrite_output_dir": "--resume, or another --output_dir",
    }
)


def read_packing(value: str | bool | None) -> str | None:
    """Return the value of ``--packing`` by its name; version 0.1 had true and false.

    Raises:
        ArgumentsError: It is not a way of packing.
    """
    if value is None:
        return None
    word = str(value).lower()
    found = next((name for name, words in _PACKINGS.items() if word in words), None)
    if found is None:
        raise ArgumentsError(
            f"--packing cannot be {value!r}.{did_you_mean(word, _PACKINGS)} Known: {', '.join(_PACKINGS)}."
        )
    return found


def extra_lora_fields(recipe: RecipeArguments) -> dict[str, Any]:
    """Return the fields that ``--lora`` sets.

    Raises:
        ArgumentsError: It is not a JSON object, or repeats a flag.
    """
    if recipe.lora is None:
        return {}
    extra = json_object("--lora", recipe.lora)
    twice = [name for name in ("r", "lora_alpha", "lora_dropout", "target_modules") if name in extra]
    if twice:
        raise ArgumentsError(f"--lora has {', '.join(twice)}, which has a flag of its own: --{twice[0]}.")
    return extra


def json_object(flag: str, text: str) -> dict[str, Any]:
    """Parse a JSON object; a mapping in a YAML file arrives as one.

    Raises:
        ArgumentsError: The text is not a JSON object.
    """
    try:
        found = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ArgumentsError(f"{flag} must be a JSON object, not {_shorten(text)}: {error}") from error
    if not isinstance(found, dict):
        raise ArgumentsError(f"{flag} must be a JSON object, not {_shorten(text)}")
    return found


def held_out_share(recipe: RecipeArguments) -> float | None:
    """Return the share of the training split that ``--eval_split`` holds out, ``None`` if it names a split."""
    return _read_share(recipe.eval_split) if recipe.eval_split else None


def _read_share(text: str) -> float | None:
    try:
        share = float(text)
    except ValueError:
        return None
    if not 0 < share < 1:
        raise ArgumentsError(f"--eval_split must be the name of a split or a number between 0 and 1, not {text}")
    return share


def _shorten(text: str) -> str:
    return repr(text if len(text) <= 200 else text[:200] + "…")

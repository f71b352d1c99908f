"""Make the inputs of a Trainer: tokenizer, data sets, base model."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from datasets import Dataset
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    DataCollatorForSeq2Seq,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    TrainingArguments,
    default_data_collator,
)

from lora_plugins.adapters.settings import LoraSettings
from lora_plugins.errors import ArgumentsError
from lora_plugins.planning.advice import AUTO
from lora_plugins.planning.planner import plan
from lora_plugins.quantization.formats import check_config
from lora_plugins.recipe.arguments import CHAT, RecipeArguments, extra_lora_fields, json_object, read_packing
from lora_plugins.recipe.best_fit.batches import best_fit_collator
from lora_plugins.recipe.best_fit.bins import BestFitCounts, pack_best_fit
from lora_plugins.recipe.data import load_examples
from lora_plugins.recipe.packing import PackingCounts, PaddedCounts, keep_apart, pack, token_offsets
from lora_plugins.recipe.templates import encode, make_template
from lora_plugins.targets.words import read_words
from lora_plugins.text import one_line

__all__ = [
    "Prepared",
    "Say",
    "check_lora",
    "check_stored",
    "choose_quantization",
    "collator",
    "completion_only",
    "load_base",
    "load_tokenizer",
    "lora_arguments",
    "packing_of",
    "prepare_data",
    "quantization_of",
]


Say = Callable[[str], None]
Counts = PackingCounts | BestFitCounts | PaddedCounts


@dataclass(frozen=True)
class Prepared:
    """The data sets of a run.

    Attributes:
        train: Rows of ``input_ids`` and ``labels`` to train on.
        held_out: Rows to evaluate on, or ``None``.
        counts: Counts of the examples, by ``"train"`` and ``"held_out"``.
        rows: The rows before that, as they were read, by ``"train"`` and ``"eval"``.
    """

    train: Dataset
    held_out: Dataset | None
    counts: dict[str, Counts]
    rows: dict[str, Dataset]


def load_tokenizer(recipe: RecipeArguments) -> PreTrainedTokenizerBase:
    """Load the base model's tokenizer; without a padding token, it pads with its end token.

    Raises:
        ArgumentsError: ``--model`` has no tokenizer that can be loaded.
    """
    load = functools.partial(AutoTokenizer.from_pretrained, recipe.model, revision=recipe.revision or "main")
    tokenizer: PreTrainedTokenizerBase = _load_from_model(recipe, "tokenizer", load)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def check_stored(recipe: RecipeArguments) -> None:
    """Refuse a base whose files have a format that adapters cannot be trained on, before anything long is done.

    Raises:
        ArgumentsError: ``--model`` has no configuration that can be loaded.
        UntrainableFormat: The format is refused, and ``--allow_format`` does not name it.
    """
    load = functools.partial(AutoConfig.from_pretrained, recipe.model, revision=recipe.revision or "main")
    check_config(_load_from_model(recipe, "model", load), recipe.allow_format)


def load_base(recipe: RecipeArguments) -> PreTrainedModel:
    """Load the base model in its stored dtype.

    Raises:
        ArgumentsError: ``--model`` has no causal language model that can be loaded.
    """
    load = functools.partial(
        AutoModelForCausalLM.from_pretrained, recipe.model, revision=recipe.revision or "main", dtype="auto"
    )
    model: PreTrainedModel = _load_from_model(recipe, "causal language model", load)
    # Nothing is generated in training, and gradient checkpointing would warn about the cache.
    model.config.use_cache = False
    return model


def _load_from_model(recipe: RecipeArguments, kind: str, load: Callable[[], Any]) -> Any:
    try:
        return load()
    except (OSError, ValueError, KeyError, ImportError) as error:
        # An ImportError: the base's own format needs a package that is missing.
        text = one_line(error)
        raise ArgumentsError(f"--model {recipe.model} cannot be loaded as a {kind}: {text}") from error


def prepare_data(
    recipe: RecipeArguments, training: TrainingArguments, tokenizer: PreTrainedTokenizerBase, say: Say
) -> Prepared:
    """Read, render, tokenise and pack; the first process of a machine does it, the others use its cache.

    Raises:
        DataError: The data sets cannot be read or hold too little.
        TemplateError: The template does not fit them.
    """
    with training.main_process_first(desc="preparing the data"):
        rows, held_out_rows = load_examples(recipe, training.seed)
        train, counts = _make_examples(recipe, rows, tokenizer, "train", say)
        found: dict[str, Counts] = {"train": counts}
        held_out = None
        if held_out_rows is not None:
            held_out, found["held_out"] = _make_examples(recipe, held_out_rows, tokenizer, "held out", say)
    read = {"train": rows} if held_out_rows is None else {"train": rows, "eval": held_out_rows}
    return Prepared(train, held_out, found, read)


def _make_examples(
    recipe: RecipeArguments, rows: Dataset, tokenizer: PreTrainedTokenizerBase, name: str, say: Say
) -> tuple[Dataset, Counts]:
    template = make_template(recipe.template, rows.features, tokenizer)
    encoded, unusable = encode(
        rows, template, tokenizer, completion_only=completion_only(recipe), num_proc=recipe.num_proc
    )
    if unusable:
        say(f"Data ({name}): {unusable:,} examples left out, a column of the template is empty in them")
    made: tuple[Dataset, Counts]
    kind = packing_of(recipe)
    if kind == "best-fit":
        made = pack_best_fit(
            encoded, recipe.chunk_length, over_long=recipe.over_long or "drop", num_proc=recipe.num_proc
        )
    elif kind == "wrapped":
        length = recipe.chunk_length
        if name != "train":
            # A small held-out set is better measured in shorter chunks than not at all.
            length = max(1, min(length, int(token_offsets(encoded)[-1])))
        made = pack(encoded, length, num_proc=recipe.num_proc)
    else:
        made = keep_apart(encoded, recipe.chunk_length, num_proc=recipe.num_proc)
    say(f"Data ({name}): {made[1].line()}")
    return made


def completion_only(recipe: RecipeArguments) -> bool:
    """Whether only answers count in the loss."""
    return (recipe.loss_on or ("completion" if recipe.template == CHAT else "all")) == "completion"


def packing_of(recipe: RecipeArguments) -> str:
    """Return how examples become rows: ``"wrapped"``, ``"best-fit"`` or ``"none"``."""
    return read_packing(recipe.packing) or ("none" if completion_only(recipe) else "wrapped")


def collator(recipe: RecipeArguments, tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel) -> Any:
    """Return the data collator: it stacks chunks, keeps packed examples apart, or pads examples to the longest.

    Best-fit packing runs the model, so it must be whole and on the device that it is trained on.

    Raises:
        UnsupportedPacking: The model cannot keep packed examples apart.
        ArgumentsError: The tokenizer has nothing to pad with.
    """
    kind = packing_of(recipe)
    if kind == "wrapped":
        return default_data_collator
    if kind == "best-fit":
        return best_fit_collator(model)
    if tokenizer.pad_token is None:
        raise ArgumentsError(
            f"The tokenizer of {recipe.model} has neither a padding nor an end token to pad with. Use --packing "
            "wrapped."
        )
    return DataCollatorForSeq2Seq(tokenizer, padding=True, label_pad_token_id=-100)


def lora_arguments(recipe: RecipeArguments) -> dict[str, Any]:
    """Return the arguments of `LoraCallback` for a recipe, without those that its named recipe gives."""
    fields: dict[str, Any] = {"r": recipe.r, "lora_alpha": recipe.lora_alpha, "lora_dropout": recipe.lora_dropout}
    if recipe.target_modules:
        fields["target_modules"] = read_words(recipe.target_modules)
    arguments: dict[str, Any] = {
        **{name: value for name, value in fields.items() if name not in recipe.from_recipe},
        "quantization": quantization_of(recipe),
        "allow_format": recipe.allow_format,
        **extra_lora_fields(recipe),
    }
    if recipe.recipe is not None:
        arguments["recipe"] = recipe.recipe
    return arguments


def check_lora(recipe: RecipeArguments) -> None:
    """Check the LoRA arguments before the data are read.

    Raises:
        UnknownQuantizer: No plugin has the quantization backend.
        UnknownArgument: ``--lora`` has something that is not a field of ``peft.LoraConfig``.
    """
    LoraSettings.from_arguments(**lora_arguments(recipe))


def choose_quantization(recipe: RecipeArguments, training: TrainingArguments, say: Say) -> None:
    """Replace ``--quantization auto`` by the least lossy backend that fits this run into memory, and say why.

    Raises:
        PlanError: The run cannot be planned.
    """
    if recipe.quantization != AUTO:
        return
    lora = {name: value for name, value in lora_arguments(recipe).items() if name != "quantization"}
    made = plan(
        recipe.model,
        quantization=AUTO,
        revision=recipe.revision or "main",
        task="causal-lm",
        batch_size=training.per_device_train_batch_size,
        length=recipe.chunk_length,
        gradient_checkpointing=training.gradient_checkpointing,
        optim=str(getattr(training.optim, "value", training.optim)),
        devices=training.world_size,
        **lora,
    )
    recipe.quantization = made.chosen.quantization or "none"
    for note in made.notes:
        if AUTO in note or "stored with" in note:
            say(f"Quantization: {note}")


def quantization_of(recipe: RecipeArguments) -> str | dict[str, Any] | None:
    """Return the backend's name, or a mapping of it and its options; ``None`` for a base in float.

    Raises:
        ArgumentsError: It has a brace and is not a JSON object.
    """
    if recipe.quantization == "none":
        return None
    return json_object("--quantization", recipe.quantization) if "{" in recipe.quantization else recipe.quantization

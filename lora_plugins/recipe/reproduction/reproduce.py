"""Run a recorded training again, and say whether the adapter is the same."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from transformers import TrainingArguments

import lora_plugins
from lora_plugins.adapters.lineage.environment import describe_code, describe_hardware
from lora_plugins.adapters.lineage.rows import describe_rows
from lora_plugins.errors import DataError, ReproductionError
from lora_plugins.recipe.arguments import RecipeArguments
from lora_plugins.recipe.data import load_examples
from lora_plugins.recipe.parser import parse
from lora_plugins.recipe.reproduction.differences import (
    Difference,
    compare_data,
    compare_libraries,
    compare_values,
    find_first_step,
)
from lora_plugins.recipe.reproduction.flags import describe_recipe
from lora_plugins.recipe.reproduction.source import Original, digest_adapter, read_original
from lora_plugins.recipe.run import TrainingRun
from registry import BaseMismatch, RegistryError, check_contract, compare_layers, read_lineage

__all__ = ["Readiness", "Reproduction", "check_reproduction", "compare_runs", "read_original", "reproduce"]

#: Flags that can be given instead of what is not recorded, and what they are in words.
_GIVEN = {"model": "the base model", "dataset": "the data set", "eval_dataset": "the data set to evaluate on"}
#: Where a run gets these from is no part of it: what they hold is compared.
_PLACES = (*_GIVEN, "revision")
_LAYERS_SHOWN = 10
#: Share of a norm that rounding can be, in float64.
_EXACT = 1e-12


@dataclass(frozen=True)
class Readiness:
    """What is known before a run is repeated.

    Attributes:
        name: The adapter.
        missing: What the run cannot do without, each with the way to give it.
        differences: What is other here than it was.
        unknown: What was not recorded, or cannot be compared, each with the reason.
    """

    name: str
    missing: dict[str, str] = field(default_factory=dict)
    differences: list[Difference] = field(default_factory=list)
    unknown: dict[str, str] = field(default_factory=dict)

    @property
    def ready(self) -> bool:
        """Whether nothing is missing and everything that was recorded is the same here."""
        return not self.missing and not self.differences

    def to_dict(self) -> dict[str, Any]:
        """Return it as plain data."""
        return {**asdict(self), "ready": self.ready}

    def lines(self) -> list[str]:
        """Return it as lines for the terminal."""
        lines = [f"{self.name}: " + ("all that was recorded is here" if self.ready else "not as it was recorded")]
        lines += [f"  missing: {key}: {why}" for key, why in self.missing.items()]
        lines += [f"  differs: {item}" for item in self.differences]
        return lines + [f"  not compared: {key}: {why}" for key, why in self.unknown.items()]


@dataclass(frozen=True)
class Reproduction:
    """What came of a repeated run.

    Attributes:
        name: The adapter.
        same: Whether every tensor has the same bits.
        digest: sha256 of the repeated adapter's tensors.
        recorded: The same of the original.
        first: The first logged step whose loss or gradient differs; ``None`` if none does.
        layers: Layers that differ, the largest difference first: name, norm before, after, of the change.
        layers_compared: Number of layers.
        readiness: What was other from the beginning: the causes.
        folder: Where the repeated run is; ``None`` if it was not kept.
    """

    name: str
    same: bool
    digest: str
    recorded: str
    first: Difference | None
    layers: list[dict[str, Any]]
    layers_compared: int
    readiness: Readiness
    folder: str | None

    def to_dict(self) -> dict[str, Any]:
        """Return it as plain data."""
        causes = {key: value for key, value in self.readiness.to_dict().items() if key not in ("name", "ready")}
        return {**{key: value for key, value in asdict(self).items() if key != "readiness"}, **causes}

    def lines(self) -> list[str]:
        """Return it as lines for the terminal."""
        if self.same:
            lines = [f"{self.name}: the same adapter, bit by bit (sha256 of its tensors {self.digest})"]
        else:
            lines = [f"{self.name}: another adapter (tensors {self.digest[:12]}, recorded {self.recorded[:12]})"]
            lines.append(f"  begins to differ: {self.first or 'in no logged step; only in the weights at the end'}")
            lines += [
                f"  layer {item['name']}: norm {item['before']:.6g} -> {item['after']:.6g}, change {item['change']:.4g}"
                for item in self.layers[:_LAYERS_SHOWN]
            ]
            lines.append(f"  {len(self.layers)} of {self.layers_compared} layers differ")
        lines += [f"  cause: {item}" for item in self.readiness.differences if not self.same]
        lines += [f"  other here, without effect: {item}" for item in self.readiness.differences if self.same]
        if not self.same and not self.readiness.differences:
            lines.append("  cause: none in what is recorded; this hardware may not compute the same twice")
        return lines + [f"  not compared: {key}: {why}" for key, why in self.readiness.unknown.items()]


def check_reproduction(reference: str, words: Sequence[str] = (), *, hub: str | None = None) -> Readiness:
    """Say what a repetition would lack, and what is other here than it was recorded; nothing is trained.

    Args:
        reference: ``org/name@version``, an adapter's folder or the output folder of a run.
        words: Flags of ``train`` that replace recorded ones, or give what was not recorded.
        hub: The registry.

    Raises:
        ReproductionError: The run is not recorded, or was not one of ``lora-plugins train``.
        ArgumentsError: A flag cannot be used.
    """
    original = read_original(reference, hub)
    missing = _find_missing(original, words)
    if missing:
        return Readiness(original.name, missing, list(compare_libraries(_get(original, "libraries"))))
    with _prepare(original, words) as (recipe, training):
        return _compare_before(original, recipe, training)


def reproduce(reference: str, words: Sequence[str] = (), *, hub: str | None = None) -> Reproduction:
    """Train again as recorded, and compare the adapters.

    Args:
        reference: See `check_reproduction`.
        words: See `check_reproduction`; with ``--output_dir`` the repeated run is kept.
        hub: The registry.

    Raises:
        ReproductionError: The run is not recorded, or something that it needs is not here.
        ArgumentsError: A flag cannot be used.
        TrainingError: The run fails.
    """
    original = read_original(reference, hub)
    missing = _find_missing(original, words)
    if missing:
        raise ReproductionError(
            f"{original.name} cannot be trained again: " + "; ".join(f"{key}: {why}" for key, why in missing.items())
        )
    with _prepare(original, words) as (recipe, training):
        before = _compare_before(original, recipe, training)
        if before.missing:
            raise ReproductionError("; ".join(f"{key}: {why}" for key, why in before.missing.items()))
        run = TrainingRun(recipe, training)
        if run.run():
            raise ReproductionError("The repeated run was interrupted; nothing was compared.")
        kept = "output_dir" in _list_flags(words)
        return _compare_after(original, before, run.folders.adapter, kept=kept)


def compare_runs(original: Original, folder: Path | None = None) -> Reproduction | Readiness:
    """Compare an adapter with one that another command has trained again from its recipe.

    Args:
        original: The adapter as it was trained first.
        folder: The adapter that was trained again; ``None`` compares only what is known before.
    """
    found = Readiness(original.name)
    found.differences.extend(compare_libraries(_get(original, "libraries")))
    _compare_code(original, found)
    if folder is None:
        return found
    lineage = read_lineage(folder)
    for name in ("recipe", "hardware"):
        found.differences.extend(compare_values(name, _get(original, name), lineage.get(name, {})))
    found.differences.extend(compare_data("dataset", _get(original, "dataset"), lineage.get("dataset", {})))
    return _compare_after(original, found, folder, kept=False)


def _get(original: Original, name: str) -> dict[str, Any]:
    value = original.lineage.get(name)
    return value if isinstance(value, dict) else {}


def _list_flags(words: Sequence[str]) -> set[str]:
    return {word.partition("=")[0][2:].replace("-", "_") for word in words if word.startswith("--")}


def _find_missing(original: Original, words: Sequence[str]) -> dict[str, str]:
    """Return what the recipe lacks, with the flag that gives it.

    Raises:
        ReproductionError: There is no recipe.
    """
    recipe = _get(original, "recipe")
    if not recipe:
        raise ReproductionError(
            f"{original.name} cannot be trained again: its recipe is not recorded ({original.find_reason('recipe')})"
        )
    given = _list_flags(words)
    reasons = original.lineage.get("not_recorded", {})
    return {
        name: f"{what} is not recorded ({reasons[f'recipe.{name}']}); give --{name.replace('_', '-')}"
        for name, what in _GIVEN.items()
        if f"recipe.{name}" in reasons and name not in given and name not in recipe
    }


@contextmanager
def _prepare(original: Original, words: Sequence[str]) -> Iterator[tuple[RecipeArguments, TrainingArguments]]:
    """Yield the arguments of the repeated run, which publishes, merges and reports nothing."""
    flags = dict(_get(original, "recipe"))
    if "model" in _list_flags(words):
        flags.pop("revision", None)
    with tempfile.TemporaryDirectory(prefix="reproduce-") as folder:
        config = Path(folder, "recipe.yaml")
        # JSON is YAML.
        config.write_text(json.dumps(flags), encoding="utf-8")
        own = ["--output_dir", str(Path(folder, "run")), "--report_to", "none"]
        yield parse(["--config", str(config), *own, *words, "--merge", "none"])


def _compare_before(original: Original, recipe: RecipeArguments, training: TrainingArguments) -> Readiness:
    found = Readiness(original.name)
    flags, _ = describe_recipe(recipe, training)
    found.differences.extend(compare_values("recipe", _get(original, "recipe"), flags, _PLACES))
    _compare_rows(original, recipe, training, found)
    _compare_base(original, recipe, found)
    found.differences.extend(compare_libraries(_get(original, "libraries")))
    found.differences.extend(compare_values("hardware", _get(original, "hardware"), describe_hardware(training)))
    _compare_code(original, found)
    for name in ("libraries", "hardware", "losses"):
        if not _get(original, name):
            found.unknown[name] = original.find_reason(name)
    resumed = original.lineage.get("resumed")
    for entry in resumed if isinstance(resumed, list) else ():
        changed = entry.get("changed") if isinstance(entry, dict) else None
        for key, pair in (changed or {}).items():
            found.unknown[f"resumed at step {entry.get('step')}"] = f"{key} had changed then: {pair}"
    return found


def _compare_rows(original: Original, recipe: RecipeArguments, training: TrainingArguments, found: Readiness) -> None:
    recorded = _get(original, "dataset")
    try:
        train, held_out = load_examples(recipe, training.seed)
    except DataError as error:
        found.missing["dataset"] = str(error)
        return
    here, _ = describe_rows({"train": train} if held_out is None else {"train": train, "eval": held_out})
    if recorded:
        found.differences.extend(compare_data("dataset", recorded, here))
    else:
        found.unknown["dataset"] = original.find_reason("dataset")


def _compare_base(original: Original, recipe: RecipeArguments, found: Readiness) -> None:
    """Compare the base with the fingerprint in the release's manifest."""
    if original.adapter is None:
        found.unknown["base"] = "a folder has no manifest, which would have the base's fingerprint"
        return
    base = recipe.model if recipe.revision is None else f"{recipe.model}@{recipe.revision}"
    try:
        result = check_contract(original.adapter, Path(base) if Path(base).exists() else base)
    except BaseMismatch as error:
        found.differences.append(Difference("base", "the one it was trained on", " ".join(str(error).split())))
    except (RegistryError, OSError) as error:
        found.unknown["base"] = " ".join(str(error).split())
    else:
        if result.identity != "verified":
            found.unknown["base"] = str(result)


def _compare_code(original: Original, found: Readiness) -> None:
    recorded, here = _get(original, "code"), describe_code(Path(lora_plugins.__file__), "lora-plugins")
    if not recorded:
        return
    if isinstance(here, str):
        found.unknown["code"] = here
        return
    if recorded.get("commit") != here["commit"]:
        found.differences.append(Difference("code.commit", recorded.get("commit"), here["commit"]))
    if recorded.get("dirty") or here["dirty"]:
        found.unknown["code"] = "there were, or are, changes that are not committed"


def _compare_after(original: Original, before: Readiness, folder: Path, *, kept: bool) -> Reproduction:
    recorded, digest = digest_adapter(original.folder), digest_adapter(folder)
    lineage = read_lineage(folder)
    if not any(item.field.startswith("dataset") for item in before.differences):
        # The same rows can be tokenized otherwise.
        before.differences.extend(compare_data("inputs", _get(original, "inputs"), lineage.get("inputs", {})))
    changes = compare_layers(original.folder, folder)
    # The norm of a difference of two products is not exactly zero where they are equal.
    layers = [asdict(one) for one in changes if one.change > _EXACT * max(one.before, one.after)]
    return Reproduction(
        original.name,
        recorded == digest,
        digest,
        recorded,
        find_first_step(_get(original, "losses"), lineage.get("losses", {})),
        [] if recorded == digest else sorted(layers, key=lambda item: -item["change"]),
        len(changes),
        before,
        str(folder.parent) if kept else None,
    )

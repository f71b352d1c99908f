"""Run a recorded training again, and say whether the adapter is the same."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator, Mapping, Sequence
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
    show_lines,
)
from lora_plugins.recipe.reproduction.flags import describe_recipe
from lora_plugins.recipe.reproduction.recorded import (
    Recorded,
    check_lora_imports,
    check_no_output,
    list_flags,
    read_recorded_flags,
)
from lora_plugins.recipe.reproduction.source import Original, digest_adapter, read_original
from lora_plugins.recipe.run import TrainingRun
from registry import BaseMismatch, RegistryError, check_contract, compare_layers, read_lineage

__all__ = [
    "Readiness",
    "Reproduction",
    "check_reproduction",
    "compare_runs",
    "read_original",
    "read_recorded_flags",
    "reproduce",
]

#: Flags that say where the base and the rows are. They may differ: the base and the rows themselves are compared.
_PLACES = ("model", "dataset", "eval_dataset", "revision")
_LAYERS_SHOWN = 10
#: Share of a norm that rounding can be, in float64.
_EXACT = 1e-12


@dataclass(frozen=True)
class Readiness:
    """What is known before a run is repeated.

    Attributes:
        name: The adapter.
        missing: What the run cannot do without, each with the way to give it.
        differences: What is different here.
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
        return show_lines(lines + [f"  not compared: {key}: {why}" for key, why in self.unknown.items()])


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
        readiness: What was different before the run began: the causes.
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
        lines += [f"  different here, without effect: {item}" for item in self.readiness.differences if self.same]
        if not self.same and not self.readiness.differences:
            told = "none in what is recorded; this hardware may not compute the same twice"
            if "base" in self.readiness.unknown:
                told = "none in what could be compared; the base could not, see below"
            lines.append(f"  cause: {told}")
        return show_lines(lines + [f"  not compared: {key}: {why}" for key, why in self.readiness.unknown.items()])


def check_reproduction(reference: str | Original, words: Sequence[str] = (), *, hub: str | None = None) -> Readiness:
    """Say what a repetition would lack, and what is different here from what was recorded; nothing is trained.

    Args:
        reference: ``org/name@version``, an adapter's folder or the output folder of a run; or one that is already read.
        words: Flags of ``train`` that replace recorded ones, or give what was not recorded.
        hub: The registry.

    Raises:
        ReproductionError: The run is not recorded, was not one of ``lora-plugins train``, or its recipe or a flag asks
            for more than a repetition.
        ArgumentsError: A flag cannot be used.
    """
    original = reference if isinstance(reference, Original) else read_original(reference, hub)
    recorded = read_recorded_flags(original, list_flags(words))
    if recorded.missing:
        differences = list(compare_libraries(_get(original, "libraries")))
        return Readiness(original.name, recorded.missing, differences, recorded.unknown)
    with _prepare(recorded, words) as (recipe, training):
        return _compare_before(original, recorded, recipe, training)


def reproduce(reference: str | Original, words: Sequence[str] = (), *, hub: str | None = None) -> Reproduction:
    """Train again as recorded, and compare the adapters.

    Args:
        reference: See `check_reproduction`.
        words: See `check_reproduction`; with ``--output_dir`` the repeated run is kept.
        hub: The registry.

    Raises:
        ReproductionError: The run is not recorded, something that it needs is not here, or its recipe or a flag asks
            for more than a repetition.
        ArgumentsError: A flag cannot be used.
        TrainingError: The run fails.
    """
    original = reference if isinstance(reference, Original) else read_original(reference, hub)
    recorded = read_recorded_flags(original, list_flags(words))
    recorded.check_complete(original)
    with _prepare(recorded, words) as (recipe, training):
        before = _compare_before(original, recorded, recipe, training)
        if before.missing:
            raise ReproductionError("; ".join(f"{key}: {why}" for key, why in before.missing.items()))
        run = TrainingRun(recipe, training)
        if run.run():
            raise ReproductionError("The repeated run was interrupted; nothing was compared.")
        kept = "output_dir" in list_flags(words)
        return _compare_after(original, before, run.folders.adapter, kept=kept)


def compare_runs(
    original: Original,
    recorded: Recorded,
    described: tuple[Mapping[str, Any], Mapping[str, str]],
    base: str,
    folder: Path | None = None,
) -> Reproduction | Readiness:
    """Compare an adapter with one that another command trains again from its recipe, or has.

    Args:
        original: The adapter as it was trained first.
        recorded: Its flags.
        described: The flags of the repetition, as they would be recorded, and why one of them would not be.
        base: Folder or id of its base model.
        folder: The adapter that was trained again; ``None`` compares only what is known before.
    """
    found = Readiness(original.name, unknown=dict(recorded.unknown))
    here = dict(described[0])
    lineage = {} if folder is None else read_lineage(folder)
    leave_out = ["command"]
    if folder is None:
        leave_out.append("revision")
    else:
        here = lineage.get("recipe", here)
    found.differences.extend(compare_values("recipe", recorded.flags, here, leave_out))
    _compare_base(original, base, found)
    found.differences.extend(compare_libraries(_get(original, "libraries")))
    _compare_code(original, found)
    if folder is None:
        return found
    found.differences.extend(compare_values("hardware", _get(original, "hardware"), lineage.get("hardware", {})))
    found.differences.extend(compare_data("dataset", _get(original, "dataset"), lineage.get("dataset", {})))
    return _compare_after(original, found, folder, kept=False)


def _get(original: Original, name: str) -> dict[str, Any]:
    value = original.lineage.get(name)
    return value if isinstance(value, dict) else {}


@contextmanager
def _prepare(recorded: Recorded, words: Sequence[str]) -> Iterator[tuple[RecipeArguments, TrainingArguments]]:
    """Yield the arguments of the repeated run, which publishes, merges and reports nothing.

    Raises:
        ReproductionError: A flag asks for it.
        ArgumentsError: A flag cannot be used.
    """
    given = list_flags(words)
    if "config" in given:
        raise ReproductionError("A repeated run takes no --config: the recording is one. Give the flags themselves.")
    left_out = {"revision"} if "model" in given else set()
    flags = {name: value for name, value in recorded.flags.items() if name not in left_out}
    with tempfile.TemporaryDirectory(prefix="reproduce-") as folder:
        config = Path(folder, "recipe.yaml")
        # JSON is YAML.
        config.write_text(json.dumps(flags), encoding="utf-8")
        own = ["--output_dir", str(Path(folder, "run")), "--report_to", "none", "--merge", "none"]
        recipe, training = parse(["--config", str(config), *own, *words])
        check_no_output(recipe, training)
        if "lora" not in given:
            check_lora_imports(recipe)
        yield recipe, training


def _compare_before(
    original: Original, recorded: Recorded, recipe: RecipeArguments, training: TrainingArguments
) -> Readiness:
    found = Readiness(original.name, unknown=dict(recorded.unknown))
    flags, _ = describe_recipe(recipe, training)
    found.differences.extend(compare_values("recipe", recorded.flags, flags, _PLACES))
    _compare_rows(original, recipe, training, found)
    base = recipe.model if recipe.revision is None else f"{recipe.model}@{recipe.revision}"
    _compare_base(original, base, found)
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


def _compare_base(original: Original, base: str, found: Readiness) -> None:
    """Compare the base with the fingerprint in the release's manifest."""
    if original.adapter is None:
        found.unknown["base"] = "the fingerprint of the base is in the manifest of a release; a folder has none"
        return
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

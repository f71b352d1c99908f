"""Write the record of a run, its figures and its loss curve."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from transformers import TrainingArguments

from lora_plugins.adapters.files import ADAPTER_CONFIG
from lora_plugins.errors import ArgumentsError, ResumeError
from lora_plugins.recipe.arguments import RecipeArguments
from lora_plugins.recipe.files import read_json
from lora_plugins.recipe.resume import checkpoint_folders
from registry import expand_path

__all__ = ["DECISIVE", "RUN_FILE", "Folders", "check_same_run", "draw_loss", "make_plain", "metrics", "run_record"]


#: File in the output folder with the arguments of the run.
RUN_FILE = "run.json"

#: Flags that may differ between a run and its continuation: they change neither data nor weights.
_FREE = frozenset(
    {
        "resume",
        "num_proc",
        "push",
        "push_base_model",
        "merge",
        "adapter_folder",
        "model_folder",
        "report_folder",
        "samples",
        "early_stopping_patience",
    }
)

#: Flags of ``TrainingArguments`` that affect the weights.
DECISIVE = (
    "num_train_epochs",
    "max_steps",
    "per_device_train_batch_size",
    "gradient_accumulation_steps",
    "learning_rate",
    "lr_scheduler_type",
    "lr_scheduler_kwargs",
    "warmup_steps",
    "weight_decay",
    "max_grad_norm",
    "label_smoothing_factor",
    "neftune_noise_alpha",
    "optim",
    "optim_args",
    "adam_beta1",
    "adam_beta2",
    "adam_epsilon",
    "bf16",
    "fp16",
    "seed",
    "data_seed",
    "train_sampling_strategy",
    "dataloader_drop_last",
    "world_size",
)


@dataclass(frozen=True)
class Folders:
    """The folders that a run writes to.

    Attributes:
        output: Checkpoints and the record of the run.
        adapter: The trained adapter.
        model: The merged model.
        report: Reports, figures, loss curve.
    """

    output: Path
    adapter: Path
    model: Path
    report: Path

    @classmethod
    def of(cls, recipe: RecipeArguments, training: TrainingArguments) -> Folders:
        """Return the folders that the arguments ask for; ``~`` is the home folder.

        Raises:
            registry.errors.MachineError: The home folder is not known.
        """
        output = expand_path(training.output_dir)
        return cls(
            output,
            expand_path(recipe.adapter_folder or output / "adapter"),
            expand_path(recipe.model_folder or output / "model"),
            expand_path(recipe.report_folder or output),
        )

    def check_unused(self, *, merge: bool) -> None:
        """Check that no output of an earlier run is in the way.

        Raises:
            ResumeError: There are checkpoints of another run.
            ArgumentsError: There is an adapter or a merged model, or both would go to one folder.
        """
        if merge and self.model.resolve() == self.adapter.resolve():
            raise ArgumentsError(f"Adapter and merged model cannot both go to {self.model}. Give each a folder.")
        checkpoints = checkpoint_folders(self.output)
        if checkpoints:
            raise ResumeError(
                f"{self.output} holds checkpoints of an earlier run, the newest {checkpoints[0].name}. Add --resume to "
                "go on from it, choose another --output_dir, or remove them."
            )
        if (self.adapter / ADAPTER_CONFIG).is_file():
            raise ArgumentsError(
                f"{self.adapter} already holds an adapter. Choose another --output_dir or --adapter_folder, or remove "
                "it."
            )
        if merge and (self.model / "config.json").is_file():
            raise ArgumentsError(f"{self.model} already holds a model. Choose another --model_folder, or remove it.")


def run_record(recipe: RecipeArguments, training: TrainingArguments) -> dict[str, Any]:
    """Return the arguments that affect the weights of a run, as plain data."""
    ours = {item.name: getattr(recipe, item.name) for item in fields(recipe) if item.name not in _FREE}
    # As version 0.1 wrote it, whose runs can be resumed.
    ours["packing"] = {"wrapped": True, "none": False}.get(recipe.packing or "", recipe.packing)
    theirs = {name: _write_flat(make_plain(getattr(training, name, None))) for name in DECISIVE}
    return {**ours, **theirs}


def make_plain(value: Any) -> Any:
    """Return an argument as plain data: an enumeration as its value, of a configuration what is not its default."""
    value = getattr(value, "value", value)
    if hasattr(value, "to_dict"):
        # A configuration that nobody gave is one with its defaults.
        usual = type(value)().to_dict()
        value = {key: item for key, item in value.to_dict().items() if item not in (None, usual.get(key))}
    if isinstance(value, Mapping):
        return {str(key): make_plain(item) for key, item in value.items()}
    return [make_plain(item) for item in value] if isinstance(value, (list, tuple)) else value


def _write_flat(value: Any) -> Any:
    """Return plain data as version 0.1 wrote it, whose runs can be resumed: text instead of lists and mappings."""
    return value if isinstance(value, (str, int, float, bool, type(None))) else str(value)


def check_same_run(output: Path, record: Mapping[str, Any]) -> None:
    """Compare the arguments of a continuation with those of the run that it continues.

    Raises:
        ResumeError: They differ.
    """
    file = output / RUN_FILE
    try:
        before = read_json(
            file, lambda why: ResumeError(f"{file} cannot be read: {why}. Start anew in another --output_dir.")
        )
    except FileNotFoundError:
        return
    different = [name for name in record if before.get(name) != record[name]]
    if different:
        text = "; ".join(f"--{name} was {before.get(name)!r} and is {record[name]!r}" for name in different)
        raise ResumeError(f"The run in {output} had other arguments: {text}. Use the same, or another --output_dir.")


def draw_loss(history: list[dict[str, Any]], path: Path) -> None:
    """Draw the losses of a Trainer's log by step into a PNG."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for key, label, style in (("loss", "training", "-"), ("eval_loss", "held out", "o--")):
        points = [(entry["step"], entry[key]) for entry in history if key in entry]
        if points:
            axes.plot(*zip(*points, strict=True), style, label=label)
    axes.set(xlabel="step", ylabel="loss (nats a token)")
    if axes.lines:
        axes.legend()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)


def metrics(history: list[dict[str, Any]], counts: Mapping[str, Any]) -> dict[str, Any]:
    """Return the figures of a run: counts of the data, last losses, the whole log."""
    last: dict[str, Any] = {}
    for entry in history:
        last |= {key: entry[key] for key in ("loss", "eval_loss", "train_loss", "train_runtime") if key in entry}
    data = {name: asdict(count) for name, count in counts.items() if count is not None}
    return {"data": data, **last, "log": history}

"""Run the demo: train, measure, publish, pull, reload in a new process."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import lora_plugins
import registry
from lora_plugins.commands.calm import quiet
from lora_plugins.commands.demo import dataset as data
from lora_plugins.commands.demo.evaluation import answers, held_out_loss
from lora_plugins.commands.demo.model import cache_folder, demo_model, describe_model, load_base, name_model
from lora_plugins.commands.demo.reload import Reload, compare_in_new_process
from lora_plugins.errors import DemoError, LoraPluginsError

if TYPE_CHECKING:
    from transformers import Trainer

__all__ = [
    "ADAPTER",
    "BATCH_SIZE",
    "HELD_OUT",
    "MAX_TOKENS",
    "SHOWN",
    "Demo",
    "DemoOptions",
    "DemoResult",
    "Sample",
    "describe_options",
    "draw_losses",
]


BATCH_SIZE = 8
MAX_TOKENS = 96
HELD_OUT = 40
SHOWN = 3
REPORT_PAGE = "report.html"
#: Name of the adapter in the demo's registry.
ADAPTER = "demo/summaries"


@dataclass(frozen=True)
class DemoOptions:
    """Options of the demo.

    Attributes:
        model: Folder or id of a causal language model; ``None`` for the small one that comes as a package.
        quantization: Backend of the base, ``None`` to leave it in float.
        steps: Optimizer steps of eight examples.
        output: Folder for the adapter, the report and the picture.
        seed: Decides the split, the order of the examples and the adapters' initial values.
    """

    model: str | None
    quantization: str | None
    steps: int
    output: Path
    seed: int


def describe_options(options: DemoOptions, commit: str | None = None) -> tuple[dict[str, Any], dict[str, str]]:
    """Return the recipe of a demo for its lineage, and why a part of it is missing.

    Args:
        options: Options of the demo.
        commit: Commit of a model of the Hub, if it is known.
    """
    model, reasons = describe_model(options.model, commit)
    quantization = options.quantization or "none"
    recipe = {"command": "demo", **model, "steps": options.steps, "seed": options.seed, "quantization": quantization}
    return recipe, {f"recipe.{name}": why for name, why in reasons.items()}


@dataclass
class Sample:
    """A held-out function and three summaries of it."""

    module: str
    source: str
    author: str
    before: str
    after: str


@dataclass
class DemoResult:
    """Everything that the demo prints.

    Attributes:
        model: Folder or id of the base model.
        quantization: Backend of the base.
        steps: Optimizer steps.
        trainable: Weights that were trained.
        total: Weights in all.
        held_out_functions: Functions that losses are measured on, none from a module seen in training.
        held_out_tokens: Tokens of their summaries.
        loss_float: Held-out loss of the base as it was loaded, in nats a token.
        loss_before: The same of the prepared model before training: the quantized base, the adapter being zero.
        loss_after: The same after training.
        perplexity_before: ``exp(loss_before)``.
        perplexity_after: ``exp(loss_after)``.
        training_loss: Loss of each step, in training mode.
        samples: Generations before and after.
        release: The published release, in a folder registry.
        content: sha256 of the published content: weights, configuration, base.
        reload: Comparison with the adapter pulled and loaded in a new process.
        files: Files and folders that were written.
        seconds: Wall time by phase.
    """

    model: str
    quantization: str | None
    steps: int
    trainable: int = 0
    total: int = 0
    held_out_functions: int = 0
    held_out_tokens: int = 0
    loss_float: float = 0.0
    loss_before: float = 0.0
    loss_after: float = 0.0
    perplexity_before: float = 0.0
    perplexity_after: float = 0.0
    training_loss: list[float] = field(default_factory=list)
    samples: list[Sample] = field(default_factory=list)
    release: str = ""
    content: str = ""
    reload: Reload | None = None
    files: list[str] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=dict)


class Demo:
    """One run of the demo, phase by phase.

    Args:
        options: What to run.
        say: Takes each line of what is told on the way.
    """

    def __init__(self, options: DemoOptions, say: Callable[[str], None] = print) -> None:
        self.options = options
        self.say = say
        self._base = ""
        self._started = time.perf_counter()

    def run(self) -> DemoResult:
        """Do all of it.

        Raises:
            DemoError: The model is missing, or the reloaded adapter is not the one that was trained.
        """
        self.say("Starting torch, transformers and PEFT …")
        quiet()
        from transformers import AutoTokenizer, set_seed

        set_seed(self.options.seed)
        self.say("Model and data …")
        self._base = self.options.model or str(demo_model(self.say))
        self.result = DemoResult(self._base, self.options.quantization, self.options.steps)
        with name_model(self._base):
            self.tokenizer = AutoTokenizer.from_pretrained(self._base)
        self._make_data()
        trainer = self._make_trainer()
        self._record_time("preparing")
        before = self._measure_before(trainer)
        self.say(f"Training for {self.options.steps} steps of {BATCH_SIZE} functions …")
        trainer.train()
        self._record_time("training")
        self._measure_after(trainer, before)
        self._save(trainer)
        self._publish(trainer)
        self._reload(trainer)
        return self.result

    def _make_data(self) -> None:
        train, test = data.split_examples(data.read_examples(cache_folder()), seed=self.options.seed)
        count = self.options.steps * BATCH_SIZE
        self.train_data = data.make_dataset(train, self.tokenizer, count=count, max_tokens=MAX_TOKENS)
        self.test_data = data.make_dataset(test, self.tokenizer, count=HELD_OUT, max_tokens=MAX_TOKENS)
        self.shown = _select_short(test, SHOWN)
        self.result.held_out_functions = len(self.test_data)
        self.result.held_out_tokens = sum(label != -100 for row in self.test_data["labels"] for label in row)
        self.say(
            f"  {len(self.train_data)} functions of the standard library to train on, {len(self.test_data)} held out "
            f"({self.result.held_out_tokens} answer tokens, from modules not trained on)"
        )

    def _make_trainer(self) -> Trainer:
        from transformers import Trainer, TrainingArguments

        from lora_plugins.adapters.lineage import recording

        model = load_base(self._base)
        self.say("Measuring the base as loaded …")
        self.result.loss_float = self._measure_loss(model)
        arguments = TrainingArguments(
            output_dir=str(self.options.output),
            max_steps=self.options.steps,
            per_device_train_batch_size=BATCH_SIZE,
            learning_rate=2e-3,
            warmup_steps=2,
            logging_steps=1,
            save_strategy="no",
            report_to=[],
            seed=self.options.seed,
            use_cpu=model.device.type == "cpu",
            disable_tqdm=not sys.stderr.isatty(),
        )
        lora = lora_plugins.LoraCallback(r=8, lora_alpha=32, lora_dropout=0.05, quantization=self.options.quantization)
        trainer = Trainer(
            model=model,
            args=arguments,
            train_dataset=self.train_data,
            data_collator=data.collator(self.tokenizer),
            processing_class=self.tokenizer,
            callbacks=[lora, lora_plugins.ParameterReportCallback()],
        )
        recipe, reasons = describe_options(self.options, getattr(trainer.model.config, "_commit_hash", None))
        recording.declare_lineage(trainer.model, {"recipe": recipe, "not_recorded": reasons})
        return trainer

    def _measure_before(self, trainer: Trainer) -> list[str]:
        from lora_plugins.quantization.counting import count_parameters

        count = count_parameters(trainer.model)
        self.result.trainable, self.result.total = count.trainable, count.total
        # The adapter is exactly zero before the first step, so this is the base under the same kernel as later.
        self.say("Measuring before training …")
        self.result.loss_before = self._measure_loss(trainer.model)
        self.result.perplexity_before = math.exp(self.result.loss_before)
        texts = self._ask(trainer.model)
        self._record_time("measuring before")
        return texts

    def _measure_after(self, trainer: Trainer, before: Sequence[str]) -> None:
        result = self.result
        result.training_loss = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
        self.say("Measuring after training …")
        result.loss_after = self._measure_loss(trainer.model)
        result.perplexity_after = math.exp(result.loss_after)
        after = self._ask(trainer.model)
        result.samples = [
            Sample(example.module, example.source, example.summary, old, new)
            for example, old, new in zip(self.shown, before, after, strict=True)
        ]
        self._record_time("measuring after")

    def _save(self, trainer: Trainer) -> None:
        output = self.options.output
        trainer.save_model(str(output / "adapter"))
        draw_losses(self.result, output / "loss.png")
        self._write_page()
        names = ["adapter", "loss.png", "parameter_report.json", "registry", REPORT_PAGE]
        self.result.files = [str(output / name) for name in names if name != REPORT_PAGE or (output / name).is_file()]

    def _write_page(self) -> None:
        from lora_plugins.recipe.report import collect, page

        output, result = self.options.output, self.result
        samples = [
            {"title": one.module, "prompt": one.source, "before": one.before, "after": one.after}
            for one in result.samples
        ]
        losses = {name: getattr(result, name) for name in ("loss_float", "loss_before", "loss_after")}
        title = f"lora-plugins demo, seed {self.options.seed}"
        try:
            facts = collect.collect_run(output, output / "adapter", samples)
            page.write_page(replace(facts, title=title, metrics={**facts.metrics, **losses}), output / REPORT_PAGE)
        except (LoraPluginsError, registry.RegistryError, OSError) as error:
            self.say(f"No report page: {error}")

    def _publish(self, trainer: Trainer) -> None:
        self.say("Publishing the adapter in a folder …")
        done = registry.push_adapter(
            trainer,
            ADAPTER,
            version="minor",
            hub=self._registry,
            metrics={"perplexity_before": self.result.perplexity_before, "perplexity": self.result.perplexity_after},
            training={"quantization": self.options.quantization or "none"},
        )
        self.result.release, self.result.content = str(done), done.manifest.content_digest
        self._record_time("publishing")

    @property
    def _registry(self) -> Path:
        return self.options.output.absolute() / "registry"

    def _reload(self, trainer: Trainer) -> None:
        self.say("Starting a new process for the reload …")
        batch = data.collator(self.tokenizer)([self.test_data[index] for index in range(4)])
        self.result.reload = compare_in_new_process(
            trainer.model,
            batch,
            base=self._base,
            adapter=self.result.release,
            quantization=self.options.quantization,
            registry=self._registry,
        )
        self._record_time("reloading")
        if not self.result.reload.equal or not self.result.reload.difference_off:
            raise DemoError(f"The reloaded adapter is not the one that was trained: {self.result.reload}")

    def _measure_loss(self, model: Any) -> float:
        loss = held_out_loss(model, self.test_data, self.tokenizer, say=self.say)
        self.say(f"  held-out loss {loss:.4f}, perplexity {math.exp(loss):.2f}")
        return loss

    def _ask(self, model: Any) -> list[str]:
        """Return what the model writes about the functions that are shown, told one by one."""
        texts = []
        for example, text in zip(self.shown, answers(model, self.shown, self.tokenizer), strict=True):
            self.say(f"  {example.module}: {text}")
            texts.append(text)
        return texts

    def _record_time(self, phase: str) -> None:
        now = time.perf_counter()
        self.result.seconds[phase] = round(now - self._started, 1)
        self._started = now


def _select_short(examples: Sequence[data.Example], count: int) -> list[data.Example]:
    """Return the first examples that are short enough to be shown, each from another package."""
    shown: dict[str, data.Example] = {}
    for example in examples:
        if example.source.count("\n") < 8:
            shown.setdefault(example.package, example)
    return list(shown.values())[:count]


def draw_losses(result: DemoResult, path: Path) -> None:
    """Draw the training loss by step, and the held-out losses, into a PNG."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    # A figure of its own, instead of pyplot's, leaves the caller's backend and figures alone.
    figure = Figure(figsize=(7, 4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.plot(range(1, len(result.training_loss) + 1), result.training_loss, label="training")
    axes.axhline(result.loss_before, color="gray", linestyle="--", label="held out, before")
    axes.axhline(result.loss_after, color="green", linestyle="--", label="held out, after")
    axes.set(xlabel="step", ylabel="loss (nats a token)", title=f"LoRA, base in {result.quantization or 'float'}")
    axes.legend()
    figure.savefig(path, dpi=120)

"""Run the command ``train``, from its first check to the merged model."""

from __future__ import annotations

import gc
import json
import signal
import traceback
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from transformers import EarlyStoppingCallback, Trainer, TrainingArguments, set_seed

from lora_plugins import LoraCallback, ParameterReportCallback
from lora_plugins.adapters.lineage.recording import continue_lineage, declare_lineage
from lora_plugins.errors import ArgumentsError, LoraPluginsError, ResumeError
from lora_plugins.merging.job import RECIPE_FILE
from lora_plugins.merging.merge import merge_and_save
from lora_plugins.merging.weights import unquantized_layers
from lora_plugins.quantization.request import parse_quantization
from lora_plugins.recipe import prepare
from lora_plugins.recipe.arguments import RecipeArguments
from lora_plugins.recipe.interruption import Interruption
from lora_plugins.recipe.output import (
    RUN_FILE,
    Folders,
    check_same_run,
    draw_loss,
    metrics,
    run_record,
)
from lora_plugins.recipe.parser import parse
from lora_plugins.recipe.publishing import Publication
from lora_plugins.recipe.report.collect import collect_run
from lora_plugins.recipe.report.page import REPORT_PAGE, write_page
from lora_plugins.recipe.report.samples import Samples
from lora_plugins.recipe.reproduction.flags import describe_run
from lora_plugins.recipe.resume import checkpoint_defect, find_checkpoints, finished_state
from lora_plugins.recipe.templates import make_template
from lora_plugins.text import one_line, write_file, write_json
from lora_plugins.trainer.checkpoints import restore_best
from lora_plugins.trainer.engines import place_whole, raise_together
from registry import RegistryError

__all__ = ["TrainingRun", "run"]


#: Added to the signal's number for the exit code, as shells do.
_SIGNAL_BASE = 128


def run(words: Sequence[str]) -> int:
    """Run the command line of ``lora-plugins train``.

    Args:
        words: The command line without ``lora-plugins train``.

    Returns:
        The exit code: 0, or 128 and the signal's number after an interruption that left a checkpoint.

    Raises:
        TrainingError: An argument, the data, the template or the run to resume cannot be used.
        LoraPluginsError: The model cannot be prepared, or the run would train nothing.
    """
    recipe, training = parse(words)
    return TrainingRun(recipe, training).run()


class TrainingRun:
    """One run, phase by phase.

    Args:
        recipe: Our own arguments.
        training: Arguments of the Trainer.
    """

    def __init__(self, recipe: RecipeArguments, training: TrainingArguments) -> None:
        self.recipe = recipe
        self.training = training
        self.folders = Folders.of(recipe, training)
        self.is_main = training.process_index == 0
        self._samples: tuple[Samples, list[str]] | None = None

    def say(self, text: str) -> None:
        """Print on the main process."""
        if self.is_main:
            print(text, flush=True)

    def run(self) -> int:
        """Run all phases; see `run`."""
        self._keep_page_here()
        prepare.choose_quantization(self.recipe, self.training, self.say)
        prepare.check_lora(self.recipe)
        publication = Publication.of(self.recipe.push, self._find_base_on_hub())
        checkpoint = self._choose_checkpoint()
        # The Trainer (transformers 5.23) sets it after the model is loaded, and loading initializes what no file has.
        set_seed(self.training.seed)
        self.tokenizer = prepare.load_tokenizer(self.recipe)
        prepare.check_stored(self.recipe)
        self.data = prepare.prepare_data(self.recipe, self.training, self.tokenizer, self.say)
        trainer, interruption = self._make_trainer()
        if publication is not None:
            publication.check(trainer.model)
        if self.is_main:
            write_json(self.folders.output / RUN_FILE, run_record(self.recipe, self.training))
        self._ask_before(trainer)
        with interruption.listening():
            self._train(trainer, checkpoint)
            # If a process ends while another still writes the checkpoint, the launcher kills that one.
            trainer.accelerator.wait_for_everyone()
        if interruption.stopped_at is not None:
            return self._end_interrupted(interruption)
        figures = self._save(trainer)
        unpublished = self._publish(publication, trainer)
        # Free the trained model: the merge needs its memory.
        if unpublished is not None:
            traceback.clear_frames(unpublished.__traceback__)
        del trainer, interruption
        gc.collect()
        self._merge(figures)
        if unpublished is not None:
            raise unpublished
        return 0

    def _keep_page_here(self) -> None:
        """Keep pages with training text out of what ``--push_to_hub`` uploads: the whole output folder.

        Raises:
            ArgumentsError: This run would write such a page there.
        """
        if not self.training.push_to_hub:
            return
        output = self.folders.output.resolve()
        if self.recipe.samples and self.folders.report.resolve().is_relative_to(output):
            raise ArgumentsError(
                "--samples writes texts of the data set into the report page, and --push_to_hub uploads the output "
                "folder with it. Give --report_folder outside of --output_dir, publish with --push instead, or leave "
                "one of them out."
            )
        if self.is_main:
            # Of an earlier run.
            (output / REPORT_PAGE).unlink(missing_ok=True)

    def describe(self) -> dict[str, Any]:
        """Return where a finished run has put things, and its figures, as they are in ``metrics.json``."""
        folders = self.folders
        figures = json.loads((folders.report / "metrics.json").read_text(encoding="utf-8"))
        model = str(folders.model) if self.recipe.merge != "none" else None
        return {"adapter": str(folders.adapter), "model": model, "report": str(folders.report), "metrics": figures}

    def _find_base_on_hub(self) -> str | None:
        """Return the base to name in the published adapter, if the model itself does not have it."""
        recipe = self.recipe
        if recipe.push_base_model is None and recipe.revision is not None and not Path(recipe.model).exists():
            return f"{recipe.model}@{recipe.revision}"
        return recipe.push_base_model

    def _publish(self, publication: Publication | None, trainer: Trainer) -> Exception | None:
        """Publish the adapter; return an error instead of raising it, so that the merge still runs."""
        if publication is None or not self.is_main:
            return None
        try:
            self.say(publication.push(trainer, self.folders.adapter, prepare.quantization_of(self.recipe)))
        except Exception as error:
            self.say(f"The adapter in {self.folders.adapter} is not published, for the reason at the end")
            return error
        return None

    def _choose_checkpoint(self) -> str | None:
        """Return the checkpoint to resume from, ``None`` to start from the beginning.

        Raises:
            ResumeError: There are checkpoints but no ``--resume``, or they are of a run with other arguments.
            ArgumentsError: An adapter or a merged model is in the way.
        """
        chosen = self.training.resume_from_checkpoint
        if not (self.recipe.resume or chosen):
            # Only one process checks, before any of them can have written something.
            if self.is_main:
                self.folders.check_unused(merge=self.recipe.merge != "none")
            return None
        check_same_run(self.folders.output, run_record(self.recipe, self.training))
        if chosen and str(chosen).lower() != "true":
            reason = checkpoint_defect(Path(chosen), self.training.world_size)
            if reason is not None:
                raise ResumeError(f"--resume_from_checkpoint {chosen} is not a complete checkpoint: {reason}")
            return str(chosen)
        found = find_checkpoints(self.folders.output, self.training.world_size)
        for folder, reason in found.broken.items():
            self.say(f"{folder.name} is incomplete and passed over ({reason})")
        if found.newest is None:
            self.say(f"No complete checkpoint in {self.folders.output}; starting from the beginning")
            return None
        self.say(f"Going on from {found.newest}")
        return str(found.newest)

    def _make_trainer(self) -> tuple[Trainer, Interruption]:
        interruption = Interruption()
        callbacks: list[Any] = [LoraCallback(**prepare.lora_arguments(self.recipe)), ParameterReportCallback()]
        if self.recipe.early_stopping_patience:
            callbacks.append(EarlyStoppingCallback(self.recipe.early_stopping_patience))
        model = prepare.load_base(self.recipe)
        commit = getattr(model.config, "_commit_hash", None)
        try:
            trainer = Trainer(
                model=model,
                args=self.training,
                train_dataset=self.data.train,
                eval_dataset=self.data.held_out,
                callbacks=[*callbacks, interruption],
            )
        except LoraPluginsError:
            raise
        except (ValueError, ImportError) as error:
            # The Trainer is the first to check some arguments, such as --report_to.
            raise ArgumentsError(f"The Trainer refuses these arguments: {error}") from error
        with raise_together(trainer):
            if prepare.packing_of(self.recipe) == "best-fit":
                place_whole(trainer)
            trainer.data_collator = prepare.collator(self.recipe, self.tokenizer, trainer.model)
        if self.is_main:
            rows = self.data.rows
            declare_lineage(trainer.model, lambda: describe_run(self.recipe, self.training, rows, commit))
        return trainer, interruption

    def _train(self, trainer: Trainer, checkpoint: str | None) -> None:
        """Train, or restore a finished run, on which the Trainer (transformers 5.23) would do one more step."""
        state = finished_state(Path(checkpoint)) if checkpoint is not None else None
        if state is None or checkpoint is None:
            try:
                trainer.train(resume_from_checkpoint=checkpoint)
            except ImportError as error:
                # Some arguments, such as --use_liger_kernel, need a package that the Trainer imports only now.
                raise ArgumentsError(f"The Trainer lacks something for these arguments: {error}") from error
            return
        self.say(f"All {state.global_step} steps were done already")
        trainer.state = state
        continue_lineage(trainer.model, Path(checkpoint), finished=True)
        best = state.best_model_checkpoint if self.training.load_best_model_at_end else None
        restore_best(trainer.model, Path(best or checkpoint))

    def _end_interrupted(self, interruption: Interruption) -> int:
        number = interruption.signal or signal.SIGTERM
        self.say(
            f"Interrupted by {signal.Signals(number).name} after step {interruption.stopped_at}; checkpoint-"
            f"{interruption.stopped_at} is in {self.folders.output}. The same command with --resume goes on from it."
        )
        return _SIGNAL_BASE + number

    def _save(self, trainer: Trainer) -> dict[str, Any]:
        """Write adapter, report and figures; return the figures."""
        trainer.save_model(str(self.folders.adapter))
        history = trainer.state.log_history
        figures = metrics(history, self.data.counts)
        if not self.is_main:
            return figures
        # A pickle with this machine's paths in it, of no use to users of the adapter.
        (self.folders.adapter / "training_args.bin").unlink(missing_ok=True)
        write_json(self.folders.adapter / RECIPE_FILE, self._make_recipe_record(trainer.model))
        report = self.folders.report
        report.mkdir(parents=True, exist_ok=True)
        write_json(report / "metrics.json", figures)
        draw_loss(history, report / "loss.png")
        written = self.folders.output / "parameter_report.json"
        if written.is_file() and written.parent != report:
            write_file(report / written.name, written.read_bytes())
        self._write_page(trainer)
        self.say(f"Adapter in {self.folders.adapter}; report and loss curve in {report}")
        return figures

    def _ask_before(self, trainer: Trainer) -> None:
        """Let the model generate text before it is trained, if ``--samples`` asks for it."""
        if not self.recipe.samples:
            return
        if self.training.world_size > 1:
            self.say("No samples: a model in several processes does not generate text here")
            return
        name, rows = (
            ("held out", self.data.rows["eval"]) if "eval" in self.data.rows else ("train", self.data.rows["train"])
        )
        try:
            template = make_template(self.recipe.template, rows.features, self.tokenizer)
            samples = Samples.choose(self.recipe.samples, rows, name, template, self.tokenizer)
            self._samples = samples, samples.ask(trainer.model)
        except Exception as error:
            self._refuse_samples(error)

    def _refuse_samples(self, error: Exception) -> None:
        self.say(f"No samples: the model generates no text here ({type(error).__name__}: {one_line(error)[:300]})")

    def _ask_after(self, trainer: Trainer) -> list[Mapping[str, str]]:
        """Return samples before and after; a run that has succeeded does not fail for them."""
        if self._samples is None:
            return []
        samples, before = self._samples
        try:
            return samples.make_rows(before, samples.ask(trainer.model))
        except Exception as error:
            self._refuse_samples(error)
            return []

    def _write_page(self, trainer: Trainer) -> None:
        """Write the report page; a run that has succeeded does not fail for it."""
        report, samples = self.folders.report, self._ask_after(trainer)
        try:
            write_page(collect_run(report, self.folders.adapter, samples), report / REPORT_PAGE)
        except (LoraPluginsError, RegistryError, OSError) as error:
            self.say(f"No report page: {error}")

    def _make_recipe_record(self, model: Any) -> dict[str, Any]:
        """Return the facts that are needed to use or merge the adapter as it was trained."""
        record: dict[str, Any] = {
            "base": self.recipe.model,
            "revision": self.recipe.revision,
            "template": self.recipe.template,
            "quantization": None,
        }
        quantization = parse_quantization(prepare.quantization_of(self.recipe))
        if quantization is not None:
            skipped = unquantized_layers(model)
            record["quantization"] = {**quantization.options, "name": quantization.name, "skip_modules": skipped}
        return record

    def _merge(self, figures: dict[str, Any]) -> None:
        if not self.is_main or self.recipe.merge == "none":
            return
        result = merge_and_save(
            self.folders.adapter,
            self.folders.model,
            dtype=self.recipe.merge,
            base=self.recipe.model,
            revision=self.recipe.revision,
            overwrite=True,
        )
        self.say(result.line())
        write_json(self.folders.report / "metrics.json", {**figures, "merge": result.to_dict()})

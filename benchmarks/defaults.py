"""The table of defaults: held-out loss at equal CPU time and memory, for targets, ranks and learning rates.

Two texts that every machine has: functions of Python's standard library, and the topics of its reference manual. Each
combination runs in a process of its own, from the same seed and on the same tokens in the same order. What a step costs
is measured first, in CPU seconds, all combinations in turns; each then gets the steps that fit into ``--seconds``. So
neither another program on the machine nor the order of the runs decides. ``--models`` takes any small causal models
that are here; `pretrained.py` makes some. A default would be changed by what wins on two texts and three models.

    python benchmarks/defaults.py --seconds 600 --ranks 2 8 64 --rates 2e-4 1e-3     hours on few cores
    python benchmarks/defaults.py --write                                           renews the docs page
    python benchmarks/defaults.py --models FOLDER --add                             adds rows to those that are there
"""

from __future__ import annotations

import argparse
import contextlib
import io
import itertools
import multiprocessing
import os
import statistics
import sys
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import page
from measure import hardware, peak_resident, record, recorded, resident, versions

#: Name of each choice of targets and what `LoraCallback` gets for it.
TARGETS: dict[str, Any] = {"default": None, "attention": "attention", "all-linear": "all-linear"}
TEXTS = ("functions", "manual")

#: Rows of text that a run may see; the same for all, so that all see them in the same order.
ROWS = 2048
#: Steps of a combination in one round of finding their cost, without the first, and the rounds.
COST_STEPS, COST_ROUNDS = 2, 2

#: Options that all rows of a table have in common.
SETTINGS = ("batch", "length", "held_out", "seconds", "seed")

Combination = Mapping[str, Any]
#: Rows of token ids.
Rows = list[list[int]]


def in_a_new_process(function: Callable[..., Any], *arguments: Any) -> Any:
    """Run a function in a process that is a copy of this one, so that its memory is its own."""
    with multiprocessing.get_context("fork").Pool(1) as pool:
        return pool.apply(function, arguments)


# -- in a process of its own -------------------------------------------------------------------


def make_trainer(options: argparse.Namespace, combination: Combination, rows: Rows, steps: int) -> Any:
    """Return a Trainer with the callback; building it prepares the model."""
    import torch
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

    from lora_plugins import LoraCallback

    targets = TARGETS[combination["targets"]]
    chosen = {} if targets is None else {"target_modules": targets}
    with contextlib.redirect_stdout(io.StringIO()):
        return Trainer(
            model=AutoModelForCausalLM.from_pretrained(find_model(combination["model"]), dtype=torch.float32),
            args=TrainingArguments(
                output_dir=options.folder,
                max_steps=steps,
                per_device_train_batch_size=options.batch,
                learning_rate=combination["rate"],
                lr_scheduler_type="constant",
                save_strategy="no",
                report_to=[],
                disable_tqdm=True,
                use_cpu=True,
                seed=options.seed,
            ),
            train_dataset=Dataset.from_dict({"input_ids": rows, "labels": rows}),
            callbacks=[LoraCallback(quantization="int8", r=combination["rank"], **chosen)],
        )


def find_costs(
    options: argparse.Namespace, combinations: list[Combination], rows: Rows, held_out: Mapping[str, Rows]
) -> tuple[list[float], dict[str, float]]:
    """Return the least CPU seconds of a step of each combination, all in turns, and the loss before on each text."""
    from step_clock import StepClock

    trainers = [make_trainer(options, combination, rows, COST_STEPS + 1) for combination in combinations]
    before = {text: compute_loss(trainers[0].model, unseen) for text, unseen in held_out.items()}
    found: list[list[float]] = [[] for _ in trainers]
    for _ in range(COST_ROUNDS):
        for trainer, costs in zip(trainers, found, strict=True):
            clock = StepClock()
            trainer.add_callback(clock)
            with contextlib.redirect_stdout(io.StringIO()):
                trainer.train()
            trainer.remove_callback(clock)
            costs += [cpu for _, cpu in clock.seconds[1:]]
    return [min(costs) for costs in found], before


def train(
    options: argparse.Namespace, combination: Combination, rows: Rows, held_out: Rows, steps: int
) -> dict[str, Any]:
    """Train one combination; return its held-out loss, its memory and what it trains."""
    before = resident()
    trainer = make_trainer(options, combination, rows, steps)
    with contextlib.redirect_stdout(io.StringIO()):
        trainer.train()
    config = trainer.model.peft_config["default"]
    return {
        "loss": compute_loss(trainer.model, held_out),
        "peak": peak_resident() - before,
        "trainable": sum(p.numel() for p in trainer.model.parameters() if p.requires_grad),
        "modules": sorted({name.rpartition(".")[2] for name in config.target_modules}),
    }


def compute_loss(model: Any, rows: Rows) -> float:
    """Return the loss in nats a token, the model in evaluation mode."""
    import torch

    model.eval()
    with torch.no_grad():
        batches = torch.tensor(rows).split(2)
        return statistics.fmean(float(model(input_ids=batch, labels=batch).loss) for batch in batches)


# -- in the process that compares --------------------------------------------------------------


def find_model(name: str) -> str:
    """Return the folder or id that a model is loaded from; the demo's has a name."""
    from lora_plugins.commands.demo.model import demo_model

    return str(demo_model()) if name == "SmolLM2-135M" else name


def read_text(name: str) -> str:
    """Return one of the texts."""
    if name == "manual":
        from pydoc_data.topics import topics

        return "\n\n".join(topics[key] for key in sorted(topics))
    from lora_plugins.commands.demo.dataset import collect_examples

    return "\n".join(f"{example.source}\n# {example.summary}\n" for example in collect_examples()[::8])


def make_rows(options: argparse.Namespace, model: str, text: str) -> tuple[Rows, Rows]:
    """Return rows of tokens for training, and held-out ones."""
    import numpy as np
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(find_model(model))
    stream = np.asarray(tokenizer(read_text(text), add_special_tokens=False)["input_ids"])
    rows = stream[: len(stream) // options.length * options.length].reshape(-1, options.length)
    # Neighbours are alike: the held-out rows are the end of the text, and those before it are shuffled.
    shuffled = np.random.default_rng(0).permutation(rows[: -2 * options.held_out])
    return shuffled[:ROWS].tolist(), rows[-options.held_out :].tolist()


def compare(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Run every combination and return a row for each."""
    rows = []
    for model in options.models:
        texts = {text: make_rows(options, model, text) for text in options.texts}
        kinds = list(itertools.product(options.ranks, options.only))
        asked = [
            {"model": model, "rank": rank, "targets": targets, "rate": options.rates[0]} for rank, targets in kinds
        ]
        first_rows = next(iter(texts.values()))[0]
        held_out = {text: unseen for text, (_, unseen) in texts.items()}
        found, before = in_a_new_process(find_costs, options, asked, first_rows, held_out)
        costs = dict(zip(kinds, found, strict=True))
        for text, rate, (rank, targets) in itertools.product(options.texts, options.rates, kinds):
            cost = costs[rank, targets]
            steps = max(1, round(options.seconds / cost))
            combination = {"model": model, "text": text, "rank": rank, "rate": rate, "targets": targets}
            result = in_a_new_process(train, options, combination, *texts[text], steps)
            combination["model"] = Path(model).name
            row = {"seconds": options.seconds, "steps": steps, "step_cpu_seconds": cost, "first": before[text]}
            rows.append({**combination, **row, **result})
            print(f"{combination}: {steps} steps, loss {result['loss']:.4f}", file=sys.stderr, flush=True)
    return rows


def put_together(options: argparse.Namespace, rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the section of the results: these rows, and with ``--add`` those that were there.

    Raises:
        SystemExit: The rows that are there are of other settings.
    """
    own = ["python benchmarks/defaults.py", *sys.argv[1:]]
    section: dict[str, Any] = {
        "command": " ".join(own),
        "hardware": hardware(),
        "versions": versions(),
        "settings": {key: getattr(options, key) for key in SETTINGS},
        "rows": rows,
    }
    known = recorded().get("defaults") if options.add else None
    if known is None:
        return section
    if any(known[key] != section[key] for key in ("settings", "hardware", "versions")):
        raise SystemExit(
            "The rows in docs/benchmarks.json are of other settings, machine or releases; leave out --add."
        )
    place = ("model", "text", "rank", "rate", "targets")
    renewed = {tuple(row[key] for key in place) for row in rows}
    kept = [row for row in known["rows"] if tuple(row[key] for key in place) not in renewed]
    return {**section, "command": f"{known['command']} && {section['command']}", "rows": [*kept, *rows]}


def main() -> None:
    """Compare, print and, where asked, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["SmolLM2-135M"], help="folders or Hub ids; the demo's by name")
    parser.add_argument("--texts", nargs="+", choices=TEXTS, default=list(TEXTS))
    parser.add_argument("--ranks", nargs="+", type=int, default=[8])
    parser.add_argument("--rates", nargs="+", type=float, default=[1e-3])
    parser.add_argument("--only", nargs="+", choices=TARGETS, default=list(TARGETS), help="targets")
    parser.add_argument("--seconds", type=float, default=60, help="CPU seconds of training for each combination")
    parser.add_argument("--batch", type=int, default=1, help="rows a step")
    parser.add_argument("--length", type=int, default=64, help="tokens a row")
    parser.add_argument("--held_out", type=int, default=16, help="rows of held-out text")
    parser.add_argument("--write", action="store_true", help="write the results and the docs page")
    parser.add_argument("--add", action="store_true", help="write, and keep the other rows that are there")
    parser.add_argument("--seed", type=int, default=42)
    options = parser.parse_args()
    # A copy of this process has what it needs; it must not start threads before.
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    from transformers.utils.logging import set_verbosity_error

    import lora_plugins.trainer.callbacks  # noqa: F401 - once, not in each copy

    set_verbosity_error()
    with tempfile.TemporaryDirectory() as options.folder:
        results = put_together(options, compare(options))
    print("\n".join(page.defaults_table(results)))
    if options.write or options.add:
        record("defaults", results)


if __name__ == "__main__":
    main()

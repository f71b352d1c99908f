"""The table of defaults: held-out loss against seconds and memory, for targets, ranks and learning rates.

Two texts that every machine has: functions of Python's standard library, and the topics of its reference manual. Each
combination runs in a process of its own, in turns, from the same seed and on the same tokens; ``--models`` takes any
small causal models that are here. A default would be changed by what wins at equal time on two texts and three models.

    python benchmarks/defaults.py --steps 60 --ranks 2 8 64 --rates 2e-4 1e-3     hours on few cores
    python benchmarks/defaults.py --write                                        renews the docs page
"""

from __future__ import annotations

import argparse
import contextlib
import io
import itertools
import json
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

import page
from measure import hardware, peak_resident, record, resident, run_child, versions

#: Name of each choice of targets and what `LoraCallback` gets for it.
TARGETS: dict[str, Any] = {"q and v": ["q_proj", "v_proj"], "attention": "attention", "all-linear": "all-linear"}
TEXTS = ("functions", "manual")


# -- in the process of one combination ---------------------------------------------------------


def measure_combination(options: argparse.Namespace) -> dict[str, Any]:
    """Train one combination; return its losses, seconds, memory and trained weights."""
    import numpy as np
    import torch
    from datasets import Dataset
    from step_clock import StepClock
    from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments
    from transformers.utils.logging import set_verbosity_error

    from lora_plugins import LoraCallback
    from lora_plugins.commands.demo.model import demo_model

    set_verbosity_error()
    source = options.model if options.model != "SmolLM2-135M" else demo_model()
    tokenizer = AutoTokenizer.from_pretrained(source)
    stream = np.asarray(tokenizer(_read_text(options.text))["input_ids"])
    rows = stream[: len(stream) // options.length * options.length].reshape(-1, options.length)
    # Neighbours are alike: the held-out rows are the end of the text, and those before it are shuffled.
    train, held_out = rows[: -2 * options.held_out], torch.from_numpy(rows[-options.held_out :])
    train = np.random.default_rng(0).permutation(train)[: options.steps * options.batch].tolist()

    steps = StepClock()
    before = resident()
    with contextlib.redirect_stdout(io.StringIO()):
        trainer = Trainer(
            model=AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32),
            args=TrainingArguments(
                output_dir=options.folder,
                max_steps=options.steps,
                per_device_train_batch_size=options.batch,
                learning_rate=options.rate,
                lr_scheduler_type="constant",
                save_strategy="no",
                report_to=[],
                disable_tqdm=True,
                use_cpu=True,
                seed=options.seed,
            ),
            train_dataset=Dataset.from_dict({"input_ids": train, "labels": train}),
            callbacks=[
                LoraCallback(quantization="int8", r=options.rank, target_modules=TARGETS[options.targets]),
                steps,
            ],
        )
        first = _compute_loss(trainer.model, held_out)
        trainer.train()
    return {
        "first": first,
        "loss": _compute_loss(trainer.model, held_out),
        "step_seconds": statistics.median(wall for wall, _ in steps.seconds),
        "step_cpu_seconds": statistics.median(cpu for _, cpu in steps.seconds),
        "peak": peak_resident() - before,
        "trainable": sum(p.numel() for p in trainer.model.parameters() if p.requires_grad),
    }


def _read_text(name: str) -> str:
    if name == "manual":
        from pydoc_data.topics import topics

        return "\n\n".join(topics[key] for key in sorted(topics))
    from lora_plugins.commands.demo.dataset import collect_examples

    return "\n".join(f"{example.source}\n# {example.summary}\n" for example in collect_examples()[::8])


def _compute_loss(model: Any, rows: Any) -> float:
    """Return the loss in nats a token, the model in evaluation mode."""
    import torch

    model.eval()
    with torch.no_grad():
        return statistics.fmean(float(model(input_ids=batch, labels=batch).loss) for batch in rows.split(2))


# -- in the process that compares --------------------------------------------------------------


def compare(options: argparse.Namespace) -> dict[str, Any]:
    """Run every combination and return a row for each."""
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for model, text, rank, rate, targets in itertools.product(
            options.models, options.texts, options.ranks, options.rates, options.only
        ):
            given = [f"--{key}={getattr(options, key)}" for key in ("steps", "batch", "length", "held_out", "seed")]
            combination = {"model": model, "text": text, "rank": rank, "rate": rate, "targets": targets}
            given += [f"--{key}={value}" for key, value in combination.items()]
            found = run_child(Path(__file__), [*given, "--child", f"--folder={folder}"])
            rows.append({**combination, **found})
            print(f"{combination}: loss {found['loss']:.4f}", file=sys.stderr, flush=True)
    return {
        "command": " ".join(["python benchmarks/defaults.py", *sys.argv[1:]]),
        "hardware": hardware(),
        "versions": versions(),
        "settings": {key: getattr(options, key) for key in ("steps", "batch", "length", "held_out")},
        "rows": rows,
    }


def main() -> None:
    """Compare, print and, where asked, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["SmolLM2-135M"], help="folders or Hub ids; the demo's by name")
    parser.add_argument("--texts", nargs="+", choices=TEXTS, default=list(TEXTS))
    parser.add_argument("--ranks", nargs="+", type=int, default=[8])
    parser.add_argument("--rates", nargs="+", type=float, default=[1e-3])
    parser.add_argument("--only", nargs="+", choices=TARGETS, default=list(TARGETS), help="targets")
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--batch", type=int, default=1, help="rows a step")
    parser.add_argument("--length", type=int, default=128, help="tokens a row")
    parser.add_argument("--held_out", type=int, default=16, help="rows of held-out text")
    parser.add_argument("--write", action="store_true", help="write the results and the docs page")
    parser.add_argument("--seed", type=int, default=42)
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    for name, kind in {"model": str, "text": str, "rank": int, "rate": float, "targets": str}.items():
        parser.add_argument(f"--{name}", type=kind, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        print(json.dumps(measure_combination(options)))
        return
    results = compare(options)
    print("\n".join(page.defaults_table(results)))
    if options.write:
        record("defaults", results)


if __name__ == "__main__":
    main()

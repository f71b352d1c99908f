"""Padded batches against packed ones: how many real tokens a second each trains on.

SmolLM2-135M and functions of Python's standard library, each an example with its summary; about ``--tokens`` real
tokens a step for everyone. Each contender runs in a process of its own, in turns.

    python benchmarks/packing.py            some minutes; prints the table
    python benchmarks/packing.py --write    renews the docs page
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import statistics
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import page
from measure import hardware, peak_resident, record, resident, run_child, versions

#: Name of each contender and what it is.
CONTENDERS = {
    "padded": "examples padded to the longest of their batch",
    "best-fit": "pack_best_fit and best_fit_collator",
    "wrapped": "examples joined and cut (they see each other)",
}


# -- in the contender's own process ------------------------------------------------------------


def measure_contender(options: argparse.Namespace) -> dict[str, Any]:
    """Train one contender here; return seconds, real tokens and all tokens of each step but the first."""
    import torch
    from datasets import disable_progress_bars
    from step_clock import StepClock
    from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments
    from transformers.utils.logging import set_verbosity_error

    from lora_plugins import LoraCallback
    from lora_plugins.commands.demo.model import demo_model

    set_verbosity_error()
    disable_progress_bars()
    tokenizer = AutoTokenizer.from_pretrained(demo_model())
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    model = AutoModelForCausalLM.from_pretrained(demo_model(), dtype=torch.float32)
    rows, collate, batch = _make_data(options, model, tokenizer)
    counted: list[tuple[int, int]] = []

    def count(features: list[dict[str, Any]]) -> Any:
        made = collate(features)
        counted.append((sum(_count_tokens(feature["input_ids"]) for feature in features), made["input_ids"].numel()))
        return made

    steps = StepClock()
    with contextlib.redirect_stdout(io.StringIO()):
        trainer = Trainer(
            model=model,
            args=TrainingArguments(
                output_dir=options.folder,
                max_steps=options.steps + 1,
                per_device_train_batch_size=batch,
                save_strategy="no",
                report_to=[],
                disable_tqdm=True,
                use_cpu=True,
                seed=options.seed,
            ),
            train_dataset=rows,
            data_collator=count,
            callbacks=[LoraCallback(quantization="int8"), steps],
        )
        baseline = resident()
        trainer.train()
    # A Trainer reads one batch ahead.
    tokens = counted[1 : options.steps + 1]
    return {
        "seconds": sum(wall for wall, _ in steps.seconds[1:]),
        "cpu_seconds": sum(cpu for _, cpu in steps.seconds[1:]),
        "real": sum(real for real, _ in tokens),
        "all": sum(total for _, total in tokens),
        "peak": peak_resident() - baseline,
    }


def _count_tokens(ids: Any) -> int:
    return sum(map(len, ids)) if hasattr(ids[0], "__len__") else len(ids)


def _make_data(options: argparse.Namespace, model: Any, tokenizer: Any) -> tuple[Any, Callable[[Any], Any], int]:
    """Return the rows of a contender, its collator and its rows a step."""
    from datasets import Dataset
    from transformers import DataCollatorForSeq2Seq, default_data_collator

    from lora_plugins import best_fit_collator, pack, pack_best_fit
    from lora_plugins.commands.demo.dataset import read_examples

    examples_read = read_examples(Path(options.folder))[:: options.every]
    texts = [f"{example.source}\n# {example.summary}\n{tokenizer.eos_token}" for example in examples_read]
    ids = [tokens for tokens in tokenizer(texts)["input_ids"] if len(tokens) <= options.length]
    examples = Dataset.from_dict({"input_ids": ids, "labels": ids})
    if options.contender == "padded":
        rows = round(options.tokens / statistics.fmean(map(len, ids)))
        return examples, DataCollatorForSeq2Seq(tokenizer, padding=True), rows
    if options.contender == "wrapped":
        return pack(examples, options.length)[0], default_data_collator, options.tokens // options.length
    packed, counts = pack_best_fit(examples, options.length)
    print(counts.line(), file=sys.stderr)
    return packed, best_fit_collator(model), options.tokens // options.length


# -- in the process that compares --------------------------------------------------------------


def compare(options: argparse.Namespace) -> dict[str, Any]:
    """Run all contenders in turns and return the medians."""
    runs: dict[str, list[dict[str, Any]]] = {name: [] for name in CONTENDERS}
    with tempfile.TemporaryDirectory() as folder:
        for number in range(options.rounds):
            # Every other round goes backwards, so that a machine that gets slower or faster favours nobody.
            for name in CONTENDERS if number % 2 == 0 else reversed(CONTENDERS):
                given = [f"--{key}={getattr(options, key)}" for key in ("tokens", "length", "steps", "every", "seed")]
                run = run_child(Path(__file__), ["--contender", name, "--folder", folder, *given])
                runs[name].append(run)
                wall, cpu = run["real"] / run["seconds"], run["real"] / run["cpu_seconds"]
                text = f"round {number + 1}: {name:9} {wall:6.1f} real tokens a second, {cpu:6.1f} a CPU second"
                print(text, file=sys.stderr, flush=True)
    return {
        "command": " ".join(["python benchmarks/packing.py", *sys.argv[1:]]),
        "hardware": hardware(),
        "versions": versions(),
        "settings": {key: getattr(options, key) for key in ("tokens", "length", "steps", "rounds")},
        "contenders": {name: _summarize(found) for name, found in runs.items()},
    }


def _summarize(runs: list[dict[str, Any]]) -> dict[str, Any]:
    return {
        "real_per_second": [run["real"] / run["seconds"] for run in runs],
        "real_per_cpu_second": [run["real"] / run["cpu_seconds"] for run in runs],
        "real_share": sum(run["real"] for run in runs) / sum(run["all"] for run in runs),
        "peak_mib": statistics.median(run["peak"] for run in runs) / 2**20,
    }


def main() -> None:
    """Compare, print and, where asked, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=1024, help="real tokens a step, about")
    parser.add_argument("--length", type=int, default=512, help="tokens that a packed row or an example may have")
    parser.add_argument("--steps", type=int, default=8, help="steps a process, besides the first")
    parser.add_argument("--rounds", type=int, default=3, help="processes for each contender")
    parser.add_argument("--every", type=int, default=4, help="take every Nth function")
    parser.add_argument("--write", action="store_true", help="write the results and the docs page")
    parser.add_argument("--seed", type=int, default=42)
    parser.add_argument("--contender", choices=CONTENDERS, help=argparse.SUPPRESS)
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.contender:
        print(json.dumps(measure_contender(options)))
        return
    results = compare(options)
    print("\n".join(page.packing_table(results)))
    if options.write:
        record("packing", results)


if __name__ == "__main__":
    main()

"""Training side by side: the recipe people copy, PEFT in bfloat16, full fine-tuning, TRL, and lora-plugins.

One real model (SmolLM2-135M), one real text, the same seed and steps; every contender runs in a process of its
own, in turns. The median step of each round counts, and the rounds are averaged. Two measurements:

* speed and memory: a few steps of ``--batch`` rows of ``--length`` tokens, with and without gradient checkpointing;
* learning: the loss on held-out text after ``--loss-steps`` steps of half the batch, without checkpointing.

A float base is in the dtype that the machine is fast at (`float_dtype`): nobody would choose the other one.

    python benchmarks/training.py                    at most twenty minutes; prints the tables
    python benchmarks/training.py --full --write     all combinations, more rounds; refreshes the docs page
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
from measure import Clock, hardware, peak_resident, record, resident, run_child, versions, write_rows

LORA = {"r": 8, "lora_alpha": 32, "lora_dropout": 0.05}
TARGETS = ["q_proj", "v_proj"]
RATE = 2e-4

#: Name of each contender and what it is, those next to each other that are compared: a machine's speed drifts.
CONTENDERS = {
    "ours-nf4": 'LoraCallback(quantization="nf4")',
    "recipe-int8": "the recipe: int8, prepare_model_for_kbit_training, get_peft_model, Trainer",
    "ours-int8": 'LoraCallback(quantization="int8")',
    "peft-float": "get_peft_model and Trainer on the float model",
    "trl-int8": "TRL's SFTTrainer(peft_config=…) on the int8 model",
    "ours-float": "LoraCallback() on the float model",
    "trl-float": "TRL's SFTTrainer(peft_config=…) on the float model",
    "full-fp32": "full fine-tuning in float32, Trainer",
}
#: What a default run does with gradient checkpointing; ``--full`` does all.
WITH_CHECKPOINTING = ("recipe-int8", "ours-int8", "trl-int8")
#: Whose held-out loss a default run measures; ``--full`` does all.
LEARNING = ("recipe-int8", "ours-int8")


def float_dtype() -> str:
    """Name of the dtype of a float base: bfloat16 where the CPU multiplies it natively, else float32."""
    import torch

    from lora_plugins.quantization.precision import fast_bfloat16

    return "bfloat16" if fast_bfloat16(torch.device("cpu")) else "float32"


# -- in the contender's own process ------------------------------------------------------------


def measure_contender(options: argparse.Namespace) -> dict[str, Any]:
    """Train one contender here.

    Returns:
        Wall and CPU seconds of each step, bytes above those after the imports, trainable weights, losses; for
        ours also the seconds of each step that were the callback's own.
    """
    _import_everything(options.contender)
    baseline = resident()
    clock = Clock()
    trainer, steps = _make_trainer(options)
    prepared, _ = clock.read()
    own = _time_callback(trainer)
    trainer.add_callback(steps)
    trainer.train()
    result = {
        "own": sum(own) / options.steps,
        "wall": steps.wall,
        "cpu": steps.cpu,
        "prepare": prepared,
        "peak": peak_resident() - baseline,
        "trainable": sum(p.numel() for p in trainer.model.parameters() if p.requires_grad),
        "loss": [entry["loss"] for entry in trainer.state.log_history if "loss" in entry],
    }
    if options.count_operations:
        result["operations"] = _operations(trainer)
    if options.held_out:
        result["held_out"] = _held_out_loss(trainer.model, options)
    return result


def _import_everything(contender: str) -> None:
    """Load every library that the contender will use, so that the baseline has them."""
    import bitsandbytes  # noqa: F401
    import datasets  # noqa: F401
    import peft  # noqa: F401
    import torch
    import transformers

    torch.ones(64, 64) @ torch.ones(64, 64)
    transformers.logging.set_verbosity_error()
    from transformers import AutoModelForCausalLM, Trainer  # noqa: F401
    from transformers.models.llama import modeling_llama  # noqa: F401

    if contender.startswith("trl"):
        from trl import SFTConfig, SFTTrainer  # noqa: F401
    if contender.startswith("ours"):
        from lora_plugins.trainer.callbacks import LoraCallback  # noqa: F401


def _make_trainer(options: argparse.Namespace) -> tuple[Any, Any]:
    from transformers import TrainerCallback

    class Steps(TrainerCallback):  # type: ignore[misc]
        """Seconds from the end of one step to the end of the next, so that nothing in between is left out."""

        def __init__(self) -> None:
            self.wall: list[float] = []
            self.cpu: list[float] = []
            self.clock: Clock | None = None

        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            if self.clock is not None:
                wall, cpu = self.clock.read()
                self.wall.append(wall)
                self.cpu.append(cpu)
            self.clock = Clock()

    with contextlib.redirect_stdout(io.StringIO()):
        return _BUILDERS[options.contender](options), Steps()


def _time_callback(trainer: Any) -> list[float]:
    """Time everything that our callback does in a step, as it does it; the list fills while training."""
    from lora_plugins.trainer.callbacks import LoraCallback

    seconds: list[float] = []

    def timed(function: Callable[..., Any]) -> Callable[..., Any]:
        def measured(*args: Any, **kwargs: Any) -> Any:
            clock = Clock()
            try:
                return function(*args, **kwargs)
            finally:
                seconds.append(clock.read()[0])

        return measured

    for callback in trainer.callback_handler.callbacks:
        if isinstance(callback, LoraCallback):
            for event in ("on_step_begin", "on_pre_optimizer_step", "on_optimizer_step", "on_step_end", "on_log"):
                setattr(callback, event, timed(getattr(callback, event)))
            callback.losses.add = timed(callback.losses.add)
    return seconds


def _arguments(options: argparse.Namespace) -> dict[str, Any]:
    return {
        "output_dir": options.data,
        "max_steps": options.steps,
        "per_device_train_batch_size": options.batch,
        "learning_rate": RATE,
        "gradient_checkpointing": options.checkpointing,
        "save_strategy": "no",
        "report_to": [],
        "logging_steps": 1,
        "disable_tqdm": True,
        "use_cpu": True,
        "seed": options.seed,
    }


def _rows(options: argparse.Namespace, name: str = "train") -> Any:
    import numpy as np
    from datasets import Dataset

    rows = np.load(Path(options.data) / f"{name}.npy").tolist()
    return Dataset.from_dict({"input_ids": rows, "labels": rows})


def _load(dtype: str, **arguments: Any) -> Any:
    from transformers import AutoModelForCausalLM

    from lora_plugins.commands.demo.model import demo_model

    return AutoModelForCausalLM.from_pretrained(demo_model(), dtype=dtype, **arguments)


def _load_int8(dtype: str) -> Any:
    from transformers import BitsAndBytesConfig

    return _load(dtype, quantization_config=BitsAndBytesConfig(load_in_8bit=True))


def _lora_config() -> Any:
    from peft import LoraConfig

    return LoraConfig(**LORA, target_modules=TARGETS, task_type="CAUSAL_LM")


def _plain(options: argparse.Namespace, model: Any, **arguments: Any) -> Any:
    from transformers import Trainer, TrainingArguments

    args = TrainingArguments(**_arguments(options))
    return Trainer(model=model, args=args, train_dataset=_rows(options), **arguments)


def _recipe(options: argparse.Namespace) -> Any:
    from peft import get_peft_model, prepare_model_for_kbit_training

    model = prepare_model_for_kbit_training(_load_int8("bfloat16"), use_gradient_checkpointing=options.checkpointing)
    return _plain(options, get_peft_model(model, _lora_config()))


def _peft_float(options: argparse.Namespace) -> Any:
    from peft import get_peft_model

    return _plain(options, get_peft_model(_load(float_dtype()), _lora_config()))


def _trl(options: argparse.Namespace, model: Any) -> Any:
    from trl import SFTConfig, SFTTrainer

    # The rows are packed already and of one length. Autocast to bfloat16 is TRL's default, and no use where it is slow.
    args = SFTConfig(**_arguments(options), max_length=None, bf16=float_dtype() == "bfloat16")
    return SFTTrainer(model=model, args=args, train_dataset=_rows(options), peft_config=_lora_config())


def _ours(options: argparse.Namespace, quantization: str | None) -> Any:
    from lora_plugins import LoraCallback

    callback = LoraCallback(quantization=quantization, target_modules=TARGETS, **LORA)
    # A checkpoint in 16 bits, as most are; the callback decides what its quantized base computes in.
    model = _load("bfloat16" if quantization else float_dtype())
    return _plain(options, model, callbacks=[callback])


_BUILDERS: dict[str, Callable[[argparse.Namespace], Any]] = {
    "recipe-int8": _recipe,
    "peft-float": _peft_float,
    "full-fp32": lambda options: _plain(options, _load("float32")),
    "trl-float": lambda options: _trl(options, _load(float_dtype())),
    "trl-int8": lambda options: _trl(options, _load_int8(float_dtype())),
    "ours-int8": lambda options: _ours(options, "int8"),
    "ours-nf4": lambda options: _ours(options, "nf4"),
    "ours-float": lambda options: _ours(options, None),
}


def _operations(trainer: Any) -> int:
    """Floating-point operations of the matrix products in one step."""
    from torch.utils.flop_counter import FlopCounterMode

    inputs = next(iter(trainer.get_train_dataloader()))
    with FlopCounterMode(display=False) as counter:
        trainer.training_step(trainer.model, inputs)
    return counter.get_total_flops()


def _held_out_loss(model: Any, options: argparse.Namespace) -> float:
    """Loss in nats a token on text of other modules, the model in evaluation mode."""
    import numpy as np
    import torch

    rows = torch.from_numpy(np.load(Path(options.data) / "held_out.npy")[: options.held_out]).long()
    model.eval()
    with torch.no_grad():
        losses = [float(model(input_ids=batch, labels=batch).loss) for batch in rows.split(4)]
    return statistics.fmean(losses)


# -- in the process that compares --------------------------------------------------------------


def compare(options: argparse.Namespace) -> dict[str, Any]:
    """Run all contenders in turns and return the medians."""
    with tempfile.TemporaryDirectory() as folder:
        write_rows(Path(folder), options.length)
        speed = _measure_speed(options, folder)
        learning = _measure_learning(options, folder) if options.loss_steps else {}
    return {
        "command": " ".join(["python benchmarks/training.py", *sys.argv[1:]]),
        "hardware": hardware(),
        "versions": versions(),
        "settings": {
            **LORA,
            "targets": TARGETS,
            "float": float_dtype(),
            "batch": options.batch,
            "length": options.length,
            "rounds": options.rounds,
            "steps": options.steps,
            "loss_steps": options.loss_steps,
            "held_out_rows": options.held_out,
        },
        "speed": speed,
        "learning": learning,
    }


def _measure_speed(options: argparse.Namespace, folder: str) -> dict[str, Any]:
    jobs = [(name, False) for name in options.only]
    jobs += [(name, True) for name in options.only if options.full or name in WITH_CHECKPOINTING]
    runs: dict[tuple[str, bool], list[dict[str, Any]]] = {job: [] for job in jobs}
    for number in range(options.rounds):
        # Every other round goes backwards, so that a machine that gets slower or faster favours nobody.
        for name, checkpointing in jobs if number % 2 == 0 else reversed(jobs):
            run = _run(options, folder, name, checkpointing, options.batch, options.steps, held_out=0)
            runs[name, checkpointing].append(run)
            _say(f"round {number + 1}: {name:12} checkpointing={checkpointing!s:5} {_line(run)}")
    tokens = options.batch * options.length
    return {
        f"{name}{'+checkpointing' * checkpointing}": _summary(found, tokens)
        for (name, checkpointing), found in runs.items()
    }


def _measure_learning(options: argparse.Namespace, folder: str) -> dict[str, Any]:
    found = {}
    for name in options.only:
        if not options.full and name not in LEARNING:
            continue
        batch = max(1, options.batch // 2)
        run = _run(options, folder, name, False, batch, options.loss_steps, held_out=options.held_out)
        found[name] = {"held_out": run["held_out"], "first": run["loss"][0], "losses": run["loss"]}
        _say(f"after {options.loss_steps} steps: {name:12} held-out loss {run['held_out']:.4f}")
    return found


def _run(
    options: argparse.Namespace, folder: str, name: str, checkpointing: bool, batch: int, steps: int, *, held_out: int
) -> dict[str, Any]:
    arguments = ["--contender", name, "--data", folder, "--batch", str(batch), "--steps", str(steps)]
    arguments += ["--held-out", str(held_out), "--seed", str(options.seed)]
    return run_child(Path(__file__), [*arguments, *["--checkpointing"] * checkpointing])


def _line(run: dict[str, Any]) -> str:
    wall, cpu = statistics.median(run["wall"]), statistics.median(run["cpu"])
    return f"{wall:6.2f} s a step ({cpu:6.2f} CPU), {run['peak'] / 2**20:6.0f} MiB"


def _summary(runs: list[dict[str, Any]], tokens: int) -> dict[str, Any]:
    walls = [seconds for run in runs for seconds in run["wall"]]
    rounds = [statistics.median(run["wall"]) for run in runs]
    # As ratios are averaged, so that they are also the ratios of these.
    wall = statistics.geometric_mean(rounds)
    return {
        "tokens_per_second": tokens / wall,
        "step_seconds": wall,
        "step_cpu_seconds": statistics.median(seconds for run in runs for seconds in run["cpu"]),
        "step_range": [min(walls), max(walls)],
        "round_seconds": rounds,
        "peak_mib": statistics.median(run["peak"] for run in runs) / 2**20,
        "callback_share": statistics.median(run["own"] for run in runs) / wall,
        "prepare_seconds": statistics.median(run["prepare"] for run in runs),
        "trainable": runs[0]["trainable"],
    }


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=CONTENDERS, default=list(CONTENDERS), help="contenders to run")
    parser.add_argument("--batch", type=int, default=2, help="rows a step")
    parser.add_argument("--length", type=int, default=256, help="tokens a row")
    parser.add_argument("--steps", type=int, help="steps a process; the first is not counted")
    parser.add_argument("--rounds", type=int, help="processes for each contender")
    parser.add_argument("--loss-steps", type=int, default=60, help="steps before the held-out loss; 0 leaves it out")
    parser.add_argument("--held-out", type=int, default=16, help="rows of held-out text")
    parser.add_argument("--full", action="store_true", help="every contender also with checkpointing, more rounds")
    parser.add_argument("--write", action="store_true", help="write the results and the docs page")
    parser.add_argument("--seed", type=int, default=42)
    parser.add_argument("--contender", choices=CONTENDERS, help=argparse.SUPPRESS)
    parser.add_argument("--checkpointing", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--data", help=argparse.SUPPRESS)
    parser.add_argument("--count-operations", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    options.steps = options.steps or (8 if options.full else 4)
    options.rounds = options.rounds or (4 if options.full else 2)
    return options


def main() -> None:
    """Compare, print and, where asked, write."""
    options = _parse()
    if options.contender:
        print(json.dumps(measure_contender(options)))
        return
    results = compare(options)
    print("\n".join(page.training_tables(results)))
    if options.write:
        record("training", results)


if __name__ == "__main__":
    main()

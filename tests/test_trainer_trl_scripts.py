"""The scripts that TRL ships, as installed, with one line added: trained, best model, resumed, saved, reloaded."""

from __future__ import annotations

import importlib.util
import itertools
import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import datasets
import pytest
import tiny
import torch
from datasets import Dataset
from peft import PeftModel
from safetensors.torch import load_file
from torch import nn
from transformers import LlamaForCausalLM, LlamaForSequenceClassification, TrainerCallback

from lora_plugins import LoraCallback, prepare_model

trl = pytest.importorskip("trl", reason="trl is not installed")
from trl_runs import KINDS, ONLINE, sentences, tokenizer  # noqa: E402 - it imports trl

NAMES = [*KINDS, *ONLINE]
#: The last argument of every Trainer in the scripts, and the line that a user adds.
LAST = "        peft_config=get_peft_config(model_args),\n"
LINE = "        callbacks=callbacks,\n"


class Keeper(TrainerCallback):  # type: ignore[misc]
    """Keeps what a script's ``main`` drops at its end."""

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.model, self.state = kwargs["model"], state


def load_script(kind: str, folder: Path, callbacks: list[Any]) -> ModuleType:
    """Import a copy of an installed script that has one line more."""
    source = (Path(trl.__file__).parent / "scripts" / f"{kind}.py").read_text(encoding="utf-8")
    assert source.count(LAST) == 1, f"TRL's {kind}.py has changed"
    file = folder / f"script_{kind}.py"
    file.write_text(source.replace(LAST, LAST + LINE), encoding="utf-8")
    spec = importlib.util.spec_from_file_location(file.stem, file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    # Dataclasses look their module up while they are made.
    sys.modules[file.stem] = module
    module.callbacks = callbacks  # type: ignore[attr-defined]
    spec.loader.exec_module(module)
    return module


@dataclass
class Run:
    """A finished run of a script.

    Attributes:
        kind: The script's name.
        base: Folder of the base model.
        output: The run's folder.
        model: The model that was trained.
        best: The checkpoint that the Trainer calls best.
        start: Runs the script again, with more arguments.
    """

    kind: str
    quantization: str | None
    base: Path
    output: Path
    model: Any
    best: Path
    start: Callable[..., Keeper]

    def load(self, seed: int) -> nn.Module:
        """Load the base as the script does; a new head gets other numbers with each seed."""
        torch.manual_seed(seed)
        if self.kind == "reward":
            model: nn.Module = LlamaForSequenceClassification.from_pretrained(self.base, num_labels=1, pad_token_id=0)
        else:
            model = LlamaForCausalLM.from_pretrained(self.base)
        return model


def start_script(kind: str, quantization: str | None, base: Path, data: Path, output: Path, *more: str) -> Keeper:
    output.mkdir(exist_ok=True)
    keeper = Keeper()
    callback = LoraCallback(r=4, lora_dropout=0.0, quantization=quantization, compute_dtype="float32")
    script = load_script(kind, output, [callback, keeper])
    options: dict[str, Any] = {
        "model_name_or_path": base,
        "dataset_name": data,
        "output_dir": output,
        "max_steps": 4,
        "per_device_train_batch_size": 4,
        "per_device_eval_batch_size": 4,
        "learning_rate": 1e-2,
        "lr_scheduler_type": "constant",
        "logging_steps": 1,
        "eval_strategy": "steps",
        "eval_steps": 2,
        "save_strategy": "steps",
        "save_steps": 2,
        "load_best_model_at_end": True,
        "metric_for_best_model": "eval_loss",
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
        "bf16": False,
        "seed": 7,
    }
    if kind in ONLINE:
        own = {"reward_funcs": "trl_runs.count_small_words", "num_generations": 2, "max_completion_length": 6}
    else:
        own = {"max_length": 16}
    words = itertools.chain.from_iterable((f"--{name}", str(value)) for name, value in {**options, **own}.items())
    script.main(*script.make_parser().parse_args_and_config([*words, *more]))
    return keeper


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A causal base with its tokenizer, as a script finds one by name."""
    folder = tmp_path_factory.mktemp("base")
    tiny.llama().save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder


CASES = [
    pytest.param(case, marks=() if case == ("sft", "int8") else pytest.mark.slow, id=f"{case[0]}-{case[1]}")
    for case in itertools.product(NAMES, (None, "int8"))
]


@pytest.fixture(scope="module", params=CASES)
def run(request: pytest.FixtureRequest, base: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Run]:
    """A run of each script, with a float and with an int8 base."""
    kind, quantization = request.param
    root = tmp_path_factory.mktemp(f"{kind}-{quantization}")
    (root / "data").mkdir()
    rows: Dataset = {**KINDS, **ONLINE}[kind][2]()
    for split, part in (("train", rows), ("test", rows.select(range(8)))):
        lines = [json.dumps(row) + "\n" for row in part]
        (root / "data" / f"{split}.jsonl").write_text("".join(lines), encoding="utf-8")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", root / "cache")
        # The scripts put the working directory first.
        patch.setattr(sys, "path", [*sys.path])

        def start(output: Path, *more: str) -> Keeper:
            return start_script(kind, quantization, base, root / "data", output, *more)

        kept = start(root / "output")
        best = Path(kept.state.best_model_checkpoint)
        yield Run(kind, quantization, base, root / "output", kept.model, best, start)


def trained(model: Any) -> dict[str, torch.Tensor]:
    names = ((name.replace(".default", "").replace(".modules_to_save", ""), p) for name, p in model.named_parameters())
    return {name: p.detach().clone() for name, p in names if p.requires_grad}


@torch.no_grad()
def outputs(model: Any) -> torch.Tensor:
    model.eval()
    batch = tokenizer()(sentences(4, 9, 8), return_tensors="pt")
    logits: torch.Tensor = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    return logits.float()


def test_a_script_of_trl_trains_and_the_best_checkpoint_is_in_memory(run: Run) -> None:
    log = json.loads((run.output / "checkpoint-4" / "trainer_state.json").read_text())["log_history"]
    assert sum("loss" in row for row in log) == 4
    stored, now = load_file(run.best / "adapter_model.safetensors"), trained(run.model)
    assert sum("lora_B" in name and bool(value.any()) for name, value in now.items()) == 4
    assert any("score" in name for name in now) == (run.kind == "reward")
    assert set(stored) == set(now)
    assert all(torch.equal(stored[name], value) for name, value in now.items())
    saved = load_file(run.output / "adapter_model.safetensors")
    assert all(torch.equal(saved[name], value) for name, value in stored.items())


def test_a_script_of_trl_that_is_resumed_is_the_same_run(run: Run, tmp_path: Path) -> None:
    run.start(tmp_path, "--resume_from_checkpoint", str(run.output / "checkpoint-2"))
    whole = load_file(run.output / "checkpoint-4" / "adapter_model.safetensors")
    again = load_file(tmp_path / "checkpoint-4" / "adapter_model.safetensors")
    assert set(whole) == set(again)
    for name, value in whole.items():
        torch.testing.assert_close(again[name], value, rtol=1e-4, atol=1e-6)


def test_plain_peft_loads_what_a_script_of_trl_saved_onto_a_float_base(run: Run) -> None:
    # Another seed: what is new and not in the file would have other numbers.
    reloaded = PeftModel.from_pretrained(run.load(seed=99), run.output)
    before, after = outputs(run.model), outputs(reloaded)
    if run.quantization is None:
        assert torch.equal(after, before)
    else:
        assert (after - before).abs().mean() < 0.05 * before.abs().mean()


def test_what_a_script_of_trl_saved_loads_onto_an_int8_base(run: Run) -> None:
    model = prepare_model(run.load(seed=99), adapter=run.output, quantization="int8", compute_dtype="float32")
    before, after = outputs(run.model), outputs(model)
    if run.quantization == "int8":
        torch.testing.assert_close(after, before, rtol=1e-3, atol=1e-3)
    else:
        assert (after - before).abs().mean() < 0.05 * before.abs().mean()

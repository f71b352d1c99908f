"""The command ``train`` as its users start it: a small BLOOM, dialogues in a JSONL file, a merged model."""

from __future__ import annotations

import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import killed_run
import psutil
import pytest
import torch
import twin
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from lora_plugins import prepare_model
from lora_plugins.commands.cli import main
from lora_plugins.errors import ArgumentsError, ResumeError
from lora_plugins.recipe.resume import find_checkpoints
from lora_plugins.recipe.run import run
from registry import pull_adapter
from registry.errors import VersionExists

STEPS = 24
SAVE_STEPS = LOGGING_STEPS = 4
SETTINGS = [
    *(
        "--chunk-length",
        "128",
        "--learning_rate",
        "1e-2",
        "--max_steps",
        str(STEPS),
        "--logging_steps",
        str(LOGGING_STEPS),
    ),
    *("--save_strategy", "steps", "--save_steps", str(SAVE_STEPS), "--save_total_limit", "10"),
    *("--eval_strategy", "steps", "--eval_steps", str(STEPS)),
]


@dataclass(frozen=True)
class Place:
    """Where a module's tests find the base model and the data, and keep their caches."""

    folder: Path

    def arguments(self, output: str, *more: str) -> list[str]:
        given = ["--model", "base", "--dataset", "train.jsonl", "--eval_dataset", "test.jsonl", "--output_dir", output]
        return ["train", *given, *SETTINGS, *more]

    def environment(self) -> dict[str, str]:
        return {**os.environ, "HF_HOME": str(self.folder / "cache"), "OMP_NUM_THREADS": "1"}

    def run(self, *words: str, program: tuple[str, ...] = ("-m", "lora_plugins")) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, *program, *words]
        return subprocess.run(
            command, cwd=self.folder, env=self.environment(), capture_output=True, text=True, check=False
        )

    def metrics(self, output: str) -> dict[str, Any]:
        return json.loads((self.folder / output / "metrics.json").read_text())


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Place:
    folder = tmp_path_factory.mktemp("train")
    twin.make_base(folder / "base")
    twin.write_jsonl(folder / "train.jsonl", twin.dialogues(120, seed=1))
    twin.write_jsonl(folder / "test.jsonl", twin.dialogues(20, seed=2))
    return Place(folder)


@pytest.fixture
def inside(place: Place, monkeypatch: pytest.MonkeyPatch) -> Callable[..., int]:
    """Runs the command in this process, which has loaded everything already; returns its exit code."""
    monkeypatch.chdir(place.folder)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", place.folder / "cache")

    def go(output: str, *more: str) -> int:
        return run(place.arguments(output, *more)[1:])

    return go


@pytest.fixture(scope="module")
def whole(place: Place) -> subprocess.CompletedProcess[str]:
    """The uninterrupted run, in the folder ``whole``."""
    done = place.run(*place.arguments("whole"))
    assert done.returncode == 0, done.stdout + done.stderr
    return done


# -- the whole command -------------------------------------------------------------------------


def test_counts_distance_and_places_are_printed(place: Place, whole: subprocess.CompletedProcess[str]) -> None:
    counts = place.metrics("whole")["data"]["train"]
    assert counts["examples"] == 120
    assert counts["chunks"] * 128 + counts["left_over"] == counts["tokens"]
    assert f"120 examples, {counts['tokens']:,} tokens -> {counts['chunks']} chunks of 128" in whole.stdout
    assert "trainable params: 4,096" in whole.stdout
    assert "Merged model in whole/model: float16" in whole.stdout
    assert "KL divergence" in whole.stdout
    assert "Traceback" not in whole.stderr


def test_the_result_as_json(
    place: Place,
    whole: subprocess.CompletedProcess[str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Only the JSON is on stdout, so that a script can read it. The finished run is written once more, not trained."""
    shutil.copytree(place.folder / "whole", place.folder / "json")
    monkeypatch.chdir(place.folder)
    with pytest.raises(SystemExit) as ended:
        main([*place.arguments("json"), "--resume", "--json"])
    said = capsys.readouterr()
    assert not ended.value.code, said.err
    result = json.loads(said.out)
    assert (result["adapter"], result["model"], result["report"]) == ("json/adapter", "json/model", "json")
    assert result["metrics"] == place.metrics("json")
    assert result["metrics"]["data"]["train"]["examples"] == 120
    assert "steps were done already" in said.err


def test_run_leaves_adapter_model_report_and_loss_curve(place: Place, whole: subprocess.CompletedProcess[str]) -> None:
    folder = place.folder / "whole"
    config = json.loads((folder / "adapter" / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["lora_dropout"]) == (8, 32, 0.05)
    assert config["target_modules"] == ["query_key_value"]
    recipe = json.loads((folder / "adapter" / "recipe.json").read_text())
    assert recipe["quantization"] == {"name": "int8", "skip_modules": ["lm_head"]}
    assert not (folder / "adapter" / "training_args.bin").exists()
    assert json.loads((folder / "parameter_report.json").read_text())["trainable"] == 4096
    assert (folder / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert {path.name for path in (folder / "model").iterdir()} >= {"config.json", "model.safetensors", "recipe.json"}


# What somebody does who has never heard of lora-plugins.
PLAIN = """
import json, sys
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
prompts = json.loads(sys.stdin.read())
texts = {}
for name in sys.argv[1:]:
    model = AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(name)
    texts[name] = []
    for prompt in prompts:
        inputs = tokenizer(prompt, return_tensors="pt")
        output = model.generate(input_ids=inputs["input_ids"], max_new_tokens=16, do_sample=False)
        texts[name].append(tokenizer.decode(output[0, inputs["input_ids"].shape[1]:]))
assert not {"lora_plugins", "peft"} & set(sys.modules), "plain transformers needs neither"
print(json.dumps(texts))
"""


def test_plain_transformers_loads_the_model_and_it_writes_other_texts(
    place: Place, whole: subprocess.CompletedProcess[str]
) -> None:
    prompts = [twin.PROMPT.format(**row) for row in twin.dialogues(4, seed=3)]
    done = subprocess.run(
        [sys.executable, "-c", PLAIN, "base", "whole/model"],
        input=json.dumps(prompts),
        cwd=place.folder,
        env=place.environment(),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    texts = json.loads(done.stdout)
    assert all(base != merged for base, merged in zip(texts["base"], texts["whole/model"], strict=True))


def test_held_out_loss_of_the_merged_model_is_the_adapters(
    place: Place, whole: subprocess.CompletedProcess[str]
) -> None:
    tokenizer = AutoTokenizer.from_pretrained(place.folder / "base")
    base = AutoModelForCausalLM.from_pretrained(place.folder / "base")
    before = twin.held_out_loss(base, tokenizer)
    trained = prepare_model(base, adapter=place.folder / "whole" / "adapter", quantization="int8")
    adapter = twin.held_out_loss(trained, tokenizer)
    merged = twin.held_out_loss(AutoModelForCausalLM.from_pretrained(place.folder / "whole" / "model"), tokenizer)
    assert adapter < 0.9 * before
    assert merged == pytest.approx(adapter, rel=0.01)


# -- interruption and resuming -----------------------------------------------------------------


def assert_same_end(place: Place, output: str) -> None:
    """The run in ``output`` ended as the uninterrupted one did."""
    assert place.metrics(output)["eval_loss"] == pytest.approx(place.metrics("whole")["eval_loss"], abs=1e-4)
    expected = load_file(place.folder / "whole" / "adapter" / "adapter_model.safetensors")
    for name, tensor in load_file(place.folder / output / "adapter" / "adapter_model.safetensors").items():
        assert torch.allclose(tensor, expected[name], atol=1e-5), name


def kill(place: Place, output: str, point: str, *more: str) -> None:
    """Start a run and kill it without warning."""
    killer = str(Path(__file__).parent / "killed_run.py")
    done = place.run(point, *place.arguments(output, "--merge", "none", *more), program=(killer,))
    assert done.returncode == -signal.SIGKILL, f"{point}: {done.stdout}{done.stderr}"


def assert_went_on(place: Place, output: str, said: str) -> None:
    """The run came to the end of the uninterrupted one, and did not do again what its checkpoint had."""
    assert_same_end(place, output)
    found = re.search(rf"Going on from {output}/checkpoint-(\d+)", said)
    assert found or "No complete checkpoint" in said
    assert said.count("'loss'") == (STEPS - (int(found[1]) if found else 0)) / LOGGING_STEPS


def test_resume_after_sigkill_equals_the_uninterrupted_run(
    place: Place,
    whole: subprocess.CompletedProcess[str],
    inside: Callable[..., int],
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Killed between two micro-batches, and again inside the writing of a checkpoint."""
    kill(place, "killed", "forward:13")
    kill(place, "killed", "open:checkpoint-12/trainer_state.json", "--resume")
    assert inside("killed", "--merge", "none", "--resume") == 0
    said = capsys.readouterr().out
    assert "checkpoint-12 is incomplete and passed over" in said
    assert "Going on from killed/checkpoint-8" in said
    assert_went_on(place, "killed", said)


def random_points() -> list[str]:
    """Seven moments of training and three of writing a checkpoint."""
    generator = random.Random(20230322)
    points = [f"forward:{number}" for number in generator.sample(range(1, 2 * STEPS), 7)]
    names = ("adapter_config.json", "README.md", "trainer_state.json")
    steps = [generator.randrange(1, STEPS // SAVE_STEPS) * SAVE_STEPS for _ in names]
    return points + [f"open:checkpoint-{step}/{name}" for step, name in zip(steps, names, strict=True)]


@pytest.mark.slow
@pytest.mark.parametrize("point", random_points())
def test_resume_after_sigkill_at_random_points(
    place: Place, whole: subprocess.CompletedProcess[str], point: str
) -> None:
    output = point.replace(":", "-").replace("/", "-")
    kill(place, output, point)
    done = place.run(*place.arguments(output, "--merge", "none", "--resume"))
    assert done.returncode == 0, done.stdout + done.stderr
    assert_went_on(place, output, done.stdout)


def test_sigterm_saves_a_checkpoint_and_ends_without_a_traceback(
    place: Place, whole: subprocess.CompletedProcess[str], inside: Callable[..., int]
) -> None:
    command = [sys.executable, "-m", "lora_plugins", *place.arguments("stopped", "--save_steps", "1000")]
    with subprocess.Popen(
        command, cwd=place.folder, env=place.environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if "'loss'" in line:
                process.send_signal(signal.SIGTERM)
                break
        said, errors = process.communicate(timeout=120)
    assert process.returncode == 128 + signal.SIGTERM, errors
    assert "Traceback" not in errors
    checkpoints = find_checkpoints(place.folder / "stopped")
    assert checkpoints.newest is not None
    assert f"{checkpoints.newest.name} is in stopped" in said
    assert 0 < int(checkpoints.newest.name.rpartition("-")[2]) < STEPS
    assert not (place.folder / "stopped" / "adapter").exists()
    assert inside("stopped", "--save_steps", "1000", "--merge", "none", "--resume") == 0
    assert_same_end(place, "stopped")


def interrupt_at(forward: int) -> Any:
    """Send Ctrl-C in a forward pass of the training."""
    return killed_run.at_forward(forward, lambda: os.kill(os.getpid(), signal.SIGINT))


@pytest.mark.parametrize("strategy", [["epoch"], ["steps", "--eval_steps", "7"]])
def test_interruption_writes_one_checkpoint_at_once(
    place: Place, inside: Callable[..., int], capsys: pytest.CaptureFixture[str], strategy: list[str]
) -> None:
    """The Trainer takes it for the end of an epoch: it would evaluate first, then write the checkpoint a second time,
    and a machine that goes away in that moment would leave neither."""
    shutil.rmtree(place.folder / "interrupted", ignore_errors=True)
    # Whoever was started in the background ignores Ctrl-C.
    before = signal.getsignal(signal.SIGINT)
    with interrupt_at(13):
        code = inside("interrupted", "--save_strategy", "epoch", "--eval_strategy", *strategy)
    assert code == 128 + signal.SIGINT
    said = capsys.readouterr()
    assert "stopping after this step" not in said.out
    assert "Interrupted by SIGINT after step 7; checkpoint-7 is in interrupted" in said.out
    state = json.loads((place.folder / "interrupted" / "checkpoint-7" / "trainer_state.json").read_text())
    assert not [entry for entry in state["log_history"] if "eval_loss" in entry]
    assert "eval_loss" not in said.out
    assert find_checkpoints(place.folder / "interrupted").newest is not None
    # It listens no longer.
    assert signal.getsignal(signal.SIGINT) is before


# One Ctrl-C arrives twice under torchrun; a second one, later, is meant.
TWICE = """
import os, signal, time
from lora_plugins.recipe.interruption import Interruption
with Interruption(grace=0.5).listening():
    os.kill(os.getpid(), signal.SIGTERM)
    os.kill(os.getpid(), signal.SIGTERM)
    print("alive", flush=True)
    time.sleep(0.7)
    os.kill(os.getpid(), signal.SIGTERM)
    print("still alive", flush=True)
"""


def test_only_a_later_signal_ends_the_program_at_once() -> None:
    done = subprocess.run([sys.executable, "-c", TWICE], capture_output=True, text=True, check=False)
    assert done.returncode == -signal.SIGTERM, done.stderr
    assert done.stdout == "alive\n"
    assert done.stderr.count("stopping after this step") == 1


@pytest.mark.slow
def test_signal_to_one_of_two_processes_stops_both_with_a_checkpoint(place: Place) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "-m", "lora_plugins"]
    words = place.arguments("two", "--save_steps", "1000", "--max_steps", "2000", "--logging_steps", "2")
    with subprocess.Popen(
        [*command, *words], cwd=place.folder, env=place.environment(), stdout=subprocess.PIPE, text=True
    ) as launcher:
        assert launcher.stdout is not None
        for line in launcher.stdout:
            if "'loss'" in line:
                workers = psutil.Process(launcher.pid).children()
                next(worker for worker in workers if worker.environ().get("RANK") == "1").terminate()
                break
        said = launcher.communicate(timeout=120)[0]
    assert launcher.returncode
    found = find_checkpoints(place.folder / "two", processes=2)
    assert found.newest is not None, found.broken
    assert not found.broken
    assert f"{found.newest.name} is in two" in said


def test_resuming_a_finished_run_trains_no_further_step(
    place: Place, whole: subprocess.CompletedProcess[str], inside: Callable[..., int]
) -> None:
    shutil.copytree("whole", "finished", ignore=shutil.ignore_patterns("adapter", "model", "metrics.json"))
    assert inside("finished", "--merge", "none", "--resume") == 0
    assert_same_end(place, "finished")
    # The last entry tells how long training took.
    assert place.metrics("finished")["log"] == place.metrics("whole")["log"][:-1]


def eval_losses(place: Place, output: str) -> list[float]:
    return [entry["eval_loss"] for entry in place.metrics(output)["log"] if "eval_loss" in entry]


def test_early_stopping_keeps_the_best_adapter_also_after_an_interruption(
    place: Place, inside: Callable[..., int]
) -> None:
    # A rate that stays this high soon stops getting better, whatever the machine's rounding.
    settings = ["--early_stopping_patience", "2", "--eval_steps", "2", "--learning_rate", "0.3", "--merge", "none"]
    settings += ["--lr_scheduler_type", "constant", "--max_steps", "120"]
    assert inside("early", *settings) == 0
    losses = eval_losses(place, "early")
    assert len(losses) < 120 / 2, "it stopped"
    best = place.folder / "early" / f"checkpoint-{2 * (losses.index(min(losses)) + 1)}"
    kept = load_file(place.folder / "early" / "adapter" / "adapter_model.safetensors")
    for name, tensor in load_file(best / "adapter_model.safetensors").items():
        assert torch.equal(tensor, kept[name])
    # Interrupted when one of the two evaluations has gone by: resumed, it waits for one more and not for two.
    with interrupt_at(2 * (2 * len(losses) - 1)):
        assert inside("early-2", *settings) == 128 + signal.SIGINT
    assert inside("early-2", *settings, "--resume") == 0
    assert eval_losses(place, "early-2") == pytest.approx(losses, abs=1e-4)


@pytest.mark.usefixtures("inside")
def test_conversations_on_a_base_in_four_bits(place: Place) -> None:
    shutil.copytree("base", "chat-base")
    Path("chat-base", "chat_template.jinja").write_text(twin.CHAT_TEMPLATE)
    rows = [
        {"messages": [{"role": "user", "content": r["dialogue"]}, {"role": "assistant", "content": r["summary"]}]}
        for r in twin.dialogues(40)
    ]
    Path("chat.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = ["--model", "chat-base", "--dataset", "chat.jsonl", "--output_dir", "chat", "--template", "chat"]
    backend = '{"name": "nf4", "double_quant": true}'
    settings = ["--quantization", backend, "--merge", "same", "--max_steps", "6", "--learning_rate", "1e-2"]
    assert run([*words, *settings]) == 0
    metrics = place.metrics("chat")
    assert metrics["data"]["train"]["kept"] == 40
    recipe = json.loads(Path("chat", "adapter", "recipe.json").read_text())
    assert recipe["quantization"] == {"name": "nf4", "double_quant": True, "skip_modules": ["lm_head"]}
    assert metrics["merge"]["distance"]["relative"] < 1e-4


def test_failed_push_loses_nothing_of_the_run(
    place: Place, inside: Callable[..., int], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("LORA_REGISTRY", (place.folder / "registry").as_uri())
    monkeypatch.setenv("LORA_REGISTRY_CACHE", str(place.folder / "registry-cache"))
    few = ["--max_steps", "4", "--eval_steps", "4", "--push"]
    assert inside("pushed", *few, "org/summaries@minor", "--merge", "none") == 0
    published = pull_adapter("org/summaries@0.1.0").manifest.metrics
    assert published["eval_loss"] == pytest.approx(place.metrics("pushed")["eval_loss"])
    # Another adapter, under a version that exists.
    with pytest.raises(VersionExists):
        inside("refused", *few, "org/summaries@0.1.0", "--seed", "1")
    assert "The adapter in refused/adapter is not published" in capsys.readouterr().out
    assert (place.folder / "refused" / "model" / "model.safetensors").is_file()
    assert "merge" in place.metrics("refused")


def test_checkpoints_cut_off_anywhere_are_passed_over(
    place: Place, whole: subprocess.CompletedProcess[str], tmp_path: Path
) -> None:
    for step in (4, 8):
        shutil.copytree(place.folder / "whole" / f"checkpoint-{step}", tmp_path / f"checkpoint-{step}")
    newest = tmp_path / "checkpoint-8"
    assert find_checkpoints(tmp_path).newest == newest
    files = ["adapter_model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json"]
    for name in (*files, "adapter_config.json"):
        content = (newest / name).read_bytes()
        for length in (0, 1, len(content) // 2, len(content) - 2):
            (newest / name).write_bytes(content[:length])
            found = find_checkpoints(tmp_path)
            assert found.newest == tmp_path / "checkpoint-4", f"{name} cut to {length} bytes"
            assert newest in found.broken
        (newest / name).unlink()
        assert find_checkpoints(tmp_path).newest == tmp_path / "checkpoint-4", name
        (newest / name).write_bytes(content)
    assert find_checkpoints(tmp_path).newest == newest
    # One process's random state is not those of two.
    assert find_checkpoints(tmp_path, processes=2).newest is None


# -- refusals ----------------------------------------------------------------------------------


def test_new_run_over_the_files_of_another_is_refused(
    place: Place, whole: subprocess.CompletedProcess[str], inside: Callable[..., int]
) -> None:
    with pytest.raises(ResumeError, match=r"an earlier run, the newest checkpoint-24\. Add --resume"):
        inside("whole")
    for folder, more in (("adapter", ["--merge", "none"]), ("model", [])):
        shutil.copytree(place.folder / "whole" / folder, place.folder / f"only-{folder}" / folder)
        with pytest.raises(ArgumentsError, match=f"only-{folder}/{folder} already holds an? {folder}"):
            inside(f"only-{folder}", *more)
    with pytest.raises(ArgumentsError, match="cannot both go to mixed"):
        inside("new", "--adapter_folder", "mixed", "--model_folder", "mixed")


def test_resuming_with_other_arguments_is_refused(
    whole: subprocess.CompletedProcess[str], inside: Callable[..., int]
) -> None:
    with pytest.raises(ResumeError, match="--chunk_length was 128 and is 64; --seed was 42 and is 1"):
        inside("whole", "--resume", "--chunk-length", "64", "--seed", "1")


def test_resuming_from_a_checkpoint_that_is_not_there_is_refused(inside: Callable[..., int]) -> None:
    with pytest.raises(ResumeError, match=r"nowhere is not a complete checkpoint: .*No such file"):
        inside("none", "--resume_from_checkpoint", "nowhere")


def test_arguments_that_only_the_trainer_knows_are_refused_by_name(inside: Callable[..., int]) -> None:
    with pytest.raises(ArgumentsError, match="The Trainer refuses these arguments: tensorbord"):
        inside("none", "--report_to", "tensorbord")


def test_misspelt_flag_is_a_message_and_an_exit_code(
    place: Place, inside: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as end:
        main(place.arguments("none", "--lerning_rate", "1"))
    assert end.value.code == 2
    said = capsys.readouterr().err
    assert "--lerning_rate is not a flag. Did you mean --learning_rate" in said
    assert "Traceback" not in said
    assert not (place.folder / "none").exists()


def test_packed_examples_do_not_see_each_other_in_a_whole_run(place: Place, inside: Callable[..., int]) -> None:
    """BLOOM gets a mask, under int8 and with gradient checkpointing."""
    words = ["--packing", "best-fit", "--max_steps", "4", "--eval_steps", "4", "--merge", "none"]
    assert inside("best-fit", *words) == 0
    counts = place.metrics("best-fit")["data"]["train"]
    assert counts["kept"] + counts["too_long"] == counts["examples"] == 120
    assert json.loads((place.folder / "best-fit" / "run.json").read_text())["packing"] == "best-fit"

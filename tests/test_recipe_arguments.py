"""Flags and YAML of ``lora-plugins train``: the recipe's defaults, and nothing unknown passes."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import TrainingArguments

from lora_plugins.errors import ArgumentsError, LoraPluginsError
from lora_plugins.recipe.arguments import RecipeArguments
from lora_plugins.recipe.output import Folders, run_record
from lora_plugins.recipe.parser import FORMER_NAMES, flag_names, make_parser, parse
from lora_plugins.recipe.prepare import check_lora, completion_only, lora_arguments, packing_of
from lora_plugins.recipe.publishing import Publication
from registry import RegistryError

NEEDED = ["--model", "m", "--dataset", "d"]


def ours(*words: str) -> RecipeArguments:
    return parse([*NEEDED, *words])[0]


def test_defaults_are_the_recipe() -> None:
    recipe, training = parse(NEEDED)
    assert (recipe.r, recipe.lora_alpha, recipe.lora_dropout, recipe.target_modules) == (8, 32, 0.05, None)
    assert (recipe.quantization, recipe.chunk_length, recipe.merge) == ("int8", 1536, "fp16")
    assert recipe.template == "Summarize the chat dialogue:\n{dialogue}\n---\nSummary:\n{summary}{eos_token}"
    assert (training.num_train_epochs, training.learning_rate, training.seed) == (3, 2e-4, 42)
    assert (training.per_device_train_batch_size, training.gradient_accumulation_steps) == (1, 2)
    assert training.gradient_checkpointing
    assert training.optim == "adafactor"
    assert training.logging_steps == 10


@pytest.mark.parametrize("fast", [True, False])
def test_bf16_follows_the_hardware_until_told(fast: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """The recipe compared the capability with 8, which switches bf16 off on everything newer."""
    monkeypatch.setattr("lora_plugins.quantization.precision.fast_bfloat16", lambda device: fast)
    assert parse(NEEDED)[1].bf16 is fast
    assert parse([*NEEDED, "--bf16", "False"])[1].bf16 is False
    assert parse([*NEEDED, "--bf16", "--use_cpu"])[1].bf16 is True


@pytest.mark.parametrize("word", ["False", "false", "0", "no"])
def test_false_is_false(word: str) -> None:
    """``type=bool`` reads "False" as true."""
    assert ours("--resume", word).resume is False
    assert parse([*NEEDED, "--gradient_checkpointing", word])[1].gradient_checkpointing is False
    assert ours("--resume").resume is True


def test_dashes_and_underscores_are_the_same() -> None:
    assert ours("--chunk-length", "5").chunk_length == ours("--chunk_length=5").chunk_length == 5


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--lerning_rate", "1"], "--lerning_rate is not a flag. Did you mean --learning_rate"),
        (["--learning-rat=1"], "--learning-rat is not a flag. Did you mean --learning_rate"),
        (["--quant", "int8"], "--quant is not a flag. Did you mean --quantization"),
        (["--num_train", "1"], "--num_train is not a flag"),
        (["--epochs", "1"], "Use --num_train_epochs"),
        (["--load_in_8bit", "True"], "Did you mean --quantization int8"),
        (["--overwrite_output_dir"], "Use --resume, or another --output_dir"),
        (["stray"], "'stray' stands where a flag was expected"),
        (["--r", "eight"], "invalid int value: 'eight'"),
        (["--r", "0"], "--r must be at least 1, not 0"),
        (["--merge", "fp8"], "--merge cannot be 'fp8'. Known: none, fp16, bf16, same"),
        (["--lr_scheduler_type", "cosin"], "--lr_scheduler_type cannot be 'cosin'. Did you mean 'cosine'?"),
        (["--resume", "perhaps"], "perhaps"),
        (["--optim", "adafactory"], "Did you mean 'adafactor'?"),
        (["--chunk_length", "0"], "--chunk_length must be at least 1, not 0"),
        (["--lora_dropout", "1.5"], "--lora_dropout must be at least 0 and below 1, not 1.5"),
        (["--eval_split", "2"], "--eval_split must be the name of a split or a number between 0 and 1, not 2"),
        (["--num_proc", "0"], "--num_proc must be at least 1, not 0"),
        (["--num_train_epochs", "0"], "--num_train_epochs must be above 0, not 0"),
        (["--max_steps", "0"], "--max_steps must be above 0, not 0"),
        (["--learning_rate=-1e-4"], "--learning_rate must be above 0, not -0.0001"),
        (["--model", "/", "--revision", "v2"], "--model / is a folder here, which has no revisions"),
        (["--metric_for_best_model", "rouge"], "--metric_for_best_model cannot be 'rouge'"),
        (["--eval_strategy", "epoch"], "nothing to evaluate on"),
        (["--early_stopping_patience", "2"], "nothing to evaluate on"),
        (["--lora", "{"], "--lora must be a JSON object, not '{'"),
        (["--lora", '{"r": 4}'], "--lora has r, which has a flag of its own: --r"),
        (["--config"], "--config must be followed by the path"),
        (["--config", "a", "--config", "b"], "--config was given 2 times"),
        (["--config", "missing.yaml"], "missing.yaml cannot be read"),
    ],
)
def test_mistakes_are_named(words: list[str], message: str) -> None:
    with pytest.raises(ArgumentsError) as caught:
        parse([*NEEDED, *words])
    assert message in str(caught.value)


def test_missing_flags_are_named() -> None:
    with pytest.raises(ArgumentsError, match="required: --model, --dataset"):
        parse([])


def test_one_letter_takes_one_dash_too() -> None:
    """SageMaker's toolkit writes hyperparameters of one letter so."""
    assert ours("-r", "4").r == 4


def test_nothing_is_abbreviated() -> None:
    """No prefix of a flag is that flag, unless it is a flag itself."""
    names = flag_names(make_parser())
    for name in ("model", "dataset", "resume", "learning_rate", "seed"):
        assert name in names
        with pytest.raises(ArgumentsError):
            parse([*NEEDED, f"--{name[:-1]}", "1"])


def test_former_names_are_no_flags_and_point_to_flags() -> None:
    names = flag_names(make_parser())
    # transformers 5.5 still has this one.
    still = {"logging_dir"} & set(TrainingArguments.__dataclass_fields__)
    assert set(FORMER_NAMES) & set(names) == still
    pointed = [target.split(",")[0].split()[0] for target in FORMER_NAMES.values()]
    assert {target.removeprefix("--") for target in pointed if target.startswith("--")} <= set(names)


def write(path: Path, text: str) -> str:
    path.write_text(text)
    return str(path)


def test_yaml_and_flags_together(tmp_path: Path) -> None:
    file = write(
        tmp_path / "run.yaml",
        "model: m\ndataset: d\nlearning_rate: 1e-3\nr: 4\nresume: true\ntarget-modules: [q_proj, v_proj]\n"
        "lora: {use_dora: true}\nbf16: false\nrevision:\ntemplate: |-\n  Q: {q}\n  A: {a}{eos_token}\n",
    )
    recipe, training = parse(["--config", file, "--r", "16"])
    assert (recipe.model, recipe.r, recipe.resume, recipe.revision) == ("m", 16, True, None)
    assert recipe.template == "Q: {q}\nA: {a}{eos_token}"
    assert training.learning_rate == 1e-3
    assert training.bf16 is False
    expected = {"r": 16, "use_dora": True, "target_modules": ["q_proj", "v_proj"], "quantization": "int8"}
    assert {**lora_arguments(recipe), **expected} == lora_arguments(recipe)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("lerning_rate: 1", "'lerning_rate' is not a flag. Did you mean --learning_rate"),
        ("help: 1", "'help' is not a flag"),
        ("config: other.yaml", "'config' is not a flag"),
        ("r: eight", "invalid int value: 'eight'"),
        ("r: [8]", "r takes one value, not the list [8]"),
        ("- r", "must hold 'name: value' lines, not a list"),
        ("r: [", "cannot be read"),
    ],
)
def test_mistakes_in_yaml_are_named(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ArgumentsError) as caught:
        parse([*NEEDED, "--config", write(tmp_path / "run.yaml", text)])
    assert message in str(caught.value)


def test_empty_yaml_changes_nothing(tmp_path: Path) -> None:
    assert parse([*NEEDED, "--config", write(tmp_path / "run.yaml", "# nothing\n")])[0] == ours()


def test_early_stopping_keeps_the_best_and_evaluates_as_it_saves() -> None:
    words = ["--eval_split", "0.1", "--early_stopping_patience", "2"]
    training = parse([*NEEDED, *words])[1]
    assert training.load_best_model_at_end
    assert training.eval_strategy == training.save_strategy == "epoch"
    training = parse([*NEEDED, *words, "--eval_strategy", "steps", "--eval_steps", "7"])[1]
    assert (training.save_strategy, training.save_steps) == ("steps", 7)
    assert training.restore_callback_states_from_checkpoint, "resuming goes on with the patience that is left"


@pytest.mark.parametrize(
    ("words", "targets"),
    [
        ([], None),
        (["attention"], "attention"),
        (["q_proj"], ["q_proj"]),
        (["q_proj", "v_proj"], ["q_proj", "v_proj"]),
        ([r".*\.q_proj"], r".*\.q_proj"),
        (['["q_proj", "v_proj"]'], ["q_proj", "v_proj"]),
        (["[qv]_proj"], "[qv]_proj"),
        (["all-linar"], "all-linar"),
        (["layers.0.self_attn.q_proj"], ["layers.0.self_attn.q_proj"]),
    ],
)
def test_targets_are_names_a_scope_or_a_pattern(words: list[str], targets: Any) -> None:
    recipe = ours(*(["--target_modules", *words] if words else []))
    assert lora_arguments(recipe).get("target_modules") == targets


def test_loss_and_packing_follow_each_other_until_told() -> None:
    def decided(*words: str) -> tuple[bool, str]:
        recipe = ours(*words)
        return completion_only(recipe), packing_of(recipe)

    assert decided() == (False, "wrapped")
    assert decided("--loss_on", "completion") == (True, "none")
    assert decided("--template", "chat") == (True, "none")
    assert decided("--template", "chat", "--loss_on", "all") == (False, "wrapped")
    assert decided("--loss_on", "completion", "--packing", "true") == (True, "wrapped")
    assert decided("--packing", "false") == (False, "none")
    assert decided("--packing", "best-fit") == (False, "best-fit")
    assert decided("--packing", "none") == decided("--packing", "False") == (False, "none")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--packing", "best-fitt"], "--packing cannot be 'best-fitt'. Did you mean 'best-fit'?"),
        (["--over_long", "cut"], "--over_long cut belongs to --packing best-fit"),
        (["--packing", "wrapped", "--over_long", "drop"], "belongs to --packing best-fit"),
    ],
)
def test_packing_that_does_not_exist_is_refused(words: list[str], message: str) -> None:
    with pytest.raises(ArgumentsError) as caught:
        ours(*words)
    assert message in str(caught.value)


def test_runs_of_earlier_releases_are_resumed_with_their_packing(tmp_path: Path) -> None:
    """They have written true, false or null."""
    before = {("--packing", "true"): True, ("--packing", "false"): False, (): None}
    for words, value in before.items():
        record = run_record(*parse([*NEEDED, "--output_dir", str(tmp_path), *words]))
        assert record["packing"] is value
        assert record["over_long"] is None
    assert run_record(*parse([*NEEDED, "--packing", "best-fit"]))["packing"] == "best-fit"


def test_quantization_is_a_name_none_or_a_name_with_options() -> None:
    assert lora_arguments(ours("--quantization", "none"))["quantization"] is None
    options = {"name": "nf4", "double_quant": True}
    assert lora_arguments(ours("--quantization", json.dumps(options)))["quantization"] == options
    with pytest.raises(ArgumentsError, match="--quantization must be a JSON object"):
        lora_arguments(ours("--quantization", "{nf4}"))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--quantization", "int9"], "Did you mean 'int8'"),
        (["--quantization", '{"name": "nf4", "double": true}'], "double_quant"),
        (["--lora", '{"use_dorra": true}'], "Did you mean 'use_dora'"),
    ],
)
def test_lora_arguments_are_checked_before_the_data_are_read(words: list[str], message: str) -> None:
    with pytest.raises(LoraPluginsError) as caught:
        check_lora(ours(*words))
    assert message in str(caught.value)


@pytest.mark.parametrize("reference", ["name", "org/name", "org/name@", "a/b/c@1.0", "org/name@1 2"])
def test_push_is_checked_before_anything_is_trained(reference: str) -> None:
    with pytest.raises(ArgumentsError, match="--push must be org/name@1"):
        Publication.of(reference)
    assert Publication.of("org/name@1.2.0rc1") == Publication("org/name", "1.2.0rc1")
    assert Publication.of("org/na.me@minor") == Publication("org/na.me", "minor")
    assert Publication.of(None) is None


def test_help_loads_no_torch() -> None:
    code = (
        "import sys\nfrom lora_plugins.commands.cli import main\n"
        "try:\n    main(['train', '--help'])\nexcept SystemExit as end:\n    assert not end.code\n"
        "assert 'torch' not in sys.modules\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "--chunk-length CHUNK_LENGTH" in done.stdout
    assert "adafactor" in done.stdout


def test_cpu_is_asked_for_where_there_is_nothing_else() -> None:
    assert parse(NEEDED)[1].use_cpu is not torch.accelerator.is_available()


# -- the home folder -------------------------------------------------------------------------------


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("HOME", str(tmp_path))
    return tmp_path


@pytest.mark.parametrize("name", ["adapter", "model", "report", "output"])
def test_output_folders_in_the_home_folder_are_not_called_tilde(name: str, home: Path) -> None:
    """No shell expands what stands in a YAML file."""
    flag = "output_dir" if name == "output" else f"{name}_folder"
    (home / "run.yaml").write_text(f"model: m\ndataset: d\n{flag}: ~/runs/first\n")
    folders = Folders.of(*parse(["--config", str(home / "run.yaml")]))
    assert getattr(folders, name) == home / "runs" / "first"


@pytest.mark.parametrize("flag", ["model", "resume_from_checkpoint"])
def test_inputs_in_the_home_folder_are_found(flag: str, home: Path) -> None:
    recipe, training = parse([*NEEDED, f"--{flag}=~/here"])
    assert getattr(recipe if flag == "model" else training, flag) == str(home / "here")


def test_a_configuration_in_the_home_folder_is_found(home: Path) -> None:
    (home / "run.yaml").write_text("model: m\ndataset: d\nr: 5\n")
    assert parse(["--config=~/run.yaml"])[0].r == 5


def test_a_home_folder_that_is_not_known_is_said_so(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(path: Path) -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "expanduser", fail)
    # transformers leaves a path as it is where the home folder is not known.
    monkeypatch.setattr("os.path.expanduser", lambda path: path)
    with pytest.raises(RegistryError, match="'~/out' cannot be found: the home folder is not known"):
        Folders.of(*parse([*NEEDED, "--output_dir", "~/out"]))

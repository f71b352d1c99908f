"""``lora-plugins reproduce``: a run trained again is the same bit by bit, or what is other is named as the cause."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import twin
from datasets import Dataset

from lora_plugins.commands.cli import main
from lora_plugins.errors import ReproductionError
from lora_plugins.recipe.parser import parse
from lora_plugins.recipe.reproduction.differences import Difference, compare_data, find_first_step
from lora_plugins.recipe.reproduction.flags import describe_recipe, is_local_flag
from lora_plugins.recipe.reproduction.reproduce import check_reproduction, reproduce
from lora_plugins.recipe.reproduction.source import digest_adapter
from lora_plugins.recipe.run import run
from registry import push_adapter

SETTINGS = [
    *("--chunk-length", "64", "--max_steps", "6", "--logging_steps", "1", "--eval_split", "0.1", "--merge", "none"),
    *("--save_strategy", "steps", "--save_steps", "2", "--save_total_limit", "5", "--learning_rate", "1e-2"),
    *("--eval_strategy", "steps", "--eval_steps", "3", "--num_proc", "1"),
]
HERE = ["--model", "base", "--dataset", "train.jsonl"]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with packing and evaluation in ``whole``, and the same cut off after step 4 and resumed in ``resumed``."""
    folder = tmp_path_factory.mktemp("reproduction")
    before = Path.cwd()
    twin.make_base(folder / "base", steps=4)
    twin.write_jsonl(folder / "train.jsonl", twin.dialogues(60, seed=1))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr("datasets.config.HF_DATASETS_CACHE", folder / "cache")
        assert run([*HERE, "--output_dir", "whole", *SETTINGS]) == 0
        shutil.copytree("whole", "resumed")
        shutil.rmtree("resumed/adapter")
        shutil.rmtree("resumed/checkpoint-6")
        assert run([*HERE, "--output_dir", "resumed", "--resume", *SETTINGS]) == 0
    assert Path.cwd() == before
    return folder


@pytest.fixture
def at_place(place: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(place)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", place / "cache")
    monkeypatch.setenv("LORA_REGISTRY", (place / "registry").as_uri())
    monkeypatch.setenv("LORA_REGISTRY_CACHE", str(place / "pulled"))
    return place


@pytest.fixture
def command(at_place: Path, capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    def call(*words: str) -> tuple[int, str, str]:
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            main(["reproduce", *words])
        said = capsys.readouterr()
        return int(ended.value.code or 0), said.out, said.err

    return call


def edited(at_place: Path, tmp_path: Path, change: Callable[[dict[str, Any]], object]) -> str:
    """The adapter of the whole run, as if its lineage had been recorded otherwise."""
    shutil.copytree(at_place / "whole" / "adapter", tmp_path / "adapter")
    file = tmp_path / "adapter" / "lineage.json"
    found = json.loads(file.read_text())
    change(found)
    file.write_text(json.dumps(found))
    return str(tmp_path / "adapter")


def test_a_run_with_packing_evaluation_and_resume_is_the_same_bit_by_bit(
    command: Callable[..., tuple[int, str, str]], at_place: Path
) -> None:
    lineage = json.loads(Path("resumed", "adapter", "lineage.json").read_text())
    assert [entry["step"] for entry in lineage["resumed"]] == [4]
    assert set(lineage["dataset"]) == set(lineage["inputs"]) == {"train", "eval"}
    code, out, err = command("./resumed", *HERE, "--json")
    assert code == 0, err
    result = json.loads(out)
    assert result["same"] is True
    assert result["digest"] == result["recorded"] == digest_adapter(Path("resumed", "adapter"))
    assert (result["first"], result["layers"], result["differences"], result["missing"]) == (None, [], [], {})
    assert result["folder"] is None
    assert "trainable params" not in out


def test_a_published_run_is_trained_again_from_its_reference(
    command: Callable[..., tuple[int, str, str]], at_place: Path
) -> None:
    push_adapter(at_place / "whole" / "adapter", "org/name", version="1.0.0")
    code, out, err = command("org/name@1.0.0", *HERE, "--output_dir", "again")
    assert code == 0, err
    assert "org/name@1.0.0: the same adapter, bit by bit" in out
    assert digest_adapter(Path("again", "adapter")) in out
    assert "base:" not in out, "the base is compared by the fingerprint in the manifest"


def test_an_evaluation_before_training_is_part_of_the_recipe(
    command: Callable[..., tuple[int, str, str]], at_place: Path
) -> None:
    """It draws random numbers, so dropout is another one after it."""
    assert run([*HERE, "--output_dir", "started", *SETTINGS, "--eval_on_start", "true"]) == 0
    assert digest_adapter(Path("started", "adapter")) != digest_adapter(Path("whole", "adapter"))
    assert json.loads(Path("started", "adapter", "lineage.json").read_text())["recipe"]["eval_on_start"] is True
    code, out, err = command("./started", *HERE, "--json")
    assert code == 0, err
    assert json.loads(out)["same"] is True
    code, out, _ = command("./whole", *HERE, "--check", "--eval_on_start", "true")
    assert code == 1
    assert "recipe.eval_on_start was nothing and is True" in out


def test_flags_that_are_not_recorded_leave_the_weights_as_they_are(at_place: Path) -> None:
    local = [
        *("--samples", "1", "--include_num_input_tokens_seen", "true", "--skip_memory_metrics", "false"),
        *("--save_total_limit", "1", "--disable_tqdm", "true", "--log_level", "error", "--report_to", "tensorboard"),
    ]
    names = {word.removeprefix("--") for word in local if word.startswith("--")}
    assert all(is_local_flag(name) for name in names)
    assert run([*HERE, "--output_dir", "local", *SETTINGS, *local]) == 0
    assert digest_adapter(Path("local", "adapter")) == digest_adapter(Path("whole", "adapter"))


def test_another_seed_is_named_as_the_cause(command: Callable[..., tuple[int, str, str]]) -> None:
    code, out, _ = command("./whole", *HERE, "--seed", "43", "--json")
    assert code == 1
    result = json.loads(out)
    assert result["same"] is False
    assert result["digest"] != result["recorded"]
    assert result["first"]["field"] == "loss at step 1"
    causes = {item["field"]: (item["recorded"], item["here"]) for item in result["differences"]}
    assert causes["recipe.seed"] == (42, 43)
    assert {layer["name"] for layer in result["layers"]} == {
        f"transformer.h.{i}.self_attention.query_key_value" for i in (0, 1)
    }
    assert all(layer["change"] > 0 for layer in result["layers"])


def test_another_row_of_the_data_is_named_as_the_cause(
    command: Callable[..., tuple[int, str, str]], at_place: Path
) -> None:
    rows = twin.dialogues(60, seed=1)
    first = Dataset.from_list(rows).train_test_split(test_size=6, seed=42)["train"][0]["id"]
    (changed,) = (row for row in rows if row["id"] == first)
    changed["summary"] += " Soon."
    twin.write_jsonl(at_place / "other.jsonl", rows)
    code, out, _ = command("./whole", "--model", "base", "--dataset", "other.jsonl")
    assert code == 1
    assert "begins to differ: loss at step" in out
    assert "2 of 2 layers differ" in out
    causes = [line for line in out.splitlines() if line.startswith("  cause: ")]
    assert len(causes) == 1
    assert causes[0].startswith("  cause: dataset.")
    assert ".sha256 was " in causes[0]


def test_another_library_is_named_before_and_after(
    command: Callable[..., tuple[int, str, str]], at_place: Path, tmp_path: Path
) -> None:
    adapter = edited(at_place, tmp_path, lambda found: found["libraries"].update(torch="2.0.0", gone="1.0"))
    code, out, _ = command(adapter, *HERE, "--check")
    assert code == 1
    assert "differs: libraries.torch was 2.0.0 and is 2." in out
    assert "differs: libraries.gone was 1.0 and is nothing" in out
    assert "missing" not in out


@pytest.mark.parametrize(
    ("change", "words", "expected"),
    [
        (lambda found: found["hardware"].update(threads=64), [], "differs: hardware.threads was 64 and is 1"),
        (lambda found: found["hardware"].update(device="NVIDIA H100"), [], "differs: hardware.device was NVIDIA H100"),
        (lambda found: found["code"].update(commit="a" * 40), [], "code.commit was aaaaaaaa"),
        (lambda found: found["dataset"]["train"].update(rows=3, sha256="a"), [], "dataset.train.rows was 3 and is 54"),
        (lambda found: found["recipe"].update(lora_alpha=16), ["--lora_alpha", "32"], "lora_alpha was 16 and is 32"),
        (lambda found: found.pop("dataset"), [], "not compared: dataset: "),
        (lambda found: found.pop("losses"), [], "not compared: losses: "),
        (
            lambda found: found.update(resumed=[{"step": 4, "changed": {"code.commit": ["1", "2"]}}]),
            [],
            "at step 4",
        ),
        (lambda found: None, ["--dataset", "gone.jsonl"], "missing: dataset: The data set gone.jsonl is not there"),
    ],
    ids=["threads", "device", "commit", "rows", "flag", "no data set", "no losses", "resumed elsewhere", "data gone"],
)
def test_what_is_other_here_is_said_before_anything_is_trained(
    change: Any, words: list[str], expected: str, at_place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if "commit" in expected and "code" not in json.loads((at_place / "whole/adapter/lineage.json").read_text()):
        pytest.skip("these tests do not run from a git checkout")
    adapter = edited(at_place, tmp_path, change)
    found = check_reproduction(adapter, [*HERE, *words])
    assert expected in "\n".join(found.lines())


def test_nothing_is_missing_or_other_for_the_run_itself(
    command: Callable[..., tuple[int, str, str]], at_place: Path
) -> None:
    code, out, err = command("./whole", *HERE, "--check")
    assert code == 0, out + err
    assert out.startswith("./whole: all that was recorded is here")


def test_what_is_not_recorded_is_asked_for(command: Callable[..., tuple[int, str, str]]) -> None:
    code, out, _ = command("./whole", "--check", "--json")
    assert code == 1
    assert set(json.loads(out)["missing"]) == {"model", "dataset"}
    code, _, err = command("./whole", "--model", "base")
    assert code == 1
    assert "give --dataset" in err
    assert "give --model" not in err


def test_another_base_is_named(at_place: Path) -> None:
    twin.make_base(at_place / "other-base", steps=5)
    push_adapter(at_place / "whole" / "adapter", "org/base-test", version="1.0.0")
    found = check_reproduction("org/base-test@1.0.0", ["--model", "other-base", "--dataset", "train.jsonl"])
    assert [item.field for item in found.differences] == ["base"]


@pytest.mark.parametrize("lineage", [None, {}, {"recipe": "none"}, {"not_recorded": {"recipe": "a script made it"}}])
def test_a_run_that_was_no_train_run_is_refused_with_the_reason(at_place: Path, tmp_path: Path, lineage: Any) -> None:
    shutil.copytree(at_place / "whole" / "adapter", tmp_path / "adapter")
    (tmp_path / "adapter" / "lineage.json").unlink()
    if lineage is not None:
        (tmp_path / "adapter" / "lineage.json").write_text(json.dumps(lineage))
    with pytest.raises(ReproductionError, match="its recipe is not recorded"):
        reproduce(str(tmp_path / "adapter"), HERE)


def test_a_folder_without_an_adapter_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ReproductionError, match=r"holds no adapter_model\.safetensors"):
        check_reproduction(str(tmp_path))


@pytest.mark.parametrize(
    "words",
    [
        ["--gradient_checkpointing", "false"],
        ["--target_modules", "query_key_value", "dense", "--quantization", '{"name": "nf4", "double_quant": true}'],
        ["--lr_scheduler_type", "cosine", "--warmup_steps", "3", "--adam_epsilon", "1e-7", "--bf16", "false"],
        ["--template", "Q: {dialogue}\\nA: {summary}", "--packing", "false", "--loss_on", "completion"],
        ["--lr_scheduler_kwargs", '{"num_cycles": 2}', "--optim", "adamw_torch", "--neftune_noise_alpha", "5"],
        ["--eval_dataset", "org/test@main", "--early_stopping_patience", "2", "--revision", "abc"],
        ["--accelerator_config", '{"even_batches": false}', "--max_steps", "7", "--lora", '{"use_rslora": true}'],
    ],
)
def test_a_recipe_is_taken_again_as_it_was_given(words: list[str], tmp_path: Path) -> None:
    """Recorded flags, given as a --config file, are recorded as the same flags."""
    given = ["--model", "org/base", "--dataset", "org/data", "--output_dir", str(tmp_path), *words]
    flags, reasons = describe_recipe(*parse(given))
    assert reasons == {}
    (tmp_path / "recipe.yaml").write_text(json.dumps(flags))
    again, _ = describe_recipe(*parse(["--config", str(tmp_path / "recipe.yaml")]))
    assert again == flags
    assert str(tmp_path) not in json.dumps(flags)
    assert os.sep + "tmp" not in json.dumps(flags)


def test_the_first_step_that_differs_is_found() -> None:
    one = {"step": [1, 2, 3], "loss": [1.0, 2.0, 3.0], "grad_norm": [1.0, 1.0, 1.0]}
    assert find_first_step(one, one) is None
    assert find_first_step(one, {**one, "loss": [1.0, 2.5, 9.0]}) == Difference("loss at step 2", 2.0, 2.5)
    assert find_first_step(one, {**one, "grad_norm": [1.0, 1.0, 2.0]}) == Difference("grad_norm at step 3", 1.0, 2.0)
    assert find_first_step(one, {"step": [5], "loss": [1.0]}) is None
    assert find_first_step({"step": "x"}, one) is None


def test_rows_that_are_missing_on_one_side_differ() -> None:
    rows = {"train": {"rows": 1, "sha256": "a", "columns": ["x"]}}
    assert list(compare_data("dataset", rows, rows)) == []
    assert [item.field for item in compare_data("dataset", rows, {})] == ["dataset.train"]
    other = {"train": {"rows": 1, "sha256": "b", "columns": ["x"]}}
    assert [item.field for item in compare_data("dataset", rows, other)] == ["dataset.train.sha256"]

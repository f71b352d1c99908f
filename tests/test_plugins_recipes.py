"""One word gives what a recipe trained, whatever the defaults are."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import tiny
from peft import LoraConfig
from transformers import BloomConfig

from lora_plugins import LoraCallback, attach, plan, prepare_model
from lora_plugins.adapters import settings
from lora_plugins.errors import ArgumentsError, PreparationError, UnknownArgument, UnmatchedTargets
from lora_plugins.recipe.parser import parse
from lora_plugins.recipe.prepare import lora_arguments

BLOOMZ = BloomConfig(vocab_size=250_880, hidden_size=4096, n_layer=30, n_head=32)
NEEDED = ["--model", "m", "--dataset", "d"]


@pytest.fixture
def other_defaults(monkeypatch: pytest.MonkeyPatch) -> None:
    """The defaults of another release."""
    monkeypatch.setattr(settings, "DEFAULTS", {"r": 64, "lora_alpha": 64, "lora_dropout": 0.0})


@pytest.mark.usefixtures("other_defaults")
def test_the_published_count_needs_one_word() -> None:
    made = plan(BLOOMZ, recipe="bloomz-2023", dtype="bfloat16", length=8)
    assert (made.trainable, made.total) == (3_932_160, 7_072_948_224)


@pytest.mark.usefixtures("other_defaults")
@pytest.mark.parametrize("way", ["callback", "attach", "prepare"])
def test_every_way_in_takes_the_recipe(way: str, tmp_path: Path) -> None:
    if way == "prepare":
        model = prepare_model(tiny.bloom(), recipe="bloomz-2023")
    else:
        callbacks = [LoraCallback(recipe="bloomz-2023")] if way == "callback" else []
        trainer = tiny.trainer(tmp_path, tiny.bloom(), callbacks)
        if way == "attach":
            attach(trainer, recipe="bloomz-2023")
        model = trainer.model
    config = model.peft_config["default"]
    assert (config.r, config.lora_alpha, config.lora_dropout) == (8, 32, 0.05)
    assert config.target_modules == {"query_key_value"}


def test_fields_that_are_passed_win() -> None:
    made = plan(BLOOMZ, recipe="bloomz-2023", r=16, dtype="bfloat16", length=8)
    assert made.trainable == 2 * 3_932_160


@pytest.mark.parametrize("name", ["bloomz-2024", "", 7])
def test_a_recipe_that_is_not_known_is_refused(name: Any) -> None:
    with pytest.raises(UnknownArgument, match=r"recipe=.* is not known\..*bloomz-2023"):
        LoraCallback(recipe=name)


@pytest.mark.parametrize("other", [{"peft_config": LoraConfig()}, {"adapter": "org/name@1"}])
def test_a_recipe_beside_another_configuration_is_refused(other: dict[str, Any]) -> None:
    with pytest.raises(PreparationError, match=f"recipe='bloomz-2023' and {next(iter(other))} were given together"):
        LoraCallback(recipe="bloomz-2023", **other)


def test_a_model_without_the_modules_of_the_recipe_says_so() -> None:
    with pytest.raises(UnmatchedTargets, match="query_key_value"):
        prepare_model(tiny.llama(), recipe="bloomz-2023")


def test_train_takes_it_and_flags_win(tmp_path: Path) -> None:
    fields = ("r", "lora_alpha", "lora_dropout", "target_modules")

    def read(*words: str) -> tuple[Any, ...]:
        lora = settings.LoraSettings.from_arguments(**lora_arguments(parse([*NEEDED, *words])[0])).lora
        return tuple(lora.get(name) for name in fields)

    assert read("--recipe", "bloomz-2023") == (8, 32, 0.05, ["query_key_value"])
    assert read("--recipe", "bloomz-2023", "--r", "16") == (16, 32, 0.05, ["query_key_value"])
    assert read("--recipe", "bloomz-2023", "--target_modules", "all-linear")[3] == "all-linear"
    file = tmp_path / "run.yaml"
    file.write_text("recipe: bloomz-2023\nlora_alpha: 8\n")
    assert read("--config", str(file)) == (8, 8, 0.05, ["query_key_value"])
    with pytest.raises(ArgumentsError, match=r"--recipe='bloomz' is not known\. Did you mean 'bloomz-2023'"):
        read("--recipe", "bloomz")

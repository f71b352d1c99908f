"""Where no targets are named, a plan and a report say which default was taken, from where, and how to choose others."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import tiny
from torch import nn
from transformers import BloomConfig

from lora_plugins import Architecture, LoraCallback, plan, prepare_model
from lora_plugins.adapters.report import make_report
from lora_plugins.adapters.settings import LoraSettings
from lora_plugins.commands.cli import main
from lora_plugins.errors import UnknownArgument
from lora_plugins.plugins.host import PluginHost, PluginInfo
from lora_plugins.recipe.parser import parse
from lora_plugins.recipe.prepare import lora_arguments
from lora_plugins.targets.resolution import resolve_targets

sys.path.insert(0, str(Path(__file__).parent.parent / "tools"))

import small_models

OTHERS = "target_modules='all-linear', another scope or a list of names chooses others"
BLOOM = BloomConfig(vocab_size=96, hidden_size=32, n_layer=2, n_head=4)


def make_llava() -> Any:
    """A small model on the meta device that has an inner model."""
    case = next(one for one in small_models.cases() if one.model_type == "llava")
    return small_models.build(case, "meta")


def find_default(notes: list[str]) -> str:
    found = [note for note in notes if note.startswith("no targets were named")]
    assert len(found) == 1, notes
    return found[0]


def test_the_report_of_a_training_names_the_default_and_who_registered_it(tmp_path: Path) -> None:
    trainer = tiny.trainer(tmp_path, tiny.llama(), [LoraCallback()])
    note = find_default(make_report(trainer.model).to_dict()["notes"])
    assert note.startswith(
        "no targets were named: q_proj, v_proj, the default for 'llama', registered by architectures ("
    )
    assert note.endswith(OTHERS)


def test_a_plan_says_it_in_its_table_and_in_its_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    BLOOM.save_pretrained(tmp_path)
    with pytest.raises(SystemExit) as end:
        main(["plan", str(tmp_path), "--length", "8", "--dtype", "float32", "--json"])
    assert not end.value.code
    made = json.loads(capsys.readouterr().out)
    note = find_default(made["notes"])
    assert note.startswith(
        "no targets were named: query_key_value, the default for 'bloom', registered by architectures"
    )
    assert made["source"] == "the registered architecture 'bloom'"
    table = " ".join(str(plan(BLOOM, length=8, dtype="float32")).split())
    assert f"note: {note}" in table


@pytest.mark.parametrize("named", [["q_proj"], "attention", "all-linear", r".*\.q_proj"])
def test_targets_that_were_named_are_not_called_a_default(named: Any) -> None:
    assert not any("no targets were named" in note for note in resolve_targets(tiny.llama(), named).notes)


def test_parameters_alone_bring_no_default_and_no_note_of_one() -> None:
    chosen = resolve_targets(tiny.llama(), target_parameters=["self_attn.q_proj.weight"])
    assert not any("no targets were named" in note for note in chosen.notes)


def test_the_default_of_an_installed_plugin_is_its_own() -> None:
    host = PluginHost()
    info = PluginInfo("mine", "my-package", "3.1", builtin=False)
    host._architectures.add("llama", info, Architecture("llama", ("o_proj", "absent")))
    note = find_default(resolve_targets(tiny.llama(), host=host).notes)
    assert (
        note == f"no targets were named: o_proj, the default for 'llama', registered by mine (my-package 3.1); {OTHERS}"
    )


def test_the_default_of_an_inner_model_is_ascribed_to_the_plugin_of_its_record() -> None:
    host = PluginHost()
    info = PluginInfo("mine", "my-package", "3.1", builtin=False)
    host._architectures.add("llama", info, Architecture("llama", ("o_proj",)))
    note = find_default(resolve_targets(make_llava(), host=host).notes)
    assert (
        note == "no targets were named: o_proj, the default for 'llama' (inside 'llava'), registered by mine "
        f"(my-package 3.1); {OTHERS}"
    )


def test_an_inner_model_of_a_built_in_record_is_named_too() -> None:
    note = find_default(resolve_targets(make_llava()).notes)
    assert "q_proj, v_proj, the default for 'llama' (inside 'llava'), registered by architectures (" in note


def test_a_model_whose_inner_model_is_not_registered_is_named_itself() -> None:
    host = PluginHost()
    info = PluginInfo("mine", "my-package", "3.1", builtin=False)
    host._architectures.add("outer", info, Architecture("outer", ("o_proj",), inner=("text_config",)))

    model = make_llava()
    model.config.model_type = "outer"
    model.config.text_config.model_type = "unknown"
    note = find_default(resolve_targets(model, host=host).notes)
    assert "o_proj, the default for 'outer', registered by mine (my-package 3.1); " in note


def test_two_inner_models_each_have_their_own_plugin_named() -> None:
    host = PluginHost()
    for name in ("llama", "clip_vision_model"):
        info = PluginInfo(f"for-{name}", "my-package", "3.1", builtin=False)
        host._architectures.add(name, info, Architecture(name, {"llama": ("o_proj",)}.get(name, ("down_proj",))))
    info = PluginInfo("mine", "my-package", "3.1", builtin=False)
    host._architectures.add("llava", info, Architecture("llava", ("absent",), inner=("text_config", "vision_config")))
    note = find_default(resolve_targets(make_llava(), host=host).notes)
    assert "o_proj, the default for 'llama' (inside 'llava'), registered by for-llama (my-package 3.1), and " in note
    assert "down_proj, the default for 'clip_vision_model' (inside 'llava'), registered by for-clip_vision_m" in note


def test_a_structure_that_was_read_says_how_to_choose_others() -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention_in = nn.Linear(8, 8)
            self.widen = nn.Linear(8, 8)

    class Unknown(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.tower = nn.ModuleList(Block() for _ in range(3))

    note = find_default(resolve_targets(Unknown()).notes)
    assert "Unknown is not registered" in note
    assert note.endswith(f"all 3 attention layers in 3 blocks were chosen; {OTHERS}")


def test_a_record_whose_names_are_absent_is_said_and_the_structure_is_read() -> None:
    host = PluginHost()
    info = PluginInfo("mine", "my-package", "3.1", builtin=False)
    host._architectures.add("llama", info, Architecture("llama", ("absent",)))
    note = find_default(resolve_targets(tiny.llama(), host=host).notes)
    assert "the record of 'llama' names absent, none of which is in LlamaForCausalLM" in note


def test_a_recipe_is_named_as_the_source_with_what_it_gave() -> None:
    made = plan(BLOOM, recipe="bloomz-2023", dtype="float32", length=8)
    assert made.source == "the recipe 'bloomz-2023'"
    gave = "the recipe 'bloomz-2023' gave r=8; lora_alpha=32; lora_dropout=0.05; target_modules=query_key_value"
    assert gave in made.notes
    report = make_report(prepare_model(tiny.bloom(), recipe="bloomz-2023"))
    assert report.source == made.source
    assert gave in report.notes
    assert not any("no targets were named" in note for note in report.notes)


def test_fields_that_were_passed_are_not_ascribed_to_the_recipe() -> None:
    made = plan(BLOOM, recipe="bloomz-2023", r=16, target_modules="all-linear", dtype="float32", length=8)
    assert made.source == "scope 'all-linear'"
    assert "the recipe 'bloomz-2023' gave lora_alpha=32; lora_dropout=0.05" in made.notes


def test_fields_that_were_passed_with_the_values_of_the_recipe_are_not_ascribed_to_it() -> None:
    made = plan(BLOOM, recipe="bloomz-2023", r=8, target_modules=["query_key_value"], dtype="float32", length=8)
    assert made.source == "the names given"
    assert "the recipe 'bloomz-2023' gave lora_alpha=32; lora_dropout=0.05" in made.notes


def test_a_recipe_whose_fields_were_all_passed_is_said_to_give_none() -> None:
    fields: dict[str, Any] = {"r": 8, "lora_alpha": 32, "lora_dropout": 0.05, "target_modules": ["query_key_value"]}
    report = make_report(prepare_model(tiny.bloom(), recipe="bloomz-2023", **fields))
    assert report.source == "the names given"
    assert "every field of the recipe 'bloomz-2023' was passed explicitly" in report.notes


def test_what_a_recipe_gave_cannot_be_passed() -> None:
    with pytest.raises(UnknownArgument, match="'from_recipe' is neither"):
        LoraCallback(recipe="bloomz-2023", from_recipe=("r",))


@pytest.mark.parametrize("file", [True, False])
def test_train_ascribes_to_its_recipe_what_no_flag_and_no_line_of_a_file_set(file: bool, tmp_path: Path) -> None:
    words = ["--model", "m", "--dataset", "d", "--recipe", "bloomz-2023"]
    if file:
        (tmp_path / "run.yaml").write_text("r: 8\ntarget_modules: [query_key_value]\n")
        words += ["--config", str(tmp_path / "run.yaml")]
    else:
        words += ["--r", "8", "--target_modules", "query_key_value"]
    settings = LoraSettings.from_arguments(**lora_arguments(parse(words)[0]))
    assert settings.from_recipe == ("lora_alpha", "lora_dropout")
    assert settings.lora == {"r": 8, "lora_alpha": 32, "lora_dropout": 0.05, "target_modules": ["query_key_value"]}


def test_train_hands_the_name_of_its_recipe_on() -> None:
    needed = ["--model", "m", "--dataset", "d"]
    named = lora_arguments(parse([*needed, "--recipe", "bloomz-2023"])[0])
    assert make_report(prepare_model(tiny.bloom(), **{**named, "quantization": None})).source.startswith("the recipe")
    assert "recipe" not in lora_arguments(parse(needed)[0])

"""Every name, pattern, index and number that a user wrote touches something, in every field, under each callback."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import tiny
from peft import IA3Config, LoHaConfig, LoraConfig, PeftModel, get_peft_model

from lora_plugins import Int8PreparationCallback, LoraCallback, ParameterReportCallback, prepare_model
from lora_plugins.errors import TargetError, TargetWarning, UnmatchedTargets
from lora_plugins.targets.resolution import check_names
from registry.errors import UnsafeFile

#: Fields with one thing in them that touches nothing, and what the message says of it.
WRONG: list[tuple[dict[str, Any], str]] = [
    ({"target_modules": ["q_proj", "v_prj"]}, r"'v_prj' \(near: .*v_proj"),
    ({"modules_to_save": ["lm_haed"]}, r"modules_to_save saves nothing by 'lm_haed' \(near: lm_head"),
    ({"modules_to_save": ["lm_head", "embed_token"]}, r"'embed_token' \(near: embed_tokens"),
    ({"exclude_modules": ["k_prj"]}, r"exclude_modules leaves nothing out by 'k_prj' \(near: k_proj"),
    ({"exclude_modules": ["self_attn"]}, r"by 'self_attn': PEFT compares names with the end of a path"),
    ({"exclude_modules": r".*layers\.7\..*"}, r"leaves nothing out"),
    ({"rank_pattern": {"q_prj": 4}}, r"rank_pattern sets 4 for no adapted module by 'q_prj' \(near: q_proj"),
    ({"rank_pattern": {"k_proj": 4}}, r"for no adapted module by 'k_proj'"),
    ({"alpha_pattern": {r"layers\.9\..*": 4}}, "alpha_pattern sets 4 for no adapted module"),
    ({"alpha_pattern": {"q_proj": 0}}, r"alpha_pattern\['q_proj'\]=0 must be above zero"),
    ({"lora_alpha": 0}, "lora_alpha=0 must be above zero"),
    (
        {"layers_to_transform": [0, 99]},
        r"layers without an adapter: 99 \(with one: 0 to 1\)|layers without an adapter: 99",
    ),
    ({"layers_to_transform": 7}, "layers without an adapter: 7"),
    ({"layers_to_transform": [0], "layers_pattern": ["layer"]}, "layers_pattern='layer'"),
    ({"target_parameters": ["q_proj.wait"]}, r"'q_proj.wait'"),
    ({"trainable_token_indices": [5, 96]}, r"rows that are not there: 96 \(there are 96\)"),
    ({"trainable_token_indices": [-1]}, "rows that are not there: -1"),
    ({"trainable_token_indices": {"embed_token": [5]}}, r"no embedding by 'embed_token' \(near: embed_tokens"),
    ({"layer_replication": [[0, 2], [1, 9]]}, r"ranges without a layer: \[1, 9\]"),
    ({"layer_replication": [[0, 2]] * 3000}, "more than 4096 layers"),
]


@pytest.mark.parametrize(
    ("fields", "message"), WRONG, ids=[f"{number}-{next(iter(f))}" for number, (f, _) in enumerate(WRONG)]
)
def test_what_touches_nothing_is_refused_by_name(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(UnmatchedTargets, match=message):
        prepare_model(tiny.llama(), **fields)
    config = LoraConfig(**{"target_modules": ["q_proj", "v_proj"], **copy.deepcopy(fields)})
    with pytest.raises(UnmatchedTargets, match=message):
        prepare_model(tiny.llama(), peft_config=config)


#: What PEFT itself lets pass.
READY: list[tuple[dict[str, Any], str]] = [
    ({"target_modules": ["q_proj", "v_proj", "fc1", "query", "o_proj", "k_proj", "gate_proj"]}, "'fc1'.*'query'"),
    ({"modules_to_save": ["lm_haed"]}, "'lm_haed'"),
    ({"exclude_modules": ["lm_haed"]}, "'lm_haed'"),
    ({"rank_pattern": {"q_prj": 4}}, "'q_prj'"),
    ({"alpha_pattern": {"up_proj": 4}}, "'up_proj'"),
    ({"layers_to_transform": [0, 99]}, "99"),
]


@pytest.mark.parametrize(("fields", "message"), READY, ids=[next(iter(fields)) for fields, _ in READY])
@pytest.mark.parametrize("callback", [LoraCallback, Int8PreparationCallback, ParameterReportCallback])
def test_ready_adapter_is_held_to_the_same_by_every_callback(
    fields: dict[str, Any], message: str, callback: Any, tmp_path: Path
) -> None:
    config = LoraConfig(**{"target_modules": ["q_proj", "v_proj"], **copy.deepcopy(fields)})
    model = get_peft_model(tiny.llama(), config)
    with pytest.raises(UnmatchedTargets, match=message):
        tiny.trainer(tmp_path, model, [callback()], max_steps=1).train()
    with pytest.warns(TargetWarning, match=message):
        tiny.trainer(tmp_path, model, [callback(strict=False)], max_steps=1).train()


def test_other_methods_of_peft_are_checked_too() -> None:
    for config, message in (
        (LoHaConfig(target_modules=["q_proj", "v_prj"]), "'v_prj'"),
        (LoHaConfig(target_modules=["q_proj"], rank_pattern={"k_proj": 2}), "'k_proj'"),
        (IA3Config(target_modules=["k_proj", "v_proj", "down_prj"], feedforward_modules=[]), "'down_prj'"),
    ):
        model = get_peft_model(tiny.llama(), config)
        with pytest.raises(UnmatchedTargets, match=message):
            check_names(model, model.peft_config["default"])


def test_sound_configurations_pass(tmp_path: Path) -> None:
    for fields in (
        {"target_modules": r".*\.(q|v)_proj"},
        {"target_modules": "all-linear"},
        {"target_modules": None},
        {"exclude_modules": ["lm_head"]},
        {"exclude_modules": r".*layers\.0\..*"},
        {"rank_pattern": {r"layers\.0\.self_attn\.q_proj": 4, "v_proj": 2}, "alpha_pattern": {"q_proj": 8}},
        {"layers_to_transform": [1], "layers_pattern": "layers"},
        {"modules_to_save": ["lm_head", "model.embed_tokens"]},
        {"trainable_token_indices": {"embed_tokens": [0, 95]}},
        {"target_parameters": ["mlp.up_proj.weight"]},
    ):
        config = LoraConfig(**{"target_modules": ["q_proj", "v_proj"], **fields})  # type: ignore[arg-type]
        model = get_peft_model(tiny.llama(), config)
        check_names(model, model.peft_config["default"])
    classifier = get_peft_model(tiny.bert_classifier(), LoraConfig(task_type="SEQ_CLS", target_modules=["query"]))
    check_names(classifier, classifier.peft_config["default"])
    classifier.save_pretrained(tmp_path)
    again: Any = prepare_model(tiny.bert_classifier(), adapter=tmp_path)
    assert "score" in again.peft_config["default"].modules_to_save, "which PEFT wrote and this model does not have"


def test_second_adapter_is_checked_by_its_own_layers() -> None:
    model: Any = get_peft_model(tiny.llama(), LoraConfig(target_modules=["q_proj"]))
    model.add_adapter("second", LoraConfig(target_modules=["v_proj"], rank_pattern={"q_proj": 2}))
    check_names(model, model.peft_config["default"])
    with pytest.raises(UnmatchedTargets, match="'q_proj'"):
        check_names(model, model.peft_config["second"])


def test_near_misses_are_warnings_when_asked() -> None:
    with pytest.warns(TargetWarning, match="lm_haed"):
        prepare_model(tiny.llama(), modules_to_save=["lm_haed"], strict=False)


# -- what was written is what is saved ---------------------------------------------------------


@pytest.mark.parametrize(
    "fields",
    [
        {"target_modules": ["q_proj", "v_proj"]},
        {"target_modules": ["self_attn.q_proj"], "layers_to_transform": [1]},
        {"target_modules": r".*\.layers\.1\..*(q|v)_proj", "exclude_modules": r".*v_proj"},
        {"target_modules": ["q_proj"], "layers_to_transform": [0], "layers_pattern": "layers"},
        {"target_modules": ["q_proj", "k_proj"], "exclude_modules": ["model.layers.0.self_attn.k_proj"]},
    ],
)
def test_configuration_is_saved_as_it_was_written(fields: dict[str, Any], tmp_path: Path) -> None:
    wrapped: Any = prepare_model(tiny.llama(), **copy.deepcopy(fields))
    wrapped.save_pretrained(tmp_path)
    stored = LoraConfig.from_pretrained(tmp_path)
    for name, value in fields.items():
        read = getattr(stored, name)
        assert (set(read) == set(value)) if isinstance(value, list) else (read == value), name
    again = PeftModel.from_pretrained(tiny.llama(), tmp_path)
    assert set(again.state_dict()) == set(wrapped.state_dict())
    wrapped.add_adapter("again", LoraConfig(**fields))


def test_short_names_stay_short_where_an_encoder_is_left_out(tmp_path: Path) -> None:
    from test_targets import small

    wrapped: Any = prepare_model(small("llava", device="cpu"), target_modules=["q_proj", "v_proj"], r=2)
    config = wrapped.peft_config["default"]
    assert config.target_modules == {"q_proj", "v_proj"}
    assert "vision_tower" in config.exclude_modules
    wrapped.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(small("llava", device="cpu"), tmp_path)
    assert set(again.state_dict()) == set(wrapped.state_dict())


def test_parameters_keep_the_names_that_they_were_given() -> None:
    from test_targets import small

    config = LoraConfig(target_parameters=["mlp.experts.down_proj"], target_modules=["q_proj"])
    wrapped: Any = prepare_model(small("mixtral", device="cpu"), peft_config=config)
    assert set(wrapped.peft_config["default"].target_parameters) == {"mlp.experts.down_proj"}
    assert config.target_modules == {"q_proj"}, "the caller's is not changed"


# -- patterns ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "fields",
    [
        {"target_modules": "(.*)*#"},
        {"target_modules": "(?:.?){60}#"},
        {"target_modules": "q_proj", "exclude_modules": "(.*)*#"},
        {"rank_pattern": {"(.*)*#": 4}},
        {"alpha_pattern": {".?" * 60 + "#": 4}},
        {"layers_to_transform": [0], "layers_pattern": "(.*)*#"},
    ],
)
def test_pattern_that_never_ends_is_refused_in_seconds(fields: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lora_plugins.targets.patterns._SECONDS", 0.5)
    fields = (
        {"target_modules": ["q_proj"], **fields}
        if fields.get("target_modules") != "q_proj"
        else {**fields, "target_modules": ["q_proj"]}
    )
    with pytest.raises(TargetError, match=r"took more than 0\.5 s"):
        prepare_model(tiny.llama(), **fields)


def test_stored_pattern_that_never_ends_is_refused(tmp_path: Path) -> None:
    wrapped: Any = prepare_model(tiny.llama(), target_modules=r".*q_proj")
    wrapped.save_pretrained(tmp_path)
    file = tmp_path / "adapter_config.json"
    file.write_text(file.read_text().replace('".*q_proj"', '"(.*)*#"'))
    with pytest.raises(UnsafeFile, match=r"'\(\.\*\)\*#', which can take forever"):
        prepare_model(tiny.llama(), adapter=tmp_path)


def test_pattern_that_cannot_be_vouched_for_becomes_names() -> None:
    wrapped: Any = prepare_model(
        tiny.llama(), target_modules=r"(\w+\.)+(q|v)_proj", rank_pattern={r"(\w+\.)+q_proj": 4}
    )
    config = wrapped.peft_config["default"]
    assert config.target_modules == {"q_proj", "v_proj"}
    assert sorted(config.rank_pattern) == [rf"model\.layers\.{layer}\.self_attn\.q_proj" for layer in (0, 1)]
    assert wrapped.base_model.model.model.layers[0].self_attn.q_proj.r == {"default": 4}
    excluded: Any = prepare_model(tiny.llama(), target_modules=["q_proj"], exclude_modules=r"(\w+\.)+0\.(\w+\.)+q_proj")
    assert excluded.peft_config["default"].target_modules == {"model.layers.1.self_attn.q_proj"}
    assert excluded.peft_config["default"].exclude_modules is None


def test_invalid_pattern_names_its_field() -> None:
    for fields in ({"target_modules": "*q_proj"}, {"exclude_modules": "(q"}, {"rank_pattern": {"[": 4}}):
        with pytest.raises(TargetError, match=rf"{next(iter(fields))}=.* is not a valid regular expression"):
            prepare_model(tiny.llama(), **fields)


def test_a_name_that_is_like_no_other_stands_without_suggestions() -> None:
    with pytest.raises(UnmatchedTargets, match=r"is called 'xyz123'\. Linear layers of"):
        prepare_model(tiny.llama(), target_modules=["q_proj", "xyz123"])
    with pytest.raises(UnmatchedTargets, match=r"does not have: 'xyz123'\."):
        prepare_model(tiny.llama(), frozen=["xyz123"])

"""What differs between two releases; the norms are those of the weights that PEFT itself computes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from adapters import adapted, pulled
from peft import PeftModel
from peft.tuners.lora.layer import LoraLayer
from transformers import MixtralConfig, MixtralForCausalLM

from registry import push_adapter
from registry.checks.lineage import compare_lineage
from registry.commands.inspecting import diff
from registry.pulling.adapter import Adapter
from registry.upkeep.diff import compare_adapters


def mixtral() -> MixtralForCausalLM:
    torch.manual_seed(0)
    config = MixtralConfig(
        vocab_size=96, hidden_size=32, intermediate_size=16, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=2, num_local_experts=3, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    return MixtralForCausalLM(config)


def added(model: PeftModel) -> dict[str, torch.Tensor]:
    """What each LoRA layer adds to its weight, by PEFT's own arithmetic."""
    return {
        name.removeprefix("base_model.model."): module.get_delta_weight("default").double()
        for name, module in model.named_modules()
        if isinstance(module, LoraLayer)
    }


def pair(tmp_path: Path, make: Any, first: dict[str, Any], second: dict[str, Any]) -> tuple[Any, Any, Adapter, Adapter]:
    models = adapted(make(), seed=1, **first), adapted(make(), seed=2, **second)
    releases = [
        pulled(model, tmp_path / str(index), f"1.{index}.0", metrics={"loss": 1.0 - index / 4}, base_model="org/base")
        for index, model in enumerate(models)
    ]
    return *models, *releases


@pytest.mark.parametrize(
    ("make", "first", "second"),
    [
        (tiny.llama, {}, {"r": 8, "lora_alpha": 32}),
        (tiny.llama, {"use_rslora": True}, {"rank_pattern": {"layers.1.self_attn.q_proj": 2}}),
        (tiny.llama, {"alpha_pattern": {".*v_proj": 1}}, {"target_modules": ["q_proj", "up_proj"]}),
        (tiny.gpt2, {"target_modules": ["c_attn"]}, {"target_modules": ["c_attn"]}),
        (tiny.llama, {"target_modules": ["embed_tokens"]}, {"target_modules": ["embed_tokens"]}),
        (
            mixtral,
            {"target_modules": ["q_proj"], "target_parameters": ["mlp.experts.down_proj"], "lora_dropout": 0.0},
            {"target_modules": ["q_proj"], "target_parameters": ["mlp.experts.down_proj"], "lora_dropout": 0.0},
        ),
    ],
)
def test_the_norms_are_those_of_the_weights(
    make: Any, first: dict[str, Any], second: dict[str, Any], tmp_path: Path
) -> None:
    one, two, before, after = pair(tmp_path, make, first, second)
    found = {change.name: change for change in compare_adapters(before, after).layers}
    weights = added(one), added(two)
    names = set(weights[0]) | set(weights[1])
    assert names <= set(found)
    for name in names:
        a, b = (w.get(name, torch.zeros_like(next(x[name] for x in weights if name in x))) for w in weights)
        expected = [float(tensor.detach().norm()) for tensor in (a, b, a - b)]
        assert [found[name].before, found[name].after, found[name].change] == pytest.approx(expected, rel=1e-5)
        assert expected[2] > 0


def test_what_else_differs(tmp_path: Path) -> None:
    *_, before, after = pair(tmp_path, tiny.llama, {}, {"r": 8, "use_dora": True})
    found = compare_adapters(before, after)
    assert (found.before, found.after) == ("org/name@1.0.0", "org/name@1.1.0")
    assert found.config == {"r": (4, None), "use_dora": (None, True)}
    assert found.metrics == {"loss": (1.0, 0.75)}
    assert found.base == {}


def test_a_release_does_not_differ_from_itself(tmp_path: Path) -> None:
    _, _, before, _ = pair(tmp_path, tiny.llama, {}, {})
    found = compare_adapters(before, before)
    assert (found.config, found.base) == ({}, {})
    assert all(change.change < 1e-12 < change.before for change in found.layers)


def test_heads_and_other_tensors_are_compared_as_they_are(tmp_path: Path) -> None:
    lora = {"task_type": "SEQ_CLS", "target_modules": ["query"]}
    one, _, before, after = pair(tmp_path, tiny.bert_classifier, lora, lora)
    with torch.no_grad():
        moved = one.base_model.model.classifier.modules_to_save["default"].weight
        norm = float(moved.norm())
    [head] = [change for change in compare_adapters(before, after).layers if change.name == "classifier.weight"]
    assert (head.before, head.after, head.change) == (pytest.approx(norm), pytest.approx(norm), 0.0)


# -- what they were trained from ---------------------------------------------------------------

SEED = {"seed": 1, "recipe": {"r": 8, "lora_alpha": 32}, "libraries": {"torch": "2.1"}, "parent": "none"}


def test_lineages_are_compared_side_by_side() -> None:
    one = {**SEED, "losses": {"step": [1, 2], "loss": [2.0, 1.0]}, "dataset": {"train": {"rows": 5, "columns": ["a"]}}}
    two = {
        **SEED, "seed": 2, "recipe": {"r": 16, "lora_alpha": 32}, "libraries": {"torch": "2.1", "trl": "1"},
        "losses": {"step": [1, 2], "loss": [2.0, 0.5]}, "dataset": {"train": {"rows": 6, "columns": ["a", "b"]}},
    }  # fmt: skip
    assert compare_lineage(one, one) == {}
    assert compare_lineage(one, two) == {
        "dataset.train.rows": (5, 6),
        "dataset.train.columns": (["a"], ["a", "b"]),
        "recipe.r": (8, 16),
        "seed": (1, 2),
        "libraries.trl": (None, "1"),
        "losses": ("2 of steps 1 to 2, first 2, last 1", "2 of steps 1 to 2, first 2, last 0.5"),
    }


def test_what_one_side_did_not_record_is_said_with_the_reason() -> None:
    script = {"seed": 1, "not_recorded": {"recipe": "a script made it", "dataset.train.id": "not from the Hub"}}
    found = compare_lineage({}, script)
    assert found == {"seed": ("not recorded: the release is older than this record", 1)}
    two = {**SEED, "dataset": {"train": {"id": "org/data"}}}
    found = compare_lineage(script, two)
    assert found["recipe.r"] == ("not recorded: a script made it", 8)
    assert found["dataset.train.id"] == ("not recorded: not from the Hub", "org/data")
    assert found["parent"] == (None, "none")


@pytest.mark.parametrize("odd", [{"dataset": "x"}, {"recipe": [1, {"a": 2}], "not_recorded": 3}, {"losses": 5}])
def test_a_malformed_lineage_can_be_compared(odd: dict[str, Any]) -> None:
    assert compare_lineage(odd, odd) == {}
    assert compare_lineage(odd, SEED)
    assert compare_lineage({}, {}) == {}


def test_diff_prints_lineage_and_metrics_side_by_side(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = adapted(tiny.llama(), seed=1)
    hub = str(tmp_path / "registry")
    for version, seed, loss in (("1.0.0", 1, 0.5), ("1.1.0", 2, 0.25)):
        model.lora_plugins_lineage = {**SEED, "seed": seed, "recipe": {"template": f"\x1b[31m{seed}"}}
        push_adapter(model, "org/name", version=version, hub=hub, base_model="org/base", metrics={"loss": loss})
        with torch.no_grad():
            next(p for name, p in model.named_parameters() if "lora_B" in name).add_(1.0)
    names = ("org/name@1.0.0", "org/name@1.1.0")
    diff(*names, hub=hub, cache_dir=str(tmp_path / "cache"))
    out = capsys.readouterr().out
    assert "metrics: loss 0.5 -> 0.25 (-0.25)" in out
    assert "seed\t1\t2" in out
    assert "recipe.template\t[31m1\t[31m2" in out
    assert "\x1b" not in out
    diff(*names, hub=hub, cache_dir=str(tmp_path / "cache"), as_json=True)
    found = json.loads(capsys.readouterr().out)
    assert found["lineage"]["seed"] == [1, 2]
    assert found["metrics"] == {"loss": [0.5, 0.25]}

"""Records, inner models, encoders, experts and names: what a target means beyond plain decoders."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from lora_plugins import Architecture, prepare_model
from lora_plugins.adapters.prepare import preparation_of
from lora_plugins.commands.cli import program
from lora_plugins.errors import ForbiddenTargets, NoTargets, TargetError, TargetWarning, UnmatchedTargets
from lora_plugins.models.structure import Structure, matches
from lora_plugins.plugins.host import PluginHost, PluginInfo
from lora_plugins.recipe.parser import parse
from lora_plugins.recipe.prepare import lora_arguments
from lora_plugins.targets.peft_names import shortest_names
from lora_plugins.targets.resolution import resolve_targets
from lora_plugins.targets.words import read_words

sys.path.insert(0, str(Path(__file__).parent.parent / "tools"))

import small_models
import tiny


def small(model_type: str, task: str = "", device: str = "meta") -> Any:
    """A small model of a type, from the first mapping that has it or that of a task."""
    case = next(c for c in small_models.cases() if c.model_type == model_type and task in ("", c.task))
    return small_models.build(case, device)


def paths(plan: Any) -> list[str]:
    return [path for hit in plan.hits for path in hit.modules]


# -- encoders beside the language model --------------------------------------------------------


def test_default_and_names_stay_out_of_the_vision_tower() -> None:
    model = small("llava")
    assert any("vision_tower" in path and path.endswith("q_proj") for path in Structure(model).linears)
    for wanted in (None, ["q_proj", "v_proj"], "attention", "all-linear"):
        plan = resolve_targets(model, wanted)
        assert paths(plan)
        assert not any("vision_tower" in path or "projector" in path for path in paths(plan))
    notes = resolve_targets(model, ["q_proj"]).notes
    assert any("'q_proj' is also the name of 4 modules in encoders" in note for note in notes)


def test_vision_tower_is_reached_when_it_is_meant() -> None:
    model = small("llava")
    assert all("vision_tower" in path for path in paths(resolve_targets(model, "vision")))
    path = next(path for path in Structure(model).linears if path.endswith("encoder.layers.0.self_attn.q_proj"))
    longer = resolve_targets(model, [path.removeprefix("model.")], layers_to_transform=0)
    assert len(paths(longer)) == 1
    both = resolve_targets(model, r".*q_proj")
    assert {"vision_tower" in path for path in paths(both)} == {True, False}


def test_inner_model_names_the_targets() -> None:
    host = PluginHost()
    host._architectures.add(
        "llama", PluginInfo("test", "somebody", "1", builtin=False), Architecture("llama", ("o_proj",))
    )
    plan = resolve_targets(small("llava"), host=host)
    assert {path.rpartition(".")[2] for path in paths(plan)} == {"o_proj"}


# -- hybrid stacks -----------------------------------------------------------------------------


def test_names_that_leave_a_kind_of_block_bare_are_loud() -> None:
    model = small("qwen3_next")
    with pytest.warns(TargetWarning, match=r"none of the 3 blocks .*linear_attn"):
        resolve_targets(model, ["q_proj", "v_proj"])
    hit = set(resolve_targets(model).coverage.values())
    assert hit == {(3, 3), (1, 1)}, "the default reaches both kinds"


def test_layer_that_is_read_raw_is_refused_by_name() -> None:
    with pytest.raises(ForbiddenTargets, match="'out_proj' means 4 modules"):
        resolve_targets(small("mamba2"), ["out_proj"])
    plan = resolve_targets(small("jamba"), ["mamba.in_proj", "dt_proj", "q_proj"][::2])
    assert "mamba.dt_proj" in " ".join(plan.bare)


def test_grouped_convolutions_are_left_out_of_records() -> None:
    model = small("regnet")
    plan = resolve_targets(model)
    groups = {model.get_submodule(path).groups for path in paths(plan)}
    assert groups == {1}
    assert any(getattr(module, "groups", 1) > 1 for module in model.modules())


def test_output_layer_of_torchs_attention_is_no_candidate() -> None:
    model = nn.Sequential(*[nn.TransformerEncoderLayer(16, 2, 32) for _ in range(2)])
    plan = resolve_targets(model, "all-linear")
    assert {path.rpartition(".")[2] for path in paths(plan)} == {"linear1", "linear2"}


class Encoder(nn.Module):
    """Torch's own encoder, with its own attention."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.words = nn.Embedding(20, 16)
        layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True, dropout=0.0)
        self.layers = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.out = nn.Linear(16, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.out(self.layers(self.words(x)))  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    ("wanted", "count"),
    [(["self_attn"], 2), (["self_attn", "linear1"], 4), (r".*self_attn", 2), (["layers.1.self_attn"], 1)],
)
@pytest.mark.parametrize("quantization", [None, "int8"])
def test_torchs_attention_is_adapted_where_it_is_named(
    wanted: Any, count: int, quantization: str | None, tmp_path: Path
) -> None:
    from peft import PeftModel

    layers = {"layers_to_transform": [1]} if count == 1 else {}
    wrapped: Any = prepare_model(
        Encoder(), r=2, lora_dropout=0.0, target_modules=wanted, quantization=quantization, **layers
    )
    record = preparation_of(wrapped)
    assert record is not None
    assert record.plan is not None
    assert len(paths(record.plan)) == count
    batch = torch.randint(0, 20, (2, 5))
    wrapped.train()(batch).square().sum().backward()
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if "lora_B" in name:
                assert parameter.grad is not None, name
                assert parameter.grad.any(), name
                parameter += 0.1
    if quantization is not None:
        return
    with torch.no_grad():
        trained = wrapped(batch)
        torch.testing.assert_close(wrapped.eval()(batch), trained)
    wrapped.save_pretrained(tmp_path)
    again: Any = PeftModel.from_pretrained(Encoder(), tmp_path)
    with torch.no_grad():
        # Torch's fast path for evaluation passes plain PEFT's adapters by.
        assert torch.equal(again.train()(batch), trained)


class Perceptron(nn.Module):
    """Linear layers that repeat nowhere."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(8, 16)
        self.gate_in = nn.Linear(16, 16)
        self.last = nn.Linear(16, 2)


def test_all_linear_reaches_layers_outside_of_a_stack() -> None:
    assert resolve_targets(Perceptron(), "all-linear").target_modules == ["first", "gate_in", "last"]
    assert resolve_targets(nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2)), "all-linear").hits
    nested = nn.ModuleDict({"left": Perceptron(), "right": nn.Embedding(3, 4)})
    assert len(paths(resolve_targets(nested, "all-linear"))) == 3
    with pytest.raises(NoTargets, match="Its linear layers: first, gate_in, last"):
        resolve_targets(Perceptron())


def test_scope_that_a_plugin_registers_is_meant_on_the_command_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    host = PluginHost()
    record = Architecture("llama", ("q_proj",), {"narrow": ("down_proj",), "wide": ("up_proj", "gate_proj")})
    host._architectures.add("llama", PluginInfo("test", "somebody", "1", builtin=False), record)
    assert read_words(["narrow"], host) == "narrow"
    assert read_words(["narrow"], PluginHost()) == ["narrow"]
    assert read_words(['["narrow"]'], host) == ["narrow"], "a module of that name is meant"
    assert read_words(["narrow", "q_proj"], host) == ["narrow", "q_proj"]
    assert read_words([], host) is None
    for damaged in ('["narrow"', "[1]", '["q_proj", 3]'):
        with pytest.raises(TargetError, match="must be a JSON list of names"):
            read_words([damaged], host)

    for module in ("words", "resolution"):
        monkeypatch.setattr(f"lora_plugins.targets.{module}.plugin_host", lambda: host)
    small("llama").config.save_pretrained(tmp_path)
    with pytest.raises(SystemExit, match="0"):
        program(["plan", str(tmp_path), "--target-modules", "wide", "--length", "8", "--json"])
    targets = json.loads(capsys.readouterr().out)["targets"]
    assert {target["name"] for target in targets} == {"up_proj", "gate_proj"}
    recipe = parse(["--model", "m", "--dataset", "d", "--target_modules", "wide"])[0]
    assert lora_arguments(recipe)["target_modules"] == "wide"


# -- experts -----------------------------------------------------------------------------------


@pytest.mark.parametrize("model_type", ["mixtral", "qwen3_moe", "gpt_oss"])
def test_policy_is_followed(model_type: str) -> None:
    model = small(model_type)
    none = resolve_targets(model, experts="none")
    routed = resolve_targets(model, experts="routed")
    assert none.target_parameters == []
    assert any("routed experts hold" in note for note in none.notes)
    assert routed.target_parameters == ["experts.down_proj", "experts.gate_up_proj"]
    assert routed.rank_factors == {"experts.gate_up_proj": 2}
    assert routed.target_modules == none.target_modules
    assert not any("routed experts hold" in note for note in routed.notes)
    with pytest.raises(UnmatchedTargets, match="no shared experts"):
        resolve_targets(model, experts="shared")
    with pytest.raises(NoTargets, match="experts='routed' adapts them"):
        resolve_targets(model, "mlp")
    with pytest.raises(UnmatchedTargets, match=r"'gate_up_proj' \(it is a stacked expert parameter"):
        resolve_targets(model, ["gate_up_proj"])


def test_experts_kept_as_layers() -> None:
    model = small("nllb-moe")
    assert not any("expert" in path for path in paths(resolve_targets(model)))
    routed = [path for path in paths(resolve_targets(model, experts="routed")) if "expert" in path]
    assert len(routed) == 2 * 4 * 2, "one block of each stack, four experts of two layers"
    assert not any("router" in path for path in routed)


def test_names_that_peft_would_rewrite_become_parameters(tmp_path: Path) -> None:
    from peft import PeftModel

    model = small("deepseek_v3", device="cpu").eval()
    batch = small_models.inputs(model)
    wrapped: Any = prepare_model(model, r=2, lora_dropout=0.1, target_modules=["o_proj"], experts="shared").eval()
    adapted = {name.partition(".lora_")[0].rpartition("mlp.")[2] for name in wrapped.state_dict() if "lora_A" in name}
    assert {"shared_experts.gate_proj", "shared_experts.up_proj", "shared_experts.down_proj"} <= adapted
    assert not any(name.startswith("experts") for name in adapted), "PEFT would have taken the routed ones"
    nn.init.ones_(
        wrapped.get_parameter(next(n for n, _ in wrapped.named_parameters() if "shared" in n and "lora_B" in n))
    )
    wrapped.save_pretrained(tmp_path)
    again: Any = PeftModel.from_pretrained(small("deepseek_v3", device="cpu").eval(), tmp_path).eval()
    with torch.no_grad():
        assert torch.equal(wrapped(**batch).logits, again(**batch).logits)


# -- records -----------------------------------------------------------------------------------


def test_record_that_fits_nothing_gives_way_to_the_structure() -> None:
    host = PluginHost()
    info = PluginInfo("test", "somebody", "1", builtin=False)
    host._architectures.add("phi3", info, Architecture("phi3", ("other_name",)))
    plan = resolve_targets(small("phi3"), host=host)
    assert plan.source == "the model's structure"
    assert any("other_name, none of which is in Phi3ForCausalLM" in note for note in plan.notes)
    assert plan.target_modules == ["o_proj", "qkv_proj"]


def test_scope_of_a_record() -> None:
    host = PluginHost()
    info = PluginInfo("test", "somebody", "1", builtin=False)
    record = Architecture("llama", ("q_proj",), {"narrow": ("down_proj",)}, never=("o_proj",))
    host._architectures.add("llama", info, record)
    model = small("llama")
    assert resolve_targets(model, "narrow", host=host).target_modules == ["down_proj"]
    assert "o_proj" not in resolve_targets(model, "all-linear", host=host).target_modules
    with pytest.raises(ForbiddenTargets, match="'o_proj'"):
        resolve_targets(model, ["o_proj"], host=host)


def test_decoder_that_stands_alone_may_pass_its_cross_attention_by() -> None:
    assert resolve_targets(small("bart", "causal LM")).unreached == ("encoder_attn",)
    assert resolve_targets(small("bart", "seq2seq LM")).unreached == ()


def test_heads_kept_in_a_list_are_named_one_by_one() -> None:
    class Lists(nn.Module):
        base_model_prefix = "body"

        def __init__(self) -> None:
            super().__init__()
            self.body = nn.Linear(2, 2)
            self.pool = nn.Flatten()
            self.heads = nn.ModuleList([self.pool, nn.Linear(2, 2)])
            self.norm = nn.LayerNorm(2)

    assert Structure(Lists()).task_heads() == ["heads.1"], "PEFT cannot wrap a list, and the norm is no head"


@pytest.mark.parametrize(
    ("model_type", "heads"),
    [
        ("hgnet_v2", ["fc"]),
        ("poolformer", ["classifier"]),
        ("swiftformer", ["head", "dist_head"]),
        ("perceiver", ["perceiver.decoder"]),
        ("deberta", ["pooler", "classifier"]),
        ("xlnet", ["sequence_summary", "logits_proj"]),
    ],
)
def test_heads_of_unusual_classifiers(model_type: str, heads: list[str]) -> None:
    task = (
        "image classification" if model_type in ("hgnet_v2", "poolformer", "swiftformer") else "sequence classification"
    )
    plan = resolve_targets(small(model_type, task))
    assert plan.modules_to_save == heads
    assert not any(path.startswith(tuple(heads)) for path in paths(plan))
    if model_type == "perceiver":
        assert resolve_targets(small(model_type, "image classification")).modules_to_save == heads


def test_modules_that_peft_trains_with_a_head_are_said() -> None:
    notes = resolve_targets(small("modernvbert", "sequence classification")).notes
    assert any(re.search(r"'head' PEFT also trains and saves model\.(vision_model\.)+head", note) for note in notes)


# -- stored adapters and parameters by name ----------------------------------------------------


@pytest.mark.parametrize(
    ("model_type", "wanted"),
    [
        ("llama", {"layers_to_transform": [1]}),
        ("llava", {"target_modules": r".*q_proj"}),
        ("mixtral", {"target_modules": "experts"}),
        ("deepseek_v3", {"target_modules": "all-linear", "experts": "none"}),
    ],
)
def test_stored_adapter_is_read_as_it_is(model_type: str, wanted: dict[str, Any], tmp_path: Path) -> None:
    first: Any = prepare_model(small(model_type, device="cpu"), r=2, lora_dropout=0.0, **wanted)
    first.save_pretrained(tmp_path)
    again: Any = prepare_model(small(model_type, device="cpu"), adapter=tmp_path)
    trained = {name for name, parameter in again.named_parameters() if parameter.requires_grad}
    assert trained == {name for name, parameter in first.named_parameters() if parameter.requires_grad}
    record = preparation_of(again)
    assert record is not None
    assert record.plan is not None
    assert len(set(paths(record.plan))) == len(trained) / 2, "the hit table is that of the adapter"


def test_stored_name_without_match_is_an_error() -> None:
    with pytest.raises(UnmatchedTargets, match="'gone'"):
        resolve_targets(small("llama"), ["q_proj", "gone"], literal=True)


def test_parameters_are_named_one_by_one() -> None:
    model = small("mixtral")
    plan = resolve_targets(model, ["q_proj"], target_parameters=["gate.weight"])
    assert plan.target_parameters == ["gate.weight"]
    assert plan.rank_factors == {}
    with pytest.raises(UnmatchedTargets, match=r"No parameter is called 'gate\.wait'"):
        resolve_targets(model, ["q_proj"], target_parameters=["gate.wait"])


# -- names for PEFT ----------------------------------------------------------------------------

_PART = st.sampled_from(["a", "b", "q", "0", "1"])
_PATHS = st.lists(st.lists(_PART, min_size=1, max_size=4).map(".".join), min_size=1, max_size=12, unique=True)


@given(_PATHS, st.data())
def test_names_mean_the_wanted_paths_and_no_others(existing: list[str], data: st.DataObject) -> None:
    wanted = data.draw(st.lists(st.sampled_from(existing), min_size=1, unique=True))
    names = shortest_names(wanted, existing)
    meant = {path for path in existing if any(matches(path, name) for name in names)}
    # A whole path may be the end of a longer one: that is PEFT's rule, and there is no shorter name for it.
    unavoidable = {path for path in existing if any(path.endswith("." + whole) for whole in wanted)}
    assert set(wanted) <= meant <= set(wanted) | unavoidable


@pytest.mark.parametrize(
    ("asked", "path", "why"),
    [
        ({"target_modules": ["q_proj"]}, "model.layers.*.mlp.up_proj", "not named in target_modules"),
        ({"target_modules": r".*q_proj"}, "model.layers.*.mlp.up_proj", "not matched by the pattern in target_modules"),
        ({"target_modules": "attention"}, "model.layers.*.mlp.up_proj", "not a target of scope 'attention'"),
        ({}, "model.layers.*.self_attn.o_proj", "not a target of the registered architecture 'llama'"),
        ({"exclude_modules": ["v_proj"]}, "model.layers.*.self_attn.v_proj", "left out by exclude_modules"),
        ({"exclude_modules": r".*v_proj"}, "model.layers.*.self_attn.v_proj", "left out by exclude_modules"),
        ({"layers_to_transform": [0]}, "model.layers.*.self_attn.q_proj", "left out by layers_to_transform"),
        ({"modules_to_save": ["lm_head"]}, "lm_head", "named by modules_to_save: trained and saved whole"),
        ({"target_modules": "all-linear"}, "lm_head", "the output layer, which is taken only where it is named"),
        ({}, "model.norm", "of the class LlamaRMSNorm, which takes no adapter"),
        ({}, "model.embed_tokens", "not a linear layer: taken only where it is named"),
    ],
)  # fmt: skip
def test_each_module_without_an_adapter_has_its_reason(asked: dict[str, Any], path: str, why: str) -> None:
    plan = resolve_targets(tiny.llama(), **asked)
    assert [row.why for row in plan.left_out if row.name == path] == [why]
    adapted = {module for hit in plan.hits for module in hit.modules}
    linear = sum(plan.bare.values())
    shown = [row for row in plan.left_out if "which takes no adapter" not in row.why and "not a linear" not in row.why]
    embedding = any(row.name == "model.embed_tokens" for row in shown)
    assert sum(row.modules for row in shown) - embedding == linear
    assert adapted

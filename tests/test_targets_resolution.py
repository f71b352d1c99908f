"""Which modules are chosen, and which wishes are refused: the ways in which runs adapt less than was meant."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from peft import LoraConfig, PeftModel
from peft.tuners import lora as peft_lora
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    GptOssConfig,
    MixtralConfig,
    Phi3Config,
    T5Config,
    T5ForConditionalGeneration,
    WhisperConfig,
    WhisperForConditionalGeneration,
)

from lora_plugins import Architecture, prepare_model
from lora_plugins.errors import NoTargets, TargetError, TargetWarning, UnevenCoverage, UnknownScope, UnmatchedTargets
from lora_plugins.targets.resolution import resolve_targets, task_heads, task_type

LLAMA_LIST = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def meta(config: Any) -> Any:
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config)


# -- the silent cases --------------------------------------------------------------------------


def test_wrong_names_beside_a_right_one_are_all_named() -> None:
    wanted = ["query_key_value", "gate_proj", "q_prooj"]
    with pytest.raises(UnmatchedTargets, match=r"'gate_proj'.*'q_prooj'"):
        resolve_targets(tiny.bloom(), wanted)
    with pytest.warns(TargetWarning, match="gate_proj"):
        plan = resolve_targets(tiny.bloom(), wanted, strict=False)
    assert plan.target_modules == ["query_key_value"]
    assert any("gate_proj" in note for note in plan.notes)


def test_near_misses_are_suggested() -> None:
    with pytest.raises(UnmatchedTargets, match=r"'q_prooj' \(near: .*q_proj"):
        resolve_targets(tiny.llama(), ["q_prooj"])


def test_llamas_list_on_phi3_is_refused() -> None:
    config = Phi3Config(
        vocab_size=96, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, pad_token_id=0
    )  # fmt: skip
    with pytest.raises(UnmatchedTargets, match=r"'q_proj' \(near: .*qkv_proj.*'gate_proj' \(near: .*gate_up_proj"):
        resolve_targets(meta(config), LLAMA_LIST)


def test_experts_left_frozen_are_said() -> None:
    config = GptOssConfig(
        vocab_size=96, hidden_size=64, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=16, num_local_experts=4,
    )  # fmt: skip
    with pytest.warns(TargetWarning, match=r"routed experts hold .* and get no adapter"):
        plan = resolve_targets(meta(config), "all-linear")
    silent = resolve_targets(meta(config), "all-linear", experts="none")
    assert silent.target_modules == plan.target_modules
    assert any("routed experts hold" in note and "get no adapter" in note for note in plan.notes)
    assert not any("router" in path for hit in plan.hits for path in hit.modules)
    assert not plan.target_parameters
    routed = resolve_targets(meta(config), "all-linear", experts="routed")
    assert sorted(routed.target_parameters) == ["experts.down_proj", "experts.gate_up_proj"]


def test_pattern_that_reaches_some_blocks_is_refused() -> None:
    with pytest.raises(UnevenCoverage, match="reaches 1 of the 4 blocks"):
        resolve_targets(tiny.llama(layers=4), r".*layers\.1\..*q_proj")
    plan = resolve_targets(tiny.llama(layers=4), ["q_proj"], layers_to_transform=[1])
    assert plan.target_modules == ["model.layers.1.self_attn.q_proj"]
    assert plan.coverage == {"LlamaDecoderLayer in model.layers": (1, 4)}


# -- scopes and patterns -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("scope", "names"),
    [
        (None, ["q_proj", "v_proj"]),
        ("attention", ["k_proj", "o_proj", "q_proj", "v_proj"]),
        ("mlp", ["down_proj", "gate_proj", "up_proj"]),
        ("all-linear", sorted(LLAMA_LIST)),
        (r".*\.(up|down)_proj", ["down_proj", "up_proj"]),
    ],
)
def test_scopes(scope: str | None, names: list[str]) -> None:
    plan = resolve_targets(tiny.llama(), scope)
    assert plan.target_modules == names
    assert plan.task_type == "CAUSAL_LM"
    assert set(plan.coverage.values()) == {(2, 2)}
    assert "lm_head" in plan.bare


def test_scope_that_is_none_suggests_one() -> None:
    with pytest.raises(UnknownScope, match="Did you mean 'attention'"):
        resolve_targets(tiny.llama(), "atention")
    with pytest.raises(UnknownScope, match=r"For a module name write \['q_proj'\]"):
        resolve_targets(tiny.llama(), "q_proj")
    with pytest.raises(TargetError, match="not a valid regular expression"):
        resolve_targets(tiny.llama(), "*q_proj")
    with pytest.raises(TargetError, match="experts must be"):
        resolve_targets(tiny.llama(), experts="all")


def test_excluded_modules_are_left_out() -> None:
    plan = resolve_targets(tiny.llama(), "attention", exclude_modules=["o_proj"])
    assert plan.target_modules == ["k_proj", "q_proj", "v_proj"]
    plan = resolve_targets(tiny.llama(), "attention", exclude_modules=r".*layers\.0.*")
    assert all("layers.1" in name for name in plan.target_modules)


def test_short_names_are_used_only_where_they_mean_nothing_else() -> None:
    assert resolve_targets(tiny.gpt2(), ["attn.c_proj"]).target_modules == ["attn.c_proj"]
    assert resolve_targets(tiny.gpt2(), ["c_proj"]).target_modules == ["c_proj"]
    plan = resolve_targets(tiny.gpt2(), ["attn.c_proj"], layers_to_transform=1)
    assert plan.target_modules == ["transformer.h.1.attn.c_proj"]


def test_user_may_name_embeddings_and_heads() -> None:
    wrapped = prepare_model(tiny.llama(), r=4, target_modules=["q_proj", "embed_tokens", "lm_head"])
    names = {name.rpartition(".lora_")[0] for name, p in wrapped.named_parameters() if p.requires_grad}
    assert {name.rpartition(".")[2] for name in names} == {"q_proj", "embed_tokens", "lm_head"}


# -- models nobody registered ------------------------------------------------------------------


class Mixer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fused_attention_in = nn.Linear(32, 96)
        self.fused_attention_out = nn.Linear(32, 32)
        self.widen = nn.Linear(32, 64)
        self.narrow = nn.Linear(64, 32)
        self.router = nn.Linear(32, 4)


class Unknown(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(10, 32)
        self.tower = nn.ModuleList(Mixer() for _ in range(3))
        self.out = nn.Linear(32, 10)


def test_structure_is_read_and_said() -> None:
    plan = resolve_targets(Unknown())
    assert plan.source == "the model's structure"
    assert plan.target_modules == ["fused_attention_in", "fused_attention_out"]
    assert any("not registered" in note and "6 attention layers in 3 blocks" in note for note in plan.notes)
    assert plan.coverage == {"Mixer in tower": (3, 3)}
    everything = resolve_targets(Unknown(), "all-linear").target_modules
    assert everything == ["fused_attention_in", "fused_attention_out", "narrow", "widen"]


def test_model_without_linears_is_refused() -> None:
    with pytest.raises(NoTargets, match="Its linear layers: none"):
        resolve_targets(nn.Sequential(nn.LayerNorm(4), nn.ReLU()))


def test_registered_architecture_wins_over_the_structure() -> None:
    from lora_plugins.plugins.host import PluginHost, PluginInfo

    host = PluginHost()
    info = PluginInfo("test", "somebody", "1", builtin=False)
    host._architectures.add("llama", info, Architecture("llama", ("o_proj",)))
    plan = resolve_targets(tiny.llama(), host=host)
    assert plan.target_modules == ["o_proj"]
    assert "'llama'" in plan.source


def test_layers_of_a_state_space_mixer_that_are_read_raw_are_left_alone() -> None:
    from transformers import MambaConfig, MambaForCausalLM

    model = MambaForCausalLM(MambaConfig(vocab_size=96, hidden_size=32, num_hidden_layers=2, state_size=4))
    assert resolve_targets(model).target_modules == ["in_proj"]
    wrapped = prepare_model(model, r=4, target_modules="all-linear")
    ids = torch.arange(1, 9)[None]
    wrapped(input_ids=ids, labels=ids).loss.backward()
    assert all(p.grad is not None and p.grad.any() for n, p in wrapped.named_parameters() if "lora_B" in n)


# -- tasks and heads ---------------------------------------------------------------------------


def test_tasks_and_heads() -> None:
    assert (task_type(tiny.bert_classifier()), task_heads(tiny.bert_classifier())) == ("SEQ_CLS", ["classifier"])
    assert (task_type(tiny.llama()), task_heads(tiny.llama())) == ("CAUSAL_LM", [])
    t5 = T5ForConditionalGeneration(T5Config(vocab_size=96, d_model=32, d_ff=64, d_kv=8, num_layers=2, num_heads=4))
    assert task_type(t5) == "SEQ_2_SEQ_LM"
    plan = resolve_targets(t5)
    assert plan.target_modules == ["q", "v"]
    assert set(plan.coverage.values()) == {(2, 2)}
    small = {"d_model": 32, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 4}
    whisper = WhisperForConditionalGeneration(
        WhisperConfig(**small, decoder_attention_heads=4, encoder_ffn_dim=64, decoder_ffn_dim=64)
    )
    assert task_type(whisper) is None, "PEFT's wrapper would pass input_ids to it"


# -- experts -----------------------------------------------------------------------------------


def test_dropout_reaches_experts_and_the_saved_file_loads_in_peft() -> None:
    from peft.tuners.lora.layer import Linear, ParamWrapper

    config = MixtralConfig(
        vocab_size=96, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, num_local_experts=4,
    )  # fmt: skip
    model = prepare_model(
        AutoModelForCausalLM.from_config(config), r=4, lora_dropout=0.1, target_modules="all-linear", experts="routed"
    )
    assert model.peft_config["default"].lora_dropout == 0.0, "what plain PEFT can load"
    linears = [m for m in model.modules() if isinstance(m, Linear)]
    wrappers = [m for m in model.modules() if isinstance(m, ParamWrapper)]
    assert len(wrappers) == 4
    assert all(m.lora_dropout["default"].p == 0.1 for m in linears)
    assert all(m.lora_dropout["default"].p == 0.1 for m in wrappers), "our experts function computes them"
    from lora_plugins.adapters.report import make_report

    assert any("the saved configuration says 0" in note for note in make_report(model).notes)


# -- what peers' own tests found ---------------------------------------------------------------


class _Tied(nn.Module):
    """A language model that is not transformers' and ties its heads to its embedding."""

    def __init__(self, heads: tuple[str, ...], blocks: int) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(32, 16)
        if blocks:
            self.layers = nn.ModuleList(nn.ModuleDict({"linear": nn.Linear(16, 16)}) for _ in range(blocks))
        else:
            self.linear = nn.Linear(16, 16)
        for name in heads:
            setattr(self, name, nn.Linear(16, 32, bias=False))
            getattr(self, name).weight = self.embed_tokens.weight


@pytest.mark.parametrize(
    ("wanted", "heads", "blocks"),
    [
        ("all-linear", ("lm_head",), 0),
        ("all-linear", ("decode",), 0),
        ("all-linear", ("lm_head", "second_head"), 0),
        ("mlp", ("lm_head",), 2),
        (None, ("lm_head",), 2),
    ],
)
def test_scopes_leave_a_tied_head_alone_in_classes_that_name_no_output_embedding(
    wanted: str | None, heads: tuple[str, ...], blocks: int
) -> None:
    assert resolve_targets(_Tied(heads, blocks), wanted).target_modules == ["linear"]


def test_an_untied_layer_beside_an_embedding_is_in_the_scope_of_all_linear() -> None:
    model = _Tied((), 0)
    model.lm_head = nn.Linear(16, 32, bias=False)
    assert sorted(resolve_targets(model, "all-linear").target_modules) == ["linear", "lm_head"]


def test_a_head_that_was_named_as_target_is_said_to_be_trained_whole() -> None:
    with pytest.raises(UnmatchedTargets, match=r"'classifier' \(a head, which is trained whole, without an adapter\)"):
        resolve_targets(tiny.bert_classifier(), ["classifier"])


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("input_layernorm", "a LlamaRMSNorm, which takes no adapter"),
        ("self_attn", "a LlamaAttention, which takes no adapter"),
        ("layers.1", "a LlamaDecoderLayer, which takes no adapter"),
    ],
)
def test_a_target_that_exists_and_takes_no_adapter_is_not_called_unknown(name: str, why: str) -> None:
    with pytest.raises(UnmatchedTargets, match=rf"'{name}' \({why}\)"):
        resolve_targets(tiny.llama(), [name])


def full_paths(layers: range) -> list[str]:
    return [f"model.layers.{index}.self_attn.{name}" for index in layers for name in ("q_proj", "v_proj")]


@pytest.mark.parametrize(
    "names",
    [
        full_paths(range(4)),
        [f"{index}.self_attn.q_proj" for index in range(4)],
        [*full_paths(range(2)), "layers.2.self_attn.q_proj", "3.self_attn.q_proj", *full_paths(range(2, 4))[1::2]],
    ],
)
def test_names_with_numbers_that_together_reach_every_block_are_even(names: list[str]) -> None:
    plan = resolve_targets(tiny.llama(layers=4), names)
    assert plan.coverage == {"LlamaDecoderLayer in model.layers": (4, 4)}
    assert sorted(path for hit in plan.hits for path in hit.modules) == sorted(
        path for path, _ in tiny.llama(layers=4).named_modules() if path.endswith(tuple(names))
    )


def test_parameters_with_numbers_that_together_reach_every_block_are_even() -> None:
    config = GptOssConfig(
        vocab_size=96, hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, num_local_experts=4, num_experts_per_tok=2, pad_token_id=0,
    )  # fmt: skip
    names = ["0.mlp.experts.down_proj", "1.mlp.experts.down_proj"]
    plan = resolve_targets(meta(config), [], target_parameters=names)
    assert plan.fields["target_parameters"] == names


def test_names_with_numbers_that_leave_out_a_block_are_uneven() -> None:
    with pytest.raises(UnevenCoverage, match=r"reaches 3 of the 4 blocks .*strict=False"):
        resolve_targets(tiny.llama(layers=4), full_paths(range(3)))


class _Mixed(nn.Module):
    """Two blocks, the first of which alone has a second expert."""

    def __init__(self) -> None:
        super().__init__()
        experts = [nn.ModuleList(nn.ModuleDict({"w1": nn.Linear(16, 16)}) for _ in range(count)) for count in (2, 1)]
        self.layers = nn.ModuleList(nn.ModuleDict({"ff": part, "out": nn.Linear(16, 16)}) for part in experts)


def test_a_number_that_is_not_the_blocks_is_part_of_the_name() -> None:
    with pytest.raises(UnevenCoverage, match=r"'1\.w1' reaches 1 of the 2 blocks"):
        resolve_targets(_Mixed(), ["out", "1.w1"])


def moe(**fields: Any) -> MixtralConfig:
    return MixtralConfig(
        vocab_size=96, hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, num_local_experts=4, num_experts_per_tok=2, pad_token_id=0, **fields,
    )  # fmt: skip


@pytest.mark.parametrize(
    "names", [["experts.down_proj"], ["gate.weight"], ["experts.down_proj", "experts.gate_up_proj"]]
)
def test_parameters_alone_bring_no_default_modules(names: list[str]) -> None:
    plan = resolve_targets(meta(moe()), target_parameters=names)
    assert plan.target_modules == []
    assert {hit.name for hit in plan.hits} == set(names)


def test_parameters_of_a_configuration_are_all_that_is_adapted() -> None:
    config = LoraConfig(target_parameters=["experts.down_proj"], lora_dropout=0.0)
    model = prepare_model(AutoModelForCausalLM.from_config(moe()), peft_config=config)
    trained = [name for name, value in model.named_parameters() if value.requires_grad]
    assert trained
    assert [name for name in trained if "experts" not in name] == []
    assert not model.peft_config["default"].target_modules
    assert set(model.peft_config["default"].target_parameters) == {"experts.down_proj"}


def test_parameters_beside_a_scope_are_added_to_it() -> None:
    plan = resolve_targets(meta(moe()), "attention", target_parameters=["experts.down_proj"])
    assert "q_proj" in plan.target_modules


# -- the user's own LoRA layers ----------------------------------------------------------------


class Scaled(nn.Module):
    """A layer that multiplies with a matrix, and is not a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.in_features = self.out_features = 8
        self.weight = nn.Parameter(torch.randn(8, 8))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.linear(x, self.weight)


class Louder(Scaled):
    """A subclass of a registered class."""


class Recurrent(nn.GRU):
    """A layer without ``in_features``."""


class OwnLora(peft_lora.Linear):
    """The user's LoRA layer for `Scaled`."""


class RecurrentLora(nn.Module, peft_lora.LoraLayer):
    """The user's LoRA layer over a layer that PEFT cannot measure; it adapts nothing."""

    def __init__(self, base_layer: nn.Module, adapter_name: str, **kwargs: Any) -> None:
        super().__init__()
        peft_lora.LoraLayer.__init__(self, base_layer, **kwargs)
        self.lora_A[adapter_name] = nn.Linear(8, 2, bias=False)
        self._active_adapter = adapter_name


class Blocks(nn.Module):
    """Two blocks, each with one layer of the class and one linear layer."""

    def __init__(self, kind: type[nn.Module], *args: Any) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.ModuleDict({"own": kind(*args), "linear": nn.Linear(8, 8)}) for _ in range(2))


def own_config(kind: type[nn.Module], layer: type[nn.Module], **fields: Any) -> LoraConfig:
    config = LoraConfig(r=2, **fields)
    config._register_custom_module({kind: layer})
    return config


@pytest.mark.parametrize(
    ("model", "config"),
    [
        (Blocks(Scaled), own_config(Scaled, OwnLora, target_modules=["own"])),
        (Blocks(Louder), own_config(Scaled, OwnLora, target_modules=["own", "linear"])),
        (Blocks(Scaled), own_config(Scaled, OwnLora, target_modules=r"blocks\.\d\.own")),
        (Blocks(Scaled), own_config(Scaled, OwnLora, target_modules=["own"], layers_to_transform=[0, 1])),
        (Blocks(Recurrent, 8, 8), own_config(nn.GRU, RecurrentLora, target_modules=["own"])),
    ],
    ids=["name", "subclass", "pattern", "layers", "no-sizes"],
)  # fmt: skip
@pytest.mark.filterwarnings("ignore:Unsupported layer type:UserWarning")
def test_a_layer_with_a_lora_layer_of_the_users_own_gets_it(model: nn.Module, config: LoraConfig) -> None:
    prepared = prepare_model(model, peft_config=config)
    layers = [module for path, module in prepared.named_modules() if path.endswith(".own")]
    assert len(layers) == 2
    assert all(isinstance(layer, (OwnLora, RecurrentLora)) for layer in layers)
    assert any(p.requires_grad and ".own." in name for name, p in prepared.named_parameters())


def test_a_class_that_nobody_registered_stays_refused() -> None:
    with pytest.raises(UnmatchedTargets, match="a Scaled, which takes no adapter"):
        prepare_model(Blocks(Scaled), peft_config=LoraConfig(r=2, target_modules=["own", "linear"]))


def test_a_lora_layer_of_the_users_own_leaves_scopes_as_they_are() -> None:
    prepared = prepare_model(Blocks(Scaled), peft_config=own_config(Scaled, OwnLora, target_modules="all-linear"))
    assert not any(isinstance(module, OwnLora) for module in prepared.modules())


# -- attention of torch, and linears outside of blocks -----------------------------------------


class Attending(nn.Module):
    """Two blocks with torch's own attention."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(
            nn.ModuleDict({"attn": nn.MultiheadAttention(16, 2, batch_first=True), "mlp": nn.Linear(16, 16)})
            for _ in range(2)
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = x + block["mlp"](block["attn"](x, x, x, need_weights=False)[0])
        return x


class Flat(nn.Module):
    """Linear layers that are in no repeated block."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.then = nn.Linear(16, 16), nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 16))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.then(self.first(x))


@pytest.mark.parametrize(
    ("kind", "targets", "count"),
    [
        (Attending, ["attn"], 2),
        (Attending, ["attn", "mlp"], 4),
        (Attending, r"blocks\.\d\.attn", 2),
        (Flat, "all-linear", 3),
        (Flat, ["first"], 1),
    ],
    ids=["name", "beside-linears", "pattern", "outside-of-blocks", "one-outside"],
)
def test_what_peft_can_adapt_is_adapted_and_comes_back(
    tmp_path: Path, kind: type[nn.Module], targets: Any, count: int
) -> None:
    torch.manual_seed(0)
    base = kind().eval()
    x = torch.randn(2, 3, 16)
    before = base(x)
    prepared = prepare_model(copy.deepcopy(base), r=2, target_modules=targets, lora_dropout=0.0).eval()
    adapted = [
        m for m in prepared.modules() if isinstance(m, peft_lora.LoraLayer) and "default" in getattr(m, "lora_A", {})
    ]
    assert len(adapted) >= count
    with torch.no_grad():
        for name, parameter in prepared.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.05)
    prepared.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path).eval()
    assert not torch.allclose(prepared(x), before, atol=1e-3)
    torch.testing.assert_close(again(x), prepared(x), rtol=1e-4, atol=1e-4)

"""`plan`: published counts, sources, file sizes, devices, advice, the command."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from test_numbers import CASES, bloom
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    LlamaConfig,
    MixtralConfig,
    PreTrainedConfig,
    T5Config,
    Trainer,
    TrainingArguments,
)

from lora_plugins import plan, prepare_model
from lora_plugins.commands.cli import main
from lora_plugins.errors import PlanError, UnevenCoverage, UnmatchedTargets
from lora_plugins.planning.advice import Scenario, nearest_change
from lora_plugins.planning.amounts import parse_memory, show_bytes
from lora_plugins.planning.layers import weight_bytes
from lora_plugins.planning.optimizer import RULES, optimizer_bytes
from lora_plugins.planning.sharing import Memory, Parts, per_device
from lora_plugins.plugins.host import plugin_host
from lora_plugins.plugins.types import Quantizer
from lora_plugins.quantization.counting import count_parameters, tensor_bytes
from lora_plugins.quantization.request import Quantization, parse_quantization

SMALL: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


def llama(**fields: Any) -> LlamaConfig:
    return LlamaConfig(**{**SMALL, **fields})


@pytest.mark.parametrize("quantization", [None, "int8"])
def test_a_plan_says_nothing_of_names_that_transformers_has_changed(quantization: str | None) -> None:
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        planned = plan(llama(), quantization=quantization, length=8, gradient_checkpointing=True)
    assert {row.checkpointing for row in planned.rows} == {False, True}
    assert [str(warning.message) for warning in said if warning.category is FutureWarning] == []


# -- published figures -------------------------------------------------------------------------


@pytest.mark.parametrize("name", CASES)
def test_published_counts(name: str) -> None:
    make, lora, trainable, total = CASES[name]
    planned = plan(make(), dtype="bfloat16", length=16, **lora)
    assert planned.trainable == trainable
    if total:
        assert planned.total == total


def test_mixtral_experts() -> None:
    planned = plan(MixtralConfig(), dtype="bfloat16", target_modules="all-linear", experts="routed", length=16)
    assert planned.trainable == 178_782_208
    assert planned.total - planned.trainable == 46_702_792_704
    assert planned.expert_share == pytest.approx(0.966, abs=5e-4)
    int8 = next(row for row in planned.rows if row.quantization == "int8")
    assert int8.quantized_share == pytest.approx(0.994, abs=5e-4)
    assert int8.memory.weights < 48 * 2**30
    assert int8.memory.weights == pytest.approx(46_702_792_704 + 4 * 178_782_208, rel=0.03)
    assert "in stacked experts" in str(planned)
    without = next(row for row in planned.rows if row.quantization == "int8-hqq")
    assert without.quantized_share == pytest.approx(0.029, abs=5e-4), "it has no format for stacked experts"
    assert "int8-hqq" in planned.float_experts
    assert any("reaches every routed expert" in note for note in planned.notes)
    # One float expert of the first projection at a time, and not the stack of 8.
    assert 28672 * 4096 * 2 < int8.memory.activations < 5 * 28672 * 4096 * 2


def test_mixtral_with_its_routers_is_pefts_own_figure() -> None:
    """PEFT's "all-linear" trains the routers as well; here they are named, as parameters."""
    planned = plan(
        MixtralConfig(),
        dtype="bfloat16",
        target_modules="all-linear",
        experts="routed",
        target_parameters=["gate.weight"],
        quantization="int8",
        length=16,
    )
    assert planned.trainable == 179_832_832
    assert planned.total - planned.trainable == 46_702_792_704
    assert [row.modules for row in planned.targets if row.name == "gate.weight"] == [32]


def test_int8_bytes_of_bloom_7b1() -> None:
    """8,098,234,368 is the published figure; it has neither the scales nor the adapters."""
    scales = 30 * 4 * (12288 + 4096 + 16384 + 4096)
    adapters = 4 * 3_932_160
    planned = plan(bloom(4096, 30, 32), dtype="float16", quantization="int8", length=16, device="cuda")
    assert planned.chosen.memory.weights - scales - adapters == 8_098_234_368
    upcast = plan(bloom(4096, 30, 32), dtype="float16", quantization="int8", upcast="all", length=16)
    # The biases of quantized layers stay as they are.
    biases = 30 * 2 * (12288 + 4096 + 16384 + 4096)
    assert upcast.chosen.memory.weights - scales - adapters == 10_156_670_976 - biases


# -- counts and files, against the real thing --------------------------------------------------


@pytest.mark.parametrize(
    ("make", "lora"),
    [
        (tiny.llama, {}),
        (tiny.bloom, {"r": 4, "use_dora": True}),
        (tiny.gpt2, {"target_modules": "all-linear"}),
        (tiny.bert_classifier, {}),
        (tiny.llama, {"target_modules": ["embed_tokens", "q_proj"]}),
        (tiny.llama, {"modules_to_save": ["lm_head"], "init_lora_weights": "pissa"}),
    ],
)
def test_counts_bytes_and_file_are_those_of_the_prepared_model(
    make: Callable[[], Any], lora: dict[str, Any], tmp_path: Path
) -> None:
    planned = plan(make(), length=8, **lora)
    real: Any = prepare_model(make(), **lora)
    count = count_parameters(real)
    assert (planned.trainable, planned.total) == (count.trainable, count.total)
    assert planned.chosen.memory.weights == tensor_bytes(real).total
    real.save_pretrained(tmp_path)
    assert planned.adapter_bytes == (tmp_path / "adapter_model.safetensors").stat().st_size


def test_arguments_reach_the_targets() -> None:
    planned = plan(llama(), target_modules=["q_proj"], layers_to_transform=[1], length=8)
    assert [(target.name, target.modules) for target in planned.targets] == [("q_proj", 1)]
    assert planned.coverage == {"LlamaDecoderLayer in model.layers": [1, 2]}
    with pytest.raises(UnmatchedTargets, match="'q_prooj'"):
        plan(llama(), target_modules=["q_proj", "q_prooj"])
    with pytest.raises(UnevenCoverage):
        plan(llama(), target_modules=["layers.0.self_attn.q_proj"])


# -- sources -----------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with a configuration and no weights."""
    config = llama(architectures=["LlamaForCausalLM"], dtype="bfloat16")
    config.save_pretrained(tmp_path / "base")
    return tmp_path / "base"


def test_every_source_gives_the_same_plan(folder: Path) -> None:
    live = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder), dtype=torch.bfloat16)
    mapping = json.loads((folder / "config.json").read_text())
    sources: list[Any] = [folder, str(folder), folder / "config.json", mapping, live, live.config]
    plans = [plan(source, length=8).to_dict() for source in sources]
    assert all(made == plans[0] for made in plans)
    assert plans[0]["dtype"] == "bfloat16"


def test_hub_id(folder: Path, loopback_hub: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "ENDPOINT", loopback_hub.endpoint)
    monkeypatch.setattr(
        constants, "HUGGINGFACE_CO_URL_TEMPLATE", loopback_hub.endpoint + "/{repo_id}/resolve/{revision}/{filename}"
    )
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    loopback_hub.create_repo("org/base")
    loopback_hub.commit("org/base", {"config.json": (folder / "config.json").read_bytes()})
    assert plan("org/base", length=8).to_dict() == plan(folder, length=8).to_dict()


def test_live_model_stays_as_it_is() -> None:
    model = tiny.llama()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    flags = [p.requires_grad for p in model.parameters()]
    planned = plan(model, quantization="int8", length=8)
    assert planned.chosen.quantization == "int8"
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert [p.requires_grad for p in model.parameters()] == flags
    assert model.config.use_cache
    assert isinstance(model.model.layers[0].self_attn.q_proj, nn.Linear)


@pytest.mark.parametrize("backend", ["int8", "nf4"])
def test_model_that_arrives_quantized_or_prepared(backend: str) -> None:
    from lora_plugins.quantization.walk import quantize_in_place

    fresh = plan(tiny.llama(), quantization=backend, compute_dtype="float32", length=8)
    model = tiny.llama()
    parsed = parse_quantization(backend)
    assert parsed is not None
    quantize_in_place(model, parsed)
    arrived = plan(model, compute_dtype="float32", length=8)
    prepared = plan(prepare_model(tiny.llama(), quantization=backend, compute_dtype="float32"), length=8)
    assert arrived.chosen.memory == prepared.chosen.memory == fresh.chosen.memory
    assert (prepared.trainable, prepared.total, prepared.adapter_bytes) == (
        fresh.trainable,
        fresh.total,
        fresh.adapter_bytes,
    )
    assert sum(target.modules for target in prepared.targets) == 4
    with pytest.raises(PlanError, match="has its adapters already"):
        plan(prepare_model(tiny.llama()), r=4)


@pytest.mark.parametrize(
    ("source", "fields", "message"),
    [
        ("no/such-model", {}, "No configuration for 'no/such-model'"),
        (7, {}, "plan\\(\\) takes a model"),
        ({"hidden_size": 3}, {}, "names no model_type"),
        ({"model_type": "llamma"}, {}, "cannot read the mapping"),
        (llama(), {"task": "causal-ml"}, "Did you mean 'causal-lm'"),
        (llama(), {"task": "image-classification"}, "no model for image-classification of type 'llama'"),
        (llama(), {"dtype": "int8"}, "must be a float dtype"),
        (llama(), {"optim": "adamw_toch"}, "Did you mean 'adamw_torch'"),
        (llama(), {"memory": "much"}, "not an amount of memory"),
        (llama(), {"strategy": "zero9"}, "Unknown strategy 'zero9'"),
        (llama(), {"strategy": "single", "devices": 2}, "devices=2 makes no sense"),
        (llama(), {"batch_size": 0}, "make no batch"),
    ],
)
def test_what_has_no_meaning_is_refused(source: Any, fields: dict[str, Any], message: str) -> None:
    with pytest.raises(PlanError, match=message):
        plan(source, **fields)


def test_broken_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(PlanError, match="is not a configuration file"):
        plan(tmp_path / "config.json")


def test_task_decides_about_the_head() -> None:
    planned = plan(llama(num_labels=3), task="sequence-classification", length=8)
    assert planned.model == "LlamaForSequenceClassification"
    assert planned.heads == ["score"]
    assert planned.trainable == 2 * 8 * (32 + 32 + 32 + 16) + 3 * 32


# -- bytes of backends -------------------------------------------------------------------------


class Halves(Quantizer):
    """Keeps a layer's weight as two bytes for each value and says nothing about its size."""

    name = "halves"
    bits = 16

    def available(self, device: torch.device, dtype: torch.dtype, options: Mapping[str, Any]) -> str | None:
        return options.get("reason")

    def quantize_linear(self, linear: nn.Linear, options: Mapping[str, Any]) -> nn.Module:
        linear.weight = nn.Parameter(linear.weight.data.half(), requires_grad=False)
        linear.register_buffer("scale", torch.ones(linear.out_features, 1))
        linear.register_buffer("table", torch.ones(5))
        return linear

    def owns(self, module: nn.Module) -> bool:
        return hasattr(module, "table")

    def dequantize(self, module: Any) -> torch.Tensor:
        return module.weight.float()


def test_backend_that_says_nothing_is_measured() -> None:
    size = weight_bytes(Quantization(Halves(), {}), 96, 1000, torch.float32)
    assert size == 2 * 96 * 1000 + 4 * 1000 + 4 * 5
    unusable = Quantization(Halves(), {"reason": "not here"})
    assert weight_bytes(unusable, 96, 1000, torch.float32) == 2 * 96 * 1000


def test_unusable_backend_is_shown_as_such() -> None:
    planned = plan(llama(), quantization=Halves(), length=8)
    assert planned.chosen.quantization == "halves"
    assert planned.chosen.unavailable == ""
    planned = plan(llama(), quantization=Unusable(), length=8)
    assert planned.chosen.unavailable == "needs another machine"
    assert "unusable *" in str(planned)
    assert "needs another machine" in str(planned)


class Unusable(Halves):
    name = "unusable"

    def available(self, device: torch.device, dtype: torch.dtype, options: Mapping[str, Any]) -> str | None:
        return "needs another machine"


@pytest.mark.parametrize("shape", [(576, 192), (64, 3), (1536, 64)])
@pytest.mark.parametrize("name", plugin_host().quantizer_names())
def test_bytes_of_a_layer_are_those_of_a_real_one(name: str, shape: tuple[int, int]) -> None:
    parsed = parse_quantization(name)
    assert parsed is not None
    if parsed.quantizer.available(torch.device("cpu"), torch.bfloat16, parsed.options):
        pytest.skip("cannot run here")
    if parsed.quantizer.unsuitable(*shape, parsed.options):
        pytest.skip("takes no such shape")
    linear = nn.Linear(*shape, bias=False, dtype=torch.bfloat16).requires_grad_(False)
    layer = parsed.quantizer.quantize_linear(linear, parsed.options)
    assert weight_bytes(parsed, *shape, torch.bfloat16) == tensor_bytes(layer).total


def test_double_quantization() -> None:
    parsed = parse_quantization({"name": "nf4", "double_quant": True})
    assert parsed is not None
    layer = parsed.quantizer.quantize_linear(nn.Linear(576, 192, bias=False), parsed.options)
    assert weight_bytes(parsed, 576, 192, torch.float32) == tensor_bytes(layer).total


# -- optimizers --------------------------------------------------------------------------------


@pytest.mark.parametrize("optim", RULES)
def test_state_of_optimizers(optim: str, tmp_path: Path) -> None:
    shapes = ((8, 1024), (1024, 8), (7, 3), (5000,), (2, 8, 700))
    parameters = [nn.Parameter(torch.randn(shape)) for shape in shapes]
    arguments = TrainingArguments(output_dir=str(tmp_path), optim=optim, use_cpu=True)
    make, options = Trainer.get_optimizer_cls_and_kwargs(arguments, None)
    optimizer = make(parameters, **options)
    for parameter in parameters:
        parameter.grad = torch.randn_like(parameter)
    optimizer.step()
    held = {
        value.untyped_storage().data_ptr(): value.nbytes
        for state in optimizer.state.values()
        for value in state.values()
        if isinstance(value, torch.Tensor)
    }
    assert optimizer_bytes(optim, parameters) == sum(held.values())


# -- devices and advice ------------------------------------------------------------------------


def test_shares_of_devices() -> None:
    trained = [((6, 10), 4), ((5,), 4)]
    frozen = [((40, 10), 2)]
    alone = Memory(weights=260 + 800 + 500, gradients=260, optimizer=520 + 8, activations=50)
    parts = Parts(alone, [*frozen, *trained], trained, block=60, outside=80, optim="adamw_torch", packed=400)
    assert per_device(parts, "single", 1) == alone
    assert per_device(parts, "ddp", 4) == Memory(1560, 260, 528, 50, 260)
    # Rows: 10 of 40, 2 of 6, 2 of 5; quantized layers stay whole.
    rows = 2 * 10 + 2
    assert per_device(parts, "fsdp", 4) == Memory(500 + 200 + 4 * rows, 4 * rows, 8 * rows + 8, 50, 200)
    # 65 trained values in parts of 18, which the optimizer copies in float32; one step counter.
    bucket = 4 * 500_000_000
    assert per_device(parts, "zero2", 4) == Memory(1560, 72, 72 + 2 * 72 + 4, 50, bucket)
    # 15 and 2 values of the trained ones; the quantized parameters are divided, what is beside them is not.
    found = per_device(replace(parts, copied=300), "zero3", 4)
    assert found == Memory(100 + 100 + 200 + 4 * 17 + 300, 68, 68 + 2 * 68 + 4, 50, 800 + 260 + 400 + bucket)
    assert all(per_device(parts, name, 1) == alone for name in ("ddp", "zero2", "zero3", "fsdp"))


def test_layers_that_are_divided_whole_are_shared_by_bytes() -> None:
    alone = Memory(weights=80 + 90 + 200, gradients=0, optimizer=0, activations=50)
    parts = Parts(
        alone, [((40,), 2)], [], block=20, outside=40, optim="sgd", flat=[96, 110], flat_block=110, unflat=200
    )
    # Padding makes the flat parameters larger than the tensors in them; 90 bytes are neither float nor flat.
    assert per_device(parts, "fsdp", 4).weights == 20 + 90 + 24 + 28
    assert per_device(parts, "fsdp", 4).communication == 2 * (20 + 110) + 40 - 14
    assert per_device(parts, "zero3", 4).weights == 20 + 90 + 24 + 28
    assert per_device(parts, "zero3", 4).communication == 80 + 206 + 4 * 500_000_000
    assert per_device(parts, "zero2", 4).weights == per_device(parts, "ddp", 4).weights == alone.weights


def test_gathered_weights_of_zero3_are_those_used_soon() -> None:
    weight = ((4096, 4096), 2)
    block, layers = 8 * 4096 * 4096 * 2, 100
    parts = Parts(Memory(0, 0, 0, 0), [weight] * (8 * layers), [((8, 4096), 4)], block, 0, "sgd")
    gathered = per_device(parts, "zero3", 8).communication - 4 * 500_000_000
    assert block * 2 < gathered < block * layers
    assert gathered == 500_000_000 * 2


def test_int8_layers_are_not_sharded() -> None:
    real = prepare_model(tiny.llama(), quantization="int8")
    floats = sum(p.nbytes for p in real.parameters() if p.is_floating_point())
    whole = plan(tiny.llama(), quantization="int8", length=8)
    shared = plan(tiny.llama(), quantization="int8", strategy="fsdp", devices=2, length=8)
    assert whole.chosen.memory.weights - shared.chosen.memory.weights == floats // 2
    assert shared.chosen.memory.communication > 0
    assert "communication" in str(shared)


def test_advice_fits_when_it_is_followed() -> None:
    config = llama(hidden_size=64, num_hidden_layers=12)
    base = plan(config, batch_size=4, length=256)
    without = base.chosen.memory.total
    with_checkpointing = next(r for r in base.rows if r.checkpointing and not r.quantization).memory.total
    limit = (without + with_checkpointing) // 2 * 10 // 9
    asked = plan(config, batch_size=4, length=256, memory=limit)
    assert asked.fits is False
    assert asked.advice.startswith("With gradient checkpointing it takes")
    assert plan(config, batch_size=4, length=256, memory=limit, gradient_checkpointing=True).fits is True
    assert plan(config, memory=1 << 40).advice == ""
    hopeless = plan(config, memory=1000)
    assert "Nothing that was tried makes it fit; the smallest is" in hopeless.advice


def test_fewest_changes_come_first() -> None:
    now = Scenario("", 4, 1024, False, "adamw_torch_fused", "single", 1)

    def size(scenario: Scenario) -> int:
        total = {"": 80, "int8": 40, "nf4": 30}[scenario.quantization] + 10 * scenario.batch_size
        return (total - 5 * scenario.checkpointing) // scenario.devices

    def advice(limit: int) -> str:
        return nearest_change(now, ["int8", "nf4"], size, limit)

    assert advice(115).startswith("With gradient checkpointing it")
    assert advice(101).startswith("With batch size 2 and 2 times the gradient accumulation it")
    assert advice(80).startswith("With quantization='int8' it")
    assert advice(75).startswith("With quantization='nf4' it")
    assert advice(66).startswith("With FSDP over 2 devices it")
    assert advice(14).startswith("With FSDP over 8 devices") or " and " in advice(14)
    assert advice(1).startswith("Nothing that was tried makes it fit; the smallest is")


@pytest.mark.parametrize(("text", "size"), [("24GiB", 24 << 30), ("80 GB", 80 * 10**9), ("1.5g", 3 << 29), (7, 7)])
def test_amounts_of_memory(text: Any, size: int) -> None:
    assert parse_memory(text) == size


def test_amounts_are_shown_readably() -> None:
    assert [show_bytes(size) for size in (7, 1536, 3 << 20, 5 << 40)] == ["7 B", "1.5 KiB", "3.0 MiB", "5120.00 GiB"]


# -- what it is printed, stored and drawn as ---------------------------------------------------


def test_json_and_chart(tmp_path: Path) -> None:
    planned = plan(llama(), quantization="nf4", memory="1GiB", length=8)
    planned.save(tmp_path / "plan.json")
    stored = json.loads((tmp_path / "plan.json").read_text())
    assert stored["chosen"]["memory"]["total"] == planned.chosen.memory.total
    assert stored["chosen"]["fits"] is True
    assert {(row["quantization"], row["checkpointing"]) for row in stored["rows"]} >= {("", False), ("nf4", True)}
    planned.chart(tmp_path / "plan.png")
    assert (tmp_path / "plan.png").read_bytes().startswith(b"\x89PNG")


def test_command(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def run(*arguments: str) -> str:
        with pytest.raises(SystemExit) as end:
            main(["plan", str(folder), "--length", "8", *arguments])
        captured = capsys.readouterr()
        return captured.out if not end.value.code else captured.err

    chart = tmp_path / "plan.png"
    names = ["-r", "4", "--target-modules", "q_proj", "--target-modules", "v_proj", "--lora", "use_rslora=true"]
    options = ["--quantization", "int8", "--memory", "1GiB", "--chart", str(chart), "--json"]
    made = json.loads(run(*names, *options))
    assert made["trainable"] == 2 * 4 * (32 + 32 + 32 + 16)
    assert made["chosen"]["quantization"] == "int8"
    assert chart.is_file()
    text = run("--target-modules", "mlp")
    assert "down_proj" in text
    assert "no adapter" in text
    assert "is not FIELD=VALUE" in run("--lora", "r")
    assert "near: q_proj" in run("--target-modules", "q_prooj", "--target-modules", "v_proj")


# -- models that cannot take a step without data ------------------------------------------------


def test_step_that_needs_values_is_said() -> None:
    model = tiny.llama()
    usual = model.forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        kwargs["input_ids"].tolist()
        return usual(*args, **kwargs)

    type(model).forward, original = forward, type(model).forward
    try:
        planned = plan(model, length=8)
    finally:
        type(model).forward = original
    assert any("estimated from the sizes of the layers" in note for note in planned.notes)
    assert planned.chosen.memory.activations > 0


CONFIGS: list[PreTrainedConfig] = [
    llama(num_hidden_layers=12),
    T5Config(
        vocab_size=96,
        d_model=32,
        d_kv=8,
        d_ff=64,
        num_layers=10,
        num_decoder_layers=12,
        num_heads=4,
        decoder_start_token_id=0,
    ),
]


@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: config.model_type)
@pytest.mark.parametrize("checkpointing", [False, True])
def test_shortened_stack_stands_for_the_whole(config: PreTrainedConfig, checkpointing: bool) -> None:
    check_shortened(config, checkpointing)


def check_shortened(config: Any, checkpointing: bool) -> None:
    """The activations of a model with blocks taken out must be those of the whole one."""
    from lora_plugins.adapters.settings import LoraSettings
    from lora_plugins.planning.source import meta_model
    from lora_plugins.planning.step import removable_blocks
    from lora_plugins.planning.variants import Workbench
    from lora_plugins.targets.resolution import resolve_targets

    model = meta_model(config)
    bench = Workbench(model, LoraSettings.from_arguments(), resolve_targets(model), torch.device("cpu"))
    assert removable_blocks(bench.structure), "nothing is shortened, so nothing is shown"
    short = bench.simulate(None, 2, 24, checkpointing, short=True)
    whole = bench.simulate(None, 2, 24, checkpointing, short=False)
    assert short == pytest.approx(whole, rel=0.01)


def test_hybrid_stack_is_shortened_by_kind() -> None:
    import sys

    sys.path.insert(0, str(Path(__file__).parent.parent / "tools"))
    import small_models

    case = next(case for case in small_models.cases() if case.model_type == "qwen3_next")
    config = small_models.build(case).config
    config.num_hidden_layers = 24
    config.layer_types = ["linear_attention"] * 3 + ["full_attention"]
    config.layer_types *= 6
    check_shortened(config, False)


def test_plan_makes_no_weights() -> None:
    """A model far larger than this machine."""
    planned = plan(bloom(14336, 70, 112), dtype="bfloat16", length=16)
    assert planned.chosen.memory.weights > 350e9


@pytest.mark.parametrize("source", ["~nobody-here/model", "~nobody-here"])
def test_home_of_an_unknown_user_is_a_folder_that_is_missing(source: str) -> None:
    with pytest.raises(PlanError, match="nobody-here"):
        plan(source)

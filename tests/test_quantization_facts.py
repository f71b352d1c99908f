"""How its base was quantized is plain data on a prepared model, and unknown layers are named."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import peft
import pytest
import tiny
import torch
from torch import nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from lora_plugins import LoraCallback, dequantize_model, prepare_model, quantization_config
from lora_plugins.adapters.report import make_report
from lora_plugins.commands.cli import main
from lora_plugins.errors import UnknownLayer
from lora_plugins.quantization.request import parse_quantization
from lora_plugins.trainer.callbacks import Int8PreparationCallback
from registry import push_adapter


def facts_of(model: Any) -> dict[str, Any]:
    """The facts without the share of weights, which has a test of its own."""
    facts: dict[str, Any] = dict(model.lora_plugins_facts)
    assert json.loads(json.dumps(facts)) == facts
    assert ("share" in facts) is (facts["quantization"] is not None)
    facts.pop("share", None)
    return facts


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("float")
    tiny.llama().to(torch.bfloat16).save_pretrained(path)  # type: ignore[arg-type]
    return path


@pytest.mark.parametrize(
    ("asked", "options"),
    [
        ("int8", {}),
        ({"name": "int8", "threshold": 4.0, "skip_modules": ["down_proj"]}, {}),
        ({"name": "nf4", "double_quant": True}, {"compute_dtype": "float32"}),
        ("int8-torchao", {"compute_dtype": "float32"}),
        ("int4-hqq", {"compute_dtype": "float32"}),
    ],
)
def test_a_model_quantized_here_says_how(asked: Any, options: dict[str, Any]) -> None:
    model = prepare_model(tiny.llama(), quantization=asked, compute_dtype="float32")
    given = {"name": asked} if isinstance(asked, str) else dict(asked)
    name = given.pop("name")
    assert facts_of(model) == {"quantization": {"name": name, "options": {**given, **options}}, "known": True}
    again = facts_of(model)["quantization"]
    found = parse_quantization({"name": again["name"], **again["options"]})
    assert found is not None
    assert found.name == name, "merging reads it back as quantization="


@pytest.mark.parametrize("experts", [False, True], ids=["dense", "experts"])
@pytest.mark.parametrize("backend", ["int8", "nf4", None])
def test_the_share_that_is_quantized_is_in_report_manifest_card_and_show(
    backend: str | None, experts: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.manual_seed(0)
    base = tiny.mixtral() if experts else tiny.llama()
    model = prepare_model(base, quantization=backend, **({"experts": "routed"} if experts else {}))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.1)
    share = make_report(model).quantized_share
    done = push_adapter(model, "org/name", version="1.0.0", hub=tmp_path, metrics={"loss": 0.5})
    if backend is None:
        assert share == 0
        assert "quantized_share" not in done.manifest.training
        assert dict(done.manifest.list_facts())["quantization"] == "none"
        return
    assert 0.5 < share < 1
    assert done.manifest.training["quantized_share"] == pytest.approx(share, abs=5e-5)
    told = f"{backend}, {share:.1%} of the weights"
    assert dict(done.manifest.list_facts())["quantization"] == told
    assert told in done._repr_html_()
    (card,) = tmp_path.rglob("README.md")
    assert f"| quantized\\_share | {round(share, 4)} |" in card.read_text(encoding="utf-8")
    with pytest.raises(SystemExit):
        main(["show", "org/name", "--hub", str(tmp_path)])
    assert f"quantized_share = {round(share, 4)}" in capsys.readouterr().out


def test_a_float_model_says_so_and_a_dequantized_one_too() -> None:
    assert facts_of(prepare_model(tiny.llama())) == {"quantization": None, "known": True}
    model = prepare_model(tiny.llama(), quantization="int8")
    dequantize_model(model)
    assert facts_of(model) == {"quantization": None, "known": True}


@pytest.mark.parametrize(
    ("config", "name", "options"),
    [
        (
            BitsAndBytesConfig(load_in_8bit=True, llm_int8_threshold=5.0),
            "int8",
            {"threshold": 5.0},
        ),
        (
            BitsAndBytesConfig(
                load_in_4bit=True,
                bnb_4bit_quant_type="nf4",
                bnb_4bit_use_double_quant=True,
                bnb_4bit_compute_dtype=torch.bfloat16,
            ),
            "nf4",
            {"double_quant": True, "compute_dtype": "bfloat16"},
        ),
        (
            BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=["up_proj", "lm_head"]),
            "int8",
            {"threshold": 6.0, "skip_modules": ["up_proj", "lm_head"]},
        ),
        ("int8-torchao", "int8-torchao", {}),
        ("int8-quanto", "int8-quanto", {}),
    ],
)
def test_a_model_that_was_loaded_quantized_says_how(
    folder: Path, config: Any, name: str, options: dict[str, Any]
) -> None:
    asked = quantization_config(config) if isinstance(config, str) else config
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16, quantization_config=asked)
    facts = facts_of(prepare_model(model))
    assert facts == {"quantization": {"name": name, "options": options}, "known": True}


def test_the_facts_are_on_models_of_both_callbacks(tmp_path: Path) -> None:
    trainer = tiny.trainer(tmp_path / "lora", callbacks=[LoraCallback(quantization="int8")])
    assert facts_of(trainer.model)["quantization"]["name"] == "int8"
    # What TRL's peft_config= does: the adapters are there before any callback is.
    wrapped = peft.get_peft_model(tiny.llama(), peft.LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM"))
    trainer = tiny.trainer(tmp_path / "wrapped", wrapped, callbacks=[Int8PreparationCallback("nf4")])
    assert facts_of(trainer.model)["quantization"]["name"] == "nf4"
    trainer = tiny.trainer(tmp_path / "later", callbacks=[Int8PreparationCallback()])
    later = peft.get_peft_model(trainer.model, peft.LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM"))
    assert facts_of(later) == {"quantization": {"name": "int8", "options": {}}, "known": True}


# -- layers that no backend knows --------------------------------------------------------------


class PackedLinear(nn.Module):
    """A linear layer whose int8 weight is a buffer, as no backend of ours makes it."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.register_buffer("scale", linear.weight.detach().abs().amax(dim=1, keepdim=True) / 127)
        self.register_buffer("qweight", (linear.weight.detach() / self.scale).round().to(torch.int8))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x @ (self.qweight.to(x.dtype) * self.scale.to(x.dtype)).T


class HalvesLinear(PackedLinear):
    """4 bits a weight, two in a byte, as a parameter."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__(linear)
        packed = self.qweight.view(torch.uint8)[:, ::2].clone()
        self.packed = nn.Parameter(packed, requires_grad=False)


class FloatLinear(nn.Module):
    """A linear layer of a class of one's own, in float: nothing is unknown about it."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.kernel = nn.Parameter(linear.weight.detach().T.clone())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x @ self.kernel


def with_layers(kind: type[nn.Module], *names: str) -> Any:
    model = tiny.llama()
    for layer in model.model.layers:
        for name in names:
            owner = layer.self_attn if hasattr(layer.self_attn, name) else layer.mlp
            setattr(owner, name, kind(getattr(owner, name)))
    return model


@pytest.mark.parametrize("kind", [PackedLinear, HalvesLinear])
def test_a_layer_of_an_unknown_quantizer_is_named_with_the_hook(kind: type[nn.Module]) -> None:
    with pytest.raises(UnknownLayer, match=rf"layers\.0\.self_attn\.q_proj \({kind.__name__}\).*register_quantizers"):
        prepare_model(with_layers(kind, "q_proj", "v_proj"))


def test_a_layer_of_an_unknown_quantizer_is_named_under_a_wrapped_model() -> None:
    with pytest.raises(UnknownLayer, match=r"v_proj \(PackedLinear\)"):
        prepare_model(with_layers(PackedLinear, "v_proj"), quantization="int8", target_modules=["q_proj", "v_proj"])


@pytest.mark.parametrize("kind", [PackedLinear, HalvesLinear])
def test_unknown_layers_beside_the_targets_are_counted_as_quantized_and_noted(kind: type[nn.Module]) -> None:
    model = prepare_model(with_layers(kind, "gate_proj", "down_proj"), target_modules=["q_proj", "v_proj"])
    plain = make_report(prepare_model(tiny.llama(), target_modules=["q_proj", "v_proj"]))
    report = make_report(model)
    assert (report.trainable, report.total) == (plain.trainable, plain.total)
    assert report.quantized_share == pytest.approx(2 * 2 * 32 * 64 / plain.total)
    assert any("4 linear layers" in note and kind.__name__ in note for note in report.notes)
    assert facts_of(model) == {"quantization": {"name": kind.__name__, "options": {}}, "known": False}


def test_a_float_layer_of_ones_own_class_is_not_unknown() -> None:
    model = prepare_model(with_layers(FloatLinear, "gate_proj"), target_modules=["q_proj", "v_proj"])
    assert facts_of(model) == {"quantization": None, "known": True}
    assert make_report(model).quantized_share == 0


def test_a_packed_tensor_in_a_plain_linear_layer_is_unknown() -> None:
    pytest.importorskip("torchao")
    from torchao.quantization import IntxWeightOnlyConfig, quantize_

    model = tiny.llama()
    quantize_(model.model.layers[0].mlp, IntxWeightOnlyConfig(weight_dtype=torch.int4))
    prepared = prepare_model(model, target_modules=["q_proj", "v_proj"])
    assert facts_of(prepared)["known"] is False

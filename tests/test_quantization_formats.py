"""A base that comes quantized is trained as its format says, or refused by the format's name."""

from __future__ import annotations

import importlib
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import stored_bases
import tiny
import torch
from tokenizers import Tokenizer, models
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING
from versions import needs

from lora_plugins import Format, LoraCallback, attach, dequantize_model, prepare_model
from lora_plugins.adapters.report import make_report
from lora_plugins.commands.cli import main
from lora_plugins.errors import MergeError, UntrainableFormat
from lora_plugins.plugins.host import plugin_host
from lora_plugins.quantization.counting import count_parameters, tensor_bytes
from lora_plugins.quantization.formats import read_dequantized, write_refusal
from lora_plugins.quantization.request import owner_of, parse_quantization, unknown_layers
from lora_plugins.quantization.selftest import self_test
from lora_plugins.trainer.callbacks import Int8PreparationCallback

IDS = torch.arange(24).reshape(2, 12) % tiny.VOCABULARY
LORA: dict[str, Any] = {"r": 4, "lora_dropout": 0.0, "compute_dtype": "float32"}
W4 = {"num_bits": 4, "group_size": 32, "strategy": "group", "symmetric": True, "type": "int"}
COMPRESSED = {
    "packed 4-bit groups": W4,
    "packed 3-bit rows": {**W4, "num_bits": 3, "group_size": None, "strategy": "channel"},
    "float8 rows": {"num_bits": 8, "strategy": "channel", "symmetric": True, "type": "float"},
    "float8 whole": {"num_bits": 8, "strategy": "tensor", "symmetric": True, "type": "float"},
}

MXFP8 = needs("transformers", "5.23", "it does not know MXFP8")


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Make each checkpoint once."""
    made: dict[Any, Path] = {}

    def make(kind: Callable[..., Path], **arguments: Any) -> Path:
        key = (kind.__name__, *sorted((name, str(value)) for name, value in arguments.items()))
        if key not in made:
            made[key] = kind(tmp_path_factory.mktemp(kind.__name__), **arguments)
        return made[key]

    return make


def load(folder: Path, **arguments: Any) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, **arguments)


def train(folder: Path, model: Any, steps: int = 6) -> tuple[Any, list[float]]:
    # The same four rows in every step, so that the loss must fall.
    trainer = tiny.trainer(folder, model, data=tiny.rows(4), max_steps=steps, learning_rate=2e-2)
    before = {name: p.detach().clone() for name, p in model.named_parameters() if not p.requires_grad}
    trainer.train()
    changed = [name for name, p in model.named_parameters() if name in before and not torch.equal(p, before[name])]
    assert changed == [], "a frozen tensor changed"
    assert all("lora_" in name for name, p in model.named_parameters() if p.requires_grad)
    return trainer, [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


# -- the table ---------------------------------------------------------------------------------


@pytest.mark.parametrize("method", sorted(AUTO_QUANTIZER_MAPPING))
def test_every_format_that_transformers_loads_has_a_record(method: str) -> None:
    record = plugin_host().format(method)
    assert record is not None, f"describe {method!r} in lora_plugins/builtin/formats.py: a new release loads it"
    assert record.merges, method
    assert record.needs, method
    assert record.evidence, method


@needs("transformers", "5.23", "some formats are newer")
def test_no_record_is_of_a_format_that_transformers_no_longer_loads() -> None:
    assert {record.method for record in plugin_host().formats()} == set(AUTO_QUANTIZER_MAPPING)


@needs("transformers", "5.23", "some formats are newer, or stand in other modules")
@pytest.mark.parametrize("record", plugin_host().formats(), ids=lambda record: record.method)
def test_the_layers_of_a_record_exist_where_their_library_is_installed(record: Format) -> None:
    modules = {"transformers": ("bitnet", "compressed_tensors", "eetq", "fbgemm_fp8", "finegrained_fp8", "gemma_quant",
                                "gguf.utils", "higgs", "metal_quantization", "mxfp4", "nvfp4")}  # fmt: skip
    for layer in record.layers:
        package, name = layer.split(".")
        for module in modules.get(package, ()):
            if hasattr(importlib.import_module(f"transformers.integrations.{module}"), name):
                break
        else:
            assert package != "transformers", f"{name} is nowhere in transformers.integrations"
    assert set(record.backends) <= set(plugin_host().quantizer_names())


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"trains": "maybe"}, "must be one of"),
        ({"trains": "stored"}, "must name its backends"),
        ({"trains": "no"}, "must say why"),
        ({"trains": "float", "layers": "one.Layer"}, "tuple of names"),
        ({"trains": "float", "method": ""}, "non-empty"),
    ],
)
def test_a_record_that_says_too_little_is_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises((TypeError, ValueError), match=message):
        Format(**{"method": "mine", "title": "Mine", **fields})


# -- compressed-tensors: trained as stored -----------------------------------------------------


@pytest.mark.parametrize("kind", COMPRESSED)
def test_compressed_tensors_train_packed_and_come_back(folders: Callable[..., Path], tmp_path: Path, kind: str) -> None:
    folder = folders(stored_bases.compressed, **COMPRESSED[kind])
    base = load(folder)
    size = tensor_bytes(base).total
    model = prepare_model(base, **LORA)
    plain = count_parameters(prepare_model(stored_bases.llama(), **LORA))
    count = count_parameters(model)
    assert (count.trainable, count.total) == (plain.trainable, plain.total)
    assert count.quantized == 2 * (2 * 128 * 128 + 2 * 64 * 128 + 3 * 128 * 256)
    _, losses = train(tmp_path, model)
    assert losses[-1] < losses[0] - 0.1
    # Nothing was decompressed: bytes grew by the adapters and the float32 embeddings, norms and head alone.
    floats = 2 * 2 * tiny.VOCABULARY * 128 + 2 * 5 * 128
    assert tensor_bytes(model).total <= size + floats + 4 * plain.trainable
    assert model.lora_plugins_facts["quantization"]["name"] == "compressed-tensors"

    model.save_pretrained(tmp_path / "adapter")
    again = prepare_model(load(folder), adapter=str(tmp_path / "adapter"), compute_dtype="float32")
    with torch.no_grad():
        assert torch.equal(again.eval()(IDS).logits, model.eval()(IDS).logits)


def test_the_weights_of_compressed_tensors_are_those_that_the_library_dequantizes(
    folders: Callable[..., Path],
) -> None:
    from transformers import CompressedTensorsConfig

    folder = folders(stored_bases.compressed, **W4)
    expected = load(folder, quantization_config=CompressedTensorsConfig(dequantize=True))
    model = prepare_model(load(folder), **LORA)
    layer = model.get_base_model().model.layers[1].mlp.up_proj
    owner = owner_of(layer)
    assert owner is not None
    assert torch.equal(owner.dequantize(layer), expected.model.layers[1].mlp.up_proj.weight)


def test_a_base_that_a_pass_has_decompressed_is_refused(folders: Callable[..., Path]) -> None:
    base = load(folders(stored_bases.compressed, **W4))
    with torch.no_grad():
        base(IDS)
    with pytest.raises(UntrainableFormat, match=r"a pass has decompressed.*Instead, load it again"):
        prepare_model(base, **LORA)


def test_compressed_tensors_say_their_options(folders: Callable[..., Path]) -> None:
    model = prepare_model(load(folders(stored_bases.compressed, **W4)), **LORA)
    facts = model.lora_plugins_facts
    options = {"num_bits": 4, "group_size": 32, "symmetric": True, "type": "int", "skip_modules": ["lm_head"]}
    assert facts["quantization"] == {"name": "compressed-tensors", "options": options}
    assert facts["known"] is True


def test_merging_into_compressed_tensors_is_refused_and_possible_after_dequantizing(
    folders: Callable[..., Path],
) -> None:
    model = prepare_model(load(folders(stored_bases.compressed, **W4)), **LORA)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.05)
        trained = model.eval()(IDS).logits
        with pytest.raises(MergeError, match="compressed-tensors"):
            model.merge_adapter()
        dequantize_model(model)
        assert torch.allclose(model.merge_and_unload()(IDS).logits, trained, atol=1e-4)


@pytest.mark.parametrize(
    "options", [{}, {"num_bits": 8, "group_size": None}, {"symmetric": False}, {"type": "float", "num_bits": 8}]
)
def test_the_backend_of_compressed_tensors_passes_the_self_test(options: dict[str, Any]) -> None:
    pytest.importorskip("compressed_tensors")
    found = parse_quantization({"name": "compressed-tensors", **options})
    assert found is not None
    assert self_test(found, torch.device("cpu"), torch.float32) is None


# -- formats that transformers dequantizes while loading ----------------------------------------


@pytest.mark.parametrize(
    "method",
    [
        "fp8",
        pytest.param("mxfp8", marks=MXFP8),
        "mxfp4",
        pytest.param("gguf", marks=needs("transformers", "5.23", "it keeps no record of a GGUF file's format")),
    ],
)
def test_a_base_that_was_dequantized_while_loading_trains_in_float_and_says_what_it_was(
    folders: Callable[..., Path], tmp_path: Path, method: str
) -> None:
    make = {"fp8": stored_bases.fp8, "mxfp8": stored_bases.fp8, "mxfp4": stored_bases.mxfp4, "gguf": stored_bases.gguf}
    folder = folders(make[method], **({"method": method} if "fp8" in method else {}))
    base = load(folder, **({"gguf_file": "model.gguf"} if method == "gguf" else {}))
    model = prepare_model(base, target_modules=["q_proj", "v_proj"], **LORA)
    assert model.lora_plugins_facts == {"quantization": None, "known": True, "stored": method}
    assert not getattr(base, "is_quantized", False)
    report = make_report(model)
    assert report.quantized_share == 0
    assert any(f"quant_method {method!r}" in note and "float" in note for note in report.notes)
    _, losses = train(tmp_path, model)
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("method", ["fp8", pytest.param("mxfp8", marks=MXFP8), "mxfp4"])
def test_what_it_was_is_known_from_its_files_where_loading_leaves_no_trace(
    folders: Callable[..., Path], method: str
) -> None:
    """As transformers 5.24 does."""
    folder = folders(stored_bases.mxfp4) if method == "mxfp4" else folders(stored_bases.fp8, method=method)
    base = load(folder)
    vars(base).pop("_weight_conversions", None)
    assert read_dequantized(base) == method
    base.config.name_or_path = base.name_or_path = str(folder / "gone")
    assert read_dequantized(base) is None, "nothing is guessed"


def test_a_float_model_whose_files_are_float_was_never_dequantized(tmp_path: Path) -> None:
    stored_bases.llama().save_pretrained(tmp_path)
    assert read_dequantized(load(tmp_path)) is None


@needs("transformers", "5.23", "it saves such a base in another layout")
def test_a_base_that_was_dequantized_while_loading_is_saved_as_the_float_base_that_it_is(
    folders: Callable[..., Path], tmp_path: Path
) -> None:
    base = prepare_model(load(folders(stored_bases.fp8, method="fp8")), r=4).unload()
    base.save_pretrained(tmp_path)
    again = load(tmp_path)
    for name, parameter in base.named_parameters():
        assert torch.equal(again.get_parameter(name), parameter), name


# -- refused -----------------------------------------------------------------------------------


#: Formats that transformers dequantizes or whose layers it makes, each with its checkpoint.
UNREAD: dict[str, tuple[Callable[..., Path], dict[str, Any]]] = {
    "mxfp8": (stored_bases.fp8, {"method": "mxfp8"}),
    "fp8": (stored_bases.fp8, {"method": "fp8"}),
    "mxfp4": (stored_bases.mxfp4, {}),
    "compressed-tensors": (stored_bases.compressed, COMPRESSED["float8 rows"]),
}


@pytest.mark.parametrize("method", UNREAD)
def test_a_format_that_this_transformers_does_not_know_is_refused(
    folders: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, method: str
) -> None:
    """As transformers 5.5 and MXFP8: it warns, and takes the stored numbers for the weights, without their scales."""
    make, arguments = UNREAD[method]
    folder = folders(make, **arguments)
    monkeypatch.delitem(AUTO_QUANTIZATION_CONFIG_MAPPING, method, raising=False)
    base = load(folder)
    before = {name: parameter.clone() for name, parameter in base.named_parameters()}
    with pytest.raises(
        UntrainableFormat,
        match=rf"{method}'\).*does not know this format.*without their scales. Instead, install a rel",
    ):
        prepare_model(base, target_modules=["q_proj", "v_proj"], **LORA)
    with pytest.raises(UntrainableFormat, match="does not know this format"):
        attach(tiny.trainer(tmp_path, base), target_modules=["q_proj", "v_proj"])
    assert all(torch.equal(parameter, before[name]) for name, parameter in base.named_parameters())


@pytest.mark.parametrize("method", ["nvfp4", "gemma"])
def test_a_newer_transformers_is_no_advice_for_a_format_that_cannot_train(
    monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    monkeypatch.delitem(AUTO_QUANTIZATION_CONFIG_MAPPING, method, raising=False)
    record = plugin_host().format(method)
    assert record is not None
    text = write_refusal(method, record.reason)
    assert record.reason in text
    assert "install a release" not in text


@pytest.mark.parametrize("method", UNREAD)
def test_a_plan_refuses_a_format_that_this_transformers_does_not_know(
    folders: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], method: str
) -> None:
    make, arguments = UNREAD[method]
    folder = folders(make, **arguments)
    monkeypatch.delitem(AUTO_QUANTIZATION_CONFIG_MAPPING, method, raising=False)
    with pytest.raises(SystemExit, match="1"):
        main(["plan", str(folder)])
    assert f"quant_method '{method}') and adapters cannot be trained on it: transformers" in " ".join(
        capsys.readouterr().err.split()
    )


def integration(name: str) -> Any:
    """A module with a format's layers; older releases of transformers lack some."""
    return pytest.importorskip(f"transformers.integrations.{name}")


def fp8_linear(linear: nn.Linear) -> nn.Module:
    layer = integration("finegrained_fp8").FP8Linear(linear.in_features, linear.out_features, block_size=(32, 32))
    layer.weight.data.copy_(linear.weight)
    return layer


def packed_bits(linear: nn.Linear) -> nn.Module:
    return integration("bitnet").BitLinear(linear.in_features, linear.out_features, bias=False, dtype=torch.float32)


def rounded_bits(linear: nn.Linear) -> nn.Module:
    return integration("bitnet").AutoBitLinear(linear.in_features, linear.out_features, bias=False, online_quant=True)


def gemma_linear(linear: nn.Linear) -> nn.Module:
    return integration("gemma_quant").QuantizedLinear(linear.in_features, linear.out_features, num_bits=4)


def gguf_linear(linear: nn.Linear) -> nn.Module:
    return integration("gguf.utils").GgufLinear(linear.in_features, linear.out_features, ggml_type=8)


def higgs_linear(linear: nn.Linear) -> nn.Module:
    return integration("higgs").HiggsLinear(linear.in_features, linear.out_features, 4, bias=False, group_size=32)


LAYERS = {
    "fp8": fp8_linear,
    "bitnet": packed_bits,
    "gemma": gemma_linear,
    "gguf": gguf_linear,
    "higgs": higgs_linear,
}


@pytest.mark.parametrize("declared", [True, False], ids=["declared", "by its layers"])
@pytest.mark.parametrize("method", LAYERS)
def test_a_packed_layer_of_transformers_is_refused_by_the_format_s_name(method: str, declared: bool) -> None:
    model = stored_bases.with_layers(LAYERS[method], {"quant_method": method} if declared else None)
    with pytest.raises(UntrainableFormat, match=rf"quant_method '{method}'.*2 layers.*allow_format='{method}'"):
        prepare_model(model, target_modules=["q_proj", "v_proj"])


def test_the_online_layers_of_bitnet_are_not_taken_for_float() -> None:
    model = stored_bases.with_layers(rounded_bits, {"quant_method": "bitnet"})
    model.is_quantized = True
    assert set(unknown_layers(model).values()) == {"AutoBitLinear"}
    with pytest.raises(UntrainableFormat, match=r"BitNet.*rounded to three values"):
        prepare_model(model, target_modules=["q_proj", "v_proj"])
    assert model.is_quantized, "its flags are left on"


@pytest.mark.parametrize("method", ["awq", "gptq", "aqlm", "eetq", "vptq", "spqr", "quark", "auto-round", "sinq"])
def test_a_format_that_was_never_run_here_is_refused_with_what_to_load_instead(method: str) -> None:
    model = stored_bases.with_layers(packed_in_buffers, {"quant_method": method})
    with pytest.raises(UntrainableFormat, match=rf"'{method}'.*Instead, load the float model.*--allow-format {method}"):
        prepare_model(model, target_modules=["q_proj", "v_proj"])


class Packed(nn.Module):
    """A layer as GPTQ keeps it: integers in buffers, and no parameter at all."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.register_buffer("qweight", torch.zeros(linear.in_features // 8, linear.out_features, dtype=torch.int32))
        self.register_buffer("scales", torch.ones(1, linear.out_features))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x @ torch.ones(self.in_features, self.out_features)


def packed_in_buffers(linear: nn.Linear) -> nn.Module:
    return Packed(linear)


def test_a_flagged_base_whose_packed_weights_are_buffers_keeps_its_flags() -> None:
    model = stored_bases.with_layers(packed_in_buffers, {"quant_method": "gptq"})
    model.is_quantized = True
    with pytest.raises(UntrainableFormat, match="GPTQ"):
        prepare_model(model)
    assert model.is_quantized
    assert model.config.quantization_config == {"quant_method": "gptq"}


@pytest.mark.parametrize("flag", [True, False])
def test_a_format_that_nobody_describes_is_refused_whatever_its_weights_are(flag: bool) -> None:
    model: Any = tiny.llama()
    model.config.quantization_config = {"quant_method": "brandnew"}
    model.is_quantized = flag
    with pytest.raises(UntrainableFormat, match=r"quant_method 'brandnew'.*no plugin describes this format"):
        prepare_model(model)


def test_the_user_can_insist_by_name_and_the_report_says_so() -> None:
    model = stored_bases.with_layers(packed_in_buffers, {"quant_method": "awq"})
    with pytest.raises(UntrainableFormat, match=r"allow_format='awk' names another format\. Did you mean 'awq'"):
        prepare_model(model, target_modules=["q_proj"], allow_format="awk")
    prepared = prepare_model(model, target_modules=["q_proj"], allow_format="awq")
    assert any("AWQ" in note and "never tried" in note for note in make_report(prepared).notes)
    count = count_parameters(prepared)
    share = round(count.quantized / count.total, 4)
    told = {"quantization": {"name": "awq", "options": {}}, "known": False, "share": share}
    assert prepared.lora_plugins_facts == told
    assert count.quantized == 2 * 32 * 64


def test_float8_without_its_scale_is_never_cast() -> None:
    model = stored_bases.with_layers(fp8_linear, {"quant_method": "fp8"})
    prepared = prepare_model(model, target_modules=["q_proj"], allow_format="fp8", compute_dtype="bfloat16")
    layer = prepared.get_base_model().model.layers[0].mlp.gate_proj
    assert layer.weight.dtype == torch.float8_e4m3fn
    assert count_parameters(prepared).quantized == 2 * 32 * 64


def test_packed_experts_without_sizes_are_unknown() -> None:
    from transformers import GptOssConfig

    model: Any = tiny.llama()
    config = GptOssConfig(num_local_experts=2, hidden_size=32, intermediate_size=32)
    model.model.layers[0].experts = integration("mxfp4").Mxfp4GptOssExperts(config)
    with pytest.raises(UntrainableFormat, match=r"MXFP4.*Mxfp4Config"):
        prepare_model(model)


def test_a_packed_embedding_is_not_float() -> None:
    class Bytes(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.num_embeddings, self.embedding_dim = 96, 32
            self.register_buffer("table", torch.zeros(96, 16, dtype=torch.uint8))

    model: Any = tiny.llama()
    model.model.embed_tokens = Bytes()
    assert unknown_layers(model) == {"model.embed_tokens": "Bytes"}
    assert count_parameters(model).total == count_parameters(tiny.llama()).total


# -- the same on every path --------------------------------------------------------------------


def refused() -> Any:
    return stored_bases.with_layers(packed_in_buffers, {"quant_method": "awq"})


def test_every_way_into_a_trainer_refuses_alike(tmp_path: Path) -> None:
    with pytest.raises(UntrainableFormat, match="AWQ"):
        tiny.trainer(tmp_path, refused(), callbacks=[LoraCallback(target_modules=["q_proj"])])
    with pytest.raises(UntrainableFormat, match="AWQ"):
        tiny.trainer(tmp_path, refused(), callbacks=[Int8PreparationCallback()])
    with pytest.raises(UntrainableFormat, match="AWQ"):
        attach(tiny.trainer(tmp_path, refused()), target_modules=["q_proj"])
    wrapped = peft.get_peft_model(refused(), peft.LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM"))
    with pytest.raises(UntrainableFormat, match="AWQ"):
        prepare_model(wrapped)


def test_every_way_into_a_trainer_can_be_insisted_on(tmp_path: Path) -> None:
    same: dict[str, Any] = {"target_modules": ["q_proj"], "allow_format": "awq"}
    trainer = tiny.trainer(tmp_path, refused(), callbacks=[LoraCallback(**same)])
    assert trainer.model.lora_plugins_facts["known"] is False
    attached = tiny.trainer(tmp_path, refused())
    attach(attached, **same)
    assert attached.model.lora_plugins_facts["quantization"]["name"] == "awq"
    plain = tiny.trainer(tmp_path, refused(), callbacks=[Int8PreparationCallback(allow_format="awq")])
    assert plain.model.lora_plugins_facts["known"] is False


# -- commands ----------------------------------------------------------------------------------

COMMANDS = {
    "train": ["train", "--model", "BASE", "--dataset", "DATA", "--template", "{text}", "--output_dir", "OUT"],
    "demo": ["demo", "--model", "BASE", "--output", "OUT"],
    "plan": ["plan", "BASE"],
}


def call(command: str, base: Path, folder: Path, capsys: pytest.CaptureFixture[str], code: int = 1) -> str:
    """Run a command that must end with one line, and return the line."""
    data = folder / "data.jsonl"
    data.write_text("".join(f'{{"text": "{number} {number + 1} {number + 2}"}}\n' for number in range(40)))
    places = {"BASE": str(base), "DATA": str(data), "OUT": str(folder / "out")}
    with pytest.raises(SystemExit) as ended:
        main([places.get(word, word) for word in COMMANDS[command]])
    assert ended.value.code == code
    said = capsys.readouterr().err
    assert "Traceback" not in said
    return said


@pytest.mark.parametrize("method", ["awq", "bitnet", "somethingnew"])
@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_refuses_a_base_before_it_is_loaded(
    command: str, method: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = tmp_path / "base"
    stored_bases.llama().save_pretrained(base)
    words = Tokenizer(models.WordLevel({str(number): number for number in range(96)}, unk_token="0"))
    PreTrainedTokenizerFast(tokenizer_object=words, unk_token="0", eos_token="1").save_pretrained(base)
    stored_bases.declare(base, {"quant_method": method})
    said = call(command, base, tmp_path, capsys)
    assert re.search(rf"quant_method '{method}'.* Instead, ", said), said


@pytest.mark.parametrize("command", COMMANDS)
def test_a_base_that_does_not_exist_is_one_line(
    command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    # For `train` it is an argument that is not valid.
    said = call(command, tmp_path / "gone", tmp_path, capsys, code=2 if command == "train" else 1)
    assert str(tmp_path / "gone") in said

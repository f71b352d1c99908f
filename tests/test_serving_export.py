"""Exports: GGUF read back tensor by tensor, Modelfile, launch lines, PEFT folders, and what is refused by name."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import Any

import gguf
import numpy
import pytest
import served
import tiny
import torch
from adapters import adapted, pulled
from peft import PeftModel
from peft.tuners.lora.layer import LoraLayer, ParamWrapper
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from lora_plugins import export_adapter, prepare_model
from lora_plugins.commands.cli import main
from lora_plugins.errors import ExportError, MergeError, UnsupportedExport
from lora_plugins.serving.gguf_families import FAMILIES
from registry import push_adapter


def read(path: Path) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """The metadata and the tensors of a GGUF file, the latter in float32."""
    reader = gguf.GGUFReader(path)
    facts = {name: field.contents() for name, field in reader.fields.items()}
    tensors = {}
    for tensor in reader.tensors:
        values = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        tensors[tensor.name] = torch.from_numpy(numpy.array(values, dtype=numpy.float32))
    return facts, tensors


def permute(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """``LlamaModel.permute`` of llama.cpp's conversion/llama.py, on a whole weight."""
    return (
        weight.reshape(heads, 2, weight.shape[0] // heads // 2, *weight.shape[1:]).swapaxes(1, 2).reshape(weight.shape)
    )


def split(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """What conversion/bloom.py and conversion/gptneox.py do with a fused projection."""
    parts = weight.reshape(heads, 3, -1, weight.shape[-1])
    return torch.cat([parts[:, index].reshape(-1, weight.shape[-1]) for index in range(3)])


def converted(path: str, weight: torch.Tensor, config: Any) -> dict[str, torch.Tensor]:
    """An update in llama.cpp's order, by the module that its tensor is named after."""
    kind, end = config.model_type, path.rpartition(".")[2]
    if kind in ("llama", "mistral", "mixtral", "granite", "smollm3") and end in ("q_proj", "k_proj"):
        return {path: permute(weight, config.num_attention_heads if end == "q_proj" else config.num_key_value_heads)}
    if kind in ("bloom", "gpt_neox") and end == "query_key_value":
        return {path: split(weight, config.num_attention_heads)}
    if path.endswith("experts.gate_up_proj"):
        half = weight.shape[1] // 2
        stem = path.removesuffix("gate_up_proj")
        return {f"{stem}gate_proj": weight[:, :half], f"{stem}up_proj": weight[:, half:]}
    return {path: weight}


def updates(model: PeftModel) -> dict[str, torch.Tensor]:
    """What PEFT itself adds to each weight, in llama.cpp's order, by the module's path."""
    found: dict[str, torch.Tensor] = {}
    for name, module in model.named_modules():
        if not isinstance(module, LoraLayer):
            continue
        path = name.removeprefix("base_model.model.").replace(".base_layer", "")
        if isinstance(module, ParamWrapper):
            path = f"{path}.{module.parameter_name}"
        weight = module.get_delta_weight("default").detach()
        if getattr(module, "fan_in_fan_out", False):
            weight = weight.T
        found.update(converted(path, weight, model.config))
    return found


def applied(tensors: dict[str, torch.Tensor], name: str, alpha: float) -> torch.Tensor:
    """What llama.cpp computes from a pair of factors, as in build_lora_mm and build_inp_embd."""
    a, b = tensors[f"{name}.lora_a"], tensors[f"{name}.lora_b"]
    rank = b.shape[-1]
    product = a @ b.T if name == "token_embd.weight" else b @ a
    return product * (alpha / rank)


@pytest.mark.parametrize("case", list(served.cases()))
def test_every_tensor_of_a_gguf_file_is_the_adapters_update(case: str, tmp_path: Path) -> None:
    family, changes = served.cases()[case]
    model = served.write(family, tmp_path, **changes)
    result = export_adapter(tmp_path / "adapter", tmp_path / "a.gguf", "gguf", base=tmp_path / "base")
    facts, tensors = read(tmp_path / "a.gguf")
    assert facts["general.type"] == "adapter"
    assert facts["adapter.type"] == "lora"
    assert facts["general.architecture"] == FAMILIES[family].architecture
    wanted = updates(model)
    assert len(tensors) == 2 * len(wanted) == 2 * result.tensors
    # The numbers of a block and of its tensor are found here by the shape of the update, the name by gguf.
    arch = next(one for one, name in gguf.MODEL_ARCH_NAMES.items() if name == FAMILIES[family].architecture)
    names = gguf.get_tensor_name_map(arch, 2)
    for path, update in wanted.items():
        name = names.get_name(path) or names.get_name(path.removeprefix("transformer."))
        made = applied(tensors, f"{name}.weight", facts["adapter.lora.alpha"])
        torch.testing.assert_close(made, update.float(), rtol=1e-4, atol=1e-5)


def test_every_family_is_tested() -> None:
    assert set(served.MODELS) == set(FAMILIES)


@pytest.mark.parametrize(("dtype", "atol"), [("f16", 2e-3), ("bf16", 2e-2)])
def test_factors_in_16_bits(dtype: Any, atol: float, tmp_path: Path) -> None:
    model = served.write("llama", tmp_path)
    export_adapter(tmp_path / "adapter", tmp_path / "a.gguf", "gguf", base=tmp_path / "base", dtype=dtype)
    kinds = {tensor.tensor_type.name.lower() for tensor in gguf.GGUFReader(tmp_path / "a.gguf").tensors}
    assert kinds == {dtype}
    _, tensors = read(tmp_path / "a.gguf")
    made = applied(tensors, "blk.0.ffn_up.weight", 8)
    torch.testing.assert_close(made, updates(model)["model.layers.0.mlp.up_proj"], rtol=2e-2, atol=atol)


def test_values_that_float16_cannot_hold_are_refused_and_nothing_is_left(tmp_path: Path) -> None:
    # 40,000 fits; twice that, which is rsLoRA's scale at rank 4, does not.
    model = served.write("llama", tmp_path, use_rslora=True)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.fill_(40_000.0)
    model.save_pretrained(tmp_path / "adapter")
    with pytest.raises(ExportError, match=r"lora_b of adapter does not fit float16\. Export with dtype='f32'"):
        export_adapter(tmp_path / "adapter", tmp_path / "a.gguf", "gguf", base=tmp_path / "base", dtype="f16")
    assert not list(tmp_path.glob("*.gguf*"))


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"use_dora": True}, "use_dora=True"),
        ({"lora_bias": True}, "lora_bias=True"),
        ({"bias": "lora_only"}, "bias='lora_only'"),
        ({"modules_to_save": ["embed_tokens"]}, "modules_to_save=['embed_tokens']"),
        ({"trainable_token_indices": [3, 4]}, "trainable_token_indices=[3, 4]"),
    ],
)
def test_what_llama_cpp_cannot_compute_is_refused_by_name(changes: dict[str, Any], named: str, tmp_path: Path) -> None:
    served.write("llama", tmp_path, **changes)
    with pytest.raises(UnsupportedExport) as caught:
        export_adapter(tmp_path / "adapter", tmp_path / "a.gguf", "gguf", base=tmp_path / "base")
    assert named in str(caught.value)
    assert "merged=True (--merged)" in str(caught.value)
    assert not list(tmp_path.glob("*.gguf*"))


def test_an_adapter_on_a_shared_head_or_embedding_is_refused(tmp_path: Path) -> None:
    for target in ("lm_head", "embed_tokens"):
        served.write("qwen2", tmp_path / target, target_modules=["q_proj", target])
        with pytest.raises(UnsupportedExport, match=f"with an adapter on .*{target}"):
            export_adapter(tmp_path / target / "adapter", tmp_path / "a.gguf", "gguf", base=tmp_path / target / "base")


def test_a_base_of_an_untested_type_is_refused_by_name(tmp_path: Path) -> None:
    base = tiny.llama()
    base.config.architectures = ["LlamaForCausalLM"]
    base.save_pretrained(tmp_path / "base")
    adapted(base, target_modules=["q_proj"]).save_pretrained(tmp_path / "adapter")
    config = json.loads((tmp_path / "base" / "config.json").read_text())
    config["model_type"] = "ernie4_5"
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "config.json").write_text(json.dumps(config))
    with pytest.raises(UnsupportedExport, match=r"its base is of type 'ernie4_5', and .* is known for bloom, gemma"):
        export_adapter(tmp_path / "adapter", tmp_path / "a.gguf", "gguf", base=tmp_path / "other")


def test_an_adapter_of_another_base_is_not_exported(tmp_path: Path) -> None:
    served.write("llama", tmp_path)
    tiny.llama().save_pretrained(tmp_path / "other")
    with pytest.raises(Exception, match="does not fit"):
        export_adapter(tmp_path / "adapter", tmp_path / "a.gguf", "gguf", base=tmp_path / "other")
    with pytest.raises(MergeError, match="cannot be loaded"):
        export_adapter(tmp_path / "adapter", tmp_path / "a.gguf", "gguf", base=tmp_path / "nowhere")


def test_copies_of_the_base_beside_an_adapter_on_the_head_are_left_out(tmp_path: Path) -> None:
    """PEFT saves the whole head with an adapter on it, unless it is told not to."""
    model = served.write("llama", tmp_path)
    model.save_pretrained(tmp_path / "adapter")
    assert "lm_head.base_layer.weight" in repr(load_file(tmp_path / "adapter" / "adapter_model.safetensors").keys())
    export_adapter(tmp_path / "adapter", tmp_path / "a.gguf", "gguf", base=tmp_path / "base")
    _, tensors = read(tmp_path / "a.gguf")
    assert all(name.endswith((".lora_a", ".lora_b")) for name in tensors)
    torch.testing.assert_close(applied(tensors, "output.weight", 8), updates(model)["lm_head"], rtol=1e-4, atol=1e-5)


def test_a_grown_vocabulary_is_refused(tmp_path: Path) -> None:
    base = served.make_base("llama")
    base.save_pretrained(tmp_path / "base")
    base.resize_token_embeddings(served.WORDS + 4, mean_resizing=False)
    model = served.make_adapter("llama", base, target_modules=["q_proj"], trainable_token_indices=[96, 97, 98, 99])
    model.save_pretrained(tmp_path / "adapter")
    with pytest.raises(UnsupportedExport, match="trainable_token_indices"):
        export_adapter(tmp_path / "adapter", tmp_path / "a.gguf", "gguf", base=tmp_path / "base")


def test_experts_trained_by_prepare_model_are_exported(tmp_path: Path) -> None:
    """Our own experts' layers write PEFT's file, with twice the rank on the fused gate and up projection."""
    base = served.make_base("qwen3_moe")
    base.save_pretrained(tmp_path / "base")
    model = prepare_model(base, r=4, target_modules="attention", experts="routed")
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    model.save_pretrained(tmp_path / "adapter")
    plain = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tmp_path / "base"), tmp_path / "adapter")
    export_adapter(tmp_path / "adapter", tmp_path / "a.gguf", "gguf", base=tmp_path / "base")
    facts, tensors = read(tmp_path / "a.gguf")
    wanted = updates(plain)
    made = applied(tensors, "blk.1.ffn_up_exps.weight", facts["adapter.lora.alpha"])
    torch.testing.assert_close(made, wanted["model.layers.1.mlp.experts.up_proj"], rtol=1e-4, atol=1e-5)


def test_a_release_names_itself_and_no_folder_of_this_machine(tmp_path: Path) -> None:
    base = tiny.llama()
    base.save_pretrained(tmp_path / "base")
    adapter = pulled(adapted(base), tmp_path / "release", version="1.2.0")
    export_adapter(adapter, tmp_path / "a.gguf", "gguf", base=tmp_path / "base")
    facts, _ = read(tmp_path / "a.gguf")
    assert facts["general.name"] == "org/name"
    assert facts["general.version"] == "1.2.0"
    assert str(tmp_path) not in repr(facts)


def test_an_ollama_folder_has_a_modelfile_beside_the_adapter(tmp_path: Path) -> None:
    served.write("llama", tmp_path)
    with pytest.raises(ExportError, match=r"pass model= \(--model\), its name there such as llama3.2:1b"):
        export_adapter(tmp_path / "adapter", tmp_path / "out", "ollama", base=tmp_path / "base")
    result = export_adapter(tmp_path / "adapter", tmp_path / "out", "ollama", base=tmp_path / "base", model="tiny:1b")
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["Modelfile", "adapter.gguf"]
    assert (tmp_path / "out" / "Modelfile").read_text() == "FROM tiny:1b\nADAPTER ./adapter.gguf\n"
    assert result.launch == f"ollama create adapter -f {tmp_path / 'out' / 'Modelfile'}"
    assert read(tmp_path / "out" / "adapter.gguf")[0]["general.architecture"] == "llama"


@pytest.mark.parametrize("to", ["peft", "vllm", "sglang"])
def test_a_plain_folder_has_pefts_files_only_and_loads(to: Any, tmp_path: Path) -> None:
    base = tiny.llama()
    base.save_pretrained(tmp_path / "base")
    adapter = pulled(adapted(base, r=6), tmp_path / "release")
    (tmp_path / "release" / "recipe.json").write_text(json.dumps({"base": str(tmp_path / "base")}))
    result = export_adapter(adapter, tmp_path / "out", to, base=tmp_path / "base")
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
    ]
    PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tmp_path / "base"), tmp_path / "out")
    words = shlex.split(result.launch)
    if to == "vllm":
        # vLLM takes some ranks only.
        assert words[:3] == ["vllm", "serve", str(tmp_path / "base")]
        assert words[3:] == ["--enable-lora", "--max-lora-rank", "8", "--lora-modules", f"name={tmp_path / 'out'}"]
    if to == "sglang":
        assert words[-2:] == ["--lora-paths", f"name={tmp_path / 'out'}"]
        assert "--max-lora-rank 6" in result.launch
    assert (to == "peft") == (result.launch == "")


def test_a_merged_export_is_a_model(tmp_path: Path) -> None:
    model = served.write("llama", tmp_path)
    result = export_adapter(tmp_path / "adapter", tmp_path / "out", "vllm", base=tmp_path / "base", merged=True)
    assert result.launch == f"vllm serve {tmp_path / 'out'}"
    ids = torch.arange(3, 20)[None]
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    with torch.no_grad():
        wanted, made = model(input_ids=ids).logits, merged(input_ids=ids).logits
    assert float((made - wanted).norm() / wanted.norm()) < 0.05
    export_adapter(tmp_path / "adapter", tmp_path / "o", "ollama", base=tmp_path / "base", merged=True)
    assert (tmp_path / "o" / "Modelfile").read_text() == "FROM ./model\n"
    with pytest.raises(UnsupportedExport, match=r"convert_hf_to_gguf.py"):
        export_adapter(tmp_path / "adapter", tmp_path / "b.gguf", "gguf", base=tmp_path / "base", merged=True)


def test_existing_files_are_replaced_only_when_asked(tmp_path: Path) -> None:
    served.write("gpt2", tmp_path)
    (tmp_path / "a.gguf").write_bytes(b"mine")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "notes.txt").write_text("mine")
    for output, to in ((tmp_path / "a.gguf", "gguf"), (tmp_path / "out", "peft"), (tmp_path / "out", "gguf")):
        with pytest.raises(ExportError, match=r"exists|not empty|is a folder"):
            export_adapter(tmp_path / "adapter", output, to, base=tmp_path / "base")  # type: ignore[arg-type]
    assert (tmp_path / "a.gguf").read_bytes() == b"mine"
    export_adapter(tmp_path / "adapter", tmp_path / "a.gguf", "gguf", base=tmp_path / "base", overwrite=True)
    assert (tmp_path / "a.gguf").read_bytes()[:4] == b"GGUF"
    export_adapter(tmp_path / "adapter", tmp_path / "out", "peft", base=tmp_path / "base", overwrite=True)
    assert (tmp_path / "out" / "notes.txt").read_text() == "mine"


def test_a_release_of_a_base_in_a_folder_is_named_where_the_base_must_be(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Before, the message named a folder of the cache."""
    hub = str(tmp_path / "registry")
    push_adapter(served.write("gpt2", tmp_path), "org/name", version="1.0.0", hub=hub)
    reason = "does not say which base model it is for: it was trained on a model in a folder, of which it has the"
    for words in (["export", "org/name@1.0.0", str(tmp_path / "out"), "--to", "peft"], ["try", "org/name", "-p", "a"]):
        with pytest.raises(SystemExit):
            main([*words, "--hub", hub])
        told = " ".join(capsys.readouterr().err.split())
        assert told.endswith(f"org/name@1.0.0 {reason} fingerprint. Pass --base.")
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    (tmp_path / "adapter" / "adapter_config.json").write_text(json.dumps({**config, "base_model_name_or_path": None}))
    with pytest.raises(MergeError, match=r"^The adapter in .*adapter does not say which base model it is for\. Pass"):
        export_adapter(tmp_path / "adapter", tmp_path / "out", "peft")


def test_a_message_names_an_option_and_its_value_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["export", str(tmp_path), str(tmp_path / "a.gguf"), "--to", "gguf", "--merged"])
    assert "export with --to peft and --merged, and give" in " ".join(capsys.readouterr().err.split())


def test_a_link_that_others_planted_beside_an_export_is_not_followed(tmp_path: Path) -> None:
    served.write("gpt2", tmp_path)
    (tmp_path / "secret").write_text("mine")
    (tmp_path / "theirs").mkdir()
    (tmp_path / "a.gguf.partial").symlink_to(tmp_path / "secret")
    (tmp_path / ".out.partial").symlink_to(tmp_path / "theirs")
    export_adapter(tmp_path / "adapter", tmp_path / "a.gguf", "gguf", base=tmp_path / "base")
    export_adapter(tmp_path / "adapter", tmp_path / "out", "peft", base=tmp_path / "base")
    assert (tmp_path / "secret").read_text() == "mine"
    assert not list((tmp_path / "theirs").iterdir())
    assert not (tmp_path / "a.gguf").is_symlink()
    assert read(tmp_path / "a.gguf")[0]["general.architecture"] == "gpt2"
    assert sorted(path.name for path in tmp_path.iterdir() if not path.is_symlink()) == [
        *("a.gguf", "adapter", "base", "out", "secret", "theirs"),
    ]


def test_links_in_the_folder_of_an_export_are_replaced(tmp_path: Path) -> None:
    served.write("gpt2", tmp_path)
    (tmp_path / "secret").write_text("mine")
    out = tmp_path / "out"
    out.mkdir()
    for name in ("Modelfile", "adapter.gguf", "adapter_config.json", "adapter_model.safetensors"):
        (out / name).symlink_to(tmp_path / "secret")
    cases: list[dict[str, Any]] = [{"to": "ollama", "merged": True}, {"to": "ollama"}, {"to": "peft"}]
    for settings in cases:
        export_adapter(tmp_path / "adapter", out, base=tmp_path / "base", model="tiny:1b", overwrite=True, **settings)
    assert (tmp_path / "secret").read_text() == "mine"
    assert not [path for path in out.iterdir() if path.is_symlink()]


def test_the_command_prints_how_to_serve(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    served.write("gpt2", tmp_path)
    words = ["export", str(tmp_path / "adapter"), str(tmp_path / "a.gguf"), "--to", "gguf"]
    with pytest.raises(SystemExit) as ended:
        main([*words, "--base", str(tmp_path / "base")])
    assert not ended.value.code
    assert f"llama-server --model BASE.gguf --lora {tmp_path / 'a.gguf'}" in capsys.readouterr().out


def test_unknown_formats_and_dtypes_are_named(tmp_path: Path) -> None:
    for settings, told in (({"to": "onnx"}, "'onnx'"), ({"to": "gguf", "dtype": "q8"}, "'q8'")):
        with pytest.raises(ExportError, match=told):
            export_adapter(tmp_path, tmp_path / "out", **settings)

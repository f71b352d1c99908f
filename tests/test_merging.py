"""Merging: the merged model computes what the trained one does, in one copy's memory, and says how far it is off."""

from __future__ import annotations

import gc
import json
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
import twin
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config, GPT2LMHeadModel, PreTrainedModel

from lora_plugins import prepare_model
from lora_plugins.errors import AdapterMismatch, MergeError
from lora_plugins.merging import weights
from lora_plugins.merging.job import RECIPE_FILE
from lora_plugins.merging.merge import merge_and_save
from lora_plugins.merging.probe import compare_logits
from lora_plugins.merging.weights import unquantized_layers
from registry import pull_adapter, push_adapter

WORDS = 320


def gpt2() -> PreTrainedModel:
    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config(vocab_size=WORDS, n_embd=32, n_layer=2, n_head=4, n_positions=128))


def bloom() -> PreTrainedModel:
    torch.manual_seed(0)
    return tiny.BloomForCausalLM(tiny.BloomConfig(vocab_size=WORDS, hidden_size=32, n_layer=2, n_head=4))


def llama(**config: Any) -> PreTrainedModel:
    return tiny.llama(vocab_size=WORDS, **config)


def make(
    folder: Path,
    model: PreTrainedModel,
    quantization: str | None = "int8",
    dtype: torch.dtype = torch.float32,
    **arguments: Any,
) -> tuple[Path, PreTrainedModel]:
    """Write a base and an adapter for it whose values are no zeros; returns the adapter and the model with it."""
    model.to(dtype).save_pretrained(folder / "base")
    twin.make_tokenizer().save_pretrained(folder / "base")
    base = AutoModelForCausalLM.from_pretrained(folder / "base", dtype="auto")
    trained = prepare_model(base, quantization=quantization, compute_dtype="float32", **arguments)
    generator = torch.Generator().manual_seed(1)
    for name, parameter in trained.named_parameters():
        if "lora_B" in name or "modules_to_save" in name:
            parameter.data += 0.05 * torch.randn(parameter.shape, generator=generator)
    trained.save_pretrained(folder / "adapter")
    record: dict[str, Any] = {"base": str(folder / "base"), "quantization": None}
    if quantization:
        record["quantization"] = {"name": quantization, "skip_modules": unquantized_layers(trained)}
    (folder / "adapter" / RECIPE_FILE).write_text(json.dumps(record))
    return folder / "adapter", trained


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=torch.arange(3, 40)[None]).logits.float()


def trained_logits(trained: Any) -> torch.Tensor:
    """With dropout off and the backend in the kernel of training, whose weights are what is merged."""
    trained.eval()
    for module in trained.modules():
        if weights.owner_of(module) is not None:
            module.train()
    return logits(trained)


def reload(folder: Path) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


# -- what is computed --------------------------------------------------------------------------


@pytest.mark.parametrize("quantization", ["int8", "nf4", None])
@pytest.mark.parametrize("make_model", [bloom, llama, gpt2])
def test_same_computes_what_was_trained(
    tmp_path: Path, make_model: Callable[[], PreTrainedModel], quantization: str | None
) -> None:
    adapter, trained = make(tmp_path, make_model(), quantization)
    result = merge_and_save(adapter, tmp_path / "merged", "same")
    assert torch.allclose(logits(reload(tmp_path / "merged")), trained_logits(trained), atol=1e-4)
    assert result.distance is not None
    assert result.distance.largest < 1e-4
    assert result.dtype == "float32"
    if quantization:
        float_weights = merge_and_save(adapter, tmp_path / "fp16", "fp16")
        assert float_weights.distance is not None
        assert float_weights.distance.relative > 10 * result.distance.relative


@pytest.mark.parametrize(("dtype", "name"), [("fp16", torch.float16), ("bf16", torch.bfloat16)])
def test_sixteen_bits_are_the_float_base_and_the_update_rounded_once(
    tmp_path: Path, dtype: str, name: torch.dtype
) -> None:
    adapter, trained = make(tmp_path, bloom(), None)
    merge_and_save(adapter, tmp_path / "merged", dtype)
    expected = trained.merge_and_unload().state_dict()
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype="auto")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    for key, tensor in merged.state_dict().items():
        assert tensor.dtype == name
        # The base is rounded when it is loaded, the sum once more.
        rounded = base.state_dict()[key].to(name).float() + (expected[key] - base.state_dict()[key])
        assert torch.allclose(tensor.float(), rounded, rtol=2 * torch.finfo(name).eps, atol=1e-6), key


def test_same_in_bf16_rounds_base_and_update_together(tmp_path: Path) -> None:
    adapter, trained = make(tmp_path, llama(), "int8", torch.bfloat16)
    result = merge_and_save(adapter, tmp_path / "merged", "same")
    assert result.dtype == "bfloat16"
    layer = trained.base_model.model.model.layers[0].self_attn.q_proj
    backend = weights.owner_of(layer.base_layer)
    assert backend is not None
    exact = backend.dequantize(layer.base_layer).float() + layer.get_delta_weight("default").float()
    weight = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype="auto").model.layers[0].self_attn.q_proj
    assert torch.equal(weight.weight, exact.to(torch.bfloat16))


def test_dora_is_computed_in_float32(tmp_path: Path) -> None:
    """Its norms of whole rows would not survive sixteen bits."""
    adapter, trained = make(tmp_path, bloom(), None, torch.bfloat16, use_dora=True)
    merge_and_save(adapter, tmp_path / "merged", "same", probe=None)
    exact = trained.float().merge_and_unload().transformer.h[1].self_attention.query_key_value.weight
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype="auto")
    weight = merged.transformer.h[1].self_attention.query_key_value.weight
    assert (weight != exact.to(torch.bfloat16)).float().mean() < 0.001


@pytest.mark.parametrize("variant", [{"use_dora": True}, {"use_rslora": True}, {"lora_bias": True, "bias": "none"}])
def test_variants_of_lora(tmp_path: Path, variant: dict[str, Any]) -> None:
    adapter, trained = make(tmp_path, bloom(), None, **variant)
    merge_and_save(adapter, tmp_path / "merged", "same")
    assert torch.allclose(logits(reload(tmp_path / "merged")), trained_logits(trained), atol=1e-4)


# -- tied weights ------------------------------------------------------------------------------


def test_tied_weights_stay_tied_and_are_stored_once(tmp_path: Path) -> None:
    adapter, _ = make(tmp_path, bloom())
    result = merge_and_save(adapter, tmp_path / "merged")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype="auto")
    assert merged.config.tie_word_embeddings
    assert merged.lm_head.weight is merged.get_input_embeddings().weight
    size = sum(parameter.nbytes for parameter in merged.parameters())
    assert result.bytes == size
    assert (tmp_path / "merged" / "model.safetensors").stat().st_size < size * 1.1


def test_adapter_on_a_tied_head_leaves_the_embedding_alone(tmp_path: Path) -> None:
    adapter, trained = make(tmp_path, llama(tie_word_embeddings=True), None, target_modules=["q_proj", "lm_head"])
    merge_and_save(adapter, tmp_path / "merged", "same")
    merged, base = reload(tmp_path / "merged"), reload(tmp_path / "base")
    assert not merged.config.tie_word_embeddings
    assert torch.equal(merged.get_input_embeddings().weight, base.get_input_embeddings().weight)
    assert not torch.equal(merged.lm_head.weight, base.lm_head.weight)
    assert torch.allclose(logits(merged), trained_logits(trained), atol=1e-4)


def test_head_trained_whole_is_untied_and_takes_the_dtype(tmp_path: Path) -> None:
    adapter, trained = make(tmp_path, llama(tie_word_embeddings=True), None, modules_to_save=["lm_head"])
    merge_and_save(adapter, tmp_path / "merged", "bf16")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype="auto")
    assert {parameter.dtype for parameter in merged.parameters()} == {torch.bfloat16}
    assert compare_logits(trained_logits(trained)[0], logits(merged)[0]).relative < 0.02


def test_layers_that_share_a_weight_are_not_merged() -> None:
    """An encoder and a decoder with one set of weights would both add their adapters to it."""
    model = llama()
    first, second = (layer.self_attn.q_proj for layer in model.model.layers[:2])
    second.weight = first.weight
    with pytest.raises(MergeError, match=r"layers\.0\.self_attn\.q_proj and model\.layers\.1.* share one weight"):
        weights._untie(second, model, weights._shared_weights(model))


# -- files -------------------------------------------------------------------------------------


def test_shards_have_the_size_asked_for_and_load(tmp_path: Path) -> None:
    adapter, trained = make(tmp_path, bloom(), None)
    merge_and_save(adapter, tmp_path / "merged", "same", max_shard_size="60KB")
    assert len(list((tmp_path / "merged").glob("model-*.safetensors"))) > 1
    assert torch.allclose(logits(reload(tmp_path / "merged")), trained_logits(trained), atol=1e-4)
    # Fewer files the next time: none of the old ones may stay.
    merge_and_save(adapter, tmp_path / "merged", "same", overwrite=True)
    assert [path.name for path in (tmp_path / "merged").glob("model*")] == ["model.safetensors"]


@pytest.mark.parametrize(
    "name", ["model.safetensors", "model-00001-of-00002.safetensors", "model.safetensors.index.json"]
)
def test_weights_without_a_configuration_are_replaced_only_when_asked(name: str, tmp_path: Path) -> None:
    adapter, _ = make(tmp_path, bloom(), None)
    (tmp_path / "merged").mkdir()
    (tmp_path / "merged" / name).write_bytes(b"weights of a download that goes on")
    with pytest.raises(MergeError, match=rf"already holds a model \({name}\)"):
        merge_and_save(adapter, tmp_path / "merged", "same", probe=None)
    assert (tmp_path / "merged" / name).read_bytes() == b"weights of a download that goes on"
    merge_and_save(adapter, tmp_path / "merged", "same", overwrite=True, probe=None)
    assert reload(tmp_path / "merged")


@pytest.mark.parametrize("name", ["model_ema.safetensors", "model.fp16.safetensors", "models.index.json"])
def test_files_of_others_stay_beside_a_merged_model(name: str, tmp_path: Path) -> None:
    adapter, _ = make(tmp_path, bloom(), None)
    (tmp_path / "merged").mkdir()
    (tmp_path / "merged" / name).write_bytes(b"of somebody else")
    merge_and_save(adapter, tmp_path / "merged", "same", probe=None)
    merge_and_save(adapter, tmp_path / "merged", "same", overwrite=True, probe=None)
    assert (tmp_path / "merged" / name).read_bytes() == b"of somebody else"


def test_tokenizer_and_recipe_go_with_the_model(tmp_path: Path) -> None:
    adapter, _ = make(tmp_path, bloom())
    merge_and_save(adapter, tmp_path / "merged")
    assert AutoTokenizer.from_pretrained(tmp_path / "merged")("Hi")["input_ids"]
    assert (tmp_path / "merged" / RECIPE_FILE).read_text() == (adapter / RECIPE_FILE).read_text()
    assert not list((tmp_path / "merged").glob(".*"))


def test_rest_of_an_aborted_merge_is_no_hindrance(tmp_path: Path) -> None:
    adapter, _ = make(tmp_path, bloom())
    (tmp_path / "merged" / ".merging").mkdir(parents=True)
    (tmp_path / "merged" / ".merging" / "model.safetensors").write_bytes(b"half")
    merge_and_save(adapter, tmp_path / "merged")
    assert reload(tmp_path / "merged")


# -- memory ------------------------------------------------------------------------------------


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of the storages that are alive, and their peak."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._seen: set[int] = set()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = function(*args, **(kwargs or {}))
        for leaf in tree_leaves((args, kwargs, output)):
            if isinstance(leaf, torch.Tensor) and leaf.device.type == "cpu":
                self._note(leaf.untyped_storage())
        return output

    def _note(self, storage: Any) -> None:
        if storage._cdata in self._seen:
            return
        self._seen.add(storage._cdata)
        self.now += storage.nbytes()
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._drop, storage._cdata, storage.nbytes())

    def _drop(self, key: int, size: int) -> None:
        self._seen.discard(key)
        self.now -= size


def peak_copies(adapter: Path, output: Path, dtype: str) -> float:
    """Peak of live tensor bytes in a merge, over the bytes of the model in the output's dtype."""
    gc.collect()
    with LiveBytes() as live:
        result = merge_and_save(adapter, output, dtype, probe=None)
    assert live.peak >= result.bytes, "the whole model is alive at some time"
    return live.peak / result.bytes


@pytest.fixture
def one_thread_loads(monkeypatch: pytest.MonkeyPatch) -> None:
    # A dispatch mode sees its own thread only.
    monkeypatch.setenv("HF_DEACTIVATE_ASYNC_LOAD", "1")


@pytest.mark.usefixtures("one_thread_loads")
@pytest.mark.parametrize("dtype", ["fp16", "bf16", "same"])
def test_peak_is_near_one_copy(tmp_path: Path, dtype: str) -> None:
    model = llama(layers=12, hidden_size=128, intermediate_size=256)
    adapter, _ = make(tmp_path, model, "int8", torch.bfloat16)
    assert peak_copies(adapter, tmp_path / "merged", dtype) <= 1.3


@pytest.mark.slow
@pytest.mark.usefixtures("one_thread_loads")
@pytest.mark.parametrize("dtype", ["fp16", "bf16", "same"])
def test_peak_of_a_real_model_is_near_one_copy(tmp_path: Path, dtype: str) -> None:
    from lora_plugins.commands.demo.model import demo_model
    from lora_plugins.errors import DemoError

    try:
        base = demo_model()
    except DemoError as error:
        pytest.skip(str(error))
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16)
    prepare_model(model, r=8).save_pretrained(tmp_path / "adapter")
    record = {"base": str(base), "quantization": {"name": "int8", "skip_modules": ["lm_head"]}}
    (tmp_path / "adapter" / RECIPE_FILE).write_text(json.dumps(record))
    del model
    assert peak_copies(tmp_path / "adapter", tmp_path / "merged", dtype) <= 1.3


# -- distance ----------------------------------------------------------------------------------


def test_distance_of_equal_and_of_shifted_logits_is_zero() -> None:
    values = torch.randn(5, 7, generator=torch.Generator().manual_seed(0))
    for other in (values, values + 3):
        distance = compare_logits(values, other)
        assert distance.relative == pytest.approx(0, abs=1e-6)
        assert distance.divergence == pytest.approx(0, abs=1e-6)
        assert distance.agreement == 1
        assert distance.tokens == 5


def test_distance_by_hand() -> None:
    first, second = torch.tensor([[1.0, -1.0]]), torch.tensor([[-1.0, 1.0]])
    distance = compare_logits(first, second)
    p = torch.tensor([1.0, -1.0]).softmax(0)
    assert distance.divergence == pytest.approx(float(2 * (p[0] - p[1])), rel=1e-5)
    assert (distance.largest, distance.relative, distance.agreement) == (2, 2, 0)


def test_probe_can_be_left_out(tmp_path: Path) -> None:
    adapter, _ = make(tmp_path, bloom())
    result = merge_and_save(adapter, tmp_path / "merged", probe=None)
    assert result.distance is None
    assert "Against" not in result.line()


# -- refusals ----------------------------------------------------------------------------------


def test_output_that_holds_a_model_is_kept(tmp_path: Path) -> None:
    adapter, _ = make(tmp_path, bloom())
    with pytest.raises(MergeError, match="already holds a model"):
        merge_and_save(adapter, tmp_path / "base")


def test_model_is_not_written_beside_an_adapter(tmp_path: Path) -> None:
    """transformers would load it and put the adapter on it a second time."""
    adapter, _ = make(tmp_path, bloom())
    with pytest.raises(MergeError, match="holds an adapter"):
        merge_and_save(adapter, adapter, overwrite=True)
    assert not (adapter / "config.json").exists()


def test_folder_has_no_revisions(tmp_path: Path) -> None:
    adapter, _ = make(tmp_path, bloom())
    with pytest.raises(MergeError, match=r"revision='v2' was given.* is a folder"):
        merge_and_save(adapter, tmp_path / "merged", revision="v2")


def test_distance_does_not_pass_for_one_from_the_trained_model_where_that_is_not_known(tmp_path: Path) -> None:
    adapter, _ = make(tmp_path, bloom())
    assert "Against the trained model" in merge_and_save(adapter, tmp_path / "known").line()
    (adapter / RECIPE_FILE).unlink()
    said = merge_and_save(adapter, tmp_path / "unknown", base=tmp_path / "base").line()
    assert "Against the adapter on the float base" in said
    assert "Against the trained model" not in said
    said = merge_and_save(adapter, tmp_path / "told", base=tmp_path / "base", quantization="none").line()
    assert "Against the trained model" in said


def test_manifest_of_a_release_says_how_the_base_was_quantized(tmp_path: Path) -> None:
    adapter, trained = make(tmp_path, bloom())
    (adapter / RECIPE_FILE).unlink()
    for version, facts in (("1.0.0", {"quantization": "int8"}), ("2.0.0", {"quantization": "not known"})):
        push_adapter(adapter, "org/name", version=version, training=facts, hub=tmp_path / "registry")
    pulled = [
        pull_adapter(f"org/name@{version}", hub=tmp_path / "registry", cache_dir=tmp_path / "cache").path
        for version in ("1.0.0", "2.0.0")
    ]
    merge_and_save(pulled[0], tmp_path / "merged", "same", base=tmp_path / "base")
    assert torch.allclose(logits(reload(tmp_path / "merged")), trained_logits(trained), atol=1e-4)
    with pytest.raises(MergeError, match="needs to know how the base was quantized"):
        merge_and_save(pulled[1], tmp_path / "unknown", "same", base=tmp_path / "base")


def test_unknown_dtype_is_named(tmp_path: Path) -> None:
    with pytest.raises(MergeError, match="'fp16', 'bf16', 'same', not 'fp8'"):
        merge_and_save(tmp_path, tmp_path / "merged", "fp8")


def test_same_needs_to_know_the_quantization(tmp_path: Path) -> None:
    adapter, trained = make(tmp_path, bloom())
    (adapter / RECIPE_FILE).unlink()
    base = tmp_path / "base"
    with pytest.raises(MergeError, match=r"no recipe\.json that says it"):
        merge_and_save(adapter, tmp_path / "merged", "same", base=base)
    merge_and_save(adapter, tmp_path / "merged", "same", base=base, quantization="int8")
    assert torch.allclose(logits(reload(tmp_path / "merged")), trained_logits(trained), atol=1e-4)


def test_missing_base_is_named(tmp_path: Path) -> None:
    adapter, _ = make(tmp_path, bloom())
    with pytest.raises(MergeError, match="nowhere"):
        merge_and_save(adapter, tmp_path / "merged", base=tmp_path / "nowhere")


def test_adapter_of_another_base_is_refused(tmp_path: Path) -> None:
    adapter, _ = make(tmp_path, bloom())
    torch.manual_seed(0)
    config = tiny.BloomConfig(vocab_size=WORDS, hidden_size=32, n_layer=1, n_head=4)
    tiny.BloomForCausalLM(config).save_pretrained(tmp_path / "small")
    twin.make_tokenizer().save_pretrained(tmp_path / "small")
    with pytest.raises(AdapterMismatch):
        merge_and_save(adapter, tmp_path / "merged", base=tmp_path / "small", probe=None)


def test_weights_that_overflow_are_refused(tmp_path: Path) -> None:
    model = bloom()
    with torch.no_grad():
        model.transformer.h[0].mlp.dense_h_to_4h.weight[0, 0] = 1e6
    adapter, _ = make(tmp_path, model, None)
    with pytest.raises(MergeError, match=r"dense_h_to_4h\.weight is not finite in float16.*bf16"):
        merge_and_save(adapter, tmp_path / "merged", probe=None)
    assert not (tmp_path / "merged").exists()
    merge_and_save(adapter, tmp_path / "merged", "bf16", probe=None)


def test_command_prints_the_distance_and_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from lora_plugins.commands.cli import program

    adapter, _ = make(tmp_path, bloom())
    for words in ([], ["--overwrite", "--json"]):
        with pytest.raises(SystemExit) as end:
            program(["merge", str(adapter), str(tmp_path / "merged"), "--dtype", "same", *words])
        assert not end.value.code
    line, _, text = capsys.readouterr().out.partition("{")
    assert "Against the trained model: logits differ by 0.00%" in line
    assert json.loads("{" + text)["distance"]["agreement"] == 1

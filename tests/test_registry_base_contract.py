"""An adapter is compared with a base before a weight is loaded; each kind of mismatch has its own message."""

from __future__ import annotations

import dataclasses
import json
import shutil
import time
import warnings
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from adapters import adapted, pulled
from peft import AutoPeftModelForCausalLM, PeftModel, get_peft_model_state_dict
from transformers import (
    AutoTokenizer,
    BertForSequenceClassification,
    CpmAntConfig,
    CpmAntForCausalLM,
    LlamaForCausalLM,
    pipeline,
)
from twin import make_tokenizer

from lora_plugins import prepare_model
from lora_plugins.adapters.files import adapter_shapes
from registry import check_contract
from registry.errors import BaseMismatch, IdentityWarning, IntegrityError, UnknownBase, UnsafeFile
from registry.formats.records import BaseRecord
from registry.hubs.huggingface import HuggingFaceHub
from registry.pulling.adapter import Adapter
from registry.testing import LoopbackHub

IDS = torch.arange(1, 9)[None]


def upset(model: Any) -> Any:
    """A model whose norms are not all ones, as those of a trained one."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name.lower():
                parameter.add_(torch.linspace(0.0, 0.1, parameter.numel()))
    return model


def base(layers: int = 2, seed: int = 0, **config: Any) -> Any:
    return upset(tiny.llama(layers, seed, **config))


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory) -> Adapter:
    root = tmp_path_factory.mktemp("contract")
    return pulled(adapted(base()), root / "release")


def loads_silently(model: Any, adapter: Adapter) -> None:
    """PEFT by itself loads it, and only says the usual things."""
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        PeftModel.from_pretrained(model, adapter.path)
    assert [str(w.message) for w in told if "missing" in str(w.message) or "unexpected" in str(w.message)] == []


def test_its_own_base_fits_and_is_recognized(adapter: Adapter) -> None:
    result = adapter.check(base())
    assert (result.tensors, result.identity) == (8, "verified")
    assert str(result) == "compatible, the base is the one it was trained on: 8 tensors"
    model = adapter.load(base())
    expected = adapted(base())
    with torch.no_grad():
        assert torch.equal(model(IDS).logits, expected(IDS).logits)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_its_own_base_is_recognized_in_another_dtype(adapter: Adapter, dtype: torch.dtype) -> None:
    assert adapter.check(base().to(dtype)).identity == "verified"


@pytest.mark.parametrize("backend", ["int8", "nf4"])
def test_its_own_base_is_recognized_when_quantized(adapter: Adapter, backend: str) -> None:
    model = prepare_model(base(), r=2, quantization=backend)
    assert adapter.check(model).identity == "verified"


def test_a_base_that_has_adapters_already_is_checked_without_them(adapter: Adapter) -> None:
    model = adapted(base())
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    names = list(dict(model.named_modules()))
    assert adapter.check(model).identity == "verified"
    assert list(dict(model.named_modules())) == names
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert all(tensor.device.type == "cpu" for tensor in model.state_dict().values())


# -- must be refused ---------------------------------------------------------------------------------------------


def test_more_layers_than_the_base_has(adapter: Adapter) -> None:
    one = base(layers=1)
    with pytest.raises(BaseMismatch, match=r"4 of 8 tensors have no place in it, first \S*layers\.1\S*") as caught:
        adapter.load(one)
    assert "num_hidden_layers is 1, was 2" in str(caught.value)
    assert not isinstance(one, PeftModel)
    assert not [name for name, _ in one.named_parameters() if "lora_" in name]
    loads_silently(base(layers=1), adapter)


def test_fewer_layers_than_the_base_has(adapter: Adapter) -> None:
    with pytest.raises(BaseMismatch, match=r"4 of its 12 places get no tensor, first \S*layers\.2\S*"):
        adapter.check(base(layers=3))


def test_another_base_of_the_same_shape(adapter: Adapter) -> None:
    other = base(seed=1)
    with pytest.raises(BaseMismatch, match=r"same shapes and other weights: model\.embed_tokens\.weight of the base"):
        adapter.load(other)
    loads_silently(base(seed=1), adapter)


def test_another_rank(adapter: Adapter, tmp_path: Path) -> None:
    manifest = dataclasses.replace(adapter.manifest, config={**adapter.manifest.config, "r": 8})
    folder = tmp_path / "other"
    folder.mkdir()
    for file in Path(adapter.path).iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps({**config, "r": 8}))
    other = dataclasses.replace(adapter, manifest=manifest, path=str(folder))
    with pytest.raises(BaseMismatch, match=r"8 tensors have another shape, first \S+ is \(4, 32\), has to be \(8,"):
        other.check(base())


def test_another_vocabulary(adapter: Adapter) -> None:
    with pytest.raises(BaseMismatch, match=r"vocabulary has 100 entries here and had 96 .*resize_token_emb"):
        adapter.load(base(vocab_size=100))


def test_another_width(adapter: Adapter) -> None:
    with pytest.raises(BaseMismatch, match=r"is \(4, 32\), has to be \(4, 64\) here.*hidden_size is 64, was 32"):
        adapter.check(base(hidden_size=64))


def test_another_architecture(adapter: Adapter) -> None:
    with pytest.raises(BaseMismatch, match="model_type is 'gpt2', was 'llama'"):
        adapter.check(tiny.gpt2())


def test_another_computation_of_the_same_shape(adapter: Adapter) -> None:
    with pytest.raises(BaseMismatch, match=r"rms_norm_eps is 0\.1, was 1e-06"):
        adapter.check(base(rms_norm_eps=0.1))


def test_keys_that_differ_by_a_prefix_get_a_hint(adapter: Adapter) -> None:
    tensors = {
        name.replace("model.model.layers", "model.model.language_model.layers"): record
        for name, record in adapter.manifest.tensors.items()
    }
    renamed = dataclasses.replace(adapter, manifest=dataclasses.replace(adapter.manifest, tensors=tensors))
    with pytest.raises(BaseMismatch) as caught:
        renamed.check(base())
    assert (
        "only a prefix differs: rename 'base_model.model.model.language_model' to 'base_model.model.model' in its keys "
        "and all 8 find their place"
    ) in str(caught.value)


def test_fields_that_this_peft_would_ignore(adapter: Adapter, tmp_path: Path) -> None:
    for file in Path(adapter.path).iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    newer = {**config, "use_magic": True, "spare_field": None, "peft_version": "99.0"}
    (tmp_path / "adapter_config.json").write_text(json.dumps(newer))
    with pytest.raises(BaseMismatch, match=r"by PEFT 99\.0 with use_magic=True, which PEFT .* pip install -U peft"):
        dataclasses.replace(adapter, path=str(tmp_path)).check(base())
    del newer["use_magic"]
    (tmp_path / "adapter_config.json").write_text(json.dumps(newer))
    assert dataclasses.replace(adapter, path=str(tmp_path)).check(base()).tensors == 8


# -- the base as folder, configuration, id -----------------------------------------------------------------------


def test_a_base_in_a_folder(adapter: Adapter, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base().save_pretrained(tmp_path / "same")
    base(seed=1).to(torch.bfloat16).save_pretrained(tmp_path / "other", max_shard_size="10KB")
    assert (tmp_path / "other" / "model.safetensors.index.json").exists()
    assert adapter.check(tmp_path / "same").identity == "verified"
    with pytest.raises(BaseMismatch, match=r"the model in .*other: it has the same shapes and other weights"):
        adapter.check(str(tmp_path / "other"))
    monkeypatch.chdir(tmp_path)
    assert adapter.check("./same").identity == "verified"
    model = adapter.load(tmp_path / "same", dtype=torch.bfloat16)
    assert model.get_base_model().dtype == torch.bfloat16
    with pytest.raises(BaseMismatch, match="same shapes and other weights"):
        adapter.load(tmp_path / "other")
    with pytest.raises(UnknownBase, match="does not exist"):
        adapter.check(tmp_path / "missing")


def test_a_base_of_which_only_the_configuration_is_known(adapter: Adapter) -> None:
    result = adapter.check(base().config)
    assert result.identity == "unverified"
    assert "identity not verified" in str(result)
    with pytest.raises(BaseMismatch, match="num_hidden_layers is 1"):
        adapter.check(base(layers=1).config)


def test_a_base_on_a_hub_is_read_in_parts(
    adapter: Adapter, loopback_hub: LoopbackHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read = []
    original = HuggingFaceHub.read_range

    def counted(self: HuggingFaceHub, *args: Any) -> bytes:
        content = original(self, *args)
        if args[2] == "model.safetensors":
            read.append(len(content))
        return content

    monkeypatch.setattr(HuggingFaceHub, "read_range", counted)
    for name, seed in (("same", 0), ("other", 1)):
        base(seed=seed).save_pretrained(tmp_path / name)
        loopback_hub.create_repo(f"org/{name}")
        loopback_hub.commit(f"org/{name}", {f.name: f.read_bytes() for f in (tmp_path / name).iterdir()})
    options = {"base_hub": loopback_hub.endpoint, "token": loopback_hub.token}
    assert adapter.check("org/same", **options).identity == "verified"
    with pytest.raises(BaseMismatch, match=r"org/other at commit \w{12}: it has the same shapes and other weights"):
        adapter.check("org/other@main", **options)
    assert 0 < sum(read) < (tmp_path / "same" / "model.safetensors").stat().st_size


def test_something_that_is_no_base(adapter: Adapter) -> None:
    for nothing in (42, None, "https://example.com", "a/b/c"):
        with pytest.raises(UnknownBase, match="is not a base model"):
            adapter.check(nothing)


# -- loading -----------------------------------------------------------------------------------------------------


def test_a_base_known_by_fingerprint_has_to_be_given(adapter: Adapter) -> None:
    with pytest.raises(UnknownBase, match=r"known by its fingerprint only.*adapter\.load\(model\)"):
        adapter.load()


def test_without_a_fingerprint_loading_says_that_identity_is_open(adapter: Adapter) -> None:
    manifest = dataclasses.replace(adapter.manifest, base=BaseRecord("org/base", "c" * 40))
    unknown = dataclasses.replace(adapter, manifest=manifest)
    with pytest.warns(IdentityWarning, match=r"could not be verified"):
        unknown.load(base())
    with warnings.catch_warnings():
        warnings.simplefilter("error", IdentityWarning)
        unknown.load(base(), trust_identity=True)


def test_who_asks_for_it_is_warned_of_a_base_that_is_only_of_the_right_shape(adapter: Adapter, tmp_path: Path) -> None:
    config = base().config
    open_ = r"fits this base by names, shapes and configuration; .* could not be verified: compared: names and shapes"
    with pytest.warns(IdentityWarning, match=open_):
        assert check_contract(adapter, config, warn=True).identity == "unverified"
    plain = copy_release(adapter, tmp_path / "plain")
    (plain / "adapter_manifest.json").unlink()
    with warnings.catch_warnings():
        warnings.simplefilter("error", IdentityWarning)
        assert check_contract(adapter, config).identity == "unverified"
        assert check_contract(adapter, base(), warn=True).identity == "verified"
        # A plain folder records no base, so there is nothing that could have been verified.
        assert check_contract(plain, base(), warn=True).identity == "unverified"


def test_a_release_whose_files_were_changed_behind_its_back_is_refused(adapter: Adapter, tmp_path: Path) -> None:
    """It was checked when it was pulled; what stands in its folder now is what would be loaded."""
    folder = copy_release(adapter, tmp_path / "changed")
    changed = dataclasses.replace(adapter, path=str(folder))
    config, weights = folder / "adapter_config.json", folder / "adapter_model.safetensors"
    fields, sound = json.loads(config.read_text()), weights.read_bytes()
    assert changed.check(base()).tensors == 8
    for name, value in (("r", 8), ("target_modules", ["v_proj"]), ("use_rslora", True)):
        config.write_text(json.dumps({**fields, name: value}))
        with pytest.raises(IntegrityError, match=f"do not agree: {name} is"):
            changed.check(base())
    config.write_text(json.dumps(fields))
    for content, error in ((sound[:-1], UnsafeFile), (b"", UnsafeFile)):
        weights.write_bytes(content)
        with pytest.raises(error, match="not a safetensors file"):
            changed.check(base())
    weights.write_bytes(sound)
    assert changed.check(base()).tensors == 8


def copy_release(adapter: Adapter, folder: Path) -> Path:
    """Copy the files of a release to a folder that can be changed."""
    shutil.copytree(adapter.path, folder, copy_function=shutil.copyfile)
    folder.chmod(0o755)
    return folder


def test_training_goes_on(adapter: Adapter, tmp_path: Path) -> None:
    model = adapter.load(base(), is_trainable=True)
    trainable = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert trainable
    assert all("lora_" in name for name in trainable)
    before = tiny.adapter_tensors(model)
    tiny.trainer(tmp_path, model, max_steps=2).train()
    assert not any(torch.equal(tensor, before[name]) for name, tensor in tiny.adapter_tensors(model).items())
    frozen = adapter.load(base())
    assert not [name for name, parameter in frozen.named_parameters() if parameter.requires_grad]


def test_it_is_a_folder_wherever_one_is_expected(adapter: Adapter, tmp_path: Path) -> None:
    expected = adapted(base())
    loaded = PeftModel.from_pretrained(base(), adapter)
    in_place = base()
    in_place.load_adapter(adapter.path)
    prepared = prepare_model(base(), adapter=adapter)
    with torch.no_grad():
        for model in (loaded, in_place, prepared.eval()):
            assert torch.equal(model(IDS).logits, expected(IDS).logits)
    assert adapter_shapes(loaded, "default") == {n: r.shape for n, r in adapter.manifest.tensors.items()}


def test_auto_classes_and_pipelines_take_it(tmp_path: Path) -> None:
    folder = tmp_path / "base"
    tokenizer = make_tokenizer()
    base(vocab_size=len(tokenizer)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    model = adapted(LlamaForCausalLM.from_pretrained(folder))
    adapter = pulled(model, tmp_path / "release")
    # The published configuration names no folder of the machine that trained it; here it is put in its place.
    config = json.loads(Path(adapter.path, "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] is None
    Path(adapter.path, "adapter_config.json").write_text(json.dumps({**config, "base_model_name_or_path": str(folder)}))
    auto = AutoPeftModelForCausalLM.from_pretrained(adapter)
    with torch.no_grad():
        assert torch.equal(auto(IDS).logits, model(IDS).logits)
    generate = pipeline("text-generation", model=adapter.path, tokenizer=AutoTokenizer.from_pretrained(folder))
    merged = pipeline("text-generation", model=adapter.load(folder), tokenizer=tokenizer)
    options: dict[str, Any] = {"max_new_tokens": 5, "do_sample": False}
    assert generate("Amanda:", **options) == merged("Amanda:", **options)


def test_a_classifier_gets_its_head_and_its_number_of_classes(tmp_path: Path) -> None:
    upset(tiny.bert_classifier()).save_pretrained(tmp_path / "base")
    trained = BertForSequenceClassification.from_pretrained(
        tmp_path / "base", num_labels=5, ignore_mismatched_sizes=True
    )
    model = adapted(trained, task_type="SEQ_CLS", target_modules=["query"]).eval()
    adapter = pulled(model, tmp_path / "release")
    assert adapter.manifest.architecture.num_labels == 5
    assert adapter.check(tmp_path / "base").identity == "verified"
    loaded = adapter.load(tmp_path / "base").eval()
    with torch.no_grad():
        assert torch.equal(loaded(IDS).logits, model(IDS).logits)


def test_added_tokens_come_with_the_adapter(tmp_path: Path) -> None:
    base().save_pretrained(tmp_path / "base")
    grown = LlamaForCausalLM.from_pretrained(tmp_path / "base")
    grown.resize_token_embeddings(100)
    model = adapted(grown)
    adapter = pulled(model, tmp_path / "release")
    assert "base_model.model.model.embed_tokens.weight" in adapter.manifest.tensors
    ids = torch.tensor([[1, 97, 99, 5]])
    with torch.no_grad():
        assert torch.equal(adapter.load(tmp_path / "base")(ids).logits, model(ids).logits)
    with pytest.raises(BaseMismatch, match="vocabulary has 96 entries here and had 100"):
        adapter.load(LlamaForCausalLM.from_pretrained(tmp_path / "base"))


@pytest.mark.parametrize(
    ("make", "lora"),
    [
        (tiny.gpt2, {"target_modules": ["c_attn"], "fan_in_fan_out": True}),
        (tiny.bloom, {"target_modules": ["query_key_value"], "use_dora": True}),
        (tiny.llama, {"target_modules": ["q_proj", "embed_tokens"]}),
        (tiny.llama, {"target_modules": ["q_proj"], "trainable_token_indices": [1, 2]}),
        (tiny.llama, {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}),
        (tiny.llama, {"target_modules": "all-linear", "rank_pattern": {"q_proj": 2}, "use_rslora": True}),
        (tiny.llama, {"target_modules": r".*\.(q|v)_proj", "lora_bias": True}),
        (tiny.bert_classifier, {"target_modules": ["query"], "task_type": "SEQ_CLS"}),
        (tiny.llama, {"target_modules": ["q_proj"], "task_type": None, "init_lora_weights": "gaussian"}),
    ],
)
def test_every_kind_of_adapter_fits_its_own_base(make: Any, lora: dict[str, Any], tmp_path: Path) -> None:
    model = adapted(make(), **lora)
    adapter = pulled(model, tmp_path / "release", allow=["lm_head", "embed_tokens"])
    assert adapter.check(make()).identity == "verified"
    loaded = adapter.load(make())
    stored = get_peft_model_state_dict(model, save_embedding_layers=False)
    again = get_peft_model_state_dict(loaded, save_embedding_layers=False)
    assert stored.keys() == again.keys()
    assert all(torch.equal(tensor, again[name]) for name, tensor in stored.items())


SLOW = ".{0,60}.{0,60}.{0,60}(?=#)"


@pytest.mark.parametrize("field", ["target_modules", "exclude_modules"])
def test_an_expression_that_is_slow_on_a_large_base_is_refused_before_peft_gets_it(
    adapter: Adapter, tmp_path: Path, field: str
) -> None:
    """Each name takes milliseconds, which is cheap for one and minutes for the modules of a large model."""
    shutil.copytree(adapter.path, tmp_path / "folder", copy_function=shutil.copyfile)
    (tmp_path / "folder").chmod(0o755)
    (tmp_path / "folder" / "adapter_manifest.json").unlink()
    path = tmp_path / "folder" / "adapter_config.json"
    config = json.loads(path.read_text())
    config[field] = SLOW
    path.write_text(json.dumps(config))
    model = base()
    # Names as long as those of a multimodal mixture of experts, and as many modules as one of these has.
    model.extra = torch.nn.ModuleDict({f"{'x' * 110}{index}": torch.nn.Identity() for index in range(6000)})
    started = time.monotonic()
    with pytest.raises(UnsafeFile, match=rf"{field} of adapter_config\.json has the expression .* too long to match"):
        check_contract(tmp_path / "folder", model)
    assert time.monotonic() - started < 60  # 2 seconds of processor time, on a machine that may be busy


def test_rows_that_a_class_adds_to_its_vocabulary_are_not_added_tokens(tmp_path: Path) -> None:
    """CPM-Ant, Mllama and Moshi make more rows of the embedding than the configuration names entries."""
    config = CpmAntConfig(
        vocab_size=96, hidden_size=32, num_attention_heads=4, dim_head=8, dim_ff=64, num_hidden_layers=1
    )
    CpmAntForCausalLM(config).save_pretrained(tmp_path / "base")
    model = adapted(CpmAntForCausalLM.from_pretrained(tmp_path / "base"), target_modules=["project_q"])
    adapter = pulled(model, tmp_path / "release")
    assert adapter.manifest.architecture.vocab_size == 96 + 32 * 32
    for base in (tmp_path / "base", CpmAntForCausalLM.from_pretrained(tmp_path / "base")):
        assert adapter.check(base).identity == "verified"

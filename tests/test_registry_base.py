"""What fits a base and what does not: heads, vocabularies, classes, fields, and files that would change the base."""

from __future__ import annotations

import dataclasses
import json
import re
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
import transformers
from adapters import adapted, pulled
from huggingface_hub import constants
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import model as lora_model
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import (
    AutoModelForSequenceClassification,
    DistilBertConfig,
    ElectraConfig,
    LlamaForCausalLM,
    PretrainedConfig,
    PreTrainedModel,
    RobertaConfig,
    ViTConfig,
    ViTForImageClassification,
)
from versions import needs

from lora_plugins import prepare_model, resolve_targets
from registry import check_contract, shorten_tables
from registry.base.classes import find_classes
from registry.errors import BaseMismatch, IntegrityError, InvalidAdapter, RegistryError, UnknownBase, UnsafeFile
from registry.formats.agreement import check_agreement
from registry.publishing.snapshot import read_state
from registry.pulling.adapter import Adapter
from registry.testing import LoopbackHub

sys.path.insert(0, str(Path(__file__).parent.parent / "tools"))

import small_models
from small_models import Case

IDS = torch.arange(1, 9)[None]
GROWN = torch.tensor([[1, 97, 99, 5]])

pytestmark = pytest.mark.filterwarnings("ignore")


def logits(model: Any, **inputs: Any) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model.eval()(**(inputs or {"input_ids": IDS})).logits
    return found


def randomise(model: Any) -> Any:
    torch.manual_seed(5)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.normal_(std=0.1)
    return model


def plain(folder: Path, target: Path, change: Callable[[dict[str, Any]], None] | None = None, **config: Any) -> Path:
    """A copy of an adapter folder with other tensors or fields."""
    target.mkdir()
    fields = {**json.loads((folder / "adapter_config.json").read_text()), **config}
    (target / "adapter_config.json").write_text(json.dumps(fields))
    tensors = load_file(folder / "adapter_model.safetensors")
    if change is not None:
        change(tensors)
    save_file(tensors, target / "adapter_model.safetensors", metadata={"format": "pt"})
    return target


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("plain") / "adapter"
    adapted(tiny.llama()).save_pretrained(path)
    return path


# -- many names ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("field", ["rank_pattern", "alpha_pattern"])
def test_of_a_table_of_many_names_peft_gets_one_key_for_each_number(
    tmp_path: Path, field: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """PEFT compiles every key anew for every target if there are more than 512."""
    look_up, seen = lora_model.get_pattern_key, set()

    def count(keys: Any, name: str) -> str:
        seen.add(len(keys))
        return look_up(keys, name)

    monkeypatch.setattr(lora_model, "get_pattern_key", count)
    base = tiny.llama(layers=4)
    names = [name for name, _ in base.named_modules() if name.endswith(("q_proj", "v_proj"))]
    table = {f"model.layers.{number}.mlp.other": 4 for number in range(600)}
    table |= {name: 2 + number % 3 for number, name in enumerate(names)}
    config = LoraConfig(r=4, lora_alpha=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM", **{field: table})
    with shorten_tables(config, base):
        model = randomise(get_peft_model(base, config))
    model.save_pretrained(tmp_path / "folder")
    assert json.loads((tmp_path / "folder" / "adapter_config.json").read_text())[field] == table
    release = pulled(model, tmp_path / "release", base_model="org/base")
    prepare = lambda: prepare_model(tiny.llama(layers=4), adapter=tmp_path / "folder", strict=False)  # noqa: E731
    for load in (lambda: release.load(tiny.llama(layers=4)), prepare):
        loaded = load()
        assert loaded.peft_config["default"].to_dict()[field] == table
        for name in names:
            layer = loaded.get_submodule(f"base_model.model.{name}")
            rank = table[name] if field == "rank_pattern" else 4
            assert layer.r["default"] == rank
            assert layer.scaling["default"] == (4 if field == "rank_pattern" else table[name]) / rank
        assert torch.equal(logits(loaded), logits(model))
    assert max(seen) == 3


# -- nothing in the file changes the base ------------------------------------------------------------------------

BASE_WEIGHTS = {
    "model.norm.weight": (32,),
    "model.layers.0.self_attn.o_proj.weight": (32, 32),
    "model.layers.0.self_attn.q_proj.base_layer.weight": (32, 32),
    "lm_head.weight": (96, 32),
    "model.embed_tokens.weight": (96, 32),
    "model.layers.0.mlp.down_proj.weight": (32, 64),
    "model.layers.1.input_layernorm.weight": (32,),
}


@pytest.mark.parametrize("name", BASE_WEIGHTS)
def test_an_adapter_that_would_overwrite_the_base_is_refused(folder: Path, tmp_path: Path, name: str) -> None:
    planted = plain(
        folder, tmp_path / "a", lambda t: t.update({f"base_model.model.{name}": torch.ones(BASE_WEIGHTS[name])})
    )
    model = tiny.llama()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    for go in (lambda: check_contract(planted, model), lambda: prepare_model(model, adapter=planted)):
        with pytest.raises(BaseMismatch, match=re.escape(name)):
            go()
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_biases_that_the_configuration_does_not_train_are_refused(tmp_path: Path) -> None:
    adapted(tiny.gpt2(), target_modules=["c_attn"], fan_in_fan_out=True).save_pretrained(tmp_path / "g")
    name = "base_model.model.transformer.h.0.attn.c_attn.base_layer.bias"
    planted = plain(tmp_path / "g", tmp_path / "a", lambda t: t.update({name: torch.ones(96)}))
    with pytest.raises(BaseMismatch, match="have no place in it"):
        check_contract(planted, tiny.gpt2())
    adapted(tiny.gpt2(), target_modules=["c_attn"], fan_in_fan_out=True, bias="lora_only").save_pretrained(
        tmp_path / "b"
    )
    assert check_contract(tmp_path / "b", tiny.gpt2()).tensors == 6


def test_an_embedding_saved_along_unchanged_is_taken(tmp_path: Path) -> None:
    """``save_embedding_layers=True`` writes the base's own rows: they change nothing."""
    adapted(tiny.llama()).save_pretrained(tmp_path, save_embedding_layers=True)
    result = check_contract(tmp_path, tiny.llama())
    assert result.tensors == 10


TIED_ENDS: dict[str, tuple[Callable[[], Any], dict[str, Any]]] = {
    "head": (lambda: tiny.llama(tie_word_embeddings=True), {"target_modules": ["q_proj", "lm_head"]}),
    "both": (lambda: tiny.llama(tie_word_embeddings=True), {"target_modules": ["q_proj", "embed_tokens", "lm_head"]}),
    "other names": (tiny.gpt2, {"target_modules": ["c_attn", "wte", "lm_head"], "fan_in_fan_out": True}),
    "saved along": (lambda: tiny.llama(tie_word_embeddings=True), {}),
}


@pytest.mark.parametrize("kind", TIED_ENDS)
def test_the_head_of_a_tied_base_is_compared_though_its_files_hold_it_once(
    kind: str, loopback_hub: LoopbackHub, tmp_path: Path
) -> None:
    """PEFT writes embedding and head beside their adapters; a tied base's file has one of their names."""
    make, lora = TIED_ENDS[kind]
    make().save_pretrained(tmp_path / "base")
    loopback_hub.create_repo("org/base")
    loopback_hub.commit("org/base", {file.name: file.read_bytes() for file in (tmp_path / "base").iterdir()})
    adapted(make(), **lora).save_pretrained(
        tmp_path / "a", save_embedding_layers=True if kind == "saved along" else "auto"
    )
    stored = load_file(tmp_path / "a" / "adapter_model.safetensors")
    head = next(name for name in stored if "lm_head" in name and "lora_" not in name)
    on_hub = {"base_hub": loopback_hub.endpoint, "token": loopback_hub.token}
    for base, options in ((make(), {}), (tmp_path / "base", {}), ("org/base", on_hub)):
        assert check_contract(tmp_path / "a", base, **options).tensors == len(stored)
    changed = plain(tmp_path / "a", tmp_path / "changed", lambda t: t[head][0].add_(1))
    for base, options in ((make(), {}), (tmp_path / "base", {}), ("org/base", on_hub)):
        with pytest.raises(BaseMismatch, match=r"replace lm_head\.weight of the base, from row 0 on"):
            check_contract(changed, base, **options)


@pytest.mark.parametrize(
    ("make", "lora"),
    [
        (lambda: tiny.llama(tie_word_embeddings=True), {"target_modules": ["q_proj", "embed_tokens"]}),
        (lambda: tiny.llama(tie_word_embeddings=True), {"target_modules": ["lm_head"]}),
        (lambda: tiny.llama(tie_word_embeddings=True), {"target_modules": r".*\.(q_proj|embed_tokens)"}),
        (tiny.gpt2, {"target_modules": ["c_attn", "wte"], "fan_in_fan_out": True}),
    ],
    ids=["embedding", "head", "expression", "other names"],
)
def test_a_folder_with_an_adapter_on_both_ends_of_a_tie_is_published_and_loaded(
    make: Callable[[], Any], lora: dict[str, Any], tmp_path: Path
) -> None:
    """With ``ensure_weight_tying``, PEFT adapts the other end, too, and its configuration does not name that."""
    make().save_pretrained(tmp_path / "base")
    model = adapted(make(), ensure_weight_tying=True, **lora)
    expected = logits(model)
    model.save_pretrained(tmp_path / "folder")
    adapter = pulled(
        tmp_path / "folder", tmp_path / "release", base_model="org/base", allow=["embed_tokens", "wte", "lm_head"]
    )
    assert adapter.check(tmp_path / "base").tensors == len(adapter.manifest.tensors)
    assert torch.equal(logits(adapter.load(tmp_path / "base", trust_identity=True)), expected)


@pytest.mark.parametrize(
    ("trained", "written"),
    [
        (["q_proj", "v_proj"], ["q_proj"]),
        (["q_proj", "v_proj"], r".*\.q_proj"),
        (["q_proj", "down_proj"], ["down_proj"]),
        (["q_proj", "v_proj", "embed_tokens"], ["q_proj", "embed_tokens"]),
    ],
    ids=["list", "expression", "other layer", "beside a tied end"],
)
def test_a_module_within_the_layers_that_no_target_names_is_refused_with_tying_too(
    trained: list[str], written: Any, tmp_path: Path
) -> None:
    """PEFT adapts the other end of a tie, too; no projection of a layer can be that end."""
    tiny.llama(tie_word_embeddings=True).save_pretrained(tmp_path / "base")
    model = adapted(tiny.llama(tie_word_embeddings=True), ensure_weight_tying=True, target_modules=trained)
    model.save_pretrained(tmp_path / "folder")
    file = tmp_path / "folder" / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "target_modules": written}))
    stray = next(name for name in trained if name not in written)
    with pytest.raises(InvalidAdapter, match=rf"not among its targets, first model\.layers\.0\.\w+\.{stray}$"):
        pulled(tmp_path / "folder", tmp_path / "release", base_model="org/base", allow=["embed_tokens", "lm_head"])


# -- grown vocabularies ------------------------------------------------------------------------------------------

GROWN_KINDS: dict[str, dict[str, Any]] = {
    "only grown": {},
    "embedding and head saved": {"modules_to_save": ["embed_tokens", "lm_head"]},
    "embedding saved": {"modules_to_save": ["embed_tokens"]},
    "added tokens trained": {"trainable_token_indices": [96, 97, 98, 99]},
    "added and old tokens trained": {"trainable_token_indices": [3, 97]},
    "embedding adapted": {"target_modules": ["q_proj", "embed_tokens"]},
    "head adapted": {"target_modules": ["q_proj", "lm_head"]},
}


TIED = pytest.param(
    True, marks=needs("transformers", "5.23", "growing a tied head leaves the number of its outputs as it was")
)


@pytest.mark.parametrize("tied", [False, TIED])
@pytest.mark.parametrize("kind", GROWN_KINDS)
def test_a_grown_vocabulary_comes_back(kind: str, tied: bool, tmp_path: Path) -> None:
    tiny.llama(tie_word_embeddings=tied).save_pretrained(tmp_path / "base")
    model = LlamaForCausalLM.from_pretrained(tmp_path / "base")
    model.resize_token_embeddings(100)
    model = randomise(adapted(model, **GROWN_KINDS[kind]))
    expected = logits(model, input_ids=GROWN)
    model.save_pretrained(tmp_path / "folder")
    options = {"allow": ["embed_tokens", "lm_head"]}
    sources = [(model, "live"), (tmp_path / "folder", "files")]
    if not tied and len(GROWN_KINDS[kind].get("target_modules", [])) == 2:
        # PEFT saves the end that has an adapter, and loses the new rows of the other one.
        with pytest.raises(BaseMismatch, match="4 entries were added"):
            check_contract(sources.pop()[0], tmp_path / "base")
    for source, name in sources:
        adapter = pulled(source, tmp_path / name, **options)
        assert adapter.manifest.architecture.vocab_size == 100
        assert adapter.check(tmp_path / "base").tensors == len(adapter.manifest.tensors)
        grown = LlamaForCausalLM.from_pretrained(tmp_path / "base")
        grown.resize_token_embeddings(100)
        assert adapter.check(grown).tensors == len(adapter.manifest.tensors)
        assert torch.equal(logits(adapter.load(tmp_path / "base"), input_ids=GROWN), expected)
        assert torch.equal(logits(adapter.load(grown), input_ids=GROWN), expected)


def test_a_grown_vocabulary_whose_old_rows_differ_is_refused(tmp_path: Path) -> None:
    tiny.llama().save_pretrained(tmp_path / "base")
    model = LlamaForCausalLM.from_pretrained(tmp_path / "base")
    model.resize_token_embeddings(100)
    adapted(model).save_pretrained(tmp_path / "folder")
    name = "base_model.model.model.embed_tokens.weight"
    planted = plain(tmp_path / "folder", tmp_path / "a", lambda t: t[name][40].add_(1))
    with pytest.raises(BaseMismatch, match=r"replace model\.embed_tokens\.weight of the base, from row 40 on"):
        check_contract(planted, tmp_path / "base")


def test_a_trained_token_beyond_the_vocabulary_is_an_error_of_ours(folder: Path, tmp_path: Path) -> None:
    planted = plain(folder, tmp_path / "a", trainable_token_indices=[200])
    with pytest.raises(BaseMismatch, match=r"trains the token 200, and the vocabulary has 96 entries"):
        check_contract(planted, tiny.llama())


@pytest.mark.parametrize("tokens", [[95], [90, 92], [93, 94, 95], [5, 91]])
def test_a_row_below_a_trained_token_that_is_in_no_file_is_refused(tokens: list[int], tmp_path: Path) -> None:
    """The folder does not say how large the vocabulary was, and rows between the base's and the token's are lost."""
    tiny.llama(vocab_size=90).save_pretrained(tmp_path / "base")
    model = LlamaForCausalLM.from_pretrained(tmp_path / "base")
    model.resize_token_embeddings(96)
    folder = tmp_path / "folder"
    adapted(model, trainable_token_indices=tokens).save_pretrained(folder, save_embedding_layers=False)
    with pytest.raises(BaseMismatch, match=r"entries were added to the vocabulary of 90 .* does not hold their rows"):
        check_contract(folder, tmp_path / "base")
    sound = adapted(LlamaForCausalLM.from_pretrained(tmp_path / "base"), trainable_token_indices=[89])
    sound.save_pretrained(tmp_path / "sound")
    assert check_contract(tmp_path / "sound", tmp_path / "base")


#: Classes that make more rows for the embedding than the vocabulary has entries.
MORE_ROWS = {"mllama": "MllamaForCausalLM", "molmo2": "Molmo2ForConditionalGeneration", "moshi": "MoshiForCausalLM"}


@needs("transformers", "5.23", "it lacks one of the classes, and reads the configuration of another as a whole only")
@pytest.mark.parametrize(
    "fields", [{}, {"trainable_token_indices": [3, -1]}, {"modules_to_save": ["embed_tokens"]}], ids=str
)
@pytest.mark.parametrize("model_type", MORE_ROWS)
def test_rows_that_a_class_makes_are_there_and_are_not_made_again(
    model_type: str, fields: dict[str, Any], tmp_path: Path
) -> None:
    made = getattr(transformers, MORE_ROWS[model_type])
    small_models.build(Case("causal LM", model_type, made.__name__), "cpu").save_pretrained(tmp_path / "base")
    model = made.from_pretrained(tmp_path / "base")
    last = model.get_input_embeddings().weight.shape[0] - 1
    assert last >= model.config.get_text_config().vocab_size
    if "trainable_token_indices" in fields:
        fields = {"trainable_token_indices": {"embed_tokens": [3, last]}}
    assert "trainable_token_indices" not in resolve_targets(model).fields, "the class's rows are not new"
    model = adapted(
        model, task_type=None, target_modules=["q_proj.linear" if model_type == "moshi" else "q_proj"], **fields
    )
    model.save_pretrained(tmp_path / "folder", save_embedding_layers=False)
    for source, name in ((model, "live"), (tmp_path / "folder", "files")):
        adapter = pulled(source, tmp_path / name, allow=["embed_tokens"], base_model=f"org/base@{'b' * 40}")
        assert adapter.check(tmp_path / "base").tensors == len(adapter.manifest.tensors)
        assert adapter.check(made.from_pretrained(tmp_path / "base")).tensors == len(adapter.manifest.tensors)
    assert check_contract(tmp_path / "folder", tmp_path / "base").tensors == len(adapter.manifest.tensors)


# -- heads -------------------------------------------------------------------------------------------------------

WIDTHS: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}
HEADS: dict[str, tuple[PretrainedConfig, list[str]]] = {
    "distilbert": (DistilBertConfig(vocab_size=96, dim=32, hidden_dim=64, n_layers=2, n_heads=4), ["q_lin"]),
    "roberta": (RobertaConfig(vocab_size=96, max_position_embeddings=64, **WIDTHS), ["query"]),
    "electra": (ElectraConfig(vocab_size=96, embedding_size=32, **WIDTHS), ["query"]),
}


@pytest.mark.parametrize("kind", HEADS)
@pytest.mark.parametrize("labels", [1, 5, 32])
def test_the_number_of_labels_is_the_last_layer_s(kind: str, labels: int, tmp_path: Path) -> None:
    config, targets = HEADS[kind]
    AutoModelForSequenceClassification.from_config(config).save_pretrained(tmp_path / "base")
    model = AutoModelForSequenceClassification.from_pretrained(
        tmp_path / "base", num_labels=labels, ignore_mismatched_sizes=True
    )
    model = randomise(adapted(model, task_type="SEQ_CLS", target_modules=targets))
    model.save_pretrained(tmp_path / "folder")
    for source, name in ((model, "live"), (tmp_path / "folder", "files")):
        adapter = pulled(source, tmp_path / name)
        assert adapter.manifest.architecture.num_labels == labels
        adapter.check(tmp_path / "base")
        assert torch.equal(logits(adapter.load(tmp_path / "base")), logits(model))


@pytest.mark.parametrize(
    ("task", "config", "head"),
    [
        ("SEQ_CLS", "WavLMConfig", "WavLMForSequenceClassification"),
        ("SEQ_CLS", "BeitConfig", "BeitForImageClassification"),
        ("SEQ_CLS", "VivitConfig", "VivitForVideoClassification"),
        ("TOKEN_CLS", "Wav2Vec2Config", "Wav2Vec2ForAudioFrameClassification"),
        ("QUESTION_ANS", "ViltConfig", "ViltForQuestionAnswering"),
    ],
)
def test_heads_of_sounds_and_images_are_found_for_a_base_without_one(task: str, config: str, head: str) -> None:
    """A folder names a task of PEFT, which has none for sounds and images."""
    assert getattr(transformers, head) in find_classes(None, task, getattr(transformers, config)())


@needs("peft", "0.21.2", "it cannot train a head alone")
def test_a_head_without_a_task_gets_its_labels(tmp_path: Path) -> None:
    config = ViTConfig(**WIDTHS, image_size=32, patch_size=16)
    ViTForImageClassification(config).save_pretrained(tmp_path / "base")
    model = ViTForImageClassification.from_pretrained(tmp_path / "base", num_labels=7, ignore_mismatched_sizes=True)
    fields = {"task_type": None, "target_modules": ["q_proj"], "modules_to_save": ["classifier"]}
    model = randomise(adapted(model, **fields))
    pixels = {"pixel_values": torch.randn(1, 3, 32, 32)}
    adapter = pulled(model, tmp_path / "release")
    adapter.check(tmp_path / "base")
    assert torch.equal(logits(adapter.load(tmp_path / "base"), **pixels), logits(model, **pixels))


# -- classes -----------------------------------------------------------------------------------------------------


class Ranker(PreTrainedModel):
    """A class of the user's own, around a transformer."""

    config_class = type(tiny.llama().config)
    _supports_sdpa = True

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.model = LlamaForCausalLM(config)
        self.ranker = nn.Linear(config.vocab_size, 1)
        self.post_init()

    def forward(self, input_ids: Any = None, **_: Any) -> Any:
        return self.ranker(self.model(input_ids=input_ids).logits)


def test_a_class_of_one_s_own_without_a_task_is_published_and_loaded(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = Ranker(tiny.llama().config)
    state = {key: value.clone() for key, value in model.state_dict().items()}
    wrapped = get_peft_model(model, LoraConfig(r=4, target_modules=["q_proj"], modules_to_save=["ranker"]))
    randomise(wrapped)
    adapter = pulled(wrapped, tmp_path / "release")
    assert json.loads(Path(adapter.path, "adapter_config.json").read_text())["auto_mapping"] is None
    again = Ranker(tiny.llama().config)
    again.load_state_dict(state)
    with torch.no_grad():
        assert torch.equal(adapter.load(again).eval()(IDS), wrapped.eval()(IDS))
    # PEFT's own folder names the class; as a folder to go on from it is the user's.
    wrapped.save_pretrained(tmp_path / "folder")
    again = Ranker(tiny.llama().config)
    again.load_state_dict(state)
    assert check_contract(tmp_path / "folder", again).tensors == len(adapter.manifest.tensors)


@pytest.mark.parametrize("model_type", ["mamba2", "falcon_mamba", "bamba"])
def test_infinite_values_in_a_configuration_are_published(model_type: str, tmp_path: Path) -> None:
    case = next(case for case in small_models.cases() if case.model_type == model_type)
    model = small_models.build(case, "cpu", small_only=True)
    model.config.time_step_limit = (0.0, float("inf"))
    targets = ["in_proj"]
    adapter = pulled(adapted(model, target_modules=targets), tmp_path / "release")
    assert adapter.manifest.base.fingerprint is not None
    again = small_models.build(case, "cpu", small_only=True)
    again.config.time_step_limit = (0.0, float("inf"))
    assert adapter.check(again).identity == "verified"
    again.config.time_step_limit = (0.0, 1.0)
    with pytest.raises(BaseMismatch, match="time_step_limit"):
        adapter.check(again)


def test_a_base_is_read_as_the_class_that_the_tensors_fit(tmp_path: Path) -> None:
    """An adapter of the bare model, or of the one with a head, whatever task its configuration names."""
    tiny.llama().save_pretrained(tmp_path / "base")
    bare = LlamaForCausalLM.from_pretrained(tmp_path / "base").model
    for task in ("FEATURE_EXTRACTION", None):
        fields = {"r": 4, "target_modules": ["q_proj"], "task_type": task}
        randomise(get_peft_model(bare, LoraConfig(**fields))).save_pretrained(tmp_path / f"bare-{task}")
        assert check_contract(tmp_path / f"bare-{task}", tmp_path / "base").tensors == 4
    for task in ("FEATURE_EXTRACTION", "CAUSAL_LM", None):
        adapted(tiny.llama(), task_type=task).save_pretrained(tmp_path / f"head-{task}")
        assert check_contract(tmp_path / f"head-{task}", tmp_path / "base").tensors == 8


# -- fields of the configuration ---------------------------------------------------------------------------------


def test_fields_of_other_trainers_are_named_and_ignored(folder: Path, tmp_path: Path) -> None:
    fields = {"lorap_emb_lr": 1e-6, "trainer": {"name": "x"}, "merge_weights": True, "scheduler": "cosine"}
    found = check_contract(plain(folder, tmp_path / "a", **fields), tiny.llama())
    assert found.ignored == tuple(repr(key) for key in sorted(fields))
    without = plain(tmp_path / "a", tmp_path / "b", peft_version=None)
    assert check_contract(without, tiny.llama()).ignored == found.ignored


def test_a_newer_field_at_its_default_is_no_reason_to_refuse(tmp_path: Path) -> None:
    adapter = pulled(adapted(tiny.llama()), tmp_path / "release")
    file = Path(adapter.path, "adapter_config.json")
    config = json.loads(file.read_text())
    file.write_text(json.dumps({**config, "peft_version": "99.0", "use_magic": "auto"}))
    manifest = dataclasses.replace(adapter.manifest, peft_version="99.0")
    newer = dataclasses.replace(adapter, manifest=manifest)
    assert newer.check(tiny.llama()).ignored == ("'use_magic'",)
    named = dataclasses.replace(manifest, config={**manifest.config, "use_magic": "auto"})
    with pytest.raises(BaseMismatch, match="use_magic='auto'"):
        dataclasses.replace(adapter, manifest=named).check(tiny.llama())


def test_a_field_of_an_old_peft_that_changed_the_computation_is_refused(folder: Path, tmp_path: Path) -> None:
    planted = plain(folder, tmp_path / "a", enable_lora=[True, False, True])
    with pytest.raises(BaseMismatch, match="enable_lora"):
        check_contract(planted, tiny.llama())
    assert check_contract(plain(folder, tmp_path / "b", enable_lora=None), tiny.llama()).tensors == 8


RAW: dict[str, dict[str, Any]] = {
    "bias": {"bias": "some"},
    "layers that are not there": {"layer_replication": [[0, 99]]},
    "a negative layer": {"layers_to_transform": [-1]},
    "many replicated layers": {"layer_replication": [[0, 2]] * 200_000},
    "many targets": {"target_modules": [f"t{n}" for n in range(300_000)]},
    "a text as tokens": {"trainable_token_indices": "abc"},
    "alpha of a module is a text": {"alpha_pattern": {"q_proj": "x"}},
    "a sub-configuration": {"eva_config": {"nonsense": 1}},
    "group size zero": {"use_qalora": True, "qalora_group_size": 0},
    "both regex and layers": {"target_modules": "q_proj", "layers_to_transform": [0]},
    "no such initialisation": {"init_lora_weights": "magic"},
    "code": {"trust_remote_code": True},
    "deep": {"loftq_config": json.loads("[" * 20 + "]" * 20)},
}


#: What PEFT ignores, too.
HARMLESS = ("a sub-configuration", "deep", "group size zero")


@pytest.mark.parametrize("case", RAW)
def test_a_strange_configuration_gives_an_error_of_ours_at_once(folder: Path, tmp_path: Path, case: str) -> None:
    planted = plain(folder, tmp_path / "a", **RAW[case])
    start = time.monotonic()
    if case in HARMLESS:
        assert check_contract(planted, tiny.llama()).tensors == 8
    else:
        for go in (check_contract, lambda adapter, model: prepare_model(model, adapter=adapter)):
            with pytest.raises(RegistryError):
                go(planted, tiny.llama())
    assert time.monotonic() - start < 20


@pytest.mark.parametrize("content", [b"", b"{", b"[" * 100_000, b"\xff", b'{"peft_type": "LORA"}', b"null"])
def test_a_damaged_configuration_is_one_error_for_adapter(folder: Path, tmp_path: Path, content: bytes) -> None:
    planted = plain(folder, tmp_path / "a")
    (planted / "adapter_config.json").write_bytes(content)
    with pytest.raises(RegistryError):
        prepare_model(tiny.llama(), adapter=planted)


def test_damaged_weights_are_one_error_for_adapter(folder: Path, tmp_path: Path) -> None:
    planted = plain(folder, tmp_path / "a")
    weights = planted / "adapter_model.safetensors"
    whole = weights.read_bytes()
    for content in (b"", whole[:100], whole[:-4], b"\xff" * 64):
        weights.write_bytes(content)
        with pytest.raises(UnsafeFile):
            prepare_model(tiny.llama(), adapter=planted)
    weights.unlink()
    with pytest.raises(InvalidAdapter, match=r"has no adapter_model\.safetensors"):
        prepare_model(tiny.llama(), adapter=planted)
    weights.mkdir()
    with pytest.raises(UnsafeFile, match="not a regular file"):
        prepare_model(tiny.llama(), adapter=planted)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e38])
def test_values_that_are_not_finite_are_refused_for_a_folder(folder: Path, tmp_path: Path, value: float) -> None:
    def plant(tensors: dict[str, Any]) -> None:
        next(iter(tensors.values()))[0, 0] = value

    with pytest.raises(InvalidAdapter):
        check_contract(plain(folder, tmp_path / "a", plant), tiny.llama())


def test_a_base_of_a_million_layers_is_refused_at_once(folder: Path) -> None:
    for config in ({"num_hidden_layers": 10**6}, {"num_hidden_layers": 10**400}, {"num_attention_heads": 0}):
        changed = tiny.llama().config
        for key, value in config.items():
            setattr(changed, key, value)
        start = time.monotonic()
        with pytest.raises(BaseMismatch):
            check_contract(folder, changed)
        assert time.monotonic() - start < 10


def test_an_error_shows_no_control_characters(folder: Path, tmp_path: Path) -> None:
    planted = plain(folder, tmp_path / "a", peft_version="99.0", **{"use\x1b[31m\u202emagic": True})
    with pytest.raises(BaseMismatch) as caught:
        check_contract(planted, tiny.llama())
    assert "\x1b" not in str(caught.value)
    assert "\u202e" not in str(caught.value)


# -- manifest and configuration ----------------------------------------------------------------------------------

CONTRADICTIONS: dict[str, dict[str, Any]] = {
    "base": {"base_model_name_or_path": "evil/remote-code"},
    "base folder": {"base_model_name_or_path": "/etc"},
    "revision": {"revision": "d" * 40},
    "rank": {"r": 8},
    "targets": {"target_modules": ["q_proj"]},
    "task": {"task_type": "SEQ_CLS"},
    "scale": {"use_rslora": True},
    "rank of a module": {"rank_pattern": {"q_proj": 2}},
}


@pytest.mark.parametrize("case", CONTRADICTIONS)
def test_a_configuration_that_contradicts_its_manifest_is_refused(case: str, tmp_path: Path) -> None:
    adapter = pulled(adapted(tiny.llama()), tmp_path / "release", base_model=f"org/base@{'c' * 40}")
    check_agreement(adapter.manifest, adapter.config)
    file = Path(adapter.path, "adapter_config.json")
    file.write_text(json.dumps({**json.loads(file.read_text()), **CONTRADICTIONS[case]}))
    for go in (adapter.check, adapter.load, lambda model: prepare_model(model, adapter=adapter)):
        with pytest.raises(IntegrityError, match="do not agree"):
            go(tiny.llama())


# -- bases that moved --------------------------------------------------------------------------------------------


@pytest.fixture
def moved(loopback_hub: LoopbackHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Adapter:
    """A release whose base is gone; the same base is at org/new and another one at org/wrong."""
    monkeypatch.setattr(constants, "ENDPOINT", loopback_hub.endpoint)
    for name, seed in (("new", 0), ("wrong", 1)):
        tiny.llama(seed=seed).save_pretrained(tmp_path / name)
    return pulled(adapted(tiny.llama()), tmp_path / "release", base_model=f"org/gone@{'c' * 40}")


def with_aliases(adapter: Adapter, *aliases: str) -> Adapter:
    record = dataclasses.replace(adapter.manifest.base, aliases=aliases)
    return dataclasses.replace(adapter, manifest=dataclasses.replace(adapter.manifest, base=record))


def test_a_base_that_is_gone_is_an_error_that_says_what_to_do(moved: Adapter) -> None:
    with pytest.raises(UnknownBase, match=r"org/gone.*adapter\.load\(\"org/name\"\)"):
        moved.load()


def test_a_moved_base_is_found_where_the_caller_says(moved: Adapter, tmp_path: Path) -> None:
    assert torch.equal(logits(moved.load(tmp_path / "new")), logits(adapted(tiny.llama())))
    with pytest.raises(BaseMismatch, match="same shapes and other weights"):
        moved.load(tmp_path / "wrong")


def test_aliases_are_written_and_read(moved: Adapter) -> None:
    named = with_aliases(moved, "org/new")
    assert type(named.manifest).parse(named.manifest.to_bytes()).base.aliases == ("org/new",)
    assert named.manifest.content_digest == moved.manifest.content_digest


def test_a_base_that_is_gone_loads_through_an_alias_with_its_fingerprint(tmp_path: Path) -> None:
    for name, seed in (("new", 0), ("wrong", 1)):
        repository = tmp_path / "cache" / f"models--org--{name}"
        tiny.llama(seed=seed).save_pretrained(repository / "snapshots" / ("d" * 40))
        (repository / "refs").mkdir()
        (repository / "refs" / "main").write_text("d" * 40)
    given: dict[str, Any] = {"base_model": f"org/gone@{'c' * 40}"}
    right = pulled(adapted(tiny.llama()), tmp_path / "right", base_aliases=["org/lost", "org/new"], **given)
    assert right.manifest.base.aliases == ("org/lost", "org/new")
    cache: dict[str, Any] = {"cache_dir": str(tmp_path / "cache"), "local_files_only": True}
    assert torch.equal(logits(right.load(**cache)), logits(adapted(tiny.llama())))
    wrong = pulled(adapted(tiny.llama()), tmp_path / "other", base_aliases="org/wrong", **given)
    with pytest.raises(BaseMismatch, match="same shapes and other weights"):
        wrong.load(**cache)


@pytest.mark.parametrize(
    ("aliases", "message"),
    [
        (["org/new@main"], "'org/new@main' is not the id of a model"),
        (["./folder"], "is not the id of a model"),
        ([f"org/base{number}" for number in range(17)], "has 17 ids, and may have 16"),
    ],
)
def test_an_alias_that_could_not_be_read_again_is_refused_at_push(
    aliases: list[str], message: str, tmp_path: Path
) -> None:
    with pytest.raises(UnknownBase, match=message):
        pulled(adapted(tiny.llama()), tmp_path / "a", base_model=f"org/base@{'c' * 40}", base_aliases=aliases)


def test_aliases_of_a_base_without_id_or_fingerprint_are_refused(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(UnknownBase, match="further ids of a base that has one"):
        pulled(adapted(tiny.llama()), tmp_path / "a", base_aliases=["org/new"])
    with pytest.raises(UnknownBase, match="fingerprint matches, and org/base has none"):
        pulled(folder, tmp_path / "b", base_model=f"org/base@{'c' * 40}", base_aliases=["org/new"])


def test_peft_still_overwrites_the_base_by_itself(folder: Path, tmp_path: Path) -> None:
    """Once this fails, PEFT refuses such tensors and the check of the contract is doubled."""
    name = "base_model.model.model.norm.weight"
    planted = plain(folder, tmp_path / "a", lambda t: t.update({name: torch.full((32,), 3.0)}))
    loaded = PeftModel.from_pretrained(tiny.llama(), planted)
    assert float(loaded.get_base_model().model.norm.weight[0]) == 3.0


@pytest.mark.parametrize("known_by", ["folder", "configuration"])
def test_a_head_with_a_fixed_number_of_labels_is_checked(known_by: str, tmp_path: Path) -> None:
    """DistilBERT's class for answers in a text cannot be built with three labels."""
    config = transformers.DistilBertConfig(vocab_size=96, dim=32, hidden_dim=64, n_layers=2, n_heads=2)
    base = transformers.DistilBertForQuestionAnswering(config)
    base.save_pretrained(tmp_path / "base")
    lora = LoraConfig(r=2, target_modules=["q_lin"], task_type="QUESTION_ANS")
    get_peft_model(base, lora).save_pretrained(tmp_path / "adapter")
    known = tmp_path / "base" if known_by == "folder" else transformers.AutoConfig.from_pretrained(tmp_path / "base")
    assert check_contract(tmp_path / "adapter", known).tensors == 6
    with pytest.raises(BaseMismatch, match=r"no place|another shape"):
        check_contract(tmp_path / "adapter", transformers.DistilBertConfig(**{**config.to_dict(), "dim": 64}))


@pytest.mark.parametrize("end", ["embed_tokens", "lm_head"])
def test_both_ends_of_a_grown_vocabulary_are_kept_where_the_base_is_not_at_hand(end: str, tmp_path: Path) -> None:
    tiny.llama().save_pretrained(tmp_path / "base")
    model = LlamaForCausalLM.from_pretrained(tmp_path / "base")
    model.resize_token_embeddings(100, mean_resizing=False)
    model = randomise(adapted(model, target_modules=["q_proj", end]))
    expected = logits(model, input_ids=GROWN)
    (tmp_path / "base").rename(tmp_path / "moved")
    state = read_state(model, "default")
    assert {tuple(value.shape) for name, value in state.items() if "lora_" not in name} == {(100, 32)}
    assert {name.split(".")[-2 if "base_layer" not in name else -3] for name in state if "lora_" not in name} == {
        "embed_tokens",
        "lm_head",
    }
    adapter = pulled(model, tmp_path / "release", allow=["embed_tokens", "lm_head"], base_model="org/base")
    assert torch.equal(logits(adapter.load(tmp_path / "moved"), input_ids=GROWN), expected)


#: Ends by the names that other types give them, tied and not, and a head by an expression.
ENDS: dict[str, tuple[Callable[[], Any], Any]] = {
    "gpt2-wte": (tiny.gpt2, ["c_attn", "wte"]),
    "bloom-word_embeddings": (tiny.bloom, ["query_key_value", "word_embeddings"]),
    "gpt_neox-embed_in": (lambda: small_gpt_neox(), ["query_key_value", "embed_in"]),
    "llama-expression": (tiny.llama, r".*\.(q_proj|embed_tokens)"),
}


def small_gpt_neox() -> Any:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    return transformers.GPTNeoXForCausalLM(transformers.GPTNeoXConfig(vocab_size=96, **sizes))


@pytest.mark.parametrize("case", sorted(ENDS))
def test_a_grown_vocabulary_is_kept_whatever_the_adapted_end_is_called(case: str, tmp_path: Path) -> None:
    make, targets = ENDS[case]
    made = make()
    made.save_pretrained(tmp_path / "base")
    model = type(made).from_pretrained(tmp_path / "base")
    model.resize_token_embeddings(100, mean_resizing=False)
    fan_in = case.startswith("gpt2")
    model = randomise(adapted(model, target_modules=targets, fan_in_fan_out=fan_in))
    expected = logits(model, input_ids=GROWN)
    (tmp_path / "base").rename(tmp_path / "moved")
    whole = {name.rpartition(".")[0] for name in read_state(model, "default") if "lora_" not in name}
    ends = [name.removesuffix(".base_layer").rpartition(".")[2] for name in whole]
    adapter = pulled(model, tmp_path / "release", allow=ends, base_model="org/base")
    assert torch.equal(logits(adapter.load(tmp_path / "moved"), input_ids=GROWN), expected)

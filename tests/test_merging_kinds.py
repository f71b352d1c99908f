"""What can be trained can be merged: every kind of model, head and adapter gives base and adapter's outputs."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import BitsAndBytesConfig, PreTrainedModel
from versions import needs

from lora_plugins import dequantize_model, prepare_model
from lora_plugins.adapters.files import MismatchedBase
from lora_plugins.commands.cli import program
from lora_plugins.errors import AdapterMismatch, MergeError
from lora_plugins.merging import probe, weights
from lora_plugins.merging.job import AS_TRAINED, read_job
from lora_plugins.merging.merge import MergeResult, merge_and_save

sys.path.insert(0, str(Path(__file__).parent.parent / "tools"))

import small_models
from small_models import Case

SMALL = {"r": 4, "lora_alpha": 16}


def train(folder: Path, base: PreTrainedModel, config: LoraConfig, *, store: bool = True) -> PeftModel:
    """Write a base and an adapter with random values for it; returns the model with the adapter."""
    if store:
        base.save_pretrained(folder / "base")
    model = get_peft_model(base, config)
    model.peft_config["default"].base_model_name_or_path = str(folder / "base")
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator)
    model.save_pretrained(folder / "adapter")
    return model.eval()


def outputs(model: Any, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    with torch.no_grad():
        torch.manual_seed(0)
        # PEFT's wrappers of tasks name other inputs than the models.
        result = (model.get_base_model() if isinstance(model, PeftModel) else model)(**batch)
    return (result.logits if "logits" in result else result[0]).float()


def check(folder: Path, trained: Any, batch: dict[str, torch.Tensor], **arguments: Any) -> MergeResult:
    """Merge, load with transformers alone, and compare with base and adapter."""
    result = merge_and_save(folder / "adapter", folder / "merged", "same", quantization="none", **arguments)
    plain = getattr(transformers, result.class_name).from_pretrained(folder / "merged").eval()
    expected = outputs(trained, batch)
    assert torch.allclose(outputs(plain, batch), expected, rtol=1e-3, atol=1e-4)
    with trained.disable_adapter():
        assert not torch.allclose(outputs(trained, batch), expected, rtol=1e-3, atol=1e-3), "the adapter does nothing"
    return result


# -- kinds of models ---------------------------------------------------------------------------

KINDS = {
    "causal": (Case("", "qwen3", "Qwen3ForCausalLM"), {"task_type": "CAUSAL_LM"}),
    "mamba": (Case("", "mamba", "MambaForCausalLM"), {"task_type": "CAUSAL_LM"}),
    "classifier": (Case("", "qwen3", "Qwen3ForSequenceClassification"), {"task_type": "SEQ_CLS"}),
    "bert classifier": (Case("", "bert", "BertForSequenceClassification"), {"task_type": "SEQ_CLS"}),
    "distilbert": (Case("", "distilbert", "DistilBertForSequenceClassification"), {"task_type": "SEQ_CLS"}),
    "tokens": (Case("", "roberta", "RobertaForTokenClassification"), {"task_type": "TOKEN_CLS"}),
    "answers": (Case("", "bert", "BertForQuestionAnswering"), {"task_type": "QUESTION_ANS"}),
    "masked": (Case("", "bert", "BertForMaskedLM"), {}),
    "features": (Case("", "qwen3", "Qwen3Model"), {"task_type": "FEATURE_EXTRACTION"}),
    "encoder-decoder": (Case("", "t5", "T5ForConditionalGeneration"), {"task_type": "SEQ_2_SEQ_LM"}),
    "bart": (Case("", "bart", "BartForConditionalGeneration"), {"task_type": "SEQ_2_SEQ_LM"}),
    "speech": (Case("", "whisper", "WhisperForConditionalGeneration"), {"task_type": "SEQ_2_SEQ_LM"}),
    "speech, no task": (Case("", "wav2vec2", "Wav2Vec2ForCTC"), {}),
    "image": (Case("", "vit", "ViTForImageClassification"), {"modules_to_save": ["classifier"]}),
    "convolutions": (Case("", "convnext", "ConvNextForImageClassification"), {"modules_to_save": ["classifier"]}),
    "image-text": (Case("", "qwen2_vl", "Qwen2VLForConditionalGeneration"), {"task_type": "CAUSAL_LM"}),
    "llava": (Case("", "llava", "LlavaForConditionalGeneration"), {"task_type": "CAUSAL_LM"}),
}
TARGETS = {
    "mamba": ["in_proj", "x_proj"],
    "convolutions": ["patch_embeddings", "pwconv1"],
    "bert classifier": ["query", "value"],
    "distilbert": ["q_lin", "v_lin"],
    "tokens": ["query", "value"],
    "answers": ["query", "value"],
    "speech": ["q_proj", "v_proj"],
    "speech, no task": ["q_proj", "v_proj"],
}


#: Kinds that the lowest release of transformers cannot build small.
NEWER = {"image-text": needs("transformers", "5.23", "it cannot build the configuration of a small one")}


@pytest.mark.parametrize("kind", [pytest.param(kind, marks=NEWER.get(kind, ())) for kind in KINDS])
def test_merged_model_gives_the_outputs_of_base_and_adapter(kind: str, tmp_path: Path) -> None:
    case, fields = KINDS[kind]
    base: Any = small_models.build(case, "cpu", small_only=True).eval()
    if kind == "classifier":
        base.config.pad_token_id = 0
    batch = small_models.inputs(base)
    trained = train(tmp_path, base, LoraConfig(target_modules=TARGETS.get(kind, "all-linear"), **SMALL, **fields))
    result = check(tmp_path, trained, batch)
    assert result.class_name == case.class_name
    assert result.error is not None
    assert result.error < 1e-3


# -- kinds of adapters -------------------------------------------------------------------------

ATTENTION = ["q_proj", "v_proj"]
WORDS = {"input_ids": torch.arange(3, 40)[None]}


@pytest.mark.parametrize(
    "fields",
    [
        {"use_dora": True},
        {"use_rslora": True, "lora_alpha": 32},
        {"bias": "all"},
        {"bias": "lora_only"},
        {"lora_bias": True},
        {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"v_proj": 8}},
        {"target_modules": ["embed_tokens", "q_proj"]},
        {"modules_to_save": ["lm_head"]},
        {"modules_to_save": ["embed_tokens"]},
        {"layer_replication": [(0, 2), (1, 2)]},
    ],
    ids=lambda fields: next(iter(fields)),
)
def test_kinds_of_adapters(fields: dict[str, Any], tmp_path: Path) -> None:
    base = tiny.llama(attention_bias=True)
    config = LoraConfig(**{"target_modules": ATTENTION, "task_type": "CAUSAL_LM", **SMALL, **fields})
    check(tmp_path, train(tmp_path, base, config), WORDS)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("tokens", [[40, 7, 95], {"embed_tokens": [1, 2]}], ids=["list", "named"])
def test_trained_tokens_are_merged_and_measured(tokens: Any, tied: bool, tmp_path: Path) -> None:
    base = tiny.llama(tie_word_embeddings=tied)
    trained = train(tmp_path, base, LoraConfig(target_modules=ATTENTION, trainable_token_indices=tokens, **SMALL))
    ids = tokens if isinstance(tokens, list) else tokens["embed_tokens"]
    check(tmp_path, trained, {"input_ids": torch.tensor([ids * 4])})
    merged = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert merged.config.tie_word_embeddings == tied
    saved = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    rows = next(value for name, value in saved.items() if "trainable_tokens" in name)
    assert torch.equal(merged.get_input_embeddings().weight[ids], rows)


@pytest.mark.parametrize(
    "fields",
    [
        {"modules_to_save": ["embed_tokens", "lm_head"]},
        {"trainable_token_indices": [96, 97, 98, 99]},
        {"target_modules": ["q_proj", "embed_tokens"]},
        {},
    ],
    ids=["saved", "trained tokens", "adapted embedding", "embedding saved along"],
)
@pytest.mark.parametrize(
    "tied",
    [
        pytest.param(
            True, marks=needs("transformers", "5.23", "growing a tied head leaves the number of its outputs as it was")
        ),
        False,
    ],
)
def test_vocabularies_that_grew(fields: dict[str, Any], tied: bool, tmp_path: Path) -> None:
    base = tiny.llama(tie_word_embeddings=tied)
    base.save_pretrained(tmp_path / "base")
    base.resize_token_embeddings(100)
    # PEFT saves the embedding that it adapts, and leaves out the rows that the head has gained.
    unsaved = "embed_tokens" in fields.get("target_modules", ()) and not tied
    config = LoraConfig(**{"target_modules": ATTENTION, "task_type": "CAUSAL_LM", **SMALL, **fields})
    trained = train(tmp_path, base, config, store=False)
    batch = {"input_ids": torch.tensor([[3, 96, 4, 99, 98, 97]])}
    if unsaved:
        with pytest.raises(AdapterMismatch, match=r"its file does not hold their rows of lm_head\.weight"):
            check(tmp_path, trained, batch)
        assert not (tmp_path / "merged").exists()
        return
    assert not check(tmp_path, trained, batch).notes


@pytest.mark.parametrize(
    "saved", [["shared"], ["shared", "lm_head"], ["encoder.embed_tokens"], ["embed_tokens", "lm_head"], ["lm_head"]]
)
@pytest.mark.parametrize("model_type", ["t5", "bart"])
def test_each_of_several_tied_embeddings_keeps_its_own_values(
    model_type: str, saved: list[str], tmp_path: Path
) -> None:
    """A file holds a shared weight once, so names that were left out were read with the values of another one."""
    name = {"t5": "T5ForConditionalGeneration", "bart": "BartForConditionalGeneration"}[model_type]
    base: Any = small_models.build(Case("", model_type, name), "cpu", small_only=True).eval()
    batch = small_models.inputs(base)
    targets = {"t5": ["q", "v"], "bart": ATTENTION}[model_type]
    config = LoraConfig(target_modules=targets, task_type="SEQ_2_SEQ_LM", modules_to_save=saved, **SMALL)
    check(tmp_path, train(tmp_path, base, config), batch)


@pytest.mark.parametrize(
    ("model_type", "name", "targets", "saved"),
    [
        ("bert", "BertForMaskedLM", ["query", "value"], ["word_embeddings"]),
        ("roberta", "RobertaForMaskedLM", ["query", "value"], ["word_embeddings"]),
        ("deberta-v2", "DebertaV2ForMaskedLM", ["query_proj", "value_proj"], ["word_embeddings"]),
        ("bert", "BertForMaskedLM", ["query", "word_embeddings"], None),
        ("bert", "BertForMaskedLM", ["query", "decoder"], None),
    ],
)
def test_a_head_whose_bias_is_tied_keeps_it_when_the_embedding_is_no_longer(
    model_type: str, name: str, targets: list[str], saved: list[str] | None, tmp_path: Path
) -> None:
    """An untied configuration also unties the bias of the head, which a file held under its other name alone."""
    base: Any = small_models.build(Case("", model_type, name), "cpu", small_only=True).eval()
    bias = base.get_output_embeddings().bias
    assert sum(bias is one for _, one in base.named_parameters(remove_duplicate=False)) == 2
    bias.data.normal_(generator=torch.Generator().manual_seed(2))
    batch = small_models.inputs(base)
    config = LoraConfig(target_modules=targets, modules_to_save=saved, **SMALL)
    check(tmp_path, train(tmp_path, base, config), batch)


@pytest.mark.parametrize("fields", [{"modules_to_save": ["embed_tokens"]}, {"target_modules": ["q_proj", "lm_head"]}])
def test_both_ends_of_a_tie_that_were_trained_as_one_are_merged(fields: dict[str, Any], tmp_path: Path) -> None:
    config = {"target_modules": ATTENTION, "task_type": "CAUSAL_LM", "ensure_weight_tying": True, **SMALL, **fields}
    trained = train(tmp_path, tiny.llama(tie_word_embeddings=True), LoraConfig(**config))
    check(tmp_path, trained, WORDS)


def test_added_tokens_whose_embedding_was_not_saved_along(tmp_path: Path) -> None:
    """PEFT leaves it out where it cannot ask the Hub for the base's vocabulary."""
    base = tiny.llama(tie_word_embeddings=True)
    base.save_pretrained(tmp_path / "base")
    base.resize_token_embeddings(98)
    config = LoraConfig(target_modules=ATTENTION, trainable_token_indices=[96, 97], **SMALL)
    trained = train(tmp_path, base, config, store=False)
    trained.save_pretrained(tmp_path / "adapter", save_embedding_layers=False)
    result = check(tmp_path, trained, {"input_ids": torch.tensor([[3, 96, 4, 97]])})
    assert result.notes == ()


def test_added_rows_of_the_head_that_nothing_holds_get_the_mean_and_are_named(tmp_path: Path) -> None:
    """The added tokens were trained; their rows of the untied head are in no file."""
    tiny.llama().save_pretrained(tmp_path / "base")
    base = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "base")
    base.resize_token_embeddings(100)
    config = LoraConfig(target_modules=ATTENTION, trainable_token_indices=[96, 97, 98, 99], **SMALL)
    trained = train(tmp_path, base, config, store=False)
    trained.save_pretrained(tmp_path / "adapter", save_embedding_layers=False)
    result = merge_and_save(tmp_path / "adapter", tmp_path / "merged", "same", quantization="none")
    assert "4 rows that training added to lm_head are in no file" in " ".join(result.notes)
    merged = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "merged").eval()
    batch = {"input_ids": torch.tensor([[3, 99, 4, 96]])}
    known = slice(0, 96)
    torch.testing.assert_close(outputs(merged, batch)[..., known], outputs(trained, batch)[..., known])
    rows = merged.get_output_embeddings().weight
    torch.testing.assert_close(rows[96:], rows[:96].mean(0).expand(4, -1))


def test_added_rows_that_nothing_holds_are_refused(tmp_path: Path) -> None:
    """One of four added tokens was trained; the rows of the others, and of the untied head, are in no file."""
    tiny.llama().save_pretrained(tmp_path / "base")
    base = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "base")
    base.resize_token_embeddings(100)
    config = LoraConfig(target_modules=ATTENTION, trainable_token_indices=[99], **SMALL)
    trained = train(tmp_path, base, config, store=False)
    trained.save_pretrained(tmp_path / "adapter", save_embedding_layers=False)
    with pytest.raises(MismatchedBase, match="its file does not hold their rows"):
        merge_and_save(tmp_path / "adapter", tmp_path / "merged", "same", quantization="none")
    assert not (tmp_path / "merged").exists()


def test_experts_as_one_stack(tmp_path: Path) -> None:
    base: Any = small_models.build(Case("", "mixtral", "MixtralForCausalLM"), "cpu", small_only=True).eval()
    stacks = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    config = LoraConfig(target_modules=ATTENTION, target_parameters=stacks, task_type="CAUSAL_LM", **SMALL)
    check(tmp_path, train(tmp_path, base, config), WORDS)


def test_head_with_more_classes_than_the_base(tmp_path: Path) -> None:
    tiny.llama().save_pretrained(tmp_path / "base")
    base = transformers.LlamaForSequenceClassification.from_pretrained(tmp_path / "base", num_labels=5)
    trained = train(tmp_path, base, LoraConfig(target_modules=ATTENTION, task_type="SEQ_CLS", **SMALL), store=False)
    result = check(tmp_path, trained, {"input_ids": torch.arange(3, 20)[None]})
    assert result.class_name == "LlamaForSequenceClassification"
    assert transformers.AutoConfig.from_pretrained(tmp_path / "merged").num_labels == 5
    assert "tokens" not in result.line() or result.distance.tokens == 1


def test_score_of_one_value_is_compared_as_it_is(tmp_path: Path) -> None:
    """Centred, as predictions are, it would be zero in every model."""
    tiny.llama().save_pretrained(tmp_path / "base")
    base = transformers.LlamaForSequenceClassification.from_pretrained(tmp_path / "base", num_labels=1)
    trained = train(tmp_path, base, LoraConfig(target_modules=ATTENTION, task_type="SEQ_CLS", **SMALL), store=False)
    result = check(tmp_path, trained, {"input_ids": torch.arange(3, 20)[None]})
    assert result.effect is not None
    assert result.effect > 0.01
    assert "outputs differ by 0.00%" in result.line()


def test_random_head_that_nobody_saved_is_refused(tmp_path: Path) -> None:
    bert: Any = transformers.BertForMaskedLM(tiny.bert_classifier().config)
    bert.save_pretrained(tmp_path / "base")
    base = transformers.BertForSequenceClassification.from_pretrained(tmp_path / "base", num_labels=2)
    train(tmp_path, base, LoraConfig(target_modules=["query"], task_type="SEQ_CLS", **SMALL), store=False)
    with pytest.raises(MergeError, match=r"are in neither base nor adapter, first bert\.pooler\.dense"):
        merge_and_save(tmp_path / "adapter", tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


# -- bases -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options", [{"load_in_8bit": True}, {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}], ids=["int8", "nf4"]
)
@pytest.mark.parametrize("dtype", ["fp16", "same"])
def test_base_whose_files_are_quantized_is_dequantized(options: dict[str, Any], dtype: str, tmp_path: Path) -> None:
    tiny.llama(hidden_size=64).save_pretrained(tmp_path / "float")
    loaded = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "float", quantization_config=BitsAndBytesConfig(**options)
    )
    loaded.save_pretrained(tmp_path / "base")
    base = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.float32)
    trained = train(tmp_path, base, LoraConfig(target_modules=ATTENTION, task_type="CAUSAL_LM", **SMALL), store=False)
    result = merge_and_save(tmp_path / "adapter", tmp_path / "merged", dtype)
    assert result.as_trained
    assert "dequantized weights" in result.line()
    merged = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    assert getattr(merged.config, "quantization_config", None) is None
    # In training the activations are not quantized.
    distance = probe.compare_logits(outputs(trained.train(), WORDS)[0], outputs(merged, WORDS)[0])
    assert distance.relative < 0.03


MOE = {"mixtral": "MixtralForCausalLM", "qwen2_moe": "Qwen2MoeForCausalLM", "qwen3_moe": "Qwen3MoeForCausalLM"}


@pytest.mark.parametrize(
    ("model_type", "backend", "options", "stored"),
    [
        ("mixtral", "int8", {"experts": "routed"}, False),
        ("qwen3_moe", "nf4", {"experts": "routed"}, False),
        ("qwen2_moe", "int8", {"experts": "none"}, False),
        ("qwen3_moe", "int8", {"experts": "none"}, True),
    ],
)
def test_quantized_experts_are_merged_as_trained_by_the_command_line(
    model_type: str,
    backend: str,
    options: dict[str, Any],
    stored: bool,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The values of experts that were stored quantized in training are in the result, and routers stay as they were."""
    made, base = getattr(transformers, MOE[model_type]), tmp_path / "base"
    small_models.build(Case("", model_type, made.__name__), "cpu", small_only=True).save_pretrained(base)
    wanted: Any = backend
    if stored:
        settings = BitsAndBytesConfig(load_in_8bit=True)
        made.from_pretrained(base, quantization_config=settings).save_pretrained(tmp_path / "stored")
        base, wanted = tmp_path / "stored", None
    loaded = made.from_pretrained(base, dtype=torch.float32)
    model = prepare_model(loaded, quantization=wanted, compute_dtype="float32", r=4, lora_dropout=0.0, **options)
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data = 0.1 * torch.randn(parameter.shape, generator=generator)
    model.save_pretrained(tmp_path / "adapter")
    command = ["merge", str(tmp_path / "adapter"), str(tmp_path / "merged"), "--dtype", "same", "--json"]
    with pytest.raises(SystemExit) as end:
        program([*command, "--base", str(base), "--quantization", backend])
    assert not end.value.code
    assert json.loads(capsys.readouterr().out)["distance"]["relative"] < 1e-3
    dequantize_model(model, torch.float32)
    expected = model.merge_and_unload().state_dict()
    found = made.from_pretrained(tmp_path / "merged", dtype=torch.float32).state_dict()
    assert found.keys() == expected.keys()
    for name, tensor in found.items():
        torch.testing.assert_close(
            tensor, expected[name], rtol=1e-3, atol=1e-4, msg=lambda text, at=name: f"{at}: {text}"
        )


def test_unknown_quantizer_names_the_float_twin(tmp_path: Path) -> None:
    base = tiny.llama()
    train(tmp_path, base, LoraConfig(target_modules=ATTENTION, **SMALL))
    file = tmp_path / "base" / "config.json"
    config = json.loads(file.read_text())
    file.write_text(json.dumps({**config, "quantization_config": {"quant_method": "gptq", "bits": 4}}))
    with pytest.raises(MergeError, match=r"stored quantized and cannot be dequantized here.*--base"):
        merge_and_save(tmp_path / "adapter", tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


def test_base_without_a_tokenizer_is_measured_on_token_ids(tmp_path: Path) -> None:
    trained = train(tmp_path, tiny.llama(), LoraConfig(target_modules=ATTENTION, task_type="CAUSAL_LM", **SMALL))
    result = check(tmp_path, trained, WORDS)
    assert result.distance is not None
    assert not (tmp_path / "merged" / "tokenizer.json").exists()


# -- what is not right is not written ----------------------------------------------------------


def lose_scaling(layer: Any) -> None:
    layer.scaling["default"] *= 0.5


@pytest.mark.parametrize(
    ("fields", "spoil"),
    [({}, lose_scaling), ({"trainable_token_indices": [5, 6]}, lambda layer: layer.merged_adapters.append("default"))],
    ids=["half of the update", "trained tokens"],
)
def test_merge_that_is_out_of_line_fails_and_leaves_nothing(
    fields: dict[str, Any], spoil: Callable[[Any], None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = LoraConfig(target_modules=ATTENTION, task_type="CAUSAL_LM", **SMALL, **fields)
    train(tmp_path, tiny.llama(), config)
    real = weights._merge_part
    spoilt = []

    def merge_part(layer: Any, *rest: Any) -> Any:
        if not spoilt and ("trainable_token_indices" not in fields or hasattr(layer, "trainable_tokens_delta")):
            spoilt.append(layer)
            spoil(layer)
        return real(layer, *rest)

    monkeypatch.setattr(weights, "_merge_part", merge_part)
    with pytest.raises(MergeError, match="is not base and adapter: on text"):
        merge_and_save(tmp_path / "adapter", tmp_path / "merged", "same", quantization="none")
    assert spoilt
    assert not (tmp_path / "merged").exists()


def test_tensor_that_is_not_in_the_result_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    train(tmp_path, tiny.llama(), LoraConfig(target_modules=ATTENTION, trainable_token_indices=[5, 6], **SMALL))
    real = weights._parts
    monkeypatch.setattr(
        weights, "_parts", lambda layer: (part for part in real(layer) if not weights._copies_rows(part))
    )
    with pytest.raises(MergeError, match=r"1 of the 9 tensors .* not in the merged model, first .*trainable_tokens"):
        merge_and_save(tmp_path / "adapter", tmp_path / "merged", "same", quantization="none", probe=None)
    assert not (tmp_path / "merged").exists()


def test_tensor_without_a_place_is_refused(tmp_path: Path) -> None:
    train(tmp_path, tiny.llama(), LoraConfig(target_modules=ATTENTION, **SMALL))
    file = tmp_path / "adapter" / "adapter_model.safetensors"
    save_file({**load_file(file), "base_model.model.v_head.weight": torch.ones(1, 32)}, file)
    with pytest.raises(AdapterMismatch, match=r"v_head\.weight"):
        merge_and_save(tmp_path / "adapter", tmp_path / "merged")


def test_probe_says_what_it_can_not_see(tmp_path: Path) -> None:
    case = Case("", "llava", "LlavaForConditionalGeneration")
    base: Any = small_models.build(case, "cpu", small_only=True).eval()
    targets = r".*vision_tower.*q_proj"
    model = train(tmp_path, base, LoraConfig(target_modules=targets, **SMALL))
    for parameter in model.parameters():
        parameter.data *= 1 - parameter.requires_grad
    model.save_pretrained(tmp_path / "adapter")
    result = merge_and_save(tmp_path / "adapter", tmp_path / "merged", "same", quantization="none")
    assert "cannot tell whether the adapter is in" in result.line()


@pytest.mark.parametrize(
    ("record", "known"),
    [
        ("bitsandbytes 8-bit", "int8"),
        ("bitsandbytes 4-bit", None),
        ("a plugin's own", None),
        ({"name": "int8", "options": {"threshold": 5.0}}, "int8"),
        ({"name": "int8", "options": {}, "known": False}, None),
        ({"name": "nf4", "double_quant": True}, "nf4"),
        (None, "float"),
    ],
)
def test_record_of_the_quantization_is_known_or_not(record: Any, known: str | None, tmp_path: Path) -> None:
    train(tmp_path, tiny.llama(), LoraConfig(target_modules=ATTENTION, **SMALL))
    manifest = tmp_path / "adapter" / "adapter_manifest.json"
    manifest.write_text(json.dumps({"training": {"quantization": record}}))
    job = read_job(tmp_path / "adapter", None, None, AS_TRAINED)
    assert job.as_trained == (known is not None)
    assert (job.quantization.name if job.quantization else "float") == (known or "float")
    if known is None:
        with pytest.raises(MergeError, match=r"not the name of a backend here.*--quantization"):
            merge_and_save(tmp_path / "adapter", tmp_path / "merged", "same")

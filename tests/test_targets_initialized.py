"""What no checkpoint gave a model is trained and saved, or the run is refused by name."""

from __future__ import annotations

import copy
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import nn
from transformers import (
    BeitConfig,
    BeitForSemanticSegmentation,
    BeitModel,
    BertConfig,
    BertForMaskedLM,
    BertForMultipleChoice,
    BertForNextSentencePrediction,
    BertForSequenceClassification,
    BertModel,
    BertPreTrainedModel,
    GPT2DoubleHeadsModel,
    GPT2LMHeadModel,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    PatchTSTConfig,
    PatchTSTForClassification,
    PatchTSTModel,
    PhiConfig,
    PhiForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen2Model,
    Qwen2PreTrainedModel,
    SegformerConfig,
    SegformerForSemanticSegmentation,
    SegformerModel,
    Wav2Vec2Config,
    Wav2Vec2ForAudioFrameClassification,
    Wav2Vec2ForCTC,
    Wav2Vec2ForXVector,
    Wav2Vec2Model,
    YolosConfig,
    YolosForObjectDetection,
    YolosModel,
)

from lora_plugins import Int8PreparationCallback, LoraCallback, attach, prepare_model, resolve_targets
from lora_plugins.adapters.prepare import preparation_of
from lora_plugins.adapters.report import make_report
from lora_plugins.errors import FrozenHead, UnknownArgument, UnmatchedTargets
from lora_plugins.models.wrapping import base_of
from lora_plugins.targets.initialized import find_initialized, find_untrained

BERT: dict[str, Any] = {
    "vocab_size": tiny.VOCABULARY,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 64,
}


class Ranker(BertPreTrainedModel):  # type: ignore[misc]
    """A class of a user's own, with a head that no list of names knows."""

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.bert = BertModel(config)
        self.ranker = nn.Linear(32, 1)
        self.post_init()


class Gated(BertPreTrainedModel):  # type: ignore[misc]
    """A class that adds a layer to each loaded block."""

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.bert = BertModel(config, add_pooling_layer=False)
        for layer in self.bert.encoder.layer:
            layer.attention.gate = nn.Linear(32, 1)
        self.post_init()


class Rewarder(Qwen2PreTrainedModel):  # type: ignore[misc]
    """A reward model with a value head of its own."""

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.model = Qwen2Model(config)
        self.value_head = nn.Linear(32, 1)
        self.post_init()


class Scaled(BertPreTrainedModel):  # type: ignore[misc]
    """A class with a new parameter that belongs to no module of its own."""

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.bert = BertModel(config, add_pooling_layer=False)
        self.temperature = nn.Parameter(torch.ones(1))
        self.post_init()


def bert() -> PreTrainedModel:
    return BertForMaskedLM(BertConfig(**BERT))


def wav2vec2() -> PreTrainedModel:
    return Wav2Vec2Model(
        Wav2Vec2Config(
            **{**BERT, "vocab_size": 20}, conv_dim=(16, 16), conv_stride=(5, 2), conv_kernel=(10, 3),
            num_feat_extract_layers=2, num_conv_pos_embeddings=16, num_conv_pos_embedding_groups=4, tdnn_dim=(16, 16),
            tdnn_kernel=(3, 1), tdnn_dilation=(1, 1), xvector_output_dim=16, classifier_proj_size=16,
        )
    )  # fmt: skip


def segformer() -> PreTrainedModel:
    return SegformerModel(
        SegformerConfig(
            num_encoder_blocks=2, depths=[1, 1], sr_ratios=[2, 1], hidden_sizes=[16, 32], patch_sizes=[7, 3],
            strides=[4, 2], num_attention_heads=[1, 2], mlp_ratios=[2, 2], decoder_hidden_size=16,
        )
    )  # fmt: skip


def beit() -> PreTrainedModel:
    layers = {**BERT, "num_hidden_layers": 4}
    return BeitModel(BeitConfig(**layers, image_size=32, patch_size=8, out_indices=[1, 2, 3, 4]))


def yolos() -> PreTrainedModel:
    return YolosModel(YolosConfig(**BERT, image_size=[32, 32], patch_size=8, num_detection_tokens=4))


def patchtst() -> PreTrainedModel:
    return PatchTSTModel(
        PatchTSTConfig(
            num_input_channels=2, context_length=16, patch_length=4, patch_stride=4, num_hidden_layers=2, d_model=16,
            num_attention_heads=2, ffn_dim=32, num_targets=3,
        )
    )  # fmt: skip


def qwen2() -> PreTrainedModel:
    return Qwen2ForCausalLM(Qwen2Config(**BERT, num_key_value_heads=2))


#: ``fpn``; in transformers 5.5 its parts stand in the model itself.
FEATURE_PYRAMID = [
    name
    for name, part in BeitForSemanticSegmentation(beit().config).named_children()
    if name.startswith("fpn") and next(part.parameters(), None) is not None
]

CASES: list[tuple[Callable[[], PreTrainedModel], type[PreTrainedModel], dict[str, Any], list[str]]] = [
    (bert, BertForSequenceClassification, {}, ["classifier", "pooler", "score"]),
    (bert, BertForNextSentencePrediction, {}, ["cls", "pooler"]),
    (bert, BertForMultipleChoice, {}, ["classifier", "pooler"]),
    (bert, Ranker, {}, ["pooler", "ranker"]),
    (bert, Gated, {}, ["gate"]),
    (wav2vec2, Wav2Vec2ForCTC, {}, ["lm_head"]),
    (wav2vec2, Wav2Vec2ForAudioFrameClassification, {}, ["classifier"]),
    (
        wav2vec2,
        Wav2Vec2ForXVector,
        {},
        ["classifier", "feature_extractor", "objective", "projector", "tdnn.0", "tdnn.1"],
    ),
    (segformer, SegformerForSemanticSegmentation, {}, ["decode_head"]),
    (beit, BeitForSemanticSegmentation, {}, ["auxiliary_head", "decode_head", *FEATURE_PYRAMID]),
    (yolos, YolosForObjectDetection, {}, ["bbox_predictor", "class_labels_classifier"]),
    (patchtst, PatchTSTForClassification, {}, ["head"]),
    (qwen2, Rewarder, {}, ["value_head"]),
    (tiny.gpt2, GPT2DoubleHeadsModel, {}, ["multiple_choice_head"]),
    (tiny.gpt2, GPT2LMHeadModel, {"add_cross_attention": True}, ["crossattention", "ln_cross_attn"]),
    (tiny.bert_classifier, BertForSequenceClassification, {"num_labels": 5}, ["classifier", "score"]),
]


@pytest.mark.parametrize(("make", "wanted", "options", "saved"), CASES, ids=[case[1].__name__ for case in CASES])
def test_new_head_of_any_class_is_trained_saved_and_reloaded(
    make: Any, wanted: Any, options: dict[str, Any], saved: list[str], tmp_path: Path
) -> None:
    torch.manual_seed(0)
    make().save_pretrained(tmp_path / "base")
    options = {**options, "ignore_mismatched_sizes": True}
    model, info = wanted.from_pretrained(tmp_path / "base", output_loading_info=True, **options)
    weights = {name for name, _ in model.named_parameters()}
    new = sorted(weights & {*info["missing_keys"], *(name for name, *_ in info["mismatched_keys"])})
    assert new, "the case shows something"

    wrapped: Any = prepare_model(model, r=2)
    record = preparation_of(wrapped)
    assert record is not None
    assert sorted(record.required.parameters) == new
    assert find_untrained(base_of(wrapped), new) == []
    assert sorted(wrapped.peft_config["default"].modules_to_save) == saved
    assert any("transformers' marks" in note for note in make_report(wrapped).notes)

    with torch.no_grad():
        for parameter in wrapped.parameters():
            parameter.add_(0.01 if parameter.requires_grad else 0.0)
    wrapped.save_pretrained(tmp_path / "adapter")
    again = PeftModel.from_pretrained(wanted.from_pretrained(tmp_path / "base", **options), tmp_path / "adapter")
    values = dict(base_of(again).named_parameters())
    trained = {name: value for name, value in base_of(wrapped).named_parameters() if value.requires_grad}
    assert [name for name, value in trained.items() if not torch.equal(value, values[name])] == []


# -- how new is told from loaded ---------------------------------------------------------------


def saved_base(folder: Path, model: PreTrainedModel) -> Path:
    torch.manual_seed(0)
    model.save_pretrained(folder)
    return folder


def test_copy_of_a_loaded_model_is_told_by_the_checkpoints_headers(tmp_path: Path) -> None:
    base = saved_base(tmp_path / "base", bert())
    for wanted in (BertForSequenceClassification, BertForNextSentencePrediction, Ranker):
        model = copy.deepcopy(wanted.from_pretrained(base))
        state = torch.get_rng_state()
        found = find_initialized(model)
        assert found.evidence == "checkpoint"
        assert {"bert.pooler.dense.weight", "bert.pooler.dense.bias"} < set(found.parameters)
        assert torch.equal(torch.get_rng_state(), state), "nothing was drawn"
    notes = make_report(prepare_model(model, r=2)).notes
    assert any("the checkpoint's headers" in note for note in notes)


def test_model_made_from_a_configuration_is_not_taken_for_a_loaded_one(tmp_path: Path) -> None:
    base = saved_base(tmp_path / "base", bert())
    model = BertForSequenceClassification(BertConfig.from_pretrained(base))
    # It names a checkpoint whose weights it does not have.
    model.name_or_path = str(base)
    assert find_initialized(model).evidence == "structure"
    wrapped: Any = prepare_model(model, r=2)
    assert "classifier" in wrapped.peft_config["default"].modules_to_save
    assert any("is not known" in note for note in make_report(wrapped).notes)


def test_head_of_a_model_made_from_a_configuration_is_found_by_structure() -> None:
    for make, wanted, saved in (
        (wav2vec2, Wav2Vec2ForCTC, ["lm_head"]),
        (segformer, SegformerForSemanticSegmentation, ["decode_head"]),
        (qwen2, Rewarder, ["value_head"]),
        (yolos, YolosForObjectDetection, ["class_labels_classifier", "bbox_predictor"]),
        (bert, BertForNextSentencePrediction, ["cls"]),
    ):
        assert resolve_targets(wanted(make().config)).modules_to_save == saved
    for model in (bert(), qwen2(), tiny.gpt2()):
        assert resolve_targets(model).modules_to_save == [], "a language model's head was pretrained"


def test_replaced_head_is_new_and_a_copied_weight_is_not(tmp_path: Path) -> None:
    base = saved_base(tmp_path / "base", tiny.bert_classifier())
    model = BertForSequenceClassification.from_pretrained(base)
    assert find_initialized(copy.copy(model)).parameters == ()
    model = BertForSequenceClassification.from_pretrained(base)
    model.classifier = nn.Linear(32, 7)
    query = model.bert.encoder.layer[0].attention.self.query
    query.weight = nn.Parameter(query.weight.detach().clone())
    assert find_initialized(model).parameters == ("classifier.weight", "classifier.bias")


def test_model_of_ones_own_around_a_loaded_one_trains_what_it_adds(tmp_path: Path) -> None:
    class Around(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = Qwen2Model.from_pretrained(saved_base(tmp_path / "base", qwen2()))
            self.value_head = nn.Linear(32, 1)

        def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
            return self.value_head(self.inner(input_ids).last_hidden_state)  # type: ignore[no-any-return]

    plan = resolve_targets(Around())
    assert plan.modules_to_save == ["value_head"]
    assert plan.required.parameters == ("value_head.weight", "value_head.bias")


def test_preparing_a_quantized_base_again_finds_what_was_found_before(tmp_path: Path) -> None:
    base = saved_base(tmp_path / "base", bert())
    model = BertForSequenceClassification.from_pretrained(base)
    wrapped: Any = prepare_model(model, r=2, quantization="int8")
    record = preparation_of(wrapped)
    assert record is not None
    first = record.required.parameters
    assert first
    again: Any = prepare_model(wrapped.unload(), r=2)
    record = preparation_of(again)
    assert record is not None
    assert record.required.parameters == first, "quantized layers have lost their marks and are not new"


# -- refused by name ---------------------------------------------------------------------------


def test_new_parameter_that_no_module_holds_is_refused(tmp_path: Path) -> None:
    base = saved_base(tmp_path / "base", bert())
    with pytest.raises(FrozenHead, match=r"temperature.*frozen=\['temperature'\]"):
        prepare_model(Scaled.from_pretrained(base), r=2)
    wrapped: Any = prepare_model(Scaled.from_pretrained(base), r=2, frozen=["temperature"])
    assert wrapped.peft_config["default"].modules_to_save is None


def test_block_that_the_checkpoint_lacks_is_refused(tmp_path: Path) -> None:
    base = saved_base(tmp_path / "base", bert())
    model = BertForMaskedLM.from_pretrained(base, num_hidden_layers=3)
    with pytest.raises(FrozenHead, match=r"bert\.encoder\.layer\.2\."):
        prepare_model(model, r=2)


def test_ready_adapter_that_leaves_a_new_pooler_frozen_is_refused(tmp_path: Path) -> None:
    base = saved_base(tmp_path / "base", bert())
    for callback in (LoraCallback(), Int8PreparationCallback()):
        model = BertForSequenceClassification.from_pretrained(base)
        wrapped = get_peft_model(model, LoraConfig(task_type="SEQ_CLS", target_modules=["query"]))
        trainer = tiny.trainer(tmp_path, wrapped, [callback], data=tiny.classes())
        with pytest.raises(FrozenHead, match=r"bert\.pooler\.dense\.weight.*modules_to_save=\['dense'\]"):
            trainer.train()
    model = BertForSequenceClassification.from_pretrained(base)
    config = LoraConfig(task_type="SEQ_CLS", target_modules=["query"], modules_to_save=["pooler"])
    tiny.trainer(tmp_path, get_peft_model(model, config), [LoraCallback()], data=tiny.classes(), max_steps=1).train()


def test_adapters_that_come_after_int8_preparation_are_held_to_the_same(tmp_path: Path) -> None:
    model = BertForSequenceClassification.from_pretrained(saved_base(tmp_path / "base", bert()))
    trainer = tiny.trainer(tmp_path, model, [Int8PreparationCallback()], data=tiny.classes())
    trainer.model = get_peft_model(trainer.model, LoraConfig(target_modules=["query"]))
    trainer.model_wrapped = trainer.model
    with pytest.raises(FrozenHead, match="classifier"):
        trainer.train()


def test_head_that_stays_frozen_on_purpose_is_said_to(tmp_path: Path) -> None:
    base = saved_base(tmp_path / "base", bert())
    model = BertForSequenceClassification.from_pretrained(base)
    callback = LoraCallback(r=2, frozen=["classifier", "bert.pooler"])
    trainer = tiny.trainer(tmp_path, model, [callback], data=tiny.classes(), max_steps=2)
    assert trainer.model.peft_config["default"].modules_to_save is None
    assert not any(p.requires_grad for name, p in trainer.model.named_parameters() if "lora_" not in name)
    trainer.train()
    wrapped = get_peft_model(BertForSequenceClassification.from_pretrained(base), LoraConfig(target_modules=["query"]))
    ready = [Int8PreparationCallback(frozen=["pooler", "classifier"])]
    tiny.trainer(tmp_path, wrapped, ready, data=tiny.classes(), max_steps=1).train()


def test_frozen_name_that_is_not_in_the_model_is_an_error() -> None:
    with pytest.raises(UnmatchedTargets, match=r"'clasifier' \(near: classifier"):
        prepare_model(tiny.bert_classifier(), frozen=["clasifier"])
    with pytest.raises(UnknownArgument, match=r"frozen=\['classifier'\]"):
        prepare_model(tiny.bert_classifier(), frozen="classifier")  # type: ignore[arg-type]


def test_head_that_was_trained_before_may_stay_frozen_in_a_ready_adapter(tmp_path: Path) -> None:
    base = saved_base(tmp_path / "base", tiny.bert_classifier())
    wrapped = get_peft_model(BertForSequenceClassification.from_pretrained(base), LoraConfig(target_modules=["query"]))
    tiny.trainer(tmp_path, wrapped, [LoraCallback()], data=tiny.classes(), max_steps=1).train()


# -- vocabularies ------------------------------------------------------------------------------


@pytest.mark.parametrize("tied", [True, False])
def test_new_rows_of_a_vocabulary_are_trained_saved_and_reloaded(tied: bool, tmp_path: Path) -> None:
    base = saved_base(tmp_path / "base", tiny.llama(tie_word_embeddings=tied))

    def grown() -> Any:
        model = LlamaForCausalLM.from_pretrained(base)
        model.resize_token_embeddings(tiny.VOCABULARY + 3, mean_resizing=False)
        return model

    trainer = tiny.trainer(tmp_path, grown(), [LoraCallback(r=2)])
    rows = list(range(tiny.VOCABULARY, tiny.VOCABULARY + 3))
    wanted = {"embed_tokens": rows} if tied else {"embed_tokens": rows, "lm_head": rows}
    config = trainer.model.peft_config["default"]
    assert config.trainable_token_indices == wanted
    trainer.train()
    trainer.save_model(str(tmp_path / "adapter"))
    stored = load_file(str(tmp_path / "adapter" / "adapter_model.safetensors"))
    assert {value.shape[0] for name, value in stored.items() if "lora_" not in name} == {3}, "the new rows only"
    again = PeftModel.from_pretrained(grown(), tmp_path / "adapter").eval()
    ids = torch.tensor([[1, 97, 5, 98]])
    with torch.no_grad():
        assert torch.equal(trainer.model.eval()(input_ids=ids).logits, again(input_ids=ids).logits)


@pytest.mark.parametrize(
    "own",
    [
        {"trainable_token_indices": {"embed_tokens": [96], "lm_head": [96, 97]}},
        {"trainable_token_indices": {"embed_tokens": [96, 97]}, "frozen": ["lm_head"]},
        {"frozen": ["embed_tokens", "lm_head"]},
    ],
)
def test_new_rows_that_no_adapter_holds_are_saved_with_the_whole_embedding(own: dict[str, Any], tmp_path: Path) -> None:
    base = saved_base(tmp_path / "base", tiny.llama())
    model = LlamaForCausalLM.from_pretrained(base)
    model.resize_token_embeddings(tiny.VOCABULARY + 2, mean_resizing=False)
    wrapped: Any = prepare_model(model, r=2, **own)
    wrapped.save_pretrained(str(tmp_path / "adapter"))
    stored = load_file(str(tmp_path / "adapter" / "adapter_model.safetensors"))
    assert tiny.VOCABULARY + 2 in {value.shape[0] for name, value in stored.items() if "lora_" not in name}
    again = LlamaForCausalLM.from_pretrained(base)
    again.resize_token_embeddings(tiny.VOCABULARY + 2, mean_resizing=False)
    reloaded = PeftModel.from_pretrained(again, tmp_path / "adapter").eval()
    ids = torch.tensor([[1, 97, 5, 96]])
    with torch.no_grad():
        assert torch.equal(wrapped.eval()(input_ids=ids).logits, reloaded(input_ids=ids).logits)


def test_vocabulary_that_the_user_trains_is_left_to_him(tmp_path: Path) -> None:
    base = saved_base(tmp_path / "base", tiny.llama())
    for own in (
        {"modules_to_save": ["embed_tokens", "lm_head"]},
        {"trainable_token_indices": {"embed_tokens": [96], "lm_head": [96]}},
        {"target_modules": ["q_proj", "embed_tokens", "lm_head"]},
    ):
        model = LlamaForCausalLM.from_pretrained(base)
        model.resize_token_embeddings(tiny.VOCABULARY + 2)
        fields = resolve_targets(model, **own).fields  # type: ignore[arg-type]
        assert "trainable_token_indices" not in fields, own


def test_list_of_the_users_rows_gets_the_rows_of_an_untied_head(tmp_path: Path) -> None:
    base = saved_base(tmp_path / "base", tiny.llama())
    model = LlamaForCausalLM.from_pretrained(base)
    model.resize_token_embeddings(tiny.VOCABULARY + 2)
    fields = resolve_targets(model, trainable_token_indices=[96]).fields
    assert fields["trainable_token_indices"] == {"embed_tokens": [96], "lm_head": [96, 97]}


def test_vocabulary_of_another_model_type_grows_alike(tmp_path: Path) -> None:
    base = saved_base(tmp_path / "base", bert())
    model = BertForMaskedLM.from_pretrained(base)
    model.resize_token_embeddings(tiny.VOCABULARY + 1)
    assert resolve_targets(model).fields["trainable_token_indices"] == {"word_embeddings": [96]}
    classifier = LlamaForSequenceClassification.from_pretrained(saved_base(tmp_path / "llama", tiny.llama()))
    classifier.resize_token_embeddings(tiny.VOCABULARY + 1)
    assert resolve_targets(classifier).fields["trainable_token_indices"] == {"embed_tokens": [96]}
    gpt = GPT2LMHeadModel.from_pretrained(saved_base(tmp_path / "gpt2", tiny.gpt2()))
    gpt.resize_token_embeddings(tiny.VOCABULARY + 1)
    assert resolve_targets(gpt).fields["trainable_token_indices"] == {"wte": [96]}


def test_head_whose_bias_grew_with_it_is_saved_whole(tmp_path: Path) -> None:
    config = PhiConfig(**BERT, num_key_value_heads=4)
    model = PhiForCausalLM.from_pretrained(saved_base(tmp_path / "base", PhiForCausalLM(config)))
    model.resize_token_embeddings(tiny.VOCABULARY + 2)
    wrapped: Any = prepare_model(model, r=2)
    assert wrapped.peft_config["default"].trainable_token_indices == {"embed_tokens": [96, 97]}
    assert wrapped.peft_config["default"].modules_to_save == ["lm_head"]
    record = preparation_of(wrapped)
    assert record is not None
    assert find_untrained(base_of(wrapped), record.required.parameters) == []


def test_vocabulary_that_did_not_grow_or_shrank_is_left_alone(tmp_path: Path) -> None:
    base = saved_base(tmp_path / "base", tiny.llama())
    for rows in (tiny.VOCABULARY, tiny.VOCABULARY - 8):
        model = LlamaForCausalLM.from_pretrained(base)
        model.resize_token_embeddings(rows)
        plan = resolve_targets(model)
        assert "trainable_token_indices" not in plan.fields
        assert plan.modules_to_save == []
        assert plan.required.parameters == ()


def test_vocabulary_whose_checkpoint_is_gone_is_said_to_be_unknown(tmp_path: Path) -> None:
    base = saved_base(tmp_path / "base", tiny.llama())
    model = LlamaForCausalLM.from_pretrained(base)
    shutil.rmtree(base)
    assert any("whether the vocabulary has grown is not known" in note for note in resolve_targets(model).notes)


def test_tokens_added_after_the_adapters_are_refused(tmp_path: Path) -> None:
    model = LlamaForCausalLM.from_pretrained(saved_base(tmp_path / "base", tiny.llama()))
    trainer = tiny.trainer(tmp_path, model, [LoraCallback(r=2)])
    base_of(trainer.model).resize_token_embeddings(tiny.VOCABULARY + 2)
    with pytest.raises(FrozenHead, match=r"model\.embed_tokens\.weight.*trainable_token_indices"):
        trainer.train()


def test_ready_adapter_without_the_new_rows_is_refused(tmp_path: Path) -> None:
    base = saved_base(tmp_path / "base", tiny.llama())
    model = LlamaForCausalLM.from_pretrained(base)
    model.resize_token_embeddings(tiny.VOCABULARY + 2)
    trainer = tiny.trainer(tmp_path, get_peft_model(model, LoraConfig(target_modules=["q_proj"])))
    attach(trainer)
    with pytest.raises(FrozenHead, match="embed_tokens"):
        trainer.train()

"""PEFT's task type is given only to models that PEFT's wrapper for it fits."""

from __future__ import annotations

from typing import Any

import pytest
import tiny
import torch
from peft import LoraConfig, PeftModel, PeftModelForCausalLM, PeftModelForTokenClassification
from torch import nn
from transformers import BertConfig, BertForTokenClassification, BertModel, BertPreTrainedModel, LlamaForCausalLM

from lora_plugins import prepare_model
from lora_plugins.targets.resolution import task_type

CONFIG = BertConfig(
    vocab_size=tiny.VOCABULARY, hidden_size=32, num_hidden_layers=1, num_attention_heads=4, intermediate_size=64
)


class _Own(BertPreTrainedModel):  # type: ignore[misc]
    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.bert = BertModel(config)
        self.classifier = nn.Linear(32, config.num_labels)
        self.post_init()

    def forward(self, input_ids: Any, attention_mask: Any = None, labels: Any = None) -> Any:
        return self.classifier(self.bert(input_ids, attention_mask=attention_mask).last_hidden_state)


class BertCrfForTokenClassification(_Own):
    """Takes three arguments, where PEFT's wrapper passes seven."""


class BertRankerForSequenceClassification(_Own):
    """Called like a classifier, and takes what it wants."""


class BertSpanForQuestionAnswering(_Own):
    """Called like a model for questions."""


class BertWriterForCausalLM(_Own):
    """Called like a language model."""


@pytest.mark.parametrize(
    "own",
    [
        BertCrfForTokenClassification,
        BertRankerForSequenceClassification,
        BertSpanForQuestionAnswering,
        BertWriterForCausalLM,
    ],
)
def test_class_that_takes_other_arguments_than_peft_passes_gets_no_task(own: Any) -> None:
    model = own(CONFIG)
    assert task_type(model) is None
    for arguments in ({}, {"peft_config": LoraConfig(task_type=None)}):
        wrapped = prepare_model(own(CONFIG), **arguments)
        assert type(wrapped) is PeftModel
        assert wrapped.peft_config["default"].modules_to_save == ["classifier"]
        wrapped(input_ids=torch.ones(1, 4, dtype=torch.long), labels=None)


def test_classes_that_fit_keep_their_task() -> None:
    assert isinstance(prepare_model(BertForTokenClassification(CONFIG)), PeftModelForTokenClassification)
    assert isinstance(prepare_model(tiny.llama()), PeftModelForCausalLM)

    class Mine(LlamaForCausalLM):  # type: ignore[misc]
        """A subclass that keeps the signature."""

    assert task_type(Mine(tiny.llama().config)) is None, "its name says nothing"
    Mine.__name__ = "MineForCausalLM"
    assert task_type(Mine(tiny.llama().config)) == "CAUSAL_LM"


def test_task_that_the_user_says_is_none_stays_none() -> None:
    wrapped = prepare_model(tiny.bert_classifier(), task_type=None)
    assert type(wrapped) is PeftModel
    assert wrapped.peft_config["default"].modules_to_save == ["classifier"]
    said = prepare_model(tiny.bert_classifier(), task_type="FEATURE_EXTRACTION")
    assert said.peft_config["default"].task_type == "FEATURE_EXTRACTION"

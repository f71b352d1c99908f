"""What can be trained can be merged: every kind of model, head and adapter gives base and adapter's outputs."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import PreTrainedModel

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
    "convolutions": ["dwconv", "pwconv1"],
    "bert classifier": ["query", "value"],
    "distilbert": ["q_lin", "v_lin"],
    "tokens": ["query", "value"],
    "answers": ["query", "value"],
    "speech": ["q_proj", "v_proj"],
    "speech, no task": ["q_proj", "v_proj"],
}


@pytest.mark.parametrize("kind", KINDS)
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

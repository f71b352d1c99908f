"""Running statistics of frozen norms: what training left in the base would be in no file."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import tiny
import torch
from datasets import Dataset
from torch import nn
from transformers import (
    PatchTSTConfig,
    PatchTSTForClassification,
    PreTrainedModel,
    ResNetConfig,
    ResNetForImageClassification,
    Wav2Vec2ConformerConfig,
    Wav2Vec2ConformerForSequenceClassification,
)

from lora_plugins import Int8PreparationCallback, LoraCallback, attach, detach
from lora_plugins.adapters.report import make_report


def resnet() -> PreTrainedModel:
    return ResNetForImageClassification(
        ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic", num_labels=2)
    )


def conformer() -> PreTrainedModel:
    return Wav2Vec2ConformerForSequenceClassification(
        Wav2Vec2ConformerConfig(
            hidden_size=32,
            num_hidden_layers=1,
            num_attention_heads=4,
            intermediate_size=64,
            conv_dim=(16, 16),
            conv_stride=(5, 2),
            conv_kernel=(10, 3),
            num_feat_extract_layers=2,
            num_conv_pos_embeddings=16,
            num_conv_pos_embedding_groups=4,
            conv_depthwise_kernel_size=3,
            layerdrop=0.0,
            mask_time_prob=0.0,
            classifier_proj_size=16,
        )
    )


def series() -> PreTrainedModel:
    return PatchTSTForClassification(
        PatchTSTConfig(
            num_input_channels=2,
            num_targets=2,
            context_length=16,
            patch_length=4,
            patch_stride=4,
            d_model=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            ffn_dim=32,
        )
    )


class Normed(nn.Module):
    """A model of one's own, with a norm that has no weight and one over single examples."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(12, 8), nn.Linear(8, 2)
        self.bare = nn.BatchNorm1d(8, affine=False)
        self.single = nn.InstanceNorm1d(1, track_running_stats=True)

    def forward(self, values: torch.Tensor, labels: torch.Tensor | None = None) -> dict[str, torch.Tensor]:
        hidden = self.bare(self.first(values))
        logits = self.second(self.single(hidden[:, None])[:, 0])
        return (
            {"logits": logits}
            if labels is None
            else {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}
        )


KINDS: dict[str, tuple[Callable[[], nn.Module], list[str], str, tuple[int, ...]]] = {
    "resnet": (resnet, ["convolution"], "pixel_values", (3, 16, 16)),
    "conformer": (conformer, ["linear_q", "linear_v"], "input_values", (400,)),
    "series": (series, ["q_proj", "v_proj"], "past_values", (16, 2)),
    "own": (Normed, ["first"], "values", (12,)),
}


def make(kind: str) -> tuple[nn.Module, dict[str, Any], Dataset]:
    maker, targets, name, shape = KINDS[kind]
    torch.manual_seed(0)
    model = maker()
    # Values far from what a new norm expects: statistics that move show.
    rows = torch.randn(16, *shape, generator=torch.Generator().manual_seed(1)) * 3 + 2
    label = "target_values" if kind == "series" else "labels"
    data = Dataset.from_dict({name: rows.tolist(), label: [0, 1] * 8}).with_format("torch")
    return model, {"r": 2, "target_modules": targets, "lora_dropout": 0.0}, data


def compute(model: nn.Module, data: Dataset) -> torch.Tensor:
    name = next(key for key in data.column_names if "labels" not in key and "target" not in key)
    with torch.no_grad():
        out = model.eval()(**{name: data[:][name]})
    logits: torch.Tensor = out["logits"] if "logits" in out else out["prediction_logits"]
    return logits


def check_reloads(trainer: Any, base: nn.Module, data: Dataset) -> None:
    """Save the adapter, and load it with PEFT alone on the base as it was."""
    trainer.save_model()
    before = compute(base, data)
    loaded = peft.PeftModel.from_pretrained(base, trainer.args.output_dir)
    assert torch.allclose(compute(loaded, data), compute(trainer.model, data), atol=1e-5)
    assert not torch.allclose(compute(loaded, data), before, atol=1e-4), "nothing was trained"


@pytest.mark.parametrize("kind", list(KINDS))
def test_statistics_of_a_frozen_norm_stay_those_of_the_base(tmp_path: Path, kind: str) -> None:
    model, lora, data = make(kind)
    base = copy.deepcopy(model)
    trainer = tiny.trainer(tmp_path, model, [LoraCallback(**lora)], data=data)  # type: ignore[arg-type]
    trainer.train()
    check_reloads(trainer, base, data)
    assert "frozen norms use their running statistics" in str(make_report(trainer.model))


@pytest.mark.parametrize("callback", [LoraCallback, Int8PreparationCallback])
def test_a_ready_adapter_is_held_to_the_same(tmp_path: Path, callback: Any) -> None:
    model, lora, data = make("conformer")
    base = copy.deepcopy(model)
    ready = peft.get_peft_model(model, peft.LoraConfig(**lora, modules_to_save=["projector", "classifier"]))
    trainer = tiny.trainer(tmp_path, ready, [callback()], data=data)
    trainer.train()
    statistics = {n: v for n, v in base.named_buffers() if "running" in n}
    after = {n.replace("base_model.model.", ""): v for n, v in trainer.model.named_buffers() if "running" in n}
    assert statistics
    assert all(torch.equal(value, after[name].float()) for name, value in statistics.items())


def test_the_best_checkpoint_is_the_one_that_was_evaluated(tmp_path: Path) -> None:
    model, lora, data = make("resnet")
    trainer = tiny.trainer(
        tmp_path,
        model,  # type: ignore[arg-type]
        [LoraCallback(**lora)],
        data=data,
        trainer_arguments={"eval_dataset": data},
        eval_strategy="steps",
        eval_steps=1,
        save_strategy="steps",
        save_steps=1,
        load_best_model_at_end=True,
        metric_for_best_model="eval_loss",
        greater_is_better=True,  # the loss falls: the best is not the last
    )
    trainer.train()
    assert trainer.evaluate()["eval_loss"] == pytest.approx(trainer.state.best_metric, abs=1e-6)


def test_a_norm_in_a_saved_module_learns_its_statistics_and_keeps_them(tmp_path: Path) -> None:
    model, lora, data = make("own")
    base = copy.deepcopy(model)
    callback = LoraCallback(**lora, modules_to_save=["bare", "second"])
    trainer = tiny.trainer(tmp_path, model, [callback], data=data)  # type: ignore[arg-type]
    trainer.train()
    saved = trainer.model.base_model.model.bare.modules_to_save["default"]
    assert saved.num_batches_tracked == 4
    check_reloads(trainer, base, data)


def test_whoever_trains_the_base_again_trains_its_norms(tmp_path: Path) -> None:
    model, lora, data = make("resnet")
    trainer = tiny.trainer(tmp_path, model, data=data, max_steps=1)  # type: ignore[arg-type]
    attach(trainer, **lora)
    trainer.train()
    base: Any = detach(trainer).requires_grad_(True)
    before = base.resnet.embedder.embedder.normalization.running_mean.clone()
    trainer.train()
    assert not torch.equal(base.resnet.embedder.embedder.normalization.running_mean, before)

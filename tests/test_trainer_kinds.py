"""Trainers that people have: for sequence to sequence, with a loss of their own, with an optimizer of their own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import bitsandbytes as bnb
import peft
import pytest
import tiny
import torch
from datasets import Dataset
from safetensors.torch import load_file
from transformers import (
    BertConfig,
    BertForTokenClassification,
    GenerationConfig,
    Seq2SeqTrainer,
    Seq2SeqTrainingArguments,
    T5Config,
    T5ForConditionalGeneration,
    Trainer,
)

from lora_plugins import LoraCallback, attach
from lora_plugins.trainer.attaching import detach


def assert_trained(trainer: Trainer) -> None:
    assert isinstance(trainer.model, peft.PeftModel)
    held = {id(p) for group in trainer.optimizer.param_groups for p in group["params"]}
    assert held == {id(p) for p in trainer.model.parameters() if p.requires_grad}
    assert all(tensor.any() for tensor in tiny.adapter_tensors(trainer.model, "lora_B").values())


# -- sequence to sequence ----------------------------------------------------------------------


def t5() -> T5ForConditionalGeneration:
    torch.manual_seed(0)
    return T5ForConditionalGeneration(
        T5Config(
            vocab_size=tiny.VOCABULARY,
            d_model=32,
            d_kv=8,
            d_ff=64,
            num_layers=1,
            num_heads=4,
            decoder_start_token_id=0,
            dropout_rate=0.0,
        )
    )


def translations() -> Dataset:
    """What is said is to be said again, in the numbers that come next."""
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(2, tiny.VOCABULARY - 1, (8, 6), generator=generator)
    return Dataset.from_dict({"input_ids": ids.tolist(), "labels": (ids + 1).tolist()})


@pytest.mark.parametrize("quantization", [None, "int8"])
def test_seq2seq_with_generation(tmp_path: Path, quantization: str | None) -> None:
    seen: list[Any] = []

    def metrics(prediction: Any) -> dict[str, float]:
        seen.append(prediction.predictions)
        return {"length": float(prediction.predictions.shape[1])}

    trainer = Seq2SeqTrainer(
        model=t5(),
        args=Seq2SeqTrainingArguments(
            output_dir=str(tmp_path),
            max_steps=2,
            per_device_train_batch_size=4,
            learning_rate=1e-2,
            predict_with_generate=True,
            generation_config=GenerationConfig(
                max_length=6, min_length=6, decoder_start_token_id=0, pad_token_id=0, eos_token_id=1
            ),
            eval_strategy="steps",
            eval_steps=1,
            save_strategy="steps",
            save_steps=1,
            load_best_model_at_end=True,
            metric_for_best_model="eval_loss",
            report_to=[],
            disable_tqdm=True,
            use_cpu=True,
        ),
        train_dataset=translations(),
        eval_dataset=translations(),
        compute_metrics=metrics,
        callbacks=[LoraCallback(r=4, quantization=quantization)],
    )
    trainer.train()
    assert_trained(trainer)
    assert trainer.model.peft_config["default"].task_type == "SEQ_2_SEQ_LM"
    assert (quantization is None) == (not any(isinstance(m, bnb.nn.Linear8bitLt) for m in trainer.model.modules()))
    assert len(seen) == 2
    assert all(predictions.shape == (8, 6) for predictions in seen), "a start token and five that were generated"
    result = trainer.predict(translations())
    with torch.no_grad():
        ids = torch.tensor(translations()["input_ids"])
        expected = trainer.model.generate(input_ids=ids, generation_config=trainer.args.generation_config)
    assert torch.equal(torch.tensor(result.predictions), expected)
    assert len(load_file(tmp_path / "checkpoint-2" / "adapter_model.safetensors")) > 0


# -- subclasses --------------------------------------------------------------------------------


class SmoothedLoss(Trainer):
    """A loss of its own, with the model's output as second result, as tutorials write it."""

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        labels = inputs.pop("labels")
        outputs = model(**inputs)
        loss = torch.nn.functional.cross_entropy(
            outputs.logits[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten(), label_smoothing=0.1
        )
        return (loss, outputs) if return_outputs else loss


class TwoRates(Trainer):
    """An optimizer of its own, made from whatever can be trained when it is asked for."""

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        named = [(name, p) for name, p in self.model.named_parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(
            [
                {"params": [p for name, p in named if "lora_A" in name], "lr": 1e-3},
                {"params": [p for name, p in named if "lora_A" not in name], "lr": 1e-2},
            ]
        )
        return self.optimizer


@pytest.mark.parametrize("quantization", [None, "int8"])
@pytest.mark.parametrize("late", [False, True])
@pytest.mark.parametrize("cls", [SmoothedLoss, TwoRates])
def test_subclass(tmp_path: Path, cls: type[Trainer], late: bool, quantization: str | None) -> None:
    callbacks = None if late else [LoraCallback(r=4, quantization=quantization)]
    trainer = tiny.trainer(tmp_path, callbacks=callbacks, cls=cls, lr_scheduler_type="constant")
    if late:
        attach(trainer, r=4, quantization=quantization)
    trainer.train()
    assert_trained(trainer)
    rates = [group["lr"] for group in trainer.optimizer.param_groups]
    assert rates == ([1e-3, 1e-2] if cls is TwoRates else [1e-2, 1e-2])
    assert trainer.state.log_history[0]["grad_norm"] > 0


def test_own_optimizer_of_a_subclass_after_a_run_without_adapters(tmp_path: Path) -> None:
    trainer = tiny.trainer(tmp_path, cls=TwoRates)
    trainer.train()
    attach(trainer, r=4)
    trainer.train()
    assert_trained(trainer)


def test_optimizer_class_and_arguments(tmp_path: Path) -> None:
    extra = {"optimizer_cls_and_kwargs": (torch.optim.SGD, {"lr": 0.5, "momentum": 0.9})}
    trainer = tiny.trainer(tmp_path, callbacks=[LoraCallback(r=4)], trainer_arguments=extra)
    trainer.train()
    assert_trained(trainer)
    assert isinstance(trainer.optimizer.optimizer, torch.optim.SGD)


def test_given_optimizer_and_schedule(tmp_path: Path) -> None:
    model = tiny.llama()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0 / (step + 1))
    trainer = tiny.trainer(
        tmp_path,
        model,
        [LoraCallback(r=4, quantization="int8")],
        trainer_arguments={"optimizers": (optimizer, schedule)},
    )
    trainer.train()
    assert_trained(trainer)
    assert trainer.optimizer.optimizer is optimizer
    rates = [entry["learning_rate"] for entry in trainer.state.log_history if "learning_rate" in entry]
    assert rates == pytest.approx([1e-2 / step for step in (1, 2, 3, 4)], rel=1e-6)


# -- heads -------------------------------------------------------------------------------------


@pytest.mark.parametrize("quantization", [None, "int8"])
def test_token_classification_head_is_trained_saved_and_reloaded(tmp_path: Path, quantization: str | None) -> None:
    def base() -> BertForTokenClassification:
        torch.manual_seed(0)
        return BertForTokenClassification(
            BertConfig(
                vocab_size=tiny.VOCABULARY,
                hidden_size=32,
                num_hidden_layers=2,
                num_attention_heads=4,
                intermediate_size=64,
                num_labels=3,
            )
        )

    ids = torch.randint(1, tiny.VOCABULARY, (16, 8), generator=torch.Generator().manual_seed(1))
    data = Dataset.from_dict({"input_ids": ids.tolist(), "labels": (ids % 3).tolist()})
    trainer = tiny.trainer(
        tmp_path,
        base(),
        [LoraCallback(r=4, quantization=quantization)],
        data=data,
        save_strategy="steps",
        save_steps=4,
    )
    start = {
        n: p.detach().clone() for n, p in trainer.model.named_parameters() if "classifier" in n and p.requires_grad
    }
    assert len(start) == 2
    trainer.train()
    assert_trained(trainer)
    now = dict(trainer.model.named_parameters())
    assert all(not torch.equal(now[name], value) for name, value in start.items())
    reloaded = dict(peft.PeftModel.from_pretrained(base(), tmp_path / "checkpoint-4").named_parameters())
    assert all(torch.equal(reloaded[name].float(), now[name].float()) for name in start)


# -- no reference that outlives the model ------------------------------------------------------


def test_callback_follows_the_trainer_and_keeps_no_model(tmp_path: Path) -> None:
    import gc
    import weakref

    callback = LoraCallback(r=4)
    trainer = tiny.trainer(tmp_path, callbacks=[callback])
    trainer.train()
    model = weakref.ref(trainer.model)
    base = weakref.ref(trainer.model.get_base_model())
    given_back = detach(trainer)
    assert given_back is base()
    gc.collect()
    assert model() is None, "nothing of ours holds the wrapped model"
    del given_back, trainer
    gc.collect()
    assert base() is None, "nothing of ours holds the base model"
    assert callback.report is not None

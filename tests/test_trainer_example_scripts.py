"""What the example scripts of transformers do, each with the one line of ours: train, best model, resume, save, reload.

The base is saved as a pretrained body and loaded under a task's class, as in those scripts, so that the head is new.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from datasets import Dataset
from packaging.version import Version
from peft import PeftModel
from safetensors.torch import load_file
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageClassification,
    AutoModelForMaskedLM,
    AutoModelForQuestionAnswering,
    AutoModelForSemanticSegmentation,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    AutoModelForSpeechSeq2Seq,
    AutoModelForTokenClassification,
    BartConfig,
    BartModel,
    BertConfig,
    BertForMaskedLM,
    GPT2Config,
    GPT2LMHeadModel,
    SegformerConfig,
    SegformerModel,
    Seq2SeqTrainer,
    Seq2SeqTrainingArguments,
    T5Config,
    T5ForConditionalGeneration,
    Trainer,
    TrainingArguments,
    ViTConfig,
    ViTModel,
    WhisperConfig,
    WhisperForConditionalGeneration,
)

from lora_plugins import LoraCallback, prepare_model

ROWS, LENGTH, VOCABULARY = 16, 10, 64


def _bert() -> nn.Module:
    return BertForMaskedLM(
        BertConfig(
            vocab_size=VOCABULARY,
            hidden_size=32,
            num_hidden_layers=2,
            num_attention_heads=4,
            intermediate_size=64,
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
        )
    )


def _gpt2() -> nn.Module:
    return GPT2LMHeadModel(
        GPT2Config(
            vocab_size=VOCABULARY,
            n_embd=32,
            n_layer=2,
            n_head=4,
            n_positions=32,
            attn_pdrop=0.0,
            resid_pdrop=0.0,
            embd_pdrop=0.0,
            bos_token_id=0,
            eos_token_id=0,
        )
    )


def _bart() -> nn.Module:
    sizes = dict.fromkeys(("encoder_layers", "decoder_layers"), 2)
    sizes |= dict.fromkeys(("encoder_attention_heads", "decoder_attention_heads"), 4)
    sizes |= dict.fromkeys(("encoder_ffn_dim", "decoder_ffn_dim"), 64)
    return BartModel(BartConfig(vocab_size=VOCABULARY, d_model=32, max_position_embeddings=32, dropout=0.0, **sizes))


def _t5() -> nn.Module:
    return T5ForConditionalGeneration(
        T5Config(
            vocab_size=VOCABULARY,
            d_model=32,
            d_kv=8,
            d_ff=64,
            num_layers=2,
            num_heads=4,
            dropout_rate=0.0,
            decoder_start_token_id=0,
        )
    )


def _whisper() -> nn.Module:
    sizes = dict.fromkeys(("encoder_layers", "decoder_layers"), 2)
    sizes |= dict.fromkeys(("encoder_attention_heads", "decoder_attention_heads"), 4)
    sizes |= dict.fromkeys(("encoder_ffn_dim", "decoder_ffn_dim"), 64)
    return WhisperForConditionalGeneration(
        WhisperConfig(
            vocab_size=VOCABULARY,
            d_model=32,
            num_mel_bins=8,
            max_source_positions=16,
            max_target_positions=16,
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=2,
            decoder_start_token_id=1,
            suppress_tokens=None,
            begin_suppress_tokens=None,
            dropout=0.0,
            **sizes,
        )
    )


def _vit() -> nn.Module:
    return ViTModel(
        ViTConfig(
            hidden_size=32,
            num_hidden_layers=2,
            num_attention_heads=4,
            intermediate_size=64,
            image_size=16,
            patch_size=8,
            hidden_dropout_prob=0.0,
        )
    )


def _segformer() -> nn.Module:
    # Drop path stays at its default of 0.1: stochastic depth must set no alarm off.
    return SegformerModel(
        SegformerConfig(
            num_encoder_blocks=2,
            depths=[1, 1],
            sr_ratios=[2, 1],
            hidden_sizes=[16, 32],
            patch_sizes=[7, 3],
            strides=[4, 2],
            num_attention_heads=[1, 2],
            mlp_ratios=[2, 2],
            decoder_hidden_size=16,
        )
    )


def _ids(length: int = LENGTH) -> list[list[int]]:
    generator = torch.Generator().manual_seed(7)
    return torch.randint(3, VOCABULARY, (ROWS, length), generator=generator).tolist()


def _classes(count: int, *shape: int) -> list[Any]:
    generator = torch.Generator().manual_seed(11)
    shape = (ROWS, *shape)
    return torch.randint(0, count, shape, generator=generator).tolist()


def _noise(*shape: int) -> list[Any]:
    return torch.randn(ROWS, *shape, generator=torch.Generator().manual_seed(13)).tolist()


@dataclass(frozen=True)
class Script:
    """One of the example scripts.

    Attributes:
        name: Its file name without ``.py``.
        body: Makes the model that counts as pretrained.
        auto: The class that the script loads it under.
        columns: Makes the data set's columns.
        loading: More arguments of ``from_pretrained``.
        trained: Names in which a new head shows in the saved adapter.
        sequence: Whether it uses `Seq2SeqTrainer`.
    """

    name: str
    body: Callable[[], nn.Module]
    auto: Any
    columns: Callable[[], dict[str, Any]]
    loading: dict[str, Any] = field(default_factory=dict)
    trained: tuple[str, ...] = ()
    sequence: bool = False


SCRIPTS = [
    Script("run_clm", _gpt2, AutoModelForCausalLM, lambda: {"input_ids": _ids(), "labels": _ids()}),
    Script("run_mlm", _bert, AutoModelForMaskedLM, lambda: {"input_ids": _ids(), "labels": _ids()}),
    Script(
        "run_glue",
        _bert,
        AutoModelForSequenceClassification,
        lambda: {"input_ids": _ids(), "labels": _classes(3)},
        {"num_labels": 3},
        ("classifier", "pooler"),
    ),
    Script(
        "run_ner",
        _bert,
        AutoModelForTokenClassification,
        lambda: {"input_ids": _ids(), "labels": _classes(5, LENGTH)},
        {"num_labels": 5},
        ("classifier",),
    ),
    Script(
        "run_qa",
        _bert,
        AutoModelForQuestionAnswering,
        lambda: {"input_ids": _ids(), "start_positions": _classes(4), "end_positions": _classes(8)},
        {},
        ("qa_outputs",),
    ),
    Script(
        "run_summarization",
        _bart,
        AutoModelForSeq2SeqLM,
        lambda: {"input_ids": _ids(), "labels": _ids(6)},
        sequence=True,
    ),
    Script(
        "run_translation",
        _t5,
        AutoModelForSeq2SeqLM,
        lambda: {"input_ids": _ids(), "labels": _ids(6)},
        sequence=True,
    ),
    Script(
        "run_speech_recognition_seq2seq",
        _whisper,
        AutoModelForSpeechSeq2Seq,
        lambda: {"input_features": _noise(8, 32), "labels": _ids(6)},
        sequence=True,
    ),
    Script(
        "run_image_classification",
        _vit,
        AutoModelForImageClassification,
        lambda: {"pixel_values": _noise(3, 16, 16), "labels": _classes(4)},
        {"num_labels": 4},
        ("classifier",),
    ),
    Script(
        "run_semantic_segmentation",
        _segformer,
        AutoModelForSemanticSegmentation,
        lambda: {"pixel_values": _noise(3, 32, 32), "labels": _classes(4, 32, 32)},
        {"num_labels": 4},
        ("decode_head",),
    ),
]
NAMES = [script.name for script in SCRIPTS]


@pytest.fixture(scope="module")
def bodies(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Script], Path]:
    """Return a function that saves a script's pretrained body once and returns its folder."""
    root = tmp_path_factory.mktemp("bodies")

    def save(script: Script) -> Path:
        folder = root / script.body.__name__
        if not folder.exists():
            torch.manual_seed(1)
            script.body().save_pretrained(folder)
        return folder

    return save


def _load(script: Script, folder: Path, seed: int) -> nn.Module:
    """Load the body under the script's class; a new head gets other numbers with each seed."""
    torch.manual_seed(seed)
    model: nn.Module = script.auto.from_pretrained(folder, **script.loading)
    return model


def _data(script: Script) -> Dataset:
    data = Dataset.from_dict(script.columns())
    return data.with_format("torch")


def _arguments(script: Script, output: Path, steps: int) -> TrainingArguments:
    kind = Seq2SeqTrainingArguments if script.sequence else TrainingArguments
    return kind(
        str(output),
        max_steps=steps,
        per_device_train_batch_size=4,
        per_device_eval_batch_size=8,
        learning_rate=5e-3,
        lr_scheduler_type="constant",
        eval_strategy="steps",
        save_strategy="steps",
        eval_steps=2,
        save_steps=2,
        logging_steps=1,
        load_best_model_at_end=True,
        metric_for_best_model="eval_loss",
        report_to=[],
        use_cpu=True,
        seed=3,
        remove_unused_columns=False,
    )


def _trainer(script: Script, model: nn.Module, output: Path, quantization: str | None, steps: int = 4) -> Trainer:
    data = _data(script)
    kind = Seq2SeqTrainer if script.sequence else Trainer
    return kind(
        model=model,
        args=_arguments(script, output, steps),
        train_dataset=data,
        eval_dataset=data.select(range(8)),
        callbacks=[LoraCallback(r=4, lora_dropout=0.0, quantization=quantization)],
    )


@torch.no_grad()
def _outputs(script: Script, model: nn.Module) -> torch.Tensor:
    """What the model says to the first rows, in evaluation mode."""
    model.eval()
    batch = {name: torch.as_tensor(value) for name, value in _data(script)[:4].items()}
    output = model(**batch)
    logits = output.logits if "logits" in output else torch.stack([output.start_logits, output.end_logits])
    return logits.float()


def _trained(trainer: Trainer) -> dict[str, torch.Tensor]:
    return {n: p.detach().clone() for n, p in trainer.model.named_parameters() if p.requires_grad}


@dataclass
class Run:
    """A finished run of a script."""

    script: Script
    folder: Path
    output: Path
    trainer: Trainer


@pytest.fixture(scope="module", params=[*itertools.product(NAMES, (None, "int8"))], ids=lambda p: f"{p[0]}-{p[1]}")
def run(
    request: pytest.FixtureRequest, bodies: Callable[[Script], Path], tmp_path_factory: pytest.TempPathFactory
) -> Run:
    """A run of each script, with a float and with an int8 base."""
    name, quantization = request.param
    script = SCRIPTS[NAMES.index(name)]
    folder, output = bodies(script), tmp_path_factory.mktemp(f"{name}-{quantization}")
    trainer = _trainer(script, _load(script, folder, seed=5), output, quantization)
    trainer.train()
    return Run(script, folder, output, trainer)


def test_the_loss_falls_and_the_new_head_is_trained(run: Run) -> None:
    losses = [row["loss"] for row in run.trainer.state.log_history if "loss" in row]
    assert len(losses) == 4
    names = "\n".join(_trained(run.trainer))
    for part in run.script.trained:
        assert f".{part}." in names, f"{part} is new and is not trained"


def test_the_best_checkpoint_is_in_memory(run: Run) -> None:
    best = Path(run.trainer.state.best_model_checkpoint or "")
    stored = load_file(best / "adapter_model.safetensors")
    names = {
        name.replace(".default", "").replace(".modules_to_save", ""): p for name, p in _trained(run.trainer).items()
    }
    assert len(stored) >= len(names)
    for name, value in names.items():
        assert torch.equal(stored[name], value), name


def test_a_resumed_run_is_the_run(run: Run, tmp_path: Path) -> None:
    first = _trainer(run.script, _load(run.script, run.folder, seed=5), tmp_path, _quantization(run))
    first.train(resume_from_checkpoint=str(run.output / "checkpoint-2"))
    whole = load_file(run.output / "checkpoint-4" / "adapter_model.safetensors")
    again = load_file(tmp_path / "checkpoint-4" / "adapter_model.safetensors")
    assert set(whole) == set(again)
    for name, value in whole.items():
        torch.testing.assert_close(again[name], value, rtol=1e-4, atol=1e-6)


def test_plain_peft_loads_what_was_saved_onto_a_float_base(run: Run, tmp_path: Path) -> None:
    run.trainer.save_model(str(tmp_path))
    # Another seed: what is new and not in the file would have other numbers.
    reloaded = PeftModel.from_pretrained(_load(run.script, run.folder, seed=99), str(tmp_path))
    if _quantization(run) is None:
        expected = _outputs(run.script, run.trainer.model)
        # Older ones round T5's logits differently in the Trainer's model.
        tolerance = 0.0 if Version(transformers.__version__) >= Version("5.23") else 1e-5
        torch.testing.assert_close(_outputs(run.script, reloaded), expected, rtol=tolerance, atol=tolerance)
    else:
        difference = _outputs(run.script, reloaded) - _outputs(run.script, run.trainer.model)
        assert difference.abs().mean() < 0.05 * _outputs(run.script, run.trainer.model).abs().mean()


def test_it_continues_on_an_int8_base(run: Run, tmp_path: Path) -> None:
    run.trainer.save_model(str(tmp_path))
    model = prepare_model(_load(run.script, run.folder, seed=99), adapter=tmp_path, quantization="int8")
    if _quantization(run) == "int8":
        torch.testing.assert_close(
            _outputs(run.script, model), _outputs(run.script, run.trainer.model), rtol=1e-3, atol=1e-3
        )
    assert any(p.requires_grad for p in model.parameters())


def _quantization(run: Run) -> str | None:
    callback = next(c for c in run.trainer.callback_handler.callbacks if isinstance(c, LoraCallback))
    quantization = callback.settings.quantization
    return None if quantization is None else quantization.name

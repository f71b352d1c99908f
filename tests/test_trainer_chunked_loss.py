"""The loss in pieces: the plain loss's value and gradient, in which Trainers it is used, and where it steps aside."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import Gemma2Config, Gemma2ForCausalLM, Trainer
from transformers.loss.loss_utils import ForCausalLMLoss

from lora_plugins import Int8PreparationCallback, LoraCallback
from lora_plugins.errors import NonFiniteLoss, UnsupportedTraining
from lora_plugins.trainer import chunked_loss as module
from lora_plugins.trainer.chunked_loss import LazyLogits, chunked_loss


@pytest.fixture(autouse=True)
def _small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """Three rows and some words at a time, so that the small models here have many pieces and an uneven last tile."""
    monkeypatch.setattr(module, "PIECE", 3 * tiny.VOCABULARY)
    monkeypatch.setattr(module, "FEWEST_ROWS", 1)
    monkeypatch.setattr(module, "TILE", 40)


class WidestLogits(TorchDispatchMode):
    """Notes how many rows of logits any one tensor held."""

    def __init__(self) -> None:
        super().__init__()
        self.rows = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        # The head's weight, turned round, has the vocabulary last as well.
        turned = func is torch.ops.aten.t.default
        if not turned and isinstance(result, torch.Tensor) and result.dim() > 1 and result.shape[-1] == tiny.VOCABULARY:
            self.rows = max(self.rows, result.numel() // tiny.VOCABULARY)
        return result


def frozen(model: Any) -> Any:
    model.requires_grad_(False)
    model.get_input_embeddings().weight.requires_grad_(model.get_input_embeddings().weight.dtype == torch.float32)
    return model.train()


def batch() -> dict[str, torch.Tensor]:
    data = tiny.rows(4)
    return {name: torch.tensor(data[name]) for name in ("input_ids", "labels")}


# -- the same numbers --------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("items", [None, 7, torch.tensor(7)])
@pytest.mark.parametrize("bias", [False, True])
def test_value_and_gradient(dtype: torch.dtype, items: Any, bias: bool) -> None:
    torch.manual_seed(0)
    head = nn.Linear(16, tiny.VOCABULARY, bias=bias, dtype=dtype).requires_grad_(False)
    hidden = torch.randn(2, 11, 16, dtype=dtype, requires_grad=True)
    labels = torch.randint(0, tiny.VOCABULARY, (2, 11))
    labels[0, 2:5] = -100
    loss = module._Loss(head, ForCausalLMLoss)
    found = loss(LazyLogits(head, hidden), labels, tiny.VOCABULARY, items)
    expected = ForCausalLMLoss(head(hidden), labels, tiny.VOCABULARY, items)
    torch.testing.assert_close(found, expected)
    one, other = (torch.autograd.grad(3 * value, hidden)[0] for value in (found, expected))
    # A factor from outside comes after the rounding here and before it there.
    tolerance = 1e-5 if dtype == torch.float32 else 1e-2
    torch.testing.assert_close(one, other, rtol=tolerance, atol=tolerance * float(other.abs().max()))
    assert float(one.norm()) > 0


def test_nothing_to_average_over_is_not_a_number() -> None:
    head = nn.Linear(16, tiny.VOCABULARY).requires_grad_(False)
    labels = torch.full((1, 4), -100)
    assert torch.isnan(module._Loss(head, ForCausalLMLoss)(LazyLogits(head, torch.randn(1, 4, 16)), labels, 96))


def test_labels_that_are_shifted_already() -> None:
    head = nn.Linear(16, tiny.VOCABULARY).requires_grad_(False)
    hidden, labels = torch.randn(2, 5, 16), torch.randint(0, tiny.VOCABULARY, (2, 5))
    found = module._Loss(head, ForCausalLMLoss)(LazyLogits(head, hidden), None, 96, shift_labels=labels)
    torch.testing.assert_close(found, ForCausalLMLoss(head(hidden), None, 96, shift_labels=labels))


def test_logits_that_somebody_looks_at_are_real() -> None:
    head = nn.Linear(16, tiny.VOCABULARY).requires_grad_(False)
    hidden = torch.randn(2, 5, 16, requires_grad=True)
    real = head(hidden)
    for function in (
        lambda x: x[:, 1:] / 2,
        lambda x: 2 * x - x,
        lambda x: torch.tanh(x),
        lambda x: x.float().view(-1, 96),
        lambda x: torch.cat([x, x]),
        lambda x: nn.functional.log_softmax(x, dim=-1),
    ):
        lazy: Any = LazyLogits(head, hidden)
        assert (lazy.shape, lazy.dtype, lazy.made) == (real.shape, real.dtype, None)
        torch.testing.assert_close(function(lazy), function(real))
        (one,), (other,) = (torch.autograd.grad(function(x).sum(), hidden, retain_graph=True) for x in (lazy, real))
        torch.testing.assert_close(one, other)


class ZLoss(torch.autograd.Function):
    """A function of its own, as users write them: it sees its input below ``__torch_function__``."""

    @staticmethod
    def forward(ctx: Any, logits: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(logits)
        return logits.logsumexp(-1).square().mean()

    @staticmethod
    def backward(ctx: Any, upstream: torch.Tensor) -> torch.Tensor:
        (logits,) = ctx.saved_tensors
        total = logits.logsumexp(-1, keepdim=True)
        return upstream * 2 * total * logits.softmax(-1) / total.numel()


def _write(logits: Any) -> Any:
    logits[..., 3] = -100.0
    return logits


def _write_in_place(logits: Any) -> Any:
    return logits.mul_(2).masked_fill_(logits > 1, 0.5)


@torch.jit.script
def scripted(logits: torch.Tensor) -> torch.Tensor:
    return torch.tanh(logits * 2) + 1


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize(
    "function",
    [
        ZLoss.apply,
        _write,
        _write_in_place,
        scripted,
        abs,
        lambda x: x % 2,
        lambda x: x.where(x != 0, x) * (x == x),
        lambda x: x.data_ptr() and x + 1,
        lambda x: x.clone() * 2,
        lambda x: torch.vmap(torch.tanh)(x),
        lambda x: x.unflatten(-1, (2, -1)).transpose(0, 1).contiguous(),
        lambda x: torch.utils.checkpoint.checkpoint(torch.tanh, x, use_reentrant=False),
        lambda x: torch.utils.checkpoint.checkpoint(torch.tanh, x, use_reentrant=True),
    ],
)
def test_logits_give_their_gradient_whatever_touches_them(function: Any, autocast: bool) -> None:
    torch.manual_seed(0)
    head = nn.Linear(16, tiny.VOCABULARY).requires_grad_(False)
    hidden = torch.randn(2, 5, 16, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        real, lazy = head(hidden).float(), LazyLogits(head, hidden)
        assert isinstance(lazy, torch.Tensor)
        assert (lazy.made, lazy.is_leaf, lazy.requires_grad) == (None, False, True)
        found, expected = function(lazy), function(real)
    torch.testing.assert_close(found + 0, expected)
    gradients = []
    for value in (found, expected):
        # Reentrant checkpoints know backward() only.
        hidden.grad = None
        value.square().sum().backward()
        gradients.append(hidden.grad)
    torch.testing.assert_close(*gradients)
    assert float(gradients[0].norm()) > 0


def test_logits_leave_torch_as_any_tensor_does(tmp_path: Path) -> None:
    head = nn.Linear(16, tiny.VOCABULARY).requires_grad_(False)
    hidden = torch.randn(2, 5, 16)
    real = head(hidden)
    for function in (
        lambda x: x.tolist(),
        lambda x: x.numpy().tolist(),
        lambda x: np.asarray(x).tolist(),
        lambda x: torch.from_dlpack(x).tolist(),
        lambda x: copy.deepcopy(x).tolist(),
        lambda x: pickle.loads(pickle.dumps(x)).tolist(),
        lambda x: x[0, 0, 0].item(),
        repr,
    ):
        assert function(LazyLogits(head, hidden)) == function(real)
    torch.save({"logits": LazyLogits(head, hidden)}, tmp_path / "file")
    assert torch.equal(torch.load(tmp_path / "file", weights_only=True)["logits"], real)


def test_second_derivative_of_logits() -> None:
    head = nn.Linear(16, tiny.VOCABULARY).requires_grad_(False)
    hidden = torch.randn(2, 5, 16, requires_grad=True)
    norms = []
    for logits in (LazyLogits(head, hidden), head(hidden)):
        (first,) = torch.autograd.grad(logits.softmax(-1).square().sum(), hidden, create_graph=True)
        norms.append(torch.autograd.grad(first.square().sum(), hidden)[0])
    torch.testing.assert_close(*norms)


def test_what_the_loss_in_pieces_cannot_give_is_refused_with_the_way_out() -> None:
    head = nn.Linear(16, tiny.VOCABULARY).requires_grad_(False)
    hidden = torch.randn(2, 5, 16, requires_grad=True)
    lazy = LazyLogits(head, hidden)
    for touch in (lazy.retain_grad, lambda: lazy.register_hook(print)):
        with pytest.raises(UnsupportedTraining, match="chunked_loss=False"):
            touch()
    loss = module._Loss(head, ForCausalLMLoss)(lazy, torch.randint(0, 96, (2, 5)), tiny.VOCABULARY)
    with pytest.raises(UnsupportedTraining, match="chunked_loss=False"):
        torch.autograd.grad(loss, hidden, create_graph=True)


def test_loss_after_logits_were_written_to_is_that_of_what_was_written() -> None:
    torch.manual_seed(0)
    head = nn.Linear(16, tiny.VOCABULARY).requires_grad_(False)
    hidden = torch.randn(2, 5, 16, requires_grad=True)
    labels = torch.randint(4, 96, (2, 5))
    lazy, real = LazyLogits(head, hidden), head(hidden)
    found, expected = (
        (module._Loss(head, ForCausalLMLoss) if x is lazy else ForCausalLMLoss)(_write(x), labels, 96)
        for x in (lazy, real)
    )
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(torch.autograd.grad(found, hidden), torch.autograd.grad(expected, hidden))


# -- in a model --------------------------------------------------------------------------------


def softcapped() -> Any:
    torch.manual_seed(0)
    return Gemma2ForCausalLM(
        Gemma2Config(
            vocab_size=tiny.VOCABULARY,
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=8,
            final_logit_softcapping=5.0,
        )
    )


@pytest.mark.parametrize(
    ("make", "in_pieces"), [(tiny.llama, True), (tiny.gpt2, True), (tiny.bloom, True), (softcapped, False)]
)
def test_models_of_every_kind(make: Any, in_pieces: bool) -> None:
    """Where the logits are changed before the loss, they are made as a whole and the loss is right all the same."""
    model = frozen(make())
    head = model.get_output_embeddings()
    head.weight = nn.Parameter(head.weight.detach().clone(), requires_grad=False)
    parameter = model.get_input_embeddings().weight
    expected = model(**batch()).loss
    gradient = torch.autograd.grad(expected, parameter)[0]
    with chunked_loss(model) as usable:
        assert usable
        output = model(**batch())
        torch.testing.assert_close(output.loss, expected)
        torch.testing.assert_close(torch.autograd.grad(output.loss, parameter)[0], gradient)
    assert (type(output.logits) is LazyLogits and output.logits.made is None) is in_pieces
    torch.testing.assert_close(torch.softmax(output.logits, -1), torch.softmax(model(**batch()).logits, -1))


def test_without_labels_the_logits_are_tensors() -> None:
    model = frozen(tiny.llama())
    model.lm_head.weight.requires_grad_(False)
    with chunked_loss(model) as usable:
        assert usable
        assert type(model(input_ids=batch()["input_ids"]).logits) is torch.Tensor


def test_nothing_is_left_on_the_model() -> None:
    model = frozen(tiny.llama())
    before = (set(vars(model)), set(vars(model.lm_head)), model.loss_function)

    def fail() -> None:
        with chunked_loss(model) as usable:
            assert usable
            assert set(vars(model.lm_head)) != before[1]
            raise RuntimeError("a step that fails")

    with pytest.raises(RuntimeError, match="a step that fails"):
        fail()
    assert (set(vars(model)), set(vars(model.lm_head)), model.loss_function) == before
    assert not model._forward_pre_hooks
    pickle.dumps(model)


def test_own_loss_function_comes_back() -> None:
    model = frozen(tiny.llama())
    model.loss_function = ForCausalLMLoss
    with chunked_loss(model) as usable:
        assert usable
    assert vars(model)["_loss_function"] is ForCausalLMLoss


def trained_head(model: Any) -> None:
    model.lm_head.weight.requires_grad_(True)


def hooked_head(model: Any) -> None:
    model.lm_head.register_forward_hook(lambda module, args, output: output * 2)


def other_loss(model: Any) -> None:
    model.loss_function = lambda logits, labels, vocab_size, **kwargs: logits.sum()


def other_forward(model: Any) -> None:
    model.lm_head.forward = lambda hidden: torch.zeros(*hidden.shape[:-1], tiny.VOCABULARY)


@pytest.mark.parametrize("change", [trained_head, hooked_head, other_loss, other_forward])
def test_heads_and_losses_that_are_not_the_plain_ones(change: Any) -> None:
    model = frozen(tiny.llama())
    change(model)
    expected = model(**batch()).loss
    with chunked_loss(model) as usable:
        assert not usable
        assert torch.equal(model(**batch()).loss, expected)


def test_classifiers_are_left_alone() -> None:
    with chunked_loss(tiny.bert_classifier()) as usable:
        assert not usable


# -- in a Trainer ------------------------------------------------------------------------------


class Observed(Trainer):  # type: ignore[misc]
    """Notes the widest logits of a training step."""

    def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        with WidestLogits() as widest:
            loss = super().training_step(*args, **kwargs)
        self.widest = max(getattr(self, "widest", 0), widest.rows)
        return loss


def losses(folder: Path, *, pieces: bool, callback: Any = None, cls: Any = Observed, **options: Any) -> tuple[Any, Any]:
    callback = callback or LoraCallback(r=4, lora_dropout=0.1, chunked_loss=pieces)
    trainer = tiny.trainer(folder, callbacks=[callback], cls=cls, **options)
    trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry], trainer


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"gradient_accumulation_steps": 2},
        {"bf16": True},
        {"gradient_checkpointing": True},
        {"average_tokens_across_devices": False, "gradient_accumulation_steps": 3},
    ],
    ids=lambda options: "+".join(options) or "plain",
)
def test_training_gives_the_plain_losses(tmp_path: Path, options: dict[str, Any]) -> None:
    expected, plain = losses(tmp_path, pieces=False, **options)
    found, trainer = losses(tmp_path, pieces=True, **options)
    assert plain.widest == 4 * tiny.LENGTH
    assert trainer.widest == 3
    assert found == pytest.approx(expected, rel=1e-5)
    for one, other in zip(trainer.model.parameters(), plain.model.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-3)


def test_under_adapters_from_elsewhere(tmp_path: Path) -> None:
    for pieces in (True, False):
        callback = [LoraCallback(r=4, chunked_loss=False), Int8PreparationCallback(chunked_loss=pieces)]
        trainer = tiny.trainer(tmp_path, callbacks=callback, cls=Observed)
        trainer.train()
        assert trainer.widest == (3 if pieces else 4 * tiny.LENGTH)


class OwnLoss(Observed):
    def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, **kwargs: Any) -> Any:
        outputs = model(**inputs)
        assert type(outputs.logits) is torch.Tensor
        return (outputs.loss, outputs) if return_outputs else outputs.loss


def summed(outputs: Any, labels: torch.Tensor, num_items_in_batch: Any = None) -> torch.Tensor:
    assert type(outputs.logits) is torch.Tensor
    return ForCausalLMLoss(outputs.logits, labels, tiny.VOCABULARY, num_items_in_batch)


@pytest.mark.parametrize(
    "options",
    [
        {"cls": OwnLoss},
        {"label_smoothing_factor": 0.1},
        {"trainer_arguments": {"compute_loss_func": summed}},
        {"callback": LoraCallback(r=4, modules_to_save=["lm_head"])},
        {"callback": LoraCallback(r=4, target_modules=["q_proj", "lm_head"])},
    ],
    ids=["compute_loss", "label smoothing", "compute_loss_func", "trained head", "adapted head"],
)
def test_trainers_with_a_loss_of_their_own(tmp_path: Path, options: dict[str, Any]) -> None:
    found, trainer = losses(tmp_path, pieces=True, **options)
    assert len(found) == 4
    assert trainer.widest == 4 * tiny.LENGTH


def test_evaluation_and_prediction(tmp_path: Path) -> None:
    evaluated = []
    for pieces in (True, False):
        _, trainer = losses(tmp_path, pieces=pieces)
        with WidestLogits() as widest:
            evaluated.append(trainer.evaluate(tiny.rows(8, seed=3))["eval_loss"])
        assert widest.rows == (3 if pieces else 8 * tiny.LENGTH)
        predictions = trainer.predict(tiny.rows(8, seed=3)).predictions
        assert predictions.shape == (8, tiny.LENGTH, tiny.VOCABULARY)
    assert evaluated[0] == pytest.approx(evaluated[1], rel=1e-5)


def test_metrics_get_their_logits(tmp_path: Path) -> None:
    seen = []

    def metrics(prediction: Any) -> dict[str, float]:
        seen.append(prediction.predictions.shape)
        return {}

    _, trainer = losses(tmp_path, pieces=True, trainer_arguments={"compute_metrics": metrics})
    trainer.evaluate(tiny.rows(8, seed=3))
    assert seen == [(8, tiny.LENGTH, tiny.VOCABULARY)]


def test_a_loss_that_is_no_number_still_stops_the_run(tmp_path: Path) -> None:
    data = tiny.rows(8).map(lambda row: {"labels": [-100] * tiny.LENGTH})
    with pytest.raises(NonFiniteLoss, match="Every label of this batch is -100"):
        losses(tmp_path, pieces=True, data=data)


def test_detaching_takes_it_away(tmp_path: Path) -> None:
    from lora_plugins import detach

    _, trainer = losses(tmp_path, pieces=True)
    detach(trainer)
    assert not {"training_step", "prediction_step"} & set(vars(trainer))

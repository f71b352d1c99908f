"""TRL's Trainers through the callbacks: what is trained, what the reference is, what a checkpoint holds."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import bitsandbytes as bnb
import peft
import pytest
import tiny
import torch
from datasets import Dataset
from safetensors.torch import load_file
from transformers import LlamaForCausalLM, Trainer

from lora_plugins import Int8PreparationCallback, LoraCallback, attach, prepare_model
from lora_plugins.adapters.report import make_report
from lora_plugins.errors import AdapterNotMoving, FrozenHead, UnsupportedTraining
from lora_plugins.models.wrapping import base_of
from lora_plugins.trainer.attaching import detach

trl = pytest.importorskip("trl", reason="trl is not installed")

from trl_runs import (  # noqa: E402 - it imports trl
    KINDS,
    ONLINE,
    assert_trained,
    count_small_words,
    losses,
    make,
    pairs,
    reward_model,
    sentences,
    tokenizer,
)

LN2 = math.log(2)


def assert_quantized(trainer: Trainer, quantization: str | None) -> None:
    layers = sum(isinstance(module, bnb.nn.Linear8bitLt) for module in trainer.model.modules())
    assert layers == (14 if quantization else 0)


@pytest.mark.parametrize("quantization", [None, "int8"])
@pytest.mark.parametrize("kind", sorted(KINDS))
def test_callback_in_the_constructor(tmp_path: Path, kind: str, quantization: str | None) -> None:
    trainer = make(
        kind,
        tmp_path,
        callbacks=[LoraCallback(r=4, quantization=quantization)],
        save_strategy="steps",
        save_steps=4,
    )
    trainer.train()
    assert_trained(trainer)
    assert_quantized(trainer, quantization)
    assert {p.dtype for p in tiny.adapter_tensors(trainer.model).values()} == {torch.float32}
    stored = load_file(tmp_path / "checkpoint-4" / "adapter_model.safetensors")
    assert sum("lora_" in key for key in stored) == 8
    assert not (tmp_path / "checkpoint-4" / "model.safetensors").exists()


@pytest.mark.parametrize("kind", ["dpo", "kto", "sft"])
def test_attach_and_detach(tmp_path: Path, kind: str) -> None:
    base = tiny.llama()
    reference = {"ref_model": tiny.llama()} if kind != "sft" else {}
    trainer = make(kind, tmp_path, base, **reference)
    attach(trainer, r=4, quantization="int8")
    trainer.train()
    assert_trained(trainer)
    if reference:
        assert not any(isinstance(m, bnb.nn.Linear8bitLt) for m in trainer.ref_model.modules()), "it is the user's own"
    assert detach(trainer) is base
    assert trainer.model is base
    assert not any("lora_" in name for name, _ in base.named_parameters())


# -- twenty steps ------------------------------------------------------------------------------


@pytest.mark.parametrize("quantization", [None, pytest.param("int8", marks=pytest.mark.slow)])
@pytest.mark.parametrize("kind", [*sorted(KINDS), *sorted(ONLINE)])
def test_twenty_steps_set_no_alarm_off(tmp_path: Path, kind: str, quantization: str | None) -> None:
    callback = LoraCallback(r=4, quantization=quantization)
    trainer = make(kind, tmp_path, callbacks=[callback], max_steps=20, save_strategy="steps", save_steps=10)
    trainer.train()
    assert_trained(trainer)
    assert trainer.state.global_step == 20
    assert (tmp_path / "checkpoint-20" / "adapter_model.safetensors").is_file()


@pytest.mark.parametrize("kind", [*sorted(KINDS), *sorted(ONLINE)])
def test_a_layer_that_is_passed_by_is_found_in_every_kind(tmp_path: Path, kind: str) -> None:
    trainer = make(kind, tmp_path, callbacks=[LoraCallback(r=4)], max_steps=20)
    layer = trainer.model.base_model.model.model.layers[1].self_attn.v_proj
    layer.forward = layer.base_layer.forward
    with pytest.raises(AdapterNotMoving, match=r"1 adapter tensors.*layers\.1\.self_attn\.v_proj\.lora_B"):
        trainer.train()


@pytest.mark.parametrize("kind", sorted(ONLINE))
def test_equal_rewards_in_the_first_steps_are_no_alarm(tmp_path: Path, kind: str) -> None:
    calls = [0]

    def reward(completions: list[str], **kwargs: Any) -> list[float]:
        calls[0] += 1
        return count_small_words(completions) if calls[0] > 5 else [1.0] * len(completions)

    arguments = {"reward_funcs": reward, "max_steps": 10}
    trainer = make(kind, tmp_path, callbacks=[LoraCallback(r=4)], **arguments)
    trainer.train()
    assert losses(trainer)[:3] == [0.0] * 3
    assert_trained(trainer)


@pytest.mark.parametrize("kind", sorted(ONLINE))
def test_rewards_that_are_always_equal_fail_at_the_end(tmp_path: Path, kind: str) -> None:
    arguments = {"reward_funcs": lambda completions, **kwargs: [1.0] * len(completions), "max_steps": 5}
    trainer = make(kind, tmp_path, callbacks=[LoraCallback(r=4)], **arguments)
    with pytest.raises(AdapterNotMoving, match="All 5 steps"):
        trainer.train()


@pytest.mark.parametrize("how", ["callback", "attach"])
def test_reference_that_follows_the_policy_is_refused(tmp_path: Path, how: str) -> None:
    def start() -> None:
        callbacks = [LoraCallback(r=4)] if how == "callback" else None
        trainer = make("dpo", tmp_path, callbacks=callbacks, ref_model=tiny.llama(), sync_ref_model=True)
        attach(trainer, r=4)

    with pytest.raises(UnsupportedTraining, match="sync_ref_model=False"):
        start()


# -- the reference -----------------------------------------------------------------------------


@pytest.mark.parametrize("quantization", [None, "int8"])
@pytest.mark.parametrize("precomputed", [False, True])
def test_fresh_adapter_is_compared_with_the_model_without_it(
    tmp_path: Path, quantization: str | None, precomputed: bool
) -> None:
    callback = LoraCallback(r=4, lora_dropout=0.0, quantization=quantization, compute_dtype="float32")
    trainer = make("dpo", tmp_path, callbacks=[callback], precompute_ref_log_probs=precomputed)
    assert trainer.ref_model is None
    assert list(trainer.model.peft_config) == ["default"]
    trainer.train()
    # Policy and reference are equal at first; afterwards they are not, or the loss would stay at ln 2.
    # (Log-probabilities that were computed beforehand come from the kernel for evaluation.)
    assert losses(trainer)[0] == pytest.approx(LN2, abs=1e-6 if not (precomputed and quantization) else 1e-3)
    assert max(abs(loss - LN2) for loss in losses(trainer)[1:]) > 1e-3
    margins = [entry["rewards/margins"] for entry in trainer.state.log_history if "loss" in entry]
    assert margins[-1] != 0


@pytest.fixture
def stored(tmp_path: Path) -> Path:
    """An adapter that has been trained a little, so that it is not what the bare base model computes."""
    trainer = make("sft", tmp_path / "first", callbacks=[LoraCallback(r=4, lora_dropout=0.0)])
    trainer.train()
    trainer.save_model()
    return tmp_path / "first"


@pytest.mark.parametrize("quantization", [None, "int8"])
@pytest.mark.parametrize("kind", ["dpo", "kto"])
def test_continued_adapter_is_compared_with_a_frozen_copy_of_itself(
    tmp_path: Path, stored: Path, kind: str, quantization: str | None
) -> None:
    def start_run() -> Trainer:
        callback = LoraCallback(adapter=stored, quantization=quantization, compute_dtype="float32")
        return make(kind, tmp_path / "second", callbacks=[callback], save_strategy="steps", save_steps=2)

    trainer = start_run()
    assert list(trainer.model.peft_config) == ["default", "ref"]
    start = peft.get_peft_model_state_dict(trainer.model)
    copy = peft.get_peft_model_state_dict(trainer.model, adapter_name="ref")
    start = {name: tensor.clone() for name, tensor in start.items()}
    assert all(torch.equal(start[name], copy[name]) for name in start)
    trainer.train()
    assert_trained(trainer)
    assert losses(trainer)[0] == pytest.approx(LN2 if kind == "dpo" else 0.5, abs=1e-6)
    assert all(torch.equal(start[name], copy[name]) for name in start), "the reference must not move"
    report = make_report(trainer.model)
    assert report.frozen_adapters == ["ref"]
    assert report.trainable == sum(tensor.numel() for tensor in start.values())
    folder = tmp_path / "second" / "checkpoint-2"
    assert len(load_file(folder / "adapter_model.safetensors")) == 8
    assert all(torch.equal(t, start[n]) for n, t in load_file(folder / "ref" / "adapter_model.safetensors").items())

    resumed = start_run()
    resumed.train(resume_from_checkpoint=str(folder))
    assert losses(resumed) == losses(trainer)


@pytest.fixture
def loadable(tmp_path: Path) -> Any:
    """A base in a folder, by whose name TRL loads a reference."""
    tiny.llama().save_pretrained(tmp_path / "base")
    return lambda: LlamaForCausalLM.from_pretrained(tmp_path / "base")


@pytest.mark.parametrize("quantization", [None, "int8"])
@pytest.mark.parametrize("start", ["fresh", "continued"])
@pytest.mark.parametrize("kind", sorted(ONLINE))
def test_a_reference_that_trl_loads_again_gives_way_to_where_the_run_started(
    tmp_path: Path, stored: Path, loadable: Any, kind: str, start: str, quantization: str | None
) -> None:
    settings: dict[str, Any] = {"quantization": quantization, "compute_dtype": "float32"}
    settings |= {"adapter": stored} if start == "continued" else {"r": 4, "lora_dropout": 0.0}
    trainer = make(kind, tmp_path / "second", loadable(), [LoraCallback(**settings)], beta=0.1, max_steps=2)
    assert trainer.ref_model is not None, "TRL knows of the adapters now: release_loaded can go"
    trainer.train()
    assert trainer.ref_model is None
    assert list(trainer.model.peft_config) == (["default", "ref"] if start == "continued" else ["default"])
    first = trainer.state.log_history[0]
    assert abs(first["kl"]) < 1e-5, "policy and reference are one model at first"
    assert_trained(trainer)


def test_attach_lets_a_loaded_reference_go_and_keeps_ones_own(tmp_path: Path, loadable: Any) -> None:
    loaded = make("rloo", tmp_path / "loaded", loadable(), beta=0.1, max_steps=1)
    attach(loaded, r=4)
    loaded.train()
    assert loaded.ref_model is None
    own = tiny.llama(seed=5)
    given = make("dpo", tmp_path / "given", ref_model=own, max_steps=1)
    attach(given, r=4)
    given.train()
    assert given.ref_model is own


@pytest.mark.parametrize("kind", ["grpo", "rloo", "dpo", "kto", "online_dpo"])
def test_a_trainer_that_lost_its_reference_with_the_adapters_says_so(tmp_path: Path, loadable: Any, kind: str) -> None:
    ready = kind in ("dpo", "kto")
    model = prepare_model(loadable(), r=4) if ready else loadable()
    callbacks = [LoraCallback() if ready else LoraCallback(r=4, lora_dropout=0.0)]
    trainer = make(kind, tmp_path / kind, model, callbacks, beta=0.1, max_steps=1)
    trainer.train()
    base = detach(trainer).requires_grad_(True)
    with pytest.raises(UnsupportedTraining, match=r"compares its model with a reference.*attach\(trainer"):
        trainer.train()
    attach(trainer, r=4)
    trainer.train()
    assert trainer.ref_model is None
    assert base_of(trainer.model) is base


def test_a_trainer_that_needs_no_reference_trains_the_base_after_detaching(tmp_path: Path) -> None:
    trainer = make("grpo", tmp_path, callbacks=[LoraCallback(r=4)], beta=0.0, max_steps=3)
    trainer.train()
    before = detach(trainer).requires_grad_(True).lm_head.weight.detach().clone()
    trainer.train()
    assert not torch.equal(trainer.model.lm_head.weight, before)


def test_a_reference_of_ones_own_stays_after_detaching(tmp_path: Path) -> None:
    own = tiny.llama(seed=5)
    trainer = make("dpo", tmp_path, callbacks=[LoraCallback(r=4)], ref_model=own, max_steps=1)
    trainer.train()
    detach(trainer).requires_grad_(True)
    trainer.train()
    assert trainer.ref_model is own


@pytest.mark.parametrize("kind", ["dpo", "kto"])
def test_ready_model_gets_the_reference_of_trl(tmp_path: Path, kind: str) -> None:
    model = prepare_model(tiny.llama(), r=4, lora_dropout=0.0)
    trainer = make(kind, tmp_path, model, [LoraCallback()], save_strategy="steps", save_steps=4)
    assert list(trainer.model.peft_config) == ["default", "ref"]
    trainer.train()
    assert_trained(trainer)
    assert (tmp_path / "checkpoint-4" / "ref" / "adapter_model.safetensors").exists()


def test_trl_casts_the_adapters_of_a_model_that_arrives_quantized(tmp_path: Path) -> None:
    """When this fails, TRL leaves them in float32: say so in docs/engines.md."""
    trainer = make("dpo", tmp_path, prepare_model(tiny.llama(), r=4, quantization="int8"), [LoraCallback()])
    assert {p.dtype for p in trainer.model.parameters() if p.requires_grad} == {torch.bfloat16}
    trainer.train()
    assert_trained(trainer)


def test_best_checkpoint_of_a_run_with_a_reference(tmp_path: Path, stored: Path) -> None:
    trainer = make(
        "dpo",
        tmp_path / "second",
        callbacks=[LoraCallback(adapter=stored)],
        eval_dataset=pairs(),
        save_strategy="steps",
        save_steps=2,
        eval_strategy="steps",
        eval_steps=2,
        load_best_model_at_end=True,
        metric_for_best_model="eval_rewards/margins",
        greater_is_better=False,
    )
    trainer.train()
    best = Path(trainer.state.best_model_checkpoint)
    assert best.name == "checkpoint-2", "margins grow on the rows it trains on, and the smallest was asked for"
    for name, folder in (("default", best), ("ref", best / "ref")):
        live = peft.get_peft_model_state_dict(trainer.model, adapter_name=name)
        saved = load_file(folder / "adapter_model.safetensors")
        assert saved.keys() == live.keys()
        assert all(torch.equal(saved[key], live[key]) for key in saved), name
    assert trainer.model.active_adapter == "default"


def test_adapter_called_like_the_reference_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedTraining, match="compared with itself"):
        make("dpo", tmp_path, callbacks=[LoraCallback(adapter_name="ref")])
    make("sft", tmp_path, callbacks=[LoraCallback(adapter_name="ref")])


def test_reference_that_peft_cant_hold_is_refused(tmp_path: Path) -> None:
    prepare_model(tiny.llama(), r=4, bias="lora_only").save_pretrained(tmp_path / "first")
    with pytest.raises(UnsupportedTraining, match="needs a frozen copy of it as reference"):
        make("dpo", tmp_path / "second", callbacks=[LoraCallback(adapter=tmp_path / "first")])


# -- adapters of TRL ---------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["sft", "dpo", "kto"])
def test_base_is_quantized_under_the_adapters_of_trl(tmp_path: Path, kind: str) -> None:
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    trainer = make(kind, tmp_path, callbacks=[Int8PreparationCallback()], peft_config=config)
    trainer.train()
    assert_trained(trainer)
    assert_quantized(trainer, "int8")


# -- heads -------------------------------------------------------------------------------------


@pytest.mark.parametrize("quantization", [None, "int8"])
def test_reward_head_is_trained_and_saved(tmp_path: Path, quantization: str | None) -> None:
    trainer = make(
        "reward",
        tmp_path,
        callbacks=[LoraCallback(r=4, quantization=quantization)],
        save_strategy="steps",
        save_steps=4,
    )
    head = trainer.model.base_model.model.score
    start = head.modules_to_save["default"].weight.detach().clone()
    trainer.train()
    now = head.modules_to_save["default"].weight.detach()
    assert not torch.equal(now, start)
    saved = load_file(tmp_path / "checkpoint-4" / "adapter_model.safetensors")
    key = next(name for name in saved if "score" in name)
    assert torch.equal(saved[key], now)
    reloaded = peft.PeftModel.from_pretrained(reward_model(), tmp_path / "checkpoint-4")
    assert torch.equal(reloaded.base_model.model.score.modules_to_save["default"].weight, now.float())


def test_frozen_reward_head_is_named(tmp_path: Path) -> None:
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"])
    trainer = make("reward", tmp_path, callbacks=[Int8PreparationCallback()], peft_config=config)
    with pytest.raises(FrozenHead, match="score"):
        trainer.train()


@pytest.mark.parametrize("tied", [True, False])
def test_tokens_of_a_chat_template_are_trained_and_saved(tied: bool, tmp_path: Path) -> None:
    source = tokenizer()
    source.add_tokens(["<|user|>", "<|end|>"])
    source.chat_template = "{% for message in messages %}<|user|> {{ message['content'] }} <|end|>{% endfor %}"
    source.save_pretrained(tmp_path / "template")
    tiny.llama(tie_word_embeddings=tied).save_pretrained(tmp_path / "base")
    chats = [[{"role": "user", "content": text}, {"role": "assistant", "content": text}] for text in sentences(8, 4, 1)]

    trainer = trl.SFTTrainer(
        model=str(tmp_path / "base"),
        args=trl.SFTConfig(
            output_dir=str(tmp_path), max_steps=1, report_to=[], use_cpu=True, bf16=False, disable_tqdm=True,
            chat_template_path=str(tmp_path / "template"), learning_rate=1e-2,
        ),
        train_dataset=Dataset.from_dict({"messages": chats}),
        processing_class=tokenizer(),
        callbacks=[LoraCallback(r=2)],
    )  # fmt: skip
    before = tiny.adapter_tensors(trainer.model, "trainable_tokens_delta")
    trainer.train()
    after = tiny.adapter_tensors(trainer.model, "trainable_tokens_delta")
    moved = [name for name, value in after.items() if not torch.equal(value, before[name])]
    rows = set(range(tiny.VOCABULARY, trainer.model.get_input_embeddings().weight.shape[0]))
    assert rows
    indices = trainer.model.peft_config["default"].trainable_token_indices
    assert all(set(value) == rows for value in indices.values())
    assert set(indices) == ({"embed_tokens"} if tied else {"embed_tokens", "lm_head"})
    assert any("embed_tokens" in name for name in moved)
    trainer.save_model(str(tmp_path / "adapter"))
    saved = load_file(str(tmp_path / "adapter" / "adapter_model.safetensors"))
    assert sum("trainable_tokens_delta" in name for name in saved) >= len(indices)

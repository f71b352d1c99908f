"""Options of the Trainer that change the model, the loop or the optimizer: each works or is refused, by name."""

from __future__ import annotations

import types
from pathlib import Path
from typing import Any

import bitsandbytes as bnb
import peft
import pytest
import tiny
import torch
from transformers import Trainer, TrainingArguments
from transformers.modeling_outputs import CausalLMOutputWithPast

from lora_plugins import LoraCallback, attach
from lora_plugins.errors import UnsupportedTraining


def assert_trained(trainer: Trainer) -> None:
    assert isinstance(trainer.model, peft.PeftModel)
    held = {id(p) for group in trainer.optimizer.param_groups for p in group["params"]}
    assert held == {id(p) for p in trainer.model.parameters() if p.requires_grad}
    assert all(tensor.any() for tensor in tiny.adapter_tensors(trainer.model, "lora_B").values())


def test_auto_find_batch_size_re_enters_the_loop(tmp_path: Path) -> None:
    sizes: list[int] = []

    class SmallMemory(Trainer):
        def training_step(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
            sizes.append(len(inputs["input_ids"]))
            if sizes[-1] > 4:
                raise RuntimeError("CUDA out of memory. Tried to allocate")
            return super().training_step(model, inputs, *args, **kwargs)

    trainer = tiny.trainer(
        tmp_path,
        callbacks=[LoraCallback(r=4, quantization="int8")],
        cls=SmallMemory,
        auto_find_batch_size=True,
        per_device_train_batch_size=16,
    )
    trainer.train()
    assert sizes[0] == 16
    assert sizes[-1] <= 4
    assert trainer.state.global_step == 4
    assert_trained(trainer)


@pytest.mark.parametrize("quantization", [None, "int8"])
def test_torch_compile(tmp_path: Path, quantization: str | None) -> None:
    trainer = tiny.trainer(
        tmp_path,
        callbacks=[LoraCallback(r=4, quantization=quantization)],
        torch_compile=True,
        torch_compile_backend="aot_eager",
        save_strategy="steps",
        save_steps=4,
    )
    trainer.train()
    assert type(trainer.model_wrapped).__name__ == "OptimizedModule"
    assert_trained(trainer)
    from safetensors.torch import load_file

    keys = set(load_file(tmp_path / "checkpoint-4" / "adapter_model.safetensors"))
    assert len(keys) == 8
    assert not any("_orig_mod" in key for key in keys)


def test_neftune_noise_reaches_the_embeddings_of_the_wrapped_model(tmp_path: Path) -> None:
    losses = []
    for noise in (None, 20.0):
        trainer = tiny.trainer(
            tmp_path, callbacks=[LoraCallback(r=4, lora_dropout=0.0)], neftune_noise_alpha=noise, max_steps=2
        )
        trainer.train()
        assert_trained(trainer)
        losses.append(trainer.state.log_history[0]["loss"])
        assert not trainer.model.get_input_embeddings()._forward_hooks
    assert losses[0] != losses[1]


@pytest.mark.parametrize("quantization", [None, "int8"])
def test_forward_methods_put_on_instances_stay(tmp_path: Path, quantization: str | None) -> None:
    """What Liger does when the Trainer is made, before any callback: forwards on instances, weights read raw.

    Its own kernels need a GPU; what has to hold here is that the patched methods survive preparation and meet
    the adapted layers.
    """
    calls: list[str] = []
    losses = []
    for patched in (False, True):
        model = tiny.llama()
        if patched:
            for layer in model.model.layers:
                layer.mlp.forward = types.MethodType(_swiglu(calls), layer.mlp)
            model.forward = types.MethodType(_linear_cross_entropy(calls), model)
        callback = LoraCallback(r=4, lora_dropout=0.0, quantization=quantization, target_modules="all-linear")
        trainer = tiny.trainer(tmp_path, model, [callback], max_steps=3)
        trainer.train()
        assert all(tensor.any() for tensor in tiny.adapter_tensors(trainer.model, "lora_B").values())
        losses.append([entry["loss"] for entry in trainer.state.log_history if "loss" in entry])
    assert calls.count("mlp") == 6
    assert calls.count("loss") == 3
    assert losses[0] == pytest.approx(losses[1], abs=1e-5)


def _swiglu(calls: list[str]) -> Any:
    def forward(self: Any, x: torch.Tensor) -> torch.Tensor:
        calls.append("mlp")
        return self.down_proj(torch.nn.functional.silu(self.gate_proj(x)) * self.up_proj(x))

    return forward


def _linear_cross_entropy(calls: list[str]) -> Any:
    def forward(self: Any, input_ids: Any = None, labels: Any = None, **kwargs: Any) -> Any:
        calls.append("loss")
        items = kwargs.pop("num_items_in_batch", None)
        hidden = self.model(input_ids=input_ids, **kwargs).last_hidden_state[:, :-1]
        logits = hidden.to(self.lm_head.weight.dtype) @ self.lm_head.weight.T
        flat, wanted = logits.float().flatten(0, 1), labels[:, 1:].flatten()
        reduction = "mean" if items is None else "sum"
        loss = torch.nn.functional.cross_entropy(flat, wanted, reduction=reduction)
        return CausalLMOutputWithPast(loss=loss if items is None else loss / items)

    return forward


@pytest.mark.parametrize("quantization", [None, "int8", "nf4"])
@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_autocast(tmp_path: Path, precision: str, quantization: str | None) -> None:
    trainer = tiny.trainer(
        tmp_path,
        callbacks=[LoraCallback(r=4, quantization=quantization)],
        trainer_arguments={"eval_dataset": tiny.rows(8, seed=2)},
        eval_strategy="steps",
        eval_steps=2,
        **{precision: True},
    )
    trainer.train()
    assert_trained(trainer)
    assert {p.dtype for p in trainer.model.parameters() if p.requires_grad} == {torch.float32}
    embedding = trainer.model.get_input_embeddings().weight
    assert embedding.dtype == torch.float32, "autocast decides the activations' dtype, the weights stay"


@pytest.mark.parametrize("optim", ["adamw_bnb_8bit", "paged_adamw_8bit", "paged_adamw_32bit", "adafactor", "sgd"])
def test_optimizers(tmp_path: Path, optim: str) -> None:
    # 8-bit state is only used for tensors of at least 4,096 values.
    model = tiny.llama(hidden_size=512, intermediate_size=128, num_attention_heads=4)
    trainer = tiny.trainer(
        tmp_path, model, [LoraCallback(r=8, quantization="int8")], optim=optim, save_strategy="steps", save_steps=2
    )
    trainer.train()
    assert_trained(trainer)
    inner = trainer.optimizer.optimizer
    if "8bit" in optim:
        assert isinstance(inner, bnb.optim.AdamW)
        states = [state["state1"].dtype for state in inner.state.values() if "state1" in state]
        assert torch.uint8 in states
    resumed = tiny.trainer(
        tmp_path,
        tiny.llama(hidden_size=512, intermediate_size=128),
        [LoraCallback(r=8, quantization="int8")],
        optim=optim,
    )
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert_trained(resumed)


@pytest.mark.parametrize("optim", ["lomo", "adalomo", "galore_adamw_layerwise"])
def test_optimizer_that_cant_be_checked_is_refused(tmp_path: Path, optim: str) -> None:
    with pytest.raises(UnsupportedTraining, match=optim):
        tiny.trainer(tmp_path, callbacks=[LoraCallback()], optim=optim)


@pytest.mark.parametrize("option", ["bf16_full_eval", "fp16_full_eval"])
def test_casting_the_whole_model_for_evaluation_is_refused(tmp_path: Path, option: str) -> None:
    trainer = tiny.trainer(tmp_path, **{option: True})
    with pytest.raises(UnsupportedTraining, match=option):
        attach(trainer)


#: Newer releases of transformers call gradient checkpointing so.
CHECKPOINTING = "activation_checkpointing"
if CHECKPOINTING not in TrainingArguments.__dataclass_fields__:
    CHECKPOINTING = "gradient_checkpointing"


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("quantization", [None, "int8", "nf4"])
def test_gradient_checkpointing_gives_the_same_losses(
    tmp_path: Path, quantization: str | None, reentrant: bool
) -> None:
    losses = []
    for checkpointing in (False, True):
        arguments: dict[str, Any] = {}
        if checkpointing:
            arguments = {
                CHECKPOINTING: True,
                f"{CHECKPOINTING}_kwargs": {"use_reentrant": reentrant},
            }
        callback = LoraCallback(r=4, lora_dropout=0.0, quantization=quantization, compute_dtype="float32")
        trainer = tiny.trainer(tmp_path, callbacks=[callback], **arguments)
        trainer.train()
        assert_trained(trainer)
        assert trainer.model.get_base_model().model.layers[0].gradient_checkpointing is checkpointing
        losses.append([entry["loss"] for entry in trainer.state.log_history if "loss" in entry])
    assert losses[0] == pytest.approx(losses[1], abs=1e-5)


@pytest.mark.parametrize("upcast", ["none", "norms", "all"])
@pytest.mark.parametrize("quantization", [None, "int8", "nf4"])
def test_upcast(tmp_path: Path, quantization: str | None, upcast: str) -> None:
    model = tiny.llama().to(torch.bfloat16)
    callback = LoraCallback(r=4, quantization=quantization, upcast=upcast, compute_dtype="bfloat16")
    trainer = tiny.trainer(tmp_path, model, [callback])
    base = trainer.model.get_base_model()
    expected = {
        "none": (torch.bfloat16, torch.bfloat16),
        "norms": (torch.float32, torch.bfloat16),
        "all": (torch.float32, torch.float32),
    }
    assert (base.model.norm.weight.dtype, base.model.embed_tokens.weight.dtype) == expected[upcast]
    seen: list[torch.dtype] = []
    base.model.layers[0].self_attn.q_proj.register_forward_pre_hook(lambda m, args: seen.append(args[0].dtype))
    trainer.train()
    assert_trained(trainer)
    assert set(seen) == {torch.float32 if upcast == "all" else torch.bfloat16}


def test_our_preparation_makes_no_float32_copy_and_the_usual_one_does() -> None:
    from lora_plugins import prepare_model

    ours = prepare_model(tiny.llama().to(torch.bfloat16), r=4, quantization="int8", compute_dtype="bfloat16")
    frozen = [p for p in ours.parameters() if not p.requires_grad]
    assert {p.dtype for p in frozen} == {torch.int8, torch.bfloat16}
    usual = peft.prepare_model_for_kbit_training(ours.unload())
    assert torch.float32 in {p.dtype for p in usual.parameters()}


@pytest.mark.parametrize(
    "lora",
    [
        {"use_dora": True},
        {"use_rslora": True},
        {"bias": "lora_only"},
        {"modules_to_save": ["lm_head"]},
        {"trainable_token_indices": [1, 2]},
    ],
)
@pytest.mark.parametrize("quantization", [None, "int8", "nf4"])
def test_lora_fields_pass_through(tmp_path: Path, quantization: str | None, lora: dict[str, Any]) -> None:
    trainer = tiny.trainer(
        tmp_path,
        callbacks=[LoraCallback(r=4, lora_dropout=0.0, quantization=quantization, **lora)],
        trainer_arguments={"eval_dataset": tiny.rows(8, seed=2)},
        eval_strategy="steps",
        eval_steps=2,
        save_strategy="steps",
        save_steps=4,
    )
    trainer.train()
    assert_trained(trainer)
    config = trainer.model.peft_config["default"]
    for name, value in lora.items():
        assert getattr(config, name) == value

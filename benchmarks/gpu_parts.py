"""What one process of `gpu.py` does: make a model of random weights on the device, check it, or measure a contender."""

# ruff: noqa: TID253 - a program for developers, which always needs them

from __future__ import annotations

import contextlib
import gc
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from measure import Clock, peak_resident, resident
from step_clock import StepClock
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, Trainer, TrainingArguments
from transformers.utils import logging

LORA = {"r": 8, "lora_alpha": 32}

#: Published shapes, as ``config.json`` on the Hub has them; Qwen3-30B-A3B has 48 layers there.
SHAPES: dict[str, dict[str, Any]] = {
    "bloomz-7b1": {"model_type": "bloom", "vocab_size": 250_880, "hidden_size": 4096, "n_layer": 30, "n_head": 32},
    "llama-3.1-8b": {
        "model_type": "llama",
        "vocab_size": 128_256,
        "hidden_size": 4096,
        "intermediate_size": 14_336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "max_position_embeddings": 131_072,
    },
    "qwen3-30b-a3b": {
        "model_type": "qwen3_moe",
        "vocab_size": 151_936,
        "hidden_size": 2048,
        "intermediate_size": 6144,
        "moe_intermediate_size": 768,
        "num_hidden_layers": 12,
        "num_attention_heads": 32,
        "num_key_value_heads": 4,
        "head_dim": 128,
        "num_experts": 128,
        "num_experts_per_tok": 8,
        "norm_topk_prob": True,
    },
}
#: What ``--tiny`` makes of a shape.
TINY: dict[str, Any] = {
    "vocab_size": 512,
    "hidden_size": 64,
    "intermediate_size": 96,
    "moe_intermediate_size": 32,
    "n_layer": 2,
    "num_hidden_layers": 2,
    "n_head": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "max_position_embeddings": 256,
}
#: What the seed's recipe trains of BLOOMZ-7B1: trained weights and all of them.
PUBLISHED = {"bloomz-7b1": (3_932_160, 7_072_948_224)}

CONTENDERS = {
    "recipe-int8": "bitsandbytes int8, prepare_model_for_kbit_training, get_peft_model, Trainer",
    "peft-bf16": "get_peft_model and Trainer",
    "ours-int8": 'LoraCallback(quantization="int8")',
    "ours-int8-lean": 'LoraCallback(quantization={"name": "int8", "lean": True})',
    "ours-nf4": 'LoraCallback(quantization="nf4")',
    "ours-bf16": "LoraCallback()",
}
BACKENDS = {"int8": "int8", "int8-lean": {"name": "int8", "lean": True}, "nf4": "nf4", "float": None}


@dataclass(frozen=True)
class Setting:
    """One kind of step.

    Attributes:
        rows: Rows of a batch.
        length: Tokens of a row.
        checkpointing: Whether blocks are computed again in the backward pass.
    """

    rows: int
    length: int
    checkpointing: bool

    @property
    def name(self) -> str:
        """Such as ``"4x512+checkpointing"``."""
        return f"{self.rows}x{self.length}{'+checkpointing' * self.checkpointing}"


def list_settings(tiny: bool) -> list[Setting]:
    """Return the settings, those without checkpointing first."""
    sizes = [(2, 16), (1, 32)] if tiny else [(4, 512), (1, 2048)]
    return [Setting(*size, checkpointing) for checkpointing in (False, True) for size in sizes]


def find_device() -> torch.device:
    """Return the accelerator, or the CPU."""
    found = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    return found or torch.device("cpu")


def float_dtype(device: torch.device) -> torch.dtype:
    """Return the dtype of a float base: float32 on a CPU, so that what is compared differs by rounding alone."""
    return torch.float32 if device.type == "cpu" else torch.bfloat16


def make_config(name: str, *, tiny: bool, layers: int | None = None) -> Any:
    """Return a published shape's configuration."""
    fields = dict(SHAPES[name])
    if tiny:
        fields |= {key: value for key, value in TINY.items() if key in fields}
    if layers is not None:
        fields |= {key: layers for key in ("n_layer", "num_hidden_layers") if key in fields}
    # Every causal model has these tokens, and a vocabulary of a tiny one has not the usual ones.
    return AutoConfig.for_model(**fields, bos_token_id=1, eos_token_id=2, pad_token_id=3, use_cache=False)


def make_model(config: Any, device: torch.device, seed: int = 0) -> Any:
    """Return a model of random weights, made on the device."""
    torch.manual_seed(seed)
    with torch.device(device):
        return AutoModelForCausalLM.from_config(config, dtype=float_dtype(device))


def make_rows(config: Any, setting: Setting, batches: int) -> list[dict[str, Any]]:
    """Return synthetic tokens, the same for everyone; a Trainer takes a list as a data set."""
    random = torch.Generator().manual_seed(1)
    ids = torch.randint(4, config.vocab_size, (setting.rows * batches, setting.length), generator=random)
    return [{"input_ids": row, "labels": row} for row in ids]


def make_trainer(model: Any, setting: Setting, steps: int, folder: str, callbacks: list[Any], **more: Any) -> Trainer:
    """Return a Trainer of a few quiet steps."""
    device = find_device()
    logging.set_verbosity_error()
    arguments: dict[str, Any] = {
        "output_dir": folder,
        "max_steps": steps,
        "per_device_train_batch_size": setting.rows,
        "gradient_checkpointing": setting.checkpointing,
        "bf16": device.type != "cpu",
        "use_cpu": device.type == "cpu",
        "learning_rate": 2e-4,
        "optim": "adamw_torch",
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": [],
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
    }
    rows = make_rows(model.config, setting, steps)
    return Trainer(model=model, args=TrainingArguments(**arguments | more), train_dataset=rows, callbacks=callbacks)


def free(device: torch.device) -> None:
    """Give memory back before the next model."""
    gc.collect()
    if device.type != "cpu":
        torch.accelerator.memory.empty_cache()


# -- right? ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Check:
    """One comparison: what was found, the most that it may be, and whether it holds."""

    name: str
    found: float
    limit: float

    @property
    def holds(self) -> bool:
        """Whether the value is within its limit; NaN is not."""
        return self.found <= self.limit


def check_backend(shape: str, backend: str, *, tiny: bool) -> dict[str, Any]:
    """Compare what a backend computes in several ways on two layers of a published shape.

    Returns:
        ``backend`` and ``checks``, each with ``name``, ``found``, ``limit``, ``holds``.
    """
    with tempfile.TemporaryDirectory() as folder:
        checker = _Checker(make_config(shape, tiny=tiny, layers=2), BACKENDS[backend], folder)
        checks = [*checker.compare_branches(), *checker.compare_resumed()]
    return {"backend": backend, "checks": [{**asdict(check), "holds": check.holds} for check in checks]}


class _Checker:
    """Short runs on the same random base that differ in one thing."""

    def __init__(self, config: Any, quantization: Any, folder: str) -> None:
        self.config = config
        self.quantization = quantization
        self.folder = folder
        self.device = find_device()
        # Relative difference that rounding explains.
        self.rounding = 1e-4 if self.device.type == "cpu" else 3e-2
        self.setting = Setting(2, 32, checkpointing=False)

    def compare_branches(self) -> Iterator[Check]:
        """Yield the fused branch against PEFT's own, and the loss in pieces against the whole."""
        losses, moved, counted = self._run(fused=True, chunked_loss=True)
        for name, options in {
            "fused branch against PEFT's": {"fused": False, "chunked_loss": True},
            "loss in pieces against the whole": {"fused": True, "chunked_loss": False},
            "with gradient checkpointing against without": {"fused": True, "chunked_loss": True, "again": True},
        }.items():
            others, other, _ = self._run(**options)
            yield Check(
                f"{name}: loss", max(abs(a / b - 1) for a, b in zip(losses, others, strict=True)), self.rounding
            )
            yield Check(f"{name}: gradients", _compare(moved, other), self.rounding)
        yield Check("steps in which the adapter didn't move (liveness)", 2 - counted, 0)

    def compare_resumed(self) -> Iterator[Check]:
        """Yield a resumed run against one that was not interrupted, and a reloaded adapter against the trained one."""
        from lora_plugins import LoraCallback, prepare_model

        def run(resume: str | None) -> Any:
            callback = LoraCallback(quantization=self.quantization, lora_dropout=0.0, **LORA)
            options = {"save_strategy": "steps", "save_steps": 1}
            trainer = make_trainer(self._make(), self.setting, 2, self.folder, [callback], **options)
            with contextlib.redirect_stdout(None):
                trainer.train(resume_from_checkpoint=resume)
            return trainer.model

        whole = run(None)
        wanted, tensors = self._logits(whole), _adapter(whole)
        del whole
        free(self.device)
        resumed = _adapter(run(str(Path(self.folder) / "checkpoint-1")))
        yield Check(
            "resumed from a checkpoint against uninterrupted: adapter", _compare(tensors, resumed), self.rounding
        )
        free(self.device)
        folder = Path(self.folder) / "checkpoint-2"
        reloaded = prepare_model(self._make(), adapter=folder, quantization=self.quantization)
        found = self._logits(reloaded)
        yield Check(
            "reloaded against trained: logits", float((found - wanted).abs().max() / wanted.abs().max()), self.rounding
        )

    def _make(self) -> Any:
        return make_model(self.config, self.device)

    def _run(
        self, *, fused: bool, chunked_loss: bool, again: bool = False
    ) -> tuple[list[float], dict[str, torch.Tensor], int]:
        """Train two steps by plain gradient descent; return losses, how far the adapter moved, steps that moved it."""
        from lora_plugins import LoraCallback

        callback = LoraCallback(
            quantization=self.quantization, fused=fused, chunked_loss=chunked_loss, lora_dropout=0.0, **LORA
        )
        setting = Setting(self.setting.rows, self.setting.length, checkpointing=again)
        options = {"optim": "sgd", "learning_rate": 1.0, "max_grad_norm": 0.0}
        trainer = make_trainer(self._make(), setting, 2, self.folder, [callback], **options)
        before = _adapter(trainer.model)
        with contextlib.redirect_stdout(None):
            trainer.train()
        moved = {name: value - before[name] for name, value in _adapter(trainer.model).items()}
        losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
        counted = callback.movement.counted
        del trainer
        free(self.device)
        return losses, moved, counted

    @torch.no_grad()
    def _logits(self, model: nn.Module) -> torch.Tensor:
        model.eval()
        ids = torch.arange(4, 36, device=self.device)[None]
        logits: torch.Tensor = model(input_ids=ids).logits
        return logits.float().cpu()


def _adapter(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.detach().float().cpu().clone() for name, value in model.named_parameters() if "lora_" in name}


def _compare(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> float:
    """Return the distance of two sets of tensors, relative to the length of the first."""
    away = sum(float((value - other[name]).square().sum()) for name, value in one.items())
    return (away / sum(float(value.square().sum()) for value in one.values())) ** 0.5


# -- fast and small? ---------------------------------------------------------------------------


def measure_contender(shape: str, contender: str, *, tiny: bool, steps: int) -> dict[str, Any]:
    """Train one contender in every setting, one after the other.

    Returns:
        ``trainable`` and ``total`` weights, seconds of preparing, and by setting the seconds of each step but the
        first and the peak bytes, or ``"error"`` where memory ran out.
    """
    device = find_device()
    config = make_config(shape, tiny=tiny)
    clock = Clock()
    model, callbacks = _BUILDERS[contender](make_model(config, device), device)
    free(device)
    result: dict[str, Any] = {"contender": contender, "prepared": clock.read()[0], "settings": {}}
    with tempfile.TemporaryDirectory() as folder:
        for setting in list_settings(tiny):
            trainer = make_trainer(model, setting, steps + 1, folder, callbacks())
            # From the second on, the callback has a model that is prepared.
            model = trainer.model
            result["settings"][setting.name] = _measure_setting(trainer, device)
            del trainer
            free(device)
    result["trainable"], result["total"] = _count(model)
    return result


def _count(model: Any) -> tuple[int, int]:
    from lora_plugins.adapters.report import make_report

    report = make_report(model)
    return report.trainable, report.total


class _Steps(StepClock):
    """Seconds of each step, the device's work included."""

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self.device = device

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        """Note what the step took, once the device has done it."""
        if self.device.type != "cpu":
            torch.accelerator.synchronize()
        super().on_step_end(*args, **kwargs)


def _measure_setting(trainer: Trainer, device: torch.device) -> dict[str, Any]:
    steps = _Steps(device)
    trainer.add_callback(steps)
    on_card = device.type != "cpu"
    if on_card:
        torch.accelerator.memory.reset_peak_memory_stats()
    before = resident()
    try:
        with contextlib.redirect_stdout(None):
            trainer.train()
    except torch.OutOfMemoryError as error:
        return {"error": f"out of memory: {str(error).splitlines()[0][:120]}"}
    found: dict[str, Any] = {"seconds": [wall for wall, _ in steps.seconds[1:]]}
    if on_card:
        found["allocated"] = torch.accelerator.memory.max_memory_allocated()
        found["reserved"] = torch.accelerator.memory.max_memory_reserved()
    else:
        found["allocated"] = _count_live(trainer)
        found["reserved"] = peak_resident() - before
    return found


def _count_live(trainer: Trainer) -> int:
    """Return the most bytes of tensors alive in one more step, as the CPU's allocator doesn't say."""
    from lora_plugins.planning.step import LiveBytes
    from lora_plugins.quantization.request import owner_of

    model = trainer.model
    state = [value for held in trainer.optimizer.state.values() for value in held.values() if hasattr(value, "nbytes")]
    owners = [(module, owner_of(module)) for module in model.modules()]
    packed = [tensor for module, owner in owners if owner is not None for tensor in owner.extra_tensors(module)]
    trainer.optimizer.zero_grad()
    with LiveBytes(*model.parameters(), *model.buffers(), *packed, *state) as live:
        trainer.training_step(model, next(iter(trainer.get_train_dataloader())))
        trainer.optimizer.step()
    return int(live.peak)


def _build_recipe(model: Any, device: torch.device) -> tuple[Any, Callable[[], list[Any]]]:
    """Do what ``load_in_8bit=True`` and the usual functions of PEFT do, without a file to load from."""
    from bitsandbytes.nn import Int8Params, Linear8bitLt
    from peft import get_peft_model, prepare_model_for_kbit_training

    head = model.get_output_embeddings()
    for path, module in list(model.named_modules()):
        if not isinstance(module, nn.Linear) or module is head:
            continue
        sizes = module.in_features, module.out_features
        layer = Linear8bitLt(*sizes, bias=module.bias is not None, has_fp16_weights=False, threshold=6.0, device="meta")
        weight = Int8Params(module.weight.data.cpu(), requires_grad=False, has_fp16_weights=False)
        layer.weight, layer.bias = weight.to(device), module.bias
        model.set_submodule(path, layer)
    model.is_loaded_in_8bit = True
    # As with load_in_8bit=True: reentrant checkpointing would need inputs that require a gradient.
    model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
    model.enable_input_require_grads()
    return get_peft_model(model, _lora_config(model)), list


def _lora_config(model: Any) -> Any:
    from peft import LoraConfig

    from lora_plugins import resolve_targets

    targets = resolve_targets(model).target_modules
    return LoraConfig(**LORA, lora_dropout=0.05, target_modules=list(targets), task_type="CAUSAL_LM")


def _build_peft(model: Any, device: torch.device) -> tuple[Any, Callable[[], list[Any]]]:
    from peft import get_peft_model

    model.enable_input_require_grads()
    return get_peft_model(model, _lora_config(model)), list


def _build_ours(quantization: Any) -> Callable[[Any, torch.device], tuple[Any, Callable[[], list[Any]]]]:
    from lora_plugins import LoraCallback, prepare_model

    def build(model: Any, device: torch.device) -> tuple[Any, Callable[[], list[Any]]]:
        prepared = prepare_model(model, quantization=quantization, **LORA)
        return prepared, lambda: [LoraCallback()]

    return build


_BUILDERS: dict[str, Callable[[Any, torch.device], tuple[Any, Callable[[], list[Any]]]]] = {
    "recipe-int8": _build_recipe,
    "peft-bf16": _build_peft,
    "ours-int8": _build_ours("int8"),
    "ours-int8-lean": _build_ours({"name": "int8", "lean": True}),
    "ours-nf4": _build_ours("nf4"),
    "ours-bf16": _build_ours(None),
}


# -- true? -------------------------------------------------------------------------------------


def predict(shape: str, *, tiny: bool) -> dict[str, dict[str, int]]:
    """Return the bytes that `plan` says, by contender of ours and setting."""
    from lora_plugins import plan

    device = find_device()
    names = {"int8": "ours-int8", "nf4": "ours-nf4", "": "ours-bf16"}
    found: dict[str, dict[str, int]] = {contender: {} for contender in names.values()}
    for setting in list_settings(tiny):
        if setting.checkpointing:
            # Both cases are in one plan.
            continue
        made = plan(
            make_config(shape, tiny=tiny),
            dtype=float_dtype(device),
            device=device,
            batch_size=setting.rows,
            length=setting.length,
            optim="adamw_torch",
            **LORA,
        )
        for row in made.rows:
            if row.quantization in names:
                name = Setting(setting.rows, setting.length, row.checkpointing).name
                found[names[row.quantization]][name] = row.memory.total
    return found

"""Training runs under one engine, as a script: alone, or as one of the ranks that a launcher starts.

Several cases run in one process, because starting one costs more than a case. What happened is written to
``rank<n>.json`` in the folder, for the tests to judge.
"""

from __future__ import annotations

import json
import os
import sys
import warnings
from collections.abc import Iterable
from dataclasses import asdict
from datetime import timedelta
from pathlib import Path
from typing import Any

import tiny
import torch
from accelerate.state import AcceleratorState
from torch.distributed.fsdp._fully_shard._fsdp_param_group import FSDPParamGroup
from torch.utils._python_dispatch import is_traceable_wrapper_subclass
from transformers import BitsAndBytesConfig, Trainer, TrainerCallback, TrainingArguments

from lora_plugins import LoraCallback, attach, detach, prepare_model
from lora_plugins.adapters.inject import has_adapters
from lora_plugins.adapters.report import make_report
from lora_plugins.errors import LoraPluginsError, PreparationWarning, ResumeConflict
from lora_plugins.models.sharding import is_sharded
from lora_plugins.quantization.counting import count_parameters
from lora_plugins.quantization.request import owner_of, parse_quantization
from lora_plugins.trainer import engines

RANK = int(os.environ.get("RANK", "-1"))
RANKS = int(os.environ.get("WORLD_SIZE", "1"))

Settings = dict[str, Any]


def arguments(folder: Path, **extra: Any) -> TrainingArguments:
    """Six steps of eight rows in all, evaluated and saved after each second one; the best one is the first."""
    return TrainingArguments(
        **{
            "output_dir": str(folder),
            "max_steps": 6,
            "per_device_train_batch_size": 8 // RANKS,
            "per_device_eval_batch_size": 8 // RANKS,
            "learning_rate": 1e-2,
            "lr_scheduler_type": "constant",
            "logging_steps": 1,
            "eval_strategy": "steps",
            "eval_steps": 2,
            "save_strategy": "steps",
            "save_steps": 2,
            "load_best_model_at_end": True,
            "metric_for_best_model": "eval_loss",
            "greater_is_better": False,
            "report_to": [],
            "disable_tqdm": True,
            "use_cpu": True,
            "seed": 7,
            "train_sampling_strategy": "sequential",
            **({"ddp_backend": "gloo"} if RANK >= 0 else {}),
            **extra,
        }
    )


class Gathered:
    """Watches how many bytes FSDP2 has gathered at most: buffers and the parameters that are made of them."""

    def __init__(self) -> None:
        self.most = 0
        self._groups: set[FSDPParamGroup] = set()
        self._wait = FSDPParamGroup.wait_for_unshard

    def __enter__(self) -> Gathered:
        watch = self

        def wait(group: Any) -> None:
            watch._groups.add(group)
            result = group._all_gather_result
            buffer = 0 if result is None else result.all_gather_output.untyped_storage().nbytes()
            watch._wait(group)
            watch.most = max(watch.most, buffer + watch._measure_parameters())

        FSDPParamGroup.wait_for_unshard = wait  # type: ignore[method-assign]
        return self

    def __exit__(self, *problem: object) -> None:
        FSDPParamGroup.wait_for_unshard = self._wait  # type: ignore[method-assign]

    def _measure_parameters(self) -> int:
        parameters = [parameter for group in self._groups for parameter in group.fsdp_params]
        return sum(output.untyped_storage().nbytes() for one in parameters for output in one.all_gather_outputs)


class Holdings(TrainerCallback):
    """Measures what this rank holds when the optimizer takes its second step and has its state."""

    def __init__(self, gathered: Gathered) -> None:
        self.held: dict[str, int] = {}
        self._gathered = gathered

    def on_train_begin(self, args: Any, state: Any, control: Any, **others: Any) -> None:
        model, optimizer = others["model"], others["optimizer"]
        while hasattr(optimizer, "optimizer"):
            optimizer = optimizer.optimizer
        optimizer.register_step_pre_hook(lambda *_: self._look(model, optimizer))

    def _look(self, model: Any, optimizer: Any) -> None:
        if not optimizer.state or self.held:
            return
        seen: set[int] = set()
        stepped = [p for group in optimizer.param_groups for p in group["params"]]
        state = [v for values in optimizer.state.values() for v in values.values() if isinstance(v, torch.Tensor)]
        quantized = [(module, owner) for module in model.modules() if (owner := owner_of(module)) is not None]
        extra = [tensor for module, owner in quantized for tensor in owner.extra_tensors(module)]
        packed = [local(p) for module, _ in quantized for name, p in module.named_parameters() if name != "bias"]
        # LLM.int8() refers to its weight a second time, which ZeRO-3 does not know.
        extra += [m.state.CB for m, _ in quantized if getattr(getattr(m, "state", None), "CB", None) is not None]
        self.held = {
            # An evaluation, which has not been yet, leaves the head gathered until the next backward pass.
            "gathered": self._gathered.most,
            "quantized": stored([*packed, *extra], set()),
            "weights": stored([*map(local, model.parameters()), *model.buffers(), *extra], seen),
            # DeepSpeed steps copies in float32, each rank its part of them.
            "copies": stored([local(p) for p in stepped], seen),
            "gradients": stored([local(p.grad) for p in stepped if p.grad is not None], seen),
            "optimizer": stored([local(value) for value in state], seen),
        }


def stored(tensors: Iterable[torch.Tensor], seen: set[int]) -> int:
    """Bytes of the storages of tensors, each once."""
    size = 0
    for tensor in tensors:
        if is_traceable_wrapper_subclass(tensor):
            # torchao and quanto keep a weight as several tensors.
            size += stored([getattr(tensor, name) for name in tensor.__tensor_flatten__()[0]], seen)
            continue
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in seen:
            seen.add(storage.data_ptr())
            size += storage.nbytes()
    return size


class NanOnOneRank(Trainer):
    """The loss of the second rank is no number in the third step."""

    def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
        loss = super().compute_loss(*args, **kwargs)
        bad = RANK == 1 and self.state.global_step == 2 and self.model.training
        return loss * float("nan") if bad else loss


def make(folder: Path, case: Settings, settings: Settings) -> Trainer:
    """A Trainer with the callback; ranks have drawn different random numbers before."""
    if settings.get("deepspeed"):
        # The stage belongs to accelerate's state, which outlives a Trainer.
        AcceleratorState._reset_state()
    extra = {**settings.get("arguments", {}), **case.get("arguments", {})}
    # ZeRO-3 partitions a model while it is loaded, but only when the arguments were there before it.
    args = arguments(folder, **extra) if case.get("arguments_first") else None
    model = load(case)
    args = args or arguments(folder, **extra)
    torch.manual_seed(100 + RANK)
    lora = {"r": 4, "lora_dropout": 0.0, "compute_dtype": "float32", **case.get("lora", {})}
    lora["quantization"] = case.get("quantization")
    cls = NanOnOneRank if case.get("nan") else Trainer
    trainer = cls(
        **({"model_init": lambda: load(case)} if case.get("model_init") else {"model": model}),
        args=args,
        train_dataset=tiny.rows(48),
        eval_dataset=tiny.rows(16, seed=2),
        callbacks=None if case.get("attach") else [LoraCallback() if case.get("load_4bit") else LoraCallback(**lora)],
    )
    if case.get("attach"):
        # The Trainer has seeded every rank alike when it was made.
        torch.manual_seed(100 + RANK)
        attach(trainer, **lora)
    return trainer


def load(case: Settings) -> Any:
    """The tiny model, made here or read from a folder, where the engine may shard it at once."""
    if case.get("experts"):
        return tiny.mixtral()
    if "pretrained" not in case:
        return tiny.llama()
    from transformers import LlamaForCausalLM

    extra: Settings = {}
    if case.get("distributed_config"):
        from transformers.distributed import DistributedConfig

        extra["distributed_config"] = DistributedConfig(fsdp_size=RANKS)
    if "load_4bit" in case:
        # As people load a base for FSDP with QLoRA: packed weights in a float dtype.
        kinds = {"bnb_4bit_quant_type": "nf4", "bnb_4bit_quant_storage": case["load_4bit"]}
        extra["quantization_config"] = BitsAndBytesConfig(load_in_4bit=True, **kinds)
        base = LlamaForCausalLM.from_pretrained(case["pretrained"], dtype=torch.float32, **extra)
        torch.manual_seed(0)
        return prepare_model(base, r=4, lora_dropout=0.0, compute_dtype="float32")
    return LlamaForCausalLM.from_pretrained(case["pretrained"], dtype=torch.float32, **extra)


def facts(trainer: Trainer) -> Settings:
    """What shows which engine really ran."""
    parameters = list(trainer.model.parameters())
    optimizer = getattr(trainer.optimizer, "optimizer", trainer.optimizer)
    return {
        "world_size": trainer.args.world_size,
        "processes": torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1,
        "distributed_type": str(trainer.accelerator.distributed_type),
        "wrapper": type(trainer.model_wrapped).__name__,
        "model": type(trainer.model).__name__,
        "optimizer": type(optimizer).__name__,
        "elements": sum(int(getattr(p, "ds_numel", p.numel())) for p in parameters),
        "local": sum(local(p).numel() for p in parameters),
        "adapter": sum(p.requires_grad for p in parameters),
        "counts": asdict(count_parameters(trainer.model)),
        "reported": make_report(trainer.model).bytes_after,
        "sharded_adapter": sum(p.requires_grad and (hasattr(p, "to_local") or hasattr(p, "ds_id")) for p in parameters),
    }


def local(parameter: Any) -> torch.Tensor:
    if hasattr(parameter, "ds_tensor"):
        return parameter.ds_tensor
    return parameter.to_local() if hasattr(parameter, "to_local") else parameter


def whole(parameter: Any) -> torch.Tensor:
    """All of a parameter, on every rank."""
    if hasattr(parameter, "ds_id"):
        import deepspeed

        with deepspeed.zero.GatheredParameters([parameter]):
            return parameter.detach().clone()
    return parameter.full_tensor() if hasattr(parameter, "full_tensor") else parameter.detach()


def live(trainer: Trainer) -> dict[str, list[float]]:
    """The adapter in the model, gathered, under the names that its file has."""
    return {
        name.replace(".default", ""): whole(p).double().flatten().tolist()
        for name, p in trainer.model.named_parameters()
        if p.requires_grad
    }


def history(trainer: Trainer, key: str) -> list[float]:
    return [entry[key] for entry in trainer.state.log_history if key in entry]


def run(folder: Path, case: Settings, settings: Settings) -> Settings:
    """Train, keep what the best checkpoint gave, then train again from the middle in a new Trainer."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer = make(folder, case, settings)
    start = live(trainer)
    gathered = Gathered()
    holdings = Holdings(gathered)
    trainer.add_callback(holdings)
    quantization = parse_quantization(case.get("quantization"))
    with gathered:
        trainer.train()
    best = trainer.state.best_model_checkpoint
    result = facts(trainer) | {
        "warnings": [str(item.message) for item in caught if issubclass(item.category, PreparationWarning)],
        "two_kernels": quantization is not None and bool(quantization.quantizer.loss_note),
        "start": start,
        "best": Path(best).name if best else None,
        "best_adapter": live(trainer),
        "held": holdings.held,
        "losses": history(trainer, "loss"),
        "eval": history(trainer, "eval_loss"),
        "norms": history(trainer, "grad_norm"),
        "after": trainer.evaluate()["eval_loss"],
        "predicted": list(trainer.predict(tiny.rows(16, seed=2)).predictions.shape),
        "generated": trainer.model.generate(input_ids=torch.ones(1, 2, dtype=torch.long), max_new_tokens=3).shape[1],
    }
    trainer.save_model(str(folder / "saved"))
    if case.get("resume", True):
        again = make(folder, case, settings)
        again.train(resume_from_checkpoint=str(folder / "checkpoint-4"))
        result["resumed"] = history(again, "loss")
    if case.get("conflict"):
        result["conflict"] = resume_as_another(folder, case, settings)
    if case.get("save_on_one"):
        engines.MEETING_TIME = timedelta(seconds=3)
        if RANK == 0:
            trainer.save_model(str(folder / "alone"))
    if case.get("detach"):
        result["detached"] = detached(trainer, case)
    return result


def resume_as_another(folder: Path, case: Settings, settings: Settings) -> str:
    """What a run with another adapter and another order of the rows is told when it takes up this one's checkpoint."""
    own = {**case.get("lora", {}), "lora_alpha": 64}
    other = make(folder, {**case, "lora": own, "arguments": {**case.get("arguments", {}), "seed": 8}}, settings)
    try:
        other.train(resume_from_checkpoint=str(folder / "checkpoint-4"))
    except ResumeConflict as problem:
        return str(problem)
    return "nothing"


def detached(trainer: Trainer, case: Settings) -> Settings:
    """What `detach` gives back after training, beside a base that never saw an engine."""
    base = detach(trainer)
    plain = prepare_model(tiny.llama(), quantization=case.get("quantization"), compute_dtype="float32").unload()
    original = dict(plain.named_parameters())
    now = dict(base.named_parameters())
    ids = torch.arange(1, 13)[None]
    with torch.no_grad():
        expected, got = plain.eval()(input_ids=ids).logits, base.eval()(input_ids=ids).logits
    return {
        "classes": [type(module).__name__ for module in base.modules()],
        "plain_classes": [type(module).__name__ for module in plain.modules()],
        "adapters": has_adapters(base),
        "in_trainer": trainer.model is base and trainer.model_wrapped is base,
        "sharded": is_sharded(base),
        "same_weights": now.keys() == original.keys() and all(p.equal(original[name]) for name, p in now.items()),
        "difference": float((got - expected).abs().max()),
        "again": retrained(trainer),
    }


def retrained(trainer: Trainer) -> list[float]:
    """Losses of a second run on the base that was given back."""
    attach(trainer, r=4, lora_dropout=0.0, compute_dtype="float32")
    trainer.train()
    return history(trainer, "loss")


def main(folder: Path, settings: Settings) -> None:
    for name, case in settings["cases"].items():
        (folder / name).mkdir(parents=True, exist_ok=True)
        try:
            result = run(folder / name, case, settings)
        except LoraPluginsError as problem:
            result = {"error": f"{type(problem).__name__}: {problem}"}
        (folder / name / f"rank{max(RANK, 0)}.json").write_text(json.dumps(result))
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def prepare_deepspeed() -> None:
    """Make accelerate's state as the Trainer would on a machine with accelerators, but over gloo.

    Without it each process on a CPU takes itself for the only one.
    """
    from accelerate import PartialState

    os.environ["ACCELERATE_USE_DEEPSPEED"] = "true"
    PartialState(backend="gloo")
    del os.environ["ACCELERATE_USE_DEEPSPEED"]


if __name__ == "__main__":
    settings = json.loads(sys.argv[2])
    if settings.get("deepspeed"):
        prepare_deepspeed()
    if settings.get("fsdp"):
        from force_fsdp import force_fsdp

        force_fsdp()
    main(Path(sys.argv[1]), settings)

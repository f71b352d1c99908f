"""A run under Ray Train as a script: two workers, of which one crashes once. Prints what happened as JSON."""

from __future__ import annotations

import json
import os
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any


def train_worker(settings: dict[str, Any]) -> None:
    """What each worker does; Ray starts it again after a crash, with the last checkpoint that was reported."""
    import ray.train
    import tiny
    import torch
    from ray.train.huggingface.transformers import RayTrainReportCallback, prepare_trainer
    from transformers import Trainer, TrainerCallback, TrainingArguments

    from lora_plugins import LoraCallback

    context = ray.train.get_context()
    rank = context.get_world_rank()
    folder = Path(settings["folder"])
    crashed = folder / "crashed"

    class CrashOnce(TrainerCallback):
        def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == 5 and rank == 1 and not crashed.exists():
                crashed.touch()
                raise RuntimeError("this worker crashes once")

    args = TrainingArguments(
        output_dir=str(folder / f"worker{rank}"),
        max_steps=6,
        per_device_train_batch_size=4,
        learning_rate=1e-2,
        lr_scheduler_type="constant",
        logging_steps=1,
        save_strategy="steps",
        save_steps=2,
        report_to=[],
        disable_tqdm=True,
        use_cpu=True,
        ddp_backend="gloo",
        seed=7,
        train_sampling_strategy="sequential",
        save_on_each_node=True,
    )
    model = tiny.llama()
    torch.manual_seed(100 + rank)
    callback = LoraCallback(r=4, lora_dropout=0.0, quantization=settings["quantization"], compute_dtype="float32")
    trainer = Trainer(
        model=model,
        args=args,
        train_dataset=tiny.rows(48),
        callbacks=[callback, CrashOnce(), RayTrainReportCallback()],
    )
    trainer = prepare_trainer(trainer)
    start = ray.train.get_checkpoint()
    if start is None:
        trainer.train()
    else:
        with start.as_directory() as checkpoint:
            trainer.train(resume_from_checkpoint=str(Path(checkpoint) / "checkpoint"))
    result = {
        "resumed": start is not None,
        "world_size": args.world_size,
        "processes": torch.distributed.get_world_size(),
        "distributed_type": str(trainer.accelerator.distributed_type),
        "wrapper": type(trainer.model_wrapped).__name__,
        "losses": [entry["loss"] for entry in trainer.state.log_history if "loss" in entry],
        "adapter": {
            name: p.double().flatten().tolist() for name, p in trainer.model.named_parameters() if p.requires_grad
        },
    }
    (folder / f"rank{rank}.json").write_text(json.dumps(result))


def main(folder: Path, quantization: str | None) -> None:
    import ray
    from ray.train import CheckpointConfig, FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchConfig, TorchTrainer

    # Ray's sockets lie in its folder, and the path of a socket must be short.
    temporary = tempfile.mkdtemp(prefix="ray")
    ray.init(
        num_cpus=3,
        include_dashboard=False,
        _temp_dir=temporary,
        runtime_env={"env_vars": {"PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}},
    )
    trainer = TorchTrainer(
        train_worker,
        train_loop_config={"folder": str(folder), "quantization": quantization},
        torch_config=TorchConfig(backend="gloo"),
        scaling_config=ScalingConfig(num_workers=2, use_gpu=False),
        run_config=RunConfig(
            name="run",
            storage_path=str(folder / "storage"),
            failure_config=FailureConfig(max_failures=1),
            checkpoint_config=CheckpointConfig(num_to_keep=2),
        ),
    )
    result = trainer.fit()
    (folder / "result.json").write_text(json.dumps({"checkpoint": result.checkpoint.path}))
    ray.shutdown()
    shutil.rmtree(temporary, ignore_errors=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]), None if sys.argv[2] == "none" else sys.argv[2])

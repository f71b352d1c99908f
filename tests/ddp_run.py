"""One training run as a script: alone, or as one of the ranks that torchrun starts. Prints what happened as JSON."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import tiny
import torch
from transformers import TrainingArguments

from lora_plugins import LoraCallback
from lora_plugins.errors import LivenessError


def main(folder: Path, quantization: str | None, broken: bool) -> None:
    rank = int(os.environ.get("RANK", "-1"))
    ranks = int(os.environ.get("WORLD_SIZE", "1"))
    # Ranks that drew different random numbers so far must still start from the same adapter.
    model = tiny.llama()
    torch.manual_seed(100 + rank)
    data = tiny.rows(32)
    arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=6,
        per_device_train_batch_size=8 // ranks,
        learning_rate=1e-2,
        lr_scheduler_type="constant",
        logging_steps=1,
        save_strategy="steps",
        save_steps=6,
        report_to=[],
        disable_tqdm=True,
        use_cpu=True,
        seed=7,
        train_sampling_strategy="sequential",
        **({"ddp_backend": "gloo"} if rank >= 0 else {}),
    )
    from transformers import Trainer

    class NanOnOneRank(Trainer):
        def compute_loss(self, *args, **kwargs):  # type: ignore[no-untyped-def]
            loss = super().compute_loss(*args, **kwargs)
            return loss * float("nan") if rank == 1 and self.state.global_step == 2 else loss

    cls = NanOnOneRank if broken else Trainer
    callback = LoraCallback(r=4, lora_dropout=0.0, quantization=quantization, compute_dtype="float32")
    trainer = cls(model=model, args=arguments, train_dataset=data, callbacks=[callback])
    error = ""
    try:
        trainer.train()
    except LivenessError as problem:
        error = f"{type(problem).__name__}: {problem}"
    result = {
        "rank": rank,
        "world_size": arguments.world_size,
        "distributed_type": str(trainer.accelerator.distributed_type),
        "wrapper": type(trainer.model_wrapped).__name__,
        "model": type(trainer.model).__name__,
        "losses": [entry["loss"] for entry in trainer.state.log_history if "loss" in entry],
        "error": error,
        "adapter": {n: p.double().sum().item() for n, p in trainer.model.named_parameters() if p.requires_grad},
    }
    Path(folder, f"rank{max(rank, 0)}.json").write_text(json.dumps(result))
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), None if sys.argv[2] == "none" else sys.argv[2], len(sys.argv) > 3)

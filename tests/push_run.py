"""One training run with ``push_to_hub=True`` as a script: huggingface_hub reads its endpoint when imported."""

from __future__ import annotations

import sys
from pathlib import Path

import tiny

from lora_plugins import LoraCallback


def main(folder: Path, strategy: str) -> None:
    trainer = tiny.trainer(
        folder,
        callbacks=[LoraCallback(r=4, quantization="int8")],
        push_to_hub=True,
        hub_model_id="org/pushed",
        hub_strategy=strategy,
        hub_always_push=True,
        save_strategy="steps",
        save_steps=2,
    )
    trainer.train()
    trainer.push_to_hub()


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])

"""SageMaker's entry point: the command `lora-plugins train`, with its folders from the container.

Hyperparameters are the flags of `lora-plugins train`, one for one. What they leave open comes from the container:
the data channel `training` (and `validation`, if there is one), the model from a channel `model`, the places for the
model, the reports and the checkpoints.
"""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path

from lora_plugins.commands.cli import is_expected, program


def folder(variable: str, inside_container: str) -> Path:
    """A folder of the container."""
    return Path(os.environ.get(variable, inside_container))


def container_flags() -> list[str]:
    """The flags that the container decides."""
    model = folder("SM_MODEL_DIR", "/opt/ml/model")
    reports = folder("SM_OUTPUT_DATA_DIR", "/opt/ml/output/data")
    # Beside the model's folder: where SageMaker keeps what must survive the loss of a spot instance.
    checkpoints = model.parent / "checkpoints"
    flags = {
        "--output_dir": checkpoints if checkpoints.is_dir() else reports / "run",
        "--adapter_folder": model / "adapter",
        "--model_folder": model,
        "--report_folder": reports,
    }
    channels = {"--dataset": "TRAINING", "--eval_dataset": "VALIDATION", "--model": "MODEL"}
    flags |= {flag: Path(os.environ[name]) for flag, name in _channels(channels).items()}
    words = [word for flag, path in flags.items() for word in (flag, str(path))]
    # A job that begins anew after an interruption finds its checkpoints; any other finds none.
    return [*words, "--resume"]


def _channels(flags: dict[str, str]) -> dict[str, str]:
    names = {flag: f"SM_CHANNEL_{channel}" for flag, channel in flags.items()}
    return {flag: name for flag, name in names.items() if name in os.environ}


def main(words: list[str]) -> int:
    """Train, and tell SageMaker why when it fails; returns the exit code."""
    try:
        program(["train", *container_flags(), *words])
    except SystemExit as end:
        if not end.code:
            take_inference_along()
        return int(end.code or 0)
    except Exception as error:
        write_failure(error)
        if not is_expected(error):
            raise
        print(f"lora-plugins: {error}", file=sys.stderr)
        return 1
    return 0


def take_inference_along() -> None:
    """Put the inference script where SageMaker looks for it: code/ in the model's folder."""
    if os.environ.get("RANK", "0") == "0":
        code = folder("SM_MODEL_DIR", "/opt/ml/model") / "code"
        code.mkdir(parents=True, exist_ok=True)
        for name in ("inference.py", "requirements.txt"):
            if (Path(__file__).parent / name).is_file():
                shutil.copy2(Path(__file__).parent / name, code / name)


def write_failure(error: Exception) -> None:
    """Write what SageMaker shows as the job's failure reason; the first process to fail has the say."""
    output = folder("SM_OUTPUT_DIR", "/opt/ml/output")
    try:
        with (output / "failure").open("x", encoding="utf-8") as file:
            file.write(f"{type(error).__name__}: {error}\n")
    except FileExistsError:
        pass


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

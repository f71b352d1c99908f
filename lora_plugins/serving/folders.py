"""Write an adapter as a plain PEFT folder, which every server reads."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from lora_plugins.adapters.files import ADAPTER_CONFIG, ADAPTER_FILE
from lora_plugins.serving.source import Source
from registry import TOKENIZER_FILES

__all__ = ["write_folder"]


def write_folder(source: Source, target: Path) -> int:
    """Copy PEFT's two files and the tokenizer into an empty folder; leave our manifest, records and card out.

    The configuration names the base that the adapter was exported for.

    Returns:
        Number of tensors in the adapter's file.
    """
    folder = source.job.folder
    config = json.loads((folder / ADAPTER_CONFIG).read_text(encoding="utf-8"))
    config["base_model_name_or_path"] = source.job.base
    if source.job.revision:
        config["revision"] = source.job.revision
    (target / ADAPTER_CONFIG).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    shutil.copyfile(source.job.file, target / ADAPTER_FILE)
    # A release has them if the adapter changed the vocabulary.
    for name in sorted(TOKENIZER_FILES):
        if (folder / name).is_file():
            shutil.copyfile(folder / name, target / name)
    return len(source.job.shapes)

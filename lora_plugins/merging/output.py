"""Write a merged model to a folder: complete and checked, or not at all."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import cached_file

from lora_plugins.adapters.files import ADAPTER_CONFIG
from lora_plugins.errors import MergeError
from lora_plugins.merging.job import RECIPE_FILE, Job

__all__ = ["check_output", "partial_folder", "publish", "write"]


#: The files of a model that `save_pretrained` writes: one, or shards with their index.
_WEIGHTS = re.compile(r"model(-\d+-of-\d+)?\.safetensors|model\.safetensors\.index\.json")

#: Subfolder for the files until all of them are written and checked.
_PARTIAL = ".merging"

#: Files that describe how images, audio and chats become model inputs; copied unchanged.
_PROCESSORS = (
    "preprocessor_config.json",
    "processor_config.json",
    "video_preprocessor_config.json",
    "chat_template.json",
    "chat_template.jinja",
)


def check_output(target: Path, *, overwrite: bool) -> None:
    """Refuse a folder that holds an adapter, or a model that must not be replaced.

    Raises:
        MergeError: The folder holds one of these.
    """
    if (target / ADAPTER_CONFIG).is_file():
        # transformers 5.23 would load the merged model and apply the adapter a second time.
        raise MergeError(f"{target} holds an adapter. The merged model needs a folder of its own.")
    model = [target / "config.json", *_find_weights(target)]
    present = next((path.name for path in model if path.is_file()), None)
    if present is not None and not overwrite:
        raise MergeError(
            f"{target} already holds a model ({present}). Choose another folder, or pass overwrite=True (--overwrite)."
        )


def _find_weights(target: Path) -> list[Path]:
    return sorted(path for path in target.glob("model*") if _WEIGHTS.fullmatch(path.name))


@contextlib.contextmanager
def partial_folder(target: Path) -> Iterator[Path]:
    """Make a folder in ``target`` for unfinished files; on failure, remove it, and ``target`` too if it is new."""
    existed = target.exists()
    partial = target / _PARTIAL
    shutil.rmtree(partial, ignore_errors=True)
    try:
        partial.mkdir(parents=True)
        yield partial
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        if not existed:
            with contextlib.suppress(OSError):
                target.rmdir()
        raise


def write(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    job: Job,
    partial: Path,
    max_shard_size: str,
) -> None:
    """Write the model, its tokenizer, processors and recipe into an empty folder."""
    model.save_pretrained(partial, max_shard_size=max_shard_size)
    if tokenizer is not None:
        tokenizer.save_pretrained(partial)
    for name in _PROCESSORS:
        source = cached_file(
            job.base,
            name,
            revision=job.revision or "main",
            _raise_exceptions_for_gated_repo=False,
            _raise_exceptions_for_missing_entries=False,
            _raise_exceptions_for_connection_errors=False,
        )
        if source is not None and not (partial / name).exists():
            shutil.copyfile(source, partial / name)
    if (job.folder / RECIPE_FILE).is_file():
        shutil.copy2(job.folder / RECIPE_FILE, partial / RECIPE_FILE)


def publish(partial: Path, target: Path) -> None:
    """Move the files into ``target``, the configuration last, because nothing loads without it."""
    for stale in (target / "config.json", *_find_weights(target)):
        stale.unlink(missing_ok=True)
    for path in sorted(partial.iterdir(), key=lambda path: path.name == "config.json"):
        os.replace(path, target / path.name)
    partial.rmdir()

"""An adapter to be exported, on the empty model that it belongs to."""

from __future__ import annotations

import os
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import PreTrainedConfig

from lora_plugins.adapters.files import adapter_shapes, check_base, check_same_tensors
from lora_plugins.errors import ExportError
from lora_plugins.merging.base import make_empty, read_config
from lora_plugins.merging.job import AS_TRAINED, Job, read_job
from lora_plugins.models.randomness import seeded
from lora_plugins.text import one_line
from registry import Adapter, Manifest, changes_base, is_path, pull_adapter

__all__ = ["Source", "is_base_copy", "load_tensors", "read_source", "wrap_empty"]

MANIFEST_FILE = "adapter_manifest.json"


@dataclass(frozen=True)
class Source:
    """An adapter and the base that it belongs to.

    Attributes:
        job: Its folder, configuration and base.
        base_config: The base model's configuration.
        name: ``org/name`` of a release that was named so, else the folder's name.
        manifest: The release's manifest, ``None`` for a folder that is not a release.
    """

    job: Job
    base_config: PreTrainedConfig
    name: str
    manifest: Manifest | None

    @property
    def title(self) -> str:
        """The name, with the version of a release."""
        return f"{self.name}@{self.manifest.version}" if self.manifest else self.name

    @property
    def short_name(self) -> str:
        """The name without its organization and without characters that servers refuse."""
        plain = "".join(sign if sign.isalnum() or sign in "-_." else "-" for sign in self.name.rpartition("/")[2])
        return plain.strip("-.") or "adapter"

    @property
    def rank(self) -> int:
        """The largest rank of its layers, as its configuration says it."""
        return max([self.job.config.r, *self.job.config.rank_pattern.values()])

    @property
    def base_is_folder(self) -> bool:
        """Whether the base is a folder on this machine."""
        return Path(self.job.base).is_dir()


def read_source(adapter: str | os.PathLike[str], base: str | os.PathLike[str] | None, revision: str | None) -> Source:
    """Read an adapter, and check that it belongs to its base without loading the base's weights.

    Args:
        adapter: Adapter folder, or a registry reference.
        base: Base model, ``None`` for the one that the adapter names.
        revision: Revision of the base model, ``None`` for the one that the adapter names.

    Raises:
        MergeError: The base is unknown or its configuration cannot be read.
        MismatchedBase: The adapter was trained on another base.
    """
    pulled = pull_adapter(adapter) if isinstance(adapter, str) and not is_path(adapter) else adapter
    job = read_job(pulled, base, revision, AS_TRAINED)
    config = read_config(job)
    check_base(job.folder, Path(job.base) if Path(job.base).is_dir() else config, warn=False)
    stored = job.folder / MANIFEST_FILE
    manifest = Manifest.parse(stored.read_bytes()) if stored.is_file() else None
    name = pulled.name if isinstance(pulled, Adapter) else job.folder.resolve().name
    return Source(job, config, name, manifest)


def wrap_empty(source: Source) -> PeftModel:
    """Return the base on the meta device with PEFT's layers for the adapter: their ranks and scales are PEFT's own.

    Raises:
        ExportError: PEFT cannot make the layers, or the adapter changed the base's weights.
        AdapterMismatch: The file has other tensors than PEFT makes.
    """
    job = source.job
    if changes_base(job.config.init_lora_weights):
        raise ExportError(
            f"{source.title} was initialized with init_lora_weights={job.config.init_lora_weights!r}, which changed "
            "the base's weights, and its file holds the difference to the changed ones. Save it as plain LoRA: "
            "`save_pretrained` of a model from prepare_model does."
        )
    model = _inject(source)
    live = adapter_shapes(model, "default")
    check_same_tensors(job.shapes, live, job.file)
    extra = sorted(name for name in set(job.shapes) - set(live) if not is_base_copy(source, name))
    if extra:
        raise ExportError(
            f"{source.title} holds {len(extra)} weights of the base beside its adapters, first {extra[0]}. {MERGED}"
        )
    return model


def is_base_copy(source: Source, name: str) -> bool:
    """Whether a tensor is the base's own embedding or head, which PEFT saves beside an adapter on it.

    `check_contract` has compared it with the base where that was at hand. A grown one is not the base's.
    """
    rows = source.base_config.get_text_config().vocab_size
    return name.endswith(".base_layer.weight") and source.job.shapes[name][0] == rows


#: The way out wherever a server cannot take an adapter as one.
MERGED = "Export the merged model with merged=True (--merged)."


def _inject(source: Source) -> PeftModel:
    config = LoraConfig(**{**_fields(source.job.config), "init_lora_weights": False})
    empty = make_empty(source.job, source.base_config)
    try:
        with seeded(empty, 0), warnings.catch_warnings():
            # PEFT 0.21.2 warns of patterns for parameters, which it follows.
            warnings.filterwarnings("ignore", message=r"The following (rank|alpha)_pattern keys")
            made: Any = get_peft_model(empty, config, low_cpu_mem_usage=True)
    except (ValueError, RuntimeError, KeyError, TypeError, AttributeError, NotImplementedError) as error:
        raise ExportError(f"PEFT cannot put {source.title} on its base: {one_line(error)}") from error
    return made


def _fields(config: LoraConfig) -> dict[str, Any]:
    return {name: value for name, value in config.to_dict().items() if name not in ("peft_type", "peft_version")}


def load_tensors(source: Source) -> dict[str, torch.Tensor]:
    """Return the tensors of the adapter's file by name, on the CPU."""
    return load_file(str(source.job.file), device="cpu")

"""Collecting what is published: from a `PeftModel`, a Trainer, an adapter folder or a Trainer's checkpoint."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

from registry.base.record import base_of_folder, base_of_model, require_known, with_given
from registry.base.stored import StoredAdapter
from registry.disk.machine import temporary_folder
from registry.errors import InvalidAdapter, TooLarge
from registry.formats.adapter_config import AdapterConfig
from registry.formats.paths import ADAPTER_CONFIG, ADAPTER_WEIGHTS
from registry.formats.records import BaseKind, BaseRecord, FileRecord, TensorRecord
from registry.formats.tensors import check_weights, labels_of, other_tensors
from registry.publishing import training_facts
from registry.publishing.snapshot import copy_adapter, copy_tokenizer, save_model
from registry.publishing.tokenizers import hash_of_file, hash_of_tokenizer

if TYPE_CHECKING:
    from registry.hubs.protocol import Hub

__all__ = ["LARGE", "Collected", "Run", "collect"]

#: Bytes that tensors other than LoRA's may have together, unless they are allowed by name.
LARGE = 32 * 1024 * 1024
_BYTES = {"F32": 4, "BF16": 2, "F16": 2}
_VOCABULARY = ("embed", "lm_head", "wte", "trainable_tokens", "shared")


@dataclass(frozen=True)
class Collected:
    """An adapter that can be published: checked, and copied to a folder of its own.

    Attributes:
        folder: Where the copies are, for as long as the context manager is open.
        files: The files to publish; the card and the manifest are added with the version.
        config: Its configuration.
        non_default: The fields of the configuration that are not at their default.
        base: The base model.
        architecture: Kind of base model.
        tensors: Of the weights.
        tokenizer_hash: sha256 over the tokenizer, if one was at hand.
        training: Facts about the training, and its log.
        metrics: Results.
    """

    folder: Path
    files: Mapping[str, FileRecord]
    config: AdapterConfig
    non_default: Mapping[str, Any]
    base: BaseRecord
    architecture: BaseKind
    tensors: Mapping[str, TensorRecord]
    tokenizer_hash: str | None
    training: training_facts.Training
    metrics: Mapping[str, float]


@dataclass(frozen=True)
class Run:
    """What a Trainer's callbacks see of it, as a source.

    Attributes:
        model: The `PeftModel`, not wrapped.
        args: The Trainer's arguments.
        state: The Trainer's state.
        processing_class: Its tokenizer or processor, if it has one.
    """

    model: Any
    args: Any
    state: Any
    processing_class: Any = None


@dataclass
class _Found:
    """What a source has, before it is checked."""

    base: BaseRecord
    architecture: BaseKind
    training: training_facts.Training
    tokenizer_hash: str | None = None
    tokenizer_files: Sequence[str] = ()


@contextmanager
def collect(
    source: Any,
    *,
    on_hub: bool,
    base_model: str | None = None,
    base_hub: Hub | None = None,
    adapter_name: str | None = None,
    metrics: Mapping[str, float] | None = None,
    training: Mapping[str, Any] | None = None,
    allow: Sequence[str] = (),
) -> Iterator[Collected]:
    """Check an adapter and copy it, before anything is published.

    Args:
        source: A `PeftModel`, a Trainer that holds one, an adapter folder, or a Trainer's checkpoint.
        on_hub: Whether it will be published where others can only load bases by their id.
        base_model: ``org/base`` or ``org/base@revision``, where the base has no id or another one.
        base_hub: Where base models are, to resolve ``base_model`` and compare it; ``None`` to do neither.
        adapter_name: Which adapter of a model; the active one by default.
        metrics: Results; those of the last evaluation by default.
        training: More facts about the training, JSON values.
        allow: Names of modules (``"lm_head"``) whose tensors may be large although they are not LoRA's.

    Raises:
        InvalidAdapter: It would be of no use.
        UnknownBase: Nobody could find its base model.
        BaseMismatch: ``base_model`` is another model.
        TooLarge: It holds large tensors that are not LoRA's.
        UnsafeFile: A file is not what it should be.
    """
    with temporary_folder() as folder:
        found = _copied(source, folder, adapter_name)
        found.training.facts.update(training or {})
        # A live model's configuration may name a class of the user's own; that of a folder must not.
        own = not isinstance(source, (str, os.PathLike))
        config = AdapterConfig.parse((folder / ADAPTER_CONFIG).read_bytes(), own=own)
        tensors = _checked(folder, config, allow)
        record = found.base if base_model is None else with_given(found.base, base_model, base_hub)
        base = require_known(record, on_hub=on_hub)
        (folder / ADAPTER_CONFIG).write_bytes(config.published(base.id, base.commit))
        names = [ADAPTER_CONFIG, ADAPTER_WEIGHTS]
        if any(part in tensor for tensor in other_tensors(tensors) for part in _VOCABULARY):
            names += found.tokenizer_files
        yield Collected(
            folder,
            {file: _record(folder / file) for file in names},
            config,
            config.non_default(_defaults()),
            base,
            replace(found.architecture, num_labels=labels_of(tensors, config)),
            tensors,
            found.tokenizer_hash,
            found.training,
            _metrics(found.training.metrics if metrics is None else metrics),
        )


def _copied(source: Any, folder: Path, adapter_name: str | None) -> _Found:
    if isinstance(source, (str, os.PathLike)):
        return _of_folder(Path(source), folder)
    if isinstance(source, Run):
        return _of_run(source, folder, adapter_name)
    if hasattr(source, "callback_handler") and hasattr(source, "model"):
        return _of_trainer(source, folder, adapter_name)
    return _of_model(source, folder, adapter_name)


def _of_folder(source: Path, folder: Path) -> _Found:
    # The folder itself may be reached through links ("latest"); what is in it may not.
    source = source.expanduser().resolve()
    copy_adapter(source, folder)
    AdapterConfig.parse((folder / ADAPTER_CONFIG).read_bytes())
    base, architecture = base_of_folder(StoredAdapter.read(folder))
    training = training_facts.of_checkpoint(source)
    files = copy_tokenizer(source, folder)
    hashed = hash_of_file(folder / "tokenizer.json") if "tokenizer.json" in files else None
    return _Found(base, architecture, training, hashed, files)


def _of_model(model: Any, folder: Path, adapter_name: str | None) -> _Found:
    from peft import PeftModel

    model = getattr(model, "_orig_mod", model)
    if not isinstance(model, PeftModel):
        raise InvalidAdapter(
            f"A {type(model).__name__} is nothing to publish: give a PeftModel, a Trainer that holds one, or a folder "
            "that save_pretrained wrote"
        )
    name = adapter_name or _active(model)
    save_model(model, name, folder)
    config = AdapterConfig.parse((folder / ADAPTER_CONFIG).read_bytes(), own=True)
    base, architecture = base_of_model(model.get_base_model(), config)
    facts = {"quantization": training_facts.quantization_of(model), "libraries": training_facts.libraries()}
    return _Found(base, architecture, training_facts.Training({k: v for k, v in facts.items() if v}))


def _of_trainer(trainer: Any, folder: Path, adapter_name: str | None) -> _Found:
    if getattr(trainer, "is_fsdp_enabled", False) or getattr(trainer, "is_deepspeed_enabled", False):
        raise InvalidAdapter(
            "This Trainer's model is spread over processes (FSDP or DeepSpeed): push the folder of a checkpoint "
            "that it has saved."
        )
    model = trainer.accelerator.unwrap_model(trainer.model)
    run = Run(model, trainer.args, trainer.state, getattr(trainer, "processing_class", None))
    return _of_run(run, folder, adapter_name)


def _of_run(run: Run, folder: Path, adapter_name: str | None) -> _Found:
    found = _of_model(run.model, folder, adapter_name)
    training = training_facts.of_run(run.args, run.state)
    training.facts.update(found.training.facts)
    found.training = training
    tokenizer = run.processing_class
    if tokenizer is not None and hasattr(tokenizer, "save_pretrained"):
        with temporary_folder() as saved:
            tokenizer.save_pretrained(str(saved))
            found.tokenizer_files = copy_tokenizer(saved, folder)
        found.tokenizer_hash = hash_of_tokenizer(tokenizer)
    return found


def _active(model: Any) -> str:
    active = model.active_adapter
    if not isinstance(active, str):
        raise InvalidAdapter(
            f"The model has several active adapters ({', '.join(active)}): name one with adapter_name="
        )
    return active


def _checked(folder: Path, config: AdapterConfig, allow: Sequence[str]) -> Mapping[str, TensorRecord]:
    file = folder / ADAPTER_WEIGHTS
    checked = check_weights(file, config)
    if checked.warnings:
        raise InvalidAdapter(checked.warnings[0])
    header = checked.header
    sizes = {name: _size(header.tensors[name]) for name in other_tensors(header.tensors)}
    refused = {name: size for name, size in sizes.items() if not _allowed(name, allow)}
    if sum(refused.values()) > LARGE:
        total = file.stat().st_size
        largest = sorted(refused, key=lambda name: -refused[name])[:5]
        listed = ", ".join(f"{name} ({refused[name] / 1e6:,.1f} MB)" for name in largest)
        modules = sorted({name.split(".")[-2] for name in largest})
        raise TooLarge(
            f"{sum(refused.values()) / 1e6:,.1f} of {total / 1e6:,.1f} MB are tensors that are not LoRA's: {listed}. "
            f"If they were trained and have to be published, say so: push_adapter(…, allow={modules!r})"
        )
    return header.tensors


def _allowed(name: str, allow: Sequence[str]) -> bool:
    return any(f".{part}." in f".{name}" for part in allow)


def _size(record: TensorRecord) -> int:
    return prod(record.shape) * _BYTES.get(record.dtype, 8)


def _record(path: Path) -> FileRecord:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(4 * 1024 * 1024):
            digest.update(chunk)
    return FileRecord(path.stat().st_size, digest.hexdigest())


def _defaults() -> dict[str, Any]:
    import peft

    return peft.LoraConfig().to_dict()


def _metrics(metrics: Mapping[str, float]) -> dict[str, float]:
    for name, value in metrics.items():
        if not isinstance(name, str) or not training_facts.finite(value):
            raise InvalidAdapter(f"The metric {name!r} is {value!r}; metrics are finite numbers by name")
    return {name: float(value) for name, value in metrics.items()}

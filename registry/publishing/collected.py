"""Records for publishing: training facts, a run, a checked adapter."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from registry.formats.adapter_config import AdapterConfig
from registry.formats.records import BaseKind, BaseRecord, FileRecord, TensorRecord

__all__ = ["Collected", "Run", "Training"]


class Training:
    """Facts about a training, and its log.

    Attributes:
        facts: Facts for the manifest, JSON values by name.
        log: The Trainer's log history, for the loss curve.
        metrics: Metrics of the last evaluation.
        lineage: What it was trained from, cleaned.
    """

    def __init__(
        self,
        facts: Mapping[str, Any] | None = None,
        log: Sequence[Mapping[str, Any]] = (),
        metrics: Mapping[str, float] | None = None,
        lineage: Mapping[str, Any] | None = None,
    ) -> None:
        self.facts = dict(facts or {})
        self.log = [dict(entry) for entry in log if isinstance(entry, Mapping)]
        self.metrics = dict(metrics or {})
        self.lineage = dict(lineage or {})


@dataclass(frozen=True)
class Run:
    """A source to publish from: the parts of a Trainer that its callbacks see.

    Attributes:
        model: The unwrapped `PeftModel`.
        args: The Trainer's arguments.
        state: The Trainer's state.
        processing_class: Its tokenizer or processor, if it has one.
    """

    model: Any
    args: Any
    state: Any
    processing_class: Any = None


@dataclass(frozen=True)
class Collected:
    """An adapter ready for publishing: checked, and copied to a private folder.

    Attributes:
        folder: The folder of the copies, which exists while the context manager is open.
        files: The files to publish; the card and the manifest are added with the version.
        config: Its configuration.
        non_default: The configuration fields that differ from their default.
        base: The base model.
        architecture: Kind of base model.
        tensors: Dtype and shape of its tensors, by name.
        tokenizer_hash: sha256 of the tokenizer, if one was available.
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
    training: Training
    metrics: Mapping[str, float]

"""Collect an adapter for publishing from a model, a Trainer or a folder."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from registry.base.contract import check_contract
from registry.base.files import find_cached_snapshots, is_hub_id
from registry.base.record import base_at_hand, base_of_folder, base_of_model, require_known, with_aliases, with_given
from registry.base.stored import StoredAdapter
from registry.checks.adapter_files import AdapterFiles
from registry.checks.lineage import clean_lineage, read_lineage
from registry.checks.table import enforce
from registry.disk.machine import temporary_folder
from registry.errors import IdentityWarning, InvalidAdapter
from registry.formats.adapter_config import AdapterConfig
from registry.formats.paths import ADAPTER_CONFIG, ADAPTER_WEIGHTS
from registry.formats.records import BaseKind, BaseRecord
from registry.formats.references import expand_path
from registry.formats.tensors import holds_vocabulary, labels_of
from registry.formats.tokenizers import hash_of_file, hash_of_tokenizer
from registry.publishing import training_facts
from registry.publishing.checks import (
    check_for_push,
    check_metrics,
    check_tokenizer,
    check_without_base,
    record_file,
    warn_of_rest,
)
from registry.publishing.collected import Collected, Run, Training
from registry.publishing.initialization import make_plain
from registry.publishing.snapshot import copy_adapter, copy_tokenizer, read_state, save_model

if TYPE_CHECKING:
    from registry.hubs.protocol import Hub

__all__ = ["Collected", "Run", "collect", "find_adapter_name", "find_base_folder"]


@dataclass
class _Found:
    """The content of a source before it is checked."""

    base: BaseRecord
    architecture: BaseKind
    training: Training
    tokenizer_hash: str | None = None
    tokenizer_files: Sequence[str] = ()
    #: The base itself, as a model or a folder, where it is at hand.
    at_hand: Any = None


@contextmanager
def collect(
    source: Any,
    *,
    on_hub: bool,
    base_model: str | None = None,
    base_hub: Hub | None = None,
    base_aliases: str | Sequence[str] = (),
    adapter_name: str | None = None,
    metrics: Mapping[str, float] | None = None,
    training: Mapping[str, Any] | None = None,
    allow: Sequence[str] = (),
) -> Iterator[Collected]:
    """Check an adapter and copy it, before anything is published.

    Args:
        source: A `PeftModel`, a Trainer that holds one, an adapter folder, or a Trainer's checkpoint.
        on_hub: Whether it will be published on a network hub, where others can load bases only by id.
        base_model: ``org/base`` or ``org/base@revision``, if the base has no id or should get another one.
        base_hub: The hub of the base models, to resolve ``base_model`` and compare it; ``None`` to do neither.
        base_aliases: Further ids of the base to try if its own is gone.
        adapter_name: Name of the adapter in the model; the active one by default.
        metrics: Results; those of the last evaluation by default.
        training: Further facts about the training, JSON values.
        allow: Names of modules (``"lm_head"``) whose tensors may be large although they are not LoRA's.

    Raises:
        InvalidAdapter: It is unusable.
        UnknownBase: Its base model is not identified well enough to be found again.
        BaseMismatch: ``base_model`` is another model, or the adapter does not fit the model that it is in, or the base
            that its folder names, where that is on this machine.
        TooLarge: It holds large tensors other than LoRA's.
        UnsafeFile: A file is malformed or not allowed.
    """
    with temporary_folder() as folder:
        found = _copy_source(source, folder, adapter_name)
        found.training.facts.update(training or {})
        # A live model's configuration may name a custom class of the base; that of a folder must not.
        own = not isinstance(source, (str, os.PathLike))
        config = AdapterConfig.parse((folder / ADAPTER_CONFIG).read_bytes(), own=own)
        files = AdapterFiles(folder, allow=allow, given={"config": config, "names": ()})
        check_for_push(files)
        tensors = files.header.tensors
        given = _find_branch(found.base, config) if base_model is None else base_model
        record = found.base if given is None else with_given(found.base, given, base_hub)
        base = with_aliases(require_known(record, on_hub=on_hub), base_aliases)
        if given is None:
            _warn_of_unseen(base)
        if found.at_hand is not None:
            check_contract(folder, found.at_hand)
        else:
            check_without_base(StoredAdapter.read(folder))
        (folder / ADAPTER_CONFIG).write_bytes(config.published(base.id, base.commit))
        names = [ADAPTER_CONFIG, ADAPTER_WEIGHTS]
        if holds_vocabulary(tensors):
            names += found.tokenizer_files
        check_tokenizer(folder, names)
        yield Collected(
            folder,
            {file: record_file(folder / file) for file in names},
            config,
            config.non_default(_defaults()),
            base,
            replace(found.architecture, num_labels=labels_of(tensors, config)),
            tensors,
            found.tokenizer_hash,
            found.training,
            check_metrics(found.training.metrics if metrics is None else metrics),
        )


def _find_branch(base: BaseRecord, config: AdapterConfig) -> str | None:
    """Return the base with the configured branch or tag, if its commit is unknown; else ``None``."""
    revision = config.fields.get("revision")
    return f"{base.id}@{revision}" if revision and base.commit is None and is_hub_id(base.id) else None


def _warn_of_unseen(base: BaseRecord) -> None:
    if base.id is not None and base.commit is None and not find_cached_snapshots(base.id):
        warnings.warn(
            f"The base {base.id!r} is recorded as it is called: it is neither a folder here nor a model in the local "
            "cache, so its commit is not known. If it is a folder, or to record the commit, say "
            'base_model="org/base@<commit>"',
            IdentityWarning,
            stacklevel=5,
        )


def _copy_source(source: Any, folder: Path, adapter_name: str | None) -> _Found:
    if isinstance(source, (str, os.PathLike)):
        return _collect_folder(Path(source), folder)
    if isinstance(source, Run):
        return _collect_run(source, folder, adapter_name)
    if hasattr(source, "callback_handler") and hasattr(source, "model"):
        return _collect_trainer(source, folder, adapter_name)
    return _collect_model(source, folder, adapter_name)


def _collect_folder(source: Path, folder: Path) -> _Found:
    # The folder itself may be reached through links ("latest"), but its files must not be links.
    source = expand_path(source).resolve()
    copy_adapter(source, folder)
    config = AdapterConfig.parse((folder / ADAPTER_CONFIG).read_bytes())
    enforce(AdapterFiles(source, f"The adapter in {source}", given={"config": config}), "folder", ("configuration",))
    meant = find_base_folder(source, config.base_id)
    if meant is not None:
        (folder / ADAPTER_CONFIG).write_bytes(config.published(str(meant), None))
    stored = StoredAdapter.read(folder)
    base, architecture = base_of_folder(stored)
    facts, log = training_facts.of_checkpoint(source)
    training = Training(facts, log, training_facts.last_evaluation(log), read_lineage(source))
    warn_of_rest(source)
    files = copy_tokenizer(source, folder)
    hashed = hash_of_file(folder / "tokenizer.json") if "tokenizer.json" in files else None
    # Without a class, transformers cannot build the base, and nothing can be compared.
    at_hand = base_at_hand(stored.config) if architecture.class_name is not None else None
    return _Found(base, architecture, training, hashed, files, at_hand)


def find_base_folder(source: Path, name: str | None) -> Path | None:
    """Return the folder that a relative base name denoted in training, in ``source`` or one of its parents, if any."""
    if name is None or not is_hub_id(name):
        return None
    return next((parent / name for parent in (source, *source.parents) if (parent / name).is_dir()), None)


def _collect_model(model: Any, folder: Path, adapter_name: str | None) -> _Found:
    from peft import PeftModel

    model = getattr(model, "_orig_mod", model)
    if not isinstance(model, PeftModel):
        raise InvalidAdapter(
            f"A {type(model).__name__} cannot be published: give a PeftModel, a Trainer that holds one, or a folder "
            "that save_pretrained wrote"
        )
    name = adapter_name or find_adapter_name(model)
    state, saved_config = make_plain(model, name, read_state(model, name))
    save_model(model, name, state, saved_config, folder)
    config = AdapterConfig.parse((folder / ADAPTER_CONFIG).read_bytes(), own=True)
    base, architecture = base_of_model(model.get_base_model(), config)
    facts: dict[str, Any] = {
        "quantization": training_facts.read_quantization(model),
        "libraries": training_facts.libraries(),
    }
    further = {
        "quantized_share": training_facts.read_quantized_share(model),
        "base_format": training_facts.read_base_format(model),
    }
    facts |= {name: value for name, value in further.items() if value is not None}
    return _Found(
        base, architecture, Training(facts, lineage=_read_lineage(model, name)), at_hand=model.get_base_model()
    )


def _read_lineage(model: Any, name: str) -> dict[str, Any]:
    """Return what an adapter in a model was trained from; of another adapter than the trained one nothing is known."""
    found = getattr(model, training_facts.LINEAGE, None)
    if isinstance(found, Mapping) and name not in found.get("adapters", (name,)):
        return clean_lineage(None, f"the training that is recorded was of another adapter than {name}")
    return clean_lineage(found, "the model was trained without LoraCallback")


def _collect_trainer(trainer: Any, folder: Path, adapter_name: str | None) -> _Found:
    if getattr(trainer, "is_fsdp_enabled", False) or getattr(trainer, "is_deepspeed_enabled", False):
        raise InvalidAdapter(
            "This Trainer's model is spread over processes (FSDP or DeepSpeed): push the folder of a checkpoint "
            "that it has saved."
        )
    model = trainer.accelerator.unwrap_model(trainer.model)
    run = Run(model, trainer.args, trainer.state, getattr(trainer, "processing_class", None))
    return _collect_run(run, folder, adapter_name)


def _collect_run(run: Run, folder: Path, adapter_name: str | None) -> _Found:
    found = _collect_model(run.model, folder, adapter_name)
    facts, log = training_facts.of_run(run.args, run.state)
    told, metrics = found.training, training_facts.last_evaluation(log)
    found.training = Training({**facts, **told.facts}, log, metrics, told.lineage)
    tokenizer = run.processing_class
    if tokenizer is not None and hasattr(tokenizer, "save_pretrained"):
        with temporary_folder() as saved:
            tokenizer.save_pretrained(str(saved))
            found.tokenizer_files = copy_tokenizer(saved, folder)
        found.tokenizer_hash = hash_of_tokenizer(tokenizer)
    return found


def find_adapter_name(model: Any) -> str:
    """Return the name of a model's only active adapter.

    Raises:
        InvalidAdapter: Several are active.
    """
    active = model.active_adapter
    if not isinstance(active, str):
        raise InvalidAdapter(
            f"The model has several active adapters ({', '.join(active)}): name one with adapter_name="
        )
    return active


def _defaults() -> dict[str, Any]:
    # Imported late because PEFT loads torch.
    import peft

    return peft.LoraConfig().to_dict()

"""Write the card of an adapter folder, such as a checkpoint."""

from __future__ import annotations

import os
from pathlib import Path

from registry.base.files import is_hub_id
from registry.checks.lineage import read_lineage
from registry.disk.files import read_small, replace_file
from registry.formats.adapter_config import MAX_CONFIG, AdapterConfig
from registry.formats.fields import COMMIT
from registry.formats.paths import ADAPTER_CONFIG, ADAPTER_WEIGHTS, CARD
from registry.formats.readme import merge_readme
from registry.formats.tensors import counted
from registry.formats.weights import read_file_header
from registry.publishing import training_facts
from registry.publishing.card import model_card
from registry.publishing.source import find_base_folder

__all__ = ["write_card"]

_LIMIT = 4 * 1024 * 1024
#: Text in the cards that PEFT, transformers and TRL generate.
_GENERATED = (b"# Model Card for Model ID", b"generated_from_trainer")


def write_card(folder: str | os.PathLike[str]) -> Path:
    """Write the ``README.md`` of an adapter folder, such as a Trainer's checkpoint, from its files.

    A template of PEFT or transformers, which may name a local folder as ``base_model``, is replaced. In a README with
    the markers of our cards, the part between them is rewritten. Any other README is left unchanged.

    Args:
        folder: Holds ``adapter_config.json`` and ``adapter_model.safetensors``, as ``save_pretrained`` writes them.

    Returns:
        The path of the file.

    Raises:
        UnsafeFile: A file of the adapter is malformed.
        OSError: A file cannot be read or written.
    """
    place = Path(folder)
    file, card = place / CARD, _describe(place).encode()
    existing = read_small(file, _LIMIT) if os.path.lexists(file) else None
    if existing is not None and not any(mark in existing for mark in _GENERATED):
        merged = merge_readme(existing, card)
        if merged is None:
            return file
        card = merged
    replace_file(file, card, durable=False)
    return file


def _describe(folder: Path) -> str:
    config = AdapterConfig.parse(read_small(folder / ADAPTER_CONFIG, MAX_CONFIG + 1), own=True)
    name, revision = config.base_id, config.fields.get("revision")
    base = name if is_hub_id(name) and find_base_folder(folder.absolute(), name) is None else None
    pinned = base is not None and isinstance(revision, str) and COMMIT.fullmatch(revision) is not None
    facts, log = training_facts.of_checkpoint(folder)
    return model_card(
        name=None,
        version=None,
        base=base,
        base_commit=revision if pinned else None,
        parameters=list(counted(read_file_header(folder / ADAPTER_WEIGHTS).tensors)),
        training=facts,
        lineage=read_lineage(folder),
        metrics=training_facts.last_evaluation(log),
        picture=False,
        task_type=config.task_type,
        class_name=config.base_class,
    )

"""Make a release from a collected adapter: card, picture, manifest."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path

from registry.checks.serving import describe_base, judge_serving
from registry.formats.manifest import Manifest
from registry.formats.paths import CARD
from registry.formats.records import FileRecord
from registry.formats.tensors import counted
from registry.publishing.card import LOSS_CURVE, CardFields, loss_curve, model_card
from registry.publishing.collected import Collected

__all__ = ["make_release"]


def make_release(
    collected: Collected,
    name: str,
    version: str,
    parent_version: str | None = None,
    *,
    fields: CardFields | None = None,
) -> tuple[Manifest, dict[str, Path | bytes]]:
    """Return the manifest of a release, and its other files.

    Args:
        collected: The adapter to publish.
        name: ``org/name``.
        version: Normalized version.
        parent_version: The version before it.
        fields: The publisher's information for the card.
    """
    files: dict[str, Path | bytes] = {file: collected.folder / file for file in collected.files}
    curve = loss_curve(collected.training.log)
    if curve is not None:
        files[LOSS_CURVE] = curve
    files[CARD] = _make_card(collected, name, version, fields, picture=curve is not None).encode()
    manifest = Manifest(
        version=version,
        parent_version=parent_version,
        created=datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
        base=collected.base,
        architecture=collected.architecture,
        config=collected.non_default,
        files={**collected.files, **_record_bytes(files)},
        tensors=collected.tensors,
        peft_version=collected.config.peft_release,
        tokenizer_hash=collected.tokenizer_hash,
        training=collected.training.facts,
        metrics=collected.metrics,
        lineage=collected.training.lineage,
    )
    # Parse it again, because the parser checks more than this code does: what is published must be readable.
    return Manifest.parse(manifest.to_bytes()), files


def _record_bytes(files: Mapping[str, Path | bytes]) -> dict[str, FileRecord]:
    return {
        name: FileRecord(len(content), hashlib.sha256(content).hexdigest())
        for name, content in files.items()
        if isinstance(content, bytes)
    }


def _make_card(collected: Collected, name: str, version: str, fields: CardFields | None, *, picture: bool) -> str:
    return model_card(
        name=name,
        version=version,
        base=collected.base.id,
        base_commit=collected.base.commit,
        parameters=list(counted(collected.tensors)),
        training=collected.training.facts,
        lineage=collected.training.lineage,
        metrics=collected.metrics,
        picture=picture,
        task_type=collected.config.task_type,
        class_name=collected.architecture.class_name,
        fields=fields,
        servers=judge_serving(
            collected.config.fields, collected.tensors, describe_base(collected.architecture, collected.base)
        ),
    )

"""Check that manifest and configuration of a release agree."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from registry.errors import IntegrityError
from registry.formats.adapter_config import AdapterConfig
from registry.formats.manifest import MANIFEST_FILE, Manifest
from registry.formats.paths import ADAPTER_CONFIG

__all__ = ["check_agreement"]

#: Fields that decide which weights are adapted and how, with PEFT's defaults.
_FIELDS: dict[str, Any] = {
    "task_type": None,
    "target_modules": None,
    "target_parameters": None,
    "rank_pattern": None,
    "use_dora": False,
    "use_rslora": False,
}


def check_agreement(manifest: Manifest, config: AdapterConfig) -> None:
    """Check that the configuration, which PEFT reads, agrees with the manifest on base, rank, targets and LoRA variant.

    Raises:
        IntegrityError: They differ.
    """
    different = [
        f"{name} is {here!r}, and {there!r} by the manifest" for name, here, there in _compare(manifest, config)
    ]
    if different:
        raise IntegrityError(
            f"{ADAPTER_CONFIG} and {MANIFEST_FILE} of the adapter {manifest.version} do not agree: "
            f"{'; '.join(different)}. Pull the release again; if it was published so, do not use it."
        )


def _compare(manifest: Manifest, config: AdapterConfig) -> Iterator[tuple[str, object, object]]:
    base = manifest.base
    # A base known only by its fingerprint may be named by the user of the adapter.
    if base.id is not None and config.base_id not in (None, base.id):
        yield "base_model_name_or_path", config.base_id, base.id
    revision = config.fields.get("revision")
    if base.commit is not None and revision is not None and revision != base.commit:
        yield "revision", revision, base.commit
    rank = manifest.config.get("r", AdapterConfig({}).rank)
    if config.rank != rank:
        yield "r", config.rank, rank
    for key, default in _FIELDS.items():
        here, there = _normalize(config.fields.get(key)), _normalize(manifest.config.get(key))
        if (default if here is None else here) != (default if there is None else there):
            yield key, here, there


def _normalize(value: Any) -> Any:
    if isinstance(value, list):
        return sorted(value, key=str) or None
    return value or None

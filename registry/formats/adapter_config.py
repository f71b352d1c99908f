"""The configuration of an adapter, as PEFT writes it: read without PEFT, and without believing it."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from registry.errors import UnsafeFile
from registry.formats.fields import Fields
from registry.formats.paths import ADAPTER_CONFIG
from registry.formats.patterns import is_cheap
from registry.formats.strict_json import JsonRefused, canonical, parse, shown

__all__ = ["MAX_CONFIG", "AdapterConfig"]

#: Bytes that a configuration may have.
MAX_CONFIG = 4 * 1024 * 1024
_MAX_RANK = 65_536
#: Where the classes of base models are imported from; PEFT imports what stands here.
_LIBRARY = re.compile(r"transformers(\.models(\.\w+)*)?(\.\w+)?", re.ASCII)
#: Fields that say where things were, not what the adapter computes.
_PLACES = ("base_model_name_or_path", "revision", "peft_version", "inference_mode", "auto_mapping")
#: Fields that PEFT matches against module names as regular expressions; in the last two, it does so with the keys.
_PATTERNS = ("target_modules", "exclude_modules", "layers_pattern")
_TABLES = ("rank_pattern", "alpha_pattern")


@dataclass(frozen=True)
class AdapterConfig:
    """The fields of ``adapter_config.json``; those that this class has properties for are of the right type."""

    fields: Mapping[str, Any]

    @classmethod
    def parse(cls, data: bytes) -> AdapterConfig:
        """Read a configuration.

        Raises:
            UnsafeFile: It is malformed, no LoRA, names a library to import, or has an expression that takes forever.
        """
        try:
            values = parse(data, MAX_CONFIG)
            _check(Fields(values), values)
        except JsonRefused as reason:
            raise UnsafeFile(f"{ADAPTER_CONFIG} can't be used: {reason}") from None
        return cls(values)

    @property
    def rank(self) -> int:
        """``r``."""
        return int(self.fields["r"])

    @property
    def ranks(self) -> frozenset[int]:
        """The ranks that modules may have by this configuration."""
        return frozenset({self.rank, *(self.fields.get("rank_pattern") or {}).values()})

    @property
    def task_type(self) -> str | None:
        """PEFT's, such as ``CAUSAL_LM``."""
        return self.fields.get("task_type")

    @property
    def base_id(self) -> str | None:
        """``base_model_name_or_path``: what was given when the base was loaded, an id or a folder."""
        return self.fields.get("base_model_name_or_path") or None

    @property
    def peft_version(self) -> str | None:
        """The release of PEFT that wrote it, if it says so."""
        return self.fields.get("peft_version")

    def non_default(self, defaults: Mapping[str, Any]) -> dict[str, Any]:
        """The fields that are not at their default, without those about places and versions."""
        return {
            key: sorted(value) if key in ("target_modules", "modules_to_save") and isinstance(value, list) else value
            for key, value in sorted(self.fields.items())
            if key not in _PLACES and value not in (None, {}, []) and value != defaults.get(key)
        }

    def published(self, base_id: str | None, base_commit: str | None) -> bytes:
        """The file as it is published: it names the base by its id and commit, and no folder of this machine."""
        values = {**self.fields, "base_model_name_or_path": base_id, "revision": base_commit, "inference_mode": True}
        return canonical(values)


def _check(fields: Fields, values: Mapping[str, Any]) -> None:
    if values.get("peft_type") != "LORA":
        raise fields.refuse("peft_type", "'LORA'")
    fields.integer("r", _MAX_RANK, least=1)
    for key in ("task_type", "base_model_name_or_path", "revision", "peft_version"):
        fields.optional(key, fields.text)
    for key in ("lora_alpha", "lora_dropout"):
        value = values.get(key, 0)
        if not isinstance(value, (int, float)) or isinstance(value, bool) or abs(value) > 1e6:
            raise fields.refuse(key, "a number")
    for key in ("use_dora", "use_rslora", "fan_in_fan_out", "lora_bias"):
        if not isinstance(values.get(key, False), bool):
            raise fields.refuse(key, "true or false")
    ranks = fields.json_table("rank_pattern") if fields.has("rank_pattern") else {}
    if not all(type(rank) is int and 1 <= rank <= _MAX_RANK for rank in ranks.values()):
        raise fields.refuse("rank_pattern", "ranks by name")
    for key in ("modules_to_save", "target_parameters"):
        if fields.has(key):
            _names(fields, values, key)
    _check_imports(fields, values)
    for key, pattern in _expressions(fields, values):
        if not is_cheap(pattern):
            raise JsonRefused(
                f"{key} has the expression {shown(pattern)}, which can take forever; name the modules instead"
            )


def _check_imports(fields: Fields, values: Mapping[str, Any]) -> None:
    """PEFT imports modules by the names that stand in two fields."""
    if values.get("megatron_core", "megatron.core") not in (None, "megatron.core") or values.get("megatron_config"):
        raise fields.refuse("megatron_core", "its default; it names a library to import")
    mapping = values.get("auto_mapping")
    if mapping is None:
        return
    inner = fields.inner("auto_mapping")
    inner.optional("parent_library", lambda key: inner.text(key, _LIBRARY, "a module of transformers"))
    inner.optional(
        "base_model_class", lambda key: inner.text(key, re.compile(r"\w{1,200}", re.ASCII), "the name of a class")
    )


def _expressions(fields: Fields, values: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    for key in _PATTERNS:
        value = values.get(key)
        # In a list, target_modules and exclude_modules are names; layers_pattern is a pattern all the same.
        if isinstance(value, str):
            yield key, value
        elif value is not None:
            yield from ((key, name) for name in _names(fields, values, key) if key == "layers_pattern")
    for key in _TABLES:
        for name in fields.json_table(key) if fields.has(key) else ():
            yield key, name


def _names(fields: Fields, values: Mapping[str, Any], key: str) -> list[str]:
    value = values.get(key)
    if not isinstance(value, list) or not all(isinstance(name, str) and len(name) <= 1000 for name in value):
        raise fields.refuse(key, "a list of names")
    return value

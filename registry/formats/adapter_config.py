"""Parse an adapter's configuration file strictly, without PEFT."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from packaging.version import InvalidVersion, Version

from registry.errors import UnsafeFile
from registry.formats.fields import Fields
from registry.formats.paths import ADAPTER_CONFIG
from registry.formats.patterns import find_costly
from registry.formats.strict_json import JsonRefused, canonical, parse, shown

__all__ = ["MAX_CONFIG", "AdapterConfig"]

#: Bytes that a configuration may have.
MAX_CONFIG = 4 * 1024 * 1024
_MAX_RANK = 65_536
_DEFAULT_RANK = 8
_MAX_NAMES = 20_000
#: Different values, and keys where names of modules are only known to PEFT: it compares them all with every target.
_MAX_VALUES = 500
_MAX_LAYERS = 2_000
_MAX_TOKENS = 1_000_000
#: Fields that make transformers run code from a repository.
_CODE = ("trust_remote_code", "auto_map", "custom_pipelines")
_BIASES = ("none", "all", "lora_only")
#: The only allowed origin of base model classes; PEFT imports the module named in this field.
_LIBRARY = re.compile(r"transformers(\.models(\.\w+)*)?(\.\w+)?", re.ASCII)
#: Fields about locations and versions, not about what the adapter computes.
_PLACES = ("base_model_name_or_path", "revision", "peft_version", "inference_mode", "auto_mapping")
#: Fields that PEFT matches against module names as regular expressions; for tables, it matches the keys.
_PATTERNS = ("target_modules", "exclude_modules", "layers_pattern", "modules_to_save")
_TABLES = ("rank_pattern", "alpha_pattern")


@dataclass(frozen=True)
class AdapterConfig:
    """The fields of ``adapter_config.json``; fields exposed as properties have the right type."""

    fields: Mapping[str, Any]

    @classmethod
    def parse(cls, data: bytes, *, own: bool = False) -> AdapterConfig:
        """Parse a configuration.

        Args:
            data: The file's bytes.
            own: Whether the file is local rather than from a registry. PEFT may then have recorded a custom class of
                the base; it is dropped, because it is not needed and importing it runs code.

        Raises:
            UnsafeFile: It is malformed, not of a LoRA adapter, names a library to import, or has an expression that
                may take forever to match.
        """
        try:
            values = parse(data, MAX_CONFIG)
            if own and isinstance(values, dict) and not _is_importable(values.get("auto_mapping")):
                values = {**values, "auto_mapping": None}
            _check(Fields(values), values)
        except JsonRefused as reason:
            raise UnsafeFile(f"{ADAPTER_CONFIG} cannot be used: {reason}") from None
        return cls(values)

    def expressions(self) -> list[tuple[str, str]]:
        """Return field and text of everything that PEFT matches with module names as a regular expression."""
        return list(_list_expressions(Fields(self.fields), self.fields))

    @property
    def rank(self) -> int:
        """``r``; 8 if the file has none, as in PEFT."""
        return int(self.fields.get("r", _DEFAULT_RANK))

    @property
    def ranks(self) -> frozenset[int]:
        """The ranks that modules may have under this configuration."""
        return frozenset({self.rank, *(self.fields.get("rank_pattern") or {}).values()})

    @property
    def task_type(self) -> str | None:
        """PEFT's task type, such as ``CAUSAL_LM``."""
        return self.fields.get("task_type")

    @property
    def base_class(self) -> str | None:
        """The transformers class of the base, which PEFT records for adapters without a task type."""
        mapping = self.fields.get("auto_mapping")
        return mapping.get("base_model_class") if isinstance(mapping, dict) else None

    @property
    def token_indices(self) -> frozenset[int]:
        """The indices of individually trained tokens."""
        tokens = self.fields.get("trainable_token_indices")
        lists = tokens.values() if isinstance(tokens, dict) else [tokens or ()]
        return frozenset(index for indices in lists for index in indices)

    @property
    def blocks(self) -> int:
        """The number of blocks of a block-diagonal A or B (``use_bdlora``); 1 for other adapters."""
        blocks = self.fields.get("use_bdlora")
        return int(blocks.get("nblocks", 1)) if isinstance(blocks, dict) else 1

    @property
    def trained_tokens(self) -> int:
        """One more than the largest index of an individually trained token; 0 without such tokens."""
        return max(self.token_indices, default=-1) + 1

    @property
    def base_id(self) -> str | None:
        """``base_model_name_or_path``: the id or folder that the base was loaded from."""
        return self.fields.get("base_model_name_or_path") or None

    @property
    def peft_version(self) -> str | None:
        """The PEFT release that wrote it, as recorded; a development version may end with ``@`` and a commit."""
        return self.fields.get("peft_version")

    @property
    def peft_release(self) -> str | None:
        """The PEFT release that wrote it, as a normalized version; ``None`` if it is not known."""
        try:
            return str(Version(self.peft_version.partition("@")[0])) if self.peft_version else None
        except InvalidVersion:
            return None

    def non_default(self, defaults: Mapping[str, Any]) -> dict[str, Any]:
        """Return the fields that differ from their default, without those about locations and versions."""
        return {
            key: sorted(value) if key in ("target_modules", "modules_to_save") and isinstance(value, list) else value
            for key, value in sorted(self.fields.items())
            if key not in _PLACES and value not in (None, {}, []) and value != defaults.get(key)
        }

    def published(self, base_id: str | None, base_commit: str | None) -> bytes:
        """Return the file as published: it names the base by id and commit, and no local folder."""
        values = {**self.fields, "base_model_name_or_path": base_id, "revision": base_commit, "inference_mode": True}
        return canonical(values)


def _check(fields: Fields, values: Mapping[str, Any]) -> None:
    if values.get("peft_type") != "LORA":
        raise fields.refuse("peft_type", "'LORA'")
    if "lora_parameters" in values:
        raise JsonRefused("lora_parameters holds its rank and targets: MLX wrote it, convert the adapter to PEFT first")
    if "r" in values:
        fields.integer("r", _MAX_RANK, least=1)
    if values.get("bias", "none") not in _BIASES:
        raise fields.refuse("bias", f"one of {', '.join(_BIASES)}")
    for key in ("task_type", "base_model_name_or_path", "revision", "peft_version"):
        fields.optional(key, fields.text)
    for key in ("lora_alpha", "lora_dropout"):
        value = values.get(key, 0)
        if not _is_number(value) or abs(value) > 1e6:
            raise fields.refuse(key, "a number")
    for key in ("use_dora", "use_rslora", "fan_in_fan_out", "lora_bias"):
        # PEFT takes null for false.
        if fields.has(key) and not isinstance(values[key], bool):
            raise fields.refuse(key, "true or false")
    _check_tables(fields)
    for key in ("modules_to_save", "target_parameters"):
        if fields.has(key):
            _read_names(fields, values, key)
    _check_numbers(fields, values)
    _check_imports(fields, values)
    costly = find_costly(_list_expressions(fields, values))
    if costly is not None:
        raise JsonRefused(
            f"{costly[0]} has the expression {shown(costly[1])}, which can take forever; name the modules instead"
        )


def _check_tables(fields: Fields) -> None:
    """Check the tables of ranks and alphas by module name."""
    ranks = fields.json_table("rank_pattern") if fields.has("rank_pattern") else {}
    if len(ranks) > _MAX_NAMES or not all(type(rank) is int and 1 <= rank <= _MAX_RANK for rank in ranks.values()):
        raise fields.refuse("rank_pattern", f"at most {_MAX_NAMES:,} ranks by name")
    alphas = fields.json_table("alpha_pattern") if fields.has("alpha_pattern") else {}
    if len(alphas) > _MAX_NAMES or not all(_is_number(alpha) and abs(alpha) <= 1e6 for alpha in alphas.values()):
        raise fields.refuse("alpha_pattern", f"at most {_MAX_NAMES:,} numbers by name")
    made_by_peft = fields.has("layer_replication") or fields.has("target_parameters")
    for key, table in (("rank_pattern", ranks), ("alpha_pattern", alphas)):
        if len(set(table.values())) > _MAX_VALUES:
            raise fields.refuse(key, f"at most {_MAX_VALUES} different numbers")
        if made_by_peft and len(table) > _MAX_VALUES:
            raise fields.refuse(key, f"at most {_MAX_VALUES} keys beside layer_replication or target_parameters")


def _check_numbers(fields: Fields, values: Mapping[str, Any]) -> None:
    """Check the numbers of layers and tokens: PEFT creates one module, or one row, for each."""
    layers = values.get("layers_to_transform")
    if layers is not None and not _are_indices(layers if isinstance(layers, list) else [layers], _MAX_LAYERS):
        raise fields.refuse("layers_to_transform", f"indices of at most {_MAX_LAYERS:,} layers")
    ranges = values.get("layer_replication")
    if ranges is not None and not (isinstance(ranges, list) and _count_replicated(ranges) <= _MAX_LAYERS):
        raise fields.refuse("layer_replication", f"ranges [start, end] of together at most {_MAX_LAYERS:,} layers")
    tokens = values.get("trainable_token_indices")
    lists = list(tokens.values()) if isinstance(tokens, dict) else [tokens] if tokens is not None else []
    blocks = values.get("use_bdlora")
    if blocks is not None and not (isinstance(blocks, dict) and _is_count(blocks.get("nblocks", 1), _MAX_RANK)):
        raise fields.refuse("use_bdlora", f"an object with nblocks, a number from 1 to {_MAX_RANK:,}")
    if not all(isinstance(indices, list) and _are_indices(indices, _MAX_TOKENS) for indices in lists):
        raise fields.refuse("trainable_token_indices", "indices of tokens, or such lists by the name of an embedding")


def _count_replicated(ranges: list[Any]) -> int:
    """Return how many layers the ranges repeat; more than allowed if a range is malformed."""
    pairs = [item for item in ranges if isinstance(item, list) and len(item) == 2 and _are_indices(item, _MAX_LAYERS)]
    return sum(end - start for start, end in pairs) if len(pairs) == len(ranges) else _MAX_LAYERS + 1


def _are_indices(values: list[Any], most: int) -> bool:
    return len(values) <= most and all(type(index) is int and 0 <= index < 2**31 for index in values)


def _is_count(value: object, most: int) -> bool:
    return type(value) is int and 1 <= value <= most


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _check_imports(fields: Fields, values: Mapping[str, Any]) -> None:
    """Refuse names of Python modules that PEFT or transformers would import."""
    if values.get("megatron_core", "megatron.core") not in (None, "megatron.core"):
        raise fields.refuse("megatron_core", "its default; it names a library to import")
    if values.get("megatron_config"):
        raise fields.refuse("megatron_config", "nothing; PEFT then imports the library in megatron_core")
    for key in _CODE:
        if values.get(key):
            raise fields.refuse(key, "nothing: a configuration cannot decide that code is run")
    mapping = values.get("auto_mapping")
    if mapping is None:
        return
    inner = fields.inner("auto_mapping")
    inner.optional("parent_library", lambda key: inner.text(key, _LIBRARY, "a module of transformers"))
    inner.optional(
        "base_model_class", lambda key: inner.text(key, re.compile(r"\w{1,200}", re.ASCII), "the name of a class")
    )


def _list_expressions(fields: Fields, values: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    for key in _PATTERNS:
        value = values.get(key)
        # In a list, entries of target_modules and exclude_modules are names; those of the other two are still patterns.
        if isinstance(value, str):
            yield key, value
        elif value is not None:
            names = _read_names(fields, values, key)
            yield from ((key, name) for name in names if key in ("layers_pattern", "modules_to_save"))
    for key in _TABLES:
        for name in fields.json_table(key) if fields.has(key) else ():
            yield key, name


def _read_names(fields: Fields, values: Mapping[str, Any], key: str) -> list[str]:
    value = values.get(key)
    if not isinstance(value, list) or len(value) > _MAX_NAMES:
        raise fields.refuse(key, f"a list of at most {_MAX_NAMES:,} names")
    if not all(isinstance(name, str) and len(name) <= 1000 for name in value):
        raise fields.refuse(key, "a list of names")
    return value


def _is_importable(mapping: object) -> bool:
    """Whether PEFT's record of the base's class is absent or names a transformers class."""
    if not isinstance(mapping, dict):
        return True
    library = mapping.get("parent_library")
    return library is None or (isinstance(library, str) and _LIBRARY.fullmatch(library) is not None)

"""The manifest of a release."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from packaging.version import InvalidVersion, Version

from registry.errors import InvalidManifest
from registry.formats.fields import COMMIT, SHA256, Fields
from registry.formats.paths import (
    ADAPTER_CONFIG,
    ADAPTER_WEIGHTS,
    CARD,
    CARD_BESIDE,
    MANIFEST_FILE,
    is_picture,
    listed_in_manifest,
)
from registry.formats.records import (
    MAX_TENSORS,
    BaseKind,
    BaseRecord,
    FileRecord,
    Fingerprint,
    TensorPrint,
    TensorRecord,
    is_tensor_name,
)
from registry.formats.strict_json import JsonRefused, canonical, parse, shown

__all__ = ["BASE_ID", "FORMAT", "MANIFEST_FILE", "MAX_ALIASES", "MAX_MANIFEST", "Manifest"]

#: The format that this release of the package writes; newer formats are refused.
FORMAT = 1
#: Maximum bytes of a manifest; one with 10,000 tensors has about 1 MB.
MAX_MANIFEST = 8 * 1024 * 1024
#: Maximum bytes of a file of a release.
MAX_FILE = 100 * 1024**3
_MAX_FILES = 64
MAX_ALIASES = 16

_CREATED = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ")
_DTYPE = re.compile(r"[A-Z][A-Z0-9_]{1,15}")
#: The id of a model on a hub.
BASE_ID = re.compile(r"(?!.*(?:\.\.|--))[A-Za-z0-9][\w.\-]{0,95}(?:/[A-Za-z0-9][\w.\-]{0,95})?", re.ASCII)


@dataclass(frozen=True)
class Manifest:
    """The content of ``adapter_manifest.json``.

    Attributes:
        version: Version of the release, normalized.
        base: The base model it was trained on.
        architecture: Kind of base model.
        config: The fields of the PEFT configuration that are not at their default.
        files: The files of the release other than the manifest, by name.
        tensors: The tensors of ``adapter_model.safetensors``, by name.
        created: Time of creation, as ``2026-01-31T12:00:00Z``.
        parent_version: The version before it, or the one that it was trained from.
        peft_version: PEFT release that wrote the adapter.
        tokenizer_hash: sha256 of the tokenizer, if one was available.
        training: Facts about the training: steps, tokens, arguments, quantization, versions of libraries.
        metrics: Results by name.
        lineage: What it was trained from: data set, recipe, code, seed, hardware, libraries; and what of it was not
            recorded, with the reason. Empty in a release from before it was recorded.
    """

    version: str
    base: BaseRecord
    architecture: BaseKind
    config: Mapping[str, Any]
    files: Mapping[str, FileRecord]
    tensors: Mapping[str, TensorRecord]
    created: str
    parent_version: str | None = None
    peft_version: str | None = None
    tokenizer_hash: str | None = None
    training: Mapping[str, Any] = field(default_factory=dict)
    metrics: Mapping[str, float] = field(default_factory=dict)
    lineage: Mapping[str, Any] = field(default_factory=dict)

    def list_facts(self) -> list[tuple[str, object]]:
        """Return what a person wants to see of it first: base, quantization, metrics, size, time; label and value."""
        quantization, share = self.training.get("quantization"), self.training.get("quantized_share")
        name = quantization.get("name") if isinstance(quantization, Mapping) else quantization
        commit = f"@{self.base.commit[:12]}" if self.base.commit else ""
        return [
            ("base", f"{self.base.id}{commit}" if self.base.id else "not recorded"),
            ("quantization", f"{name}, {share:.1%} of the weights" if name and isinstance(share, float) else name),
            *self.metrics.items(),
            ("bytes", f"{sum(file.size for file in self.files.values()):,}"),
            ("created", self.created),
        ]

    @classmethod
    def parse(cls, data: bytes) -> Manifest:
        """Parse a manifest; the result has checked types and sizes, and lists only allowed files.

        Raises:
            InvalidManifest: It is malformed, or of a newer format.
        """
        try:
            manifest = cls._read(Fields(parse(data, MAX_MANIFEST)))
        except JsonRefused as reason:
            raise InvalidManifest(f"{MANIFEST_FILE}: {reason}") from None
        # The digest covers the bytes as read, not the parsed values.
        object.__setattr__(manifest, "_bytes", data)
        return manifest

    @classmethod
    def _read(cls, fields: Fields) -> Manifest:
        if fields.integer("format", 2**31, least=1) > FORMAT:
            raise fields.refuse("format", f"at most {FORMAT}; a newer lora-plugins wrote it, and can read it")
        return cls(
            version=_read_version(fields, "version"),
            base=_read_base(fields.inner("base")),
            architecture=_read_architecture(fields.inner("architecture")),
            config=fields.json_table("config"),
            files=_read_files(fields),
            tensors=_read_tensors(fields),
            created=fields.text("created", _CREATED, "a time such as 2026-01-31T12:00:00Z"),
            parent_version=fields.optional("parent_version", lambda key: _read_version(fields, key)),
            peft_version=fields.optional("peft_version", lambda key: _read_version(fields, key)),
            tokenizer_hash=fields.optional("tokenizer_hash", lambda key: fields.text(key, SHA256, "a sha256")),
            training=fields.json_table("training"),
            metrics=fields.number_table("metrics"),
            lineage=fields.json_table("lineage"),
        )

    def to_bytes(self) -> bytes:
        """Return the bytes it was parsed from, or else its canonical encoding."""
        known: bytes | None = getattr(self, "_bytes", None)
        if known is not None:
            return known
        fields = {"format": FORMAT, **_convert_to_json(self)}
        if not self.lineage:
            # Lock files hold the digest of an unversioned adapter from before lineage was recorded.
            del fields["lineage"]
        return canonical(fields)

    @property
    def unversioned(self) -> bool:
        """Whether it describes an adapter that nobody published as a version; such a manifest is never uploaded."""
        return Version(self.version).local is not None

    @property
    def digest(self) -> str:
        """sha256 (hex) of ``to_bytes()``: the identity of the release."""
        return hashlib.sha256(self.to_bytes()).hexdigest()

    @property
    def content_digest(self) -> str:
        """sha256 (hex) of the adapter's content: weights, tokenizer, configuration, base.

        Two pushes of the same adapter share it although their times, library versions, metrics and cards differ.
        """
        told = (
            ADAPTER_CONFIG,
            CARD,
            CARD_BESIDE,
        )  # the configuration counts by its fields; PEFT adds its version to the file
        content = {
            "architecture": _convert_to_json(self.architecture),
            "base": {key: value for key, value in _convert_to_json(self.base).items() if key != "aliases"},
            "config": dict(self.config),
            "files": {n: _convert_to_json(f) for n, f in self.files.items() if n not in told and not is_picture(n)},
            "tensors": {name: _convert_to_json(tensor) for name, tensor in self.tensors.items()},
            "tokenizer_hash": self.tokenizer_hash,
        }
        return hashlib.sha256(canonical(content)).hexdigest()


def _read_version(fields: Fields, key: str) -> str:
    text = fields.text(key, expected="a version")
    try:
        if len(text) <= 128 and str(Version(text)) == text:
            return text
    except (InvalidVersion, ValueError):
        pass
    raise fields.refuse(key, "a normalized version such as 1.2.0")


def _read_base(fields: Fields) -> BaseRecord:
    return BaseRecord(
        id=fields.optional("id", lambda key: fields.text(key, BASE_ID, "the id of a model, such as org/name")),
        commit=fields.optional("commit", lambda key: fields.text(key, COMMIT, "a commit")),
        fingerprint=_read_fingerprint(fields.inner("fingerprint")) if fields.has("fingerprint") else None,
        aliases=fields.optional("aliases", lambda key: _read_aliases(fields, key)),
    )


def _read_aliases(fields: Fields, key: str) -> tuple[str, ...]:
    found = fields.texts(key)
    if len(found) > MAX_ALIASES or not all(BASE_ID.fullmatch(name) for name in found):
        raise fields.refuse(key, f"at most {MAX_ALIASES} ids of models, such as org/name")
    return found


def _read_fingerprint(fields: Fields) -> Fingerprint:
    tensors = {
        _check_tensor_name(name): TensorPrint(
            entry.text("sha256", SHA256, "a sha256"),
            entry.text("dtype", _DTYPE, "a dtype such as BF16"),
            entry.numbers("values", 64),
        )
        for name, entry in fields.table("tensors", 16)
    }
    return Fingerprint(fields.json_table("config"), tensors)


def _read_architecture(fields: Fields) -> BaseKind:
    return BaseKind(
        fields.optional("model_type", fields.text),
        fields.optional("class_name", fields.text),
        fields.optional("vocab_size", lambda key: fields.integer(key, 2**40)),
        fields.optional("num_labels", lambda key: fields.integer(key, 2**31)),
    )


def _read_files(fields: Fields) -> dict[str, FileRecord]:
    files = {}
    for name, entry in fields.table("files", _MAX_FILES):
        if not listed_in_manifest(name):
            raise JsonRefused(f"files lists {shown(name)}, which a release cannot hold")
        files[name] = FileRecord(entry.integer("size", MAX_FILE), entry.text("sha256", SHA256, "a sha256"))
    missing = {ADAPTER_CONFIG, ADAPTER_WEIGHTS} - set(files)
    if missing:
        raise JsonRefused(f"files lacks {', '.join(sorted(missing))}")
    return files


def _read_tensors(fields: Fields) -> dict[str, TensorRecord]:
    tensors = {
        _check_tensor_name(name): TensorRecord(entry.text("dtype", _DTYPE, "a dtype such as F32"), entry.shape("shape"))
        for name, entry in fields.table("tensors", MAX_TENSORS)
    }
    if not tensors:
        raise JsonRefused("tensors is empty")
    return tensors


def _check_tensor_name(name: str) -> str:
    if not is_tensor_name(name):
        raise JsonRefused(f"tensors has {shown(name)}, which is not a valid name of a tensor")
    return name


def _convert_to_json(value: Any) -> Any:
    """Return a record as JSON values, without unknown (``None``) fields."""
    if hasattr(value, "__dataclass_fields__"):
        found = {name: _convert_to_json(getattr(value, name)) for name in value.__dataclass_fields__}
        return {name: item for name, item in found.items() if item is not None}
    if isinstance(value, Mapping):
        return {str(name): _convert_to_json(item) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_convert_to_json(item) for item in value]
    return value

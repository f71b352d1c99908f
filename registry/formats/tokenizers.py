"""Hash a tokenizer, in memory or in a file, with equal results."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from registry.formats.strict_json import JsonRefused, canonical, parse

__all__ = ["hash_of_file", "hash_of_tokenizer"]

_LIMIT = 256 * 1024 * 1024
#: Keys that change while a tokenizer is used.
_STATE = ("truncation", "padding")


def hash_of_file(path: Path) -> str | None:
    """Return the hash of a ``tokenizer.json``; ``None`` if it is not valid JSON."""
    try:
        return _hash(parse(path.read_bytes(), _LIMIT))
    except JsonRefused:
        return None


def hash_of_tokenizer(tokenizer: Any) -> str | None:
    """Return the hash of a transformers tokenizer; for one without a fast backend, of its vocabulary."""
    tokenizer = getattr(tokenizer, "tokenizer", tokenizer)
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:
        return _hash(json.loads(backend.to_str()))
    if hasattr(tokenizer, "get_vocab"):
        return _hash({"vocabulary": tokenizer.get_vocab()})
    return None


def _hash(values: Any) -> str:
    kept = {key: value for key, value in values.items() if key not in _STATE} if isinstance(values, dict) else values
    return hashlib.sha256(canonical(kept)).hexdigest()

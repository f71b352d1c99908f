"""The names that files of a release may have."""

from __future__ import annotations

import re

__all__ = [
    "ADAPTER_CONFIG",
    "ADAPTER_WEIGHTS",
    "CARD",
    "CARD_BESIDE",
    "GIT_ATTRIBUTES",
    "MANIFEST_FILE",
    "SIGNATURE_FILE",
    "TOKENIZER_FILES",
    "allowed",
    "is_picture",
    "listed_in_manifest",
    "max_size",
]

ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"
MANIFEST_FILE = "adapter_manifest.json"
#: The signature of the manifest; a separate file, because no file can contain its own hash.
SIGNATURE_FILE = "adapter_manifest.sig"
CARD = "README.md"
#: The card's name in a repository with a foreign README.md.
CARD_BESIDE = "ADAPTER_CARD.md"
#: The Hub adds it to every repository.
GIT_ATTRIBUTES = ".gitattributes"
#: Data files of transformers tokenizers; none of them is executed.
TOKENIZER_FILES = frozenset(
    {
        "added_tokens.json",
        "chat_template.jinja",
        "merges.txt",
        "sentencepiece.bpe.model",
        "special_tokens_map.json",
        "spiece.model",
        "tokenizer.json",
        "tokenizer.model",
        "tokenizer_config.json",
        "vocab.json",
        "vocab.txt",
    }
)
_OTHERS = frozenset({ADAPTER_CONFIG, ADAPTER_WEIGHTS, MANIFEST_FILE, CARD, CARD_BESIDE, GIT_ATTRIBUTES})
_PICTURE = re.compile(r"[a-z0-9][a-z0-9_-]{0,63}\.png")


_MAX_WEIGHTS = 100 * 1024**3
#: Bytes; the largest tokenizers have 30 MB.
_MAX_OTHER = 256 * 1024**2


def max_size(name: str) -> int:
    """Return the maximum bytes of a file of a release."""
    return _MAX_WEIGHTS if name == ADAPTER_WEIGHTS else _MAX_OTHER


def allowed(name: str) -> bool:
    """Whether a release may hold a file of this name."""
    return name in _OTHERS or name in TOKENIZER_FILES or is_picture(name)


def is_picture(name: str) -> bool:
    """Whether it is the name of a picture of the model card."""
    return _PICTURE.fullmatch(name) is not None


def listed_in_manifest(name: str) -> bool:
    """Whether a manifest may list a file of this name: not itself, and not the file that the Hub adds."""
    return allowed(name) and name not in (MANIFEST_FILE, GIT_ATTRIBUTES)

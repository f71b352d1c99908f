"""Find tokens that a base model's own tokenizer does not have."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import nn
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from lora_plugins.models.checkpoint import find_pretrained, locate

__all__ = ["find_new_tokens"]


#: Files of which a tokenizer has at least one; their folder is the tokenizer's.
_FILES = ("tokenizer.json", "tokenizer_config.json", "vocab.txt", "vocab.json", "tokenizer.model", "spiece.model")

#: Attribute of a base model with the ids of its own tokenizer's tokens, and where they were read.
_KEPT = "_lora_plugins_own_tokens"


def find_new_tokens(model: nn.Module, processor: Any) -> dict[int, str]:
    """Return the tokens of a tokenizer that the base's own tokenizer and configuration do not have, by id.

    The base's tokenizer is read from the folder or the Hub's cache; there are no network requests. The padding token is
    left out: it is masked, and neither read nor predicted.

    Args:
        model: The base model, with or without adapters in it.
        processor: A tokenizer, or a processor that holds one; anything else has no tokens.

    Returns:
        Empty where the base's tokenizer is not at hand: then it is not known.
    """
    tokenizer = getattr(processor, "tokenizer", processor)
    pretrained = find_pretrained(model)
    if pretrained is None or not isinstance(tokenizer, PreTrainedTokenizerBase):
        return {}
    known = _read_own_tokens(pretrained[1])
    if not known:
        return {}
    known |= _list_special_ids(pretrained[1].config) | {tokenizer.pad_token_id}
    return {number: token for token, number in tokenizer.get_vocab().items() if number not in known}


def _read_own_tokens(model: Any) -> set[int]:
    """Return the ids of the base's own tokenizer, which is read once for each base."""
    source = str(getattr(model, "name_or_path", "") or "")
    commit = getattr(model.config, "_commit_hash", None)
    kept = vars(model).get(_KEPT)
    if kept is None or kept[0] != (source, commit):
        kept = (source, commit), frozenset(_load_own_tokens(source, commit))
        setattr(model, _KEPT, kept)
    return set(kept[1])


def _load_own_tokens(source: str, commit: str | None) -> set[int]:
    try:
        file = next(filter(None, (locate(source, name, commit) for name in _FILES))) if source else None
        return set(_load_tokenizer(file.parent).get_vocab().values()) if file is not None else set()
    except Exception:
        # A tokenizer may be incomplete, need a package or code of its own, or raise anything.
        return set()


def _load_tokenizer(folder: Path) -> Any:
    return AutoTokenizer.from_pretrained(folder, local_files_only=True)


def _list_special_ids(config: Any) -> set[int]:
    """Return the ids that a configuration names, such as placeholders for images, whose rows are not read."""
    found: set[int] = set()
    for part in (config, *(value for value in vars(config).values() if hasattr(value, "to_dict"))):
        for name, value in vars(part).items():
            if name.endswith(("_token_id", "_token_index")):
                found |= {
                    number for number in (value if isinstance(value, list) else [value]) if isinstance(number, int)
                }
    return found

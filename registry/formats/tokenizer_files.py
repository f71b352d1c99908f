"""Check that tokenizer files do not make transformers run code."""

from __future__ import annotations

import json

from registry.errors import UnsafeFile

__all__ = ["MAX_TOKENIZER_CONFIG", "TOKENIZER_CONFIG", "check_tokenizer_config"]

#: The only tokenizer file that can make transformers run code.
TOKENIZER_CONFIG = "tokenizer_config.json"
MAX_TOKENIZER_CONFIG = 32 * 1024 * 1024
#: Fields that make transformers import code from a repository.
_CODE = ("auto_map", "custom_pipelines", "trust_remote_code")


def check_tokenizer_config(data: bytes) -> None:
    """Refuse a tokenizer configuration that makes transformers run code.

    Args:
        data: The content of ``tokenizer_config.json``.

    Raises:
        UnsafeFile: It names code, or is malformed.
    """
    if len(data) > MAX_TOKENIZER_CONFIG:
        raise UnsafeFile(f"{TOKENIZER_CONFIG} cannot be used: it has more than {MAX_TOKENIZER_CONFIG:,} bytes")
    try:
        # Parsed as transformers does. Tokenizers without a length limit have a number of 31 digits here.
        values = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise UnsafeFile(f"{TOKENIZER_CONFIG} cannot be used: it is not JSON ({type(error).__name__})") from None
    if not isinstance(values, dict):
        raise UnsafeFile(f"{TOKENIZER_CONFIG} cannot be used: it is not an object")
    found = [key for key in _CODE if values.get(key)]
    if found:
        raise UnsafeFile(
            f"{TOKENIZER_CONFIG} sets {found[0]}, by which code is run where the tokenizer is loaded; a release holds "
            "no code. Save the tokenizer with a class of transformers, such as PreTrainedTokenizerFast"
        )

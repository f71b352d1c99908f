"""The plugin of vLLM: it asks the registry for adapters, once configured.

vLLM calls `register` in each of its processes (entry points ``vllm.general_plugins``).
"""

from __future__ import annotations

import importlib
import os

from lora_plugins.errors import InvalidServingSetting
from lora_plugins.serving.resolver_settings import VARIABLE, ResolverSettings

__all__ = ["register"]

#: With this one set, vLLM lets every model name pass, and answers from the base.
_UNCHECKED = "VLLM_SKIP_MODEL_NAME_VALIDATION"


def register() -> None:
    """Register a resolver in vLLM if ``LORA_PLUGINS_VLLM`` names a registry; else do nothing.

    Raises:
        InvalidServingSetting: A variable has a value that it cannot have, or vLLM would answer from the base in place
            of an adapter that was refused.
    """
    settings = ResolverSettings.read(os.environ)
    if settings is None:
        return
    if os.environ.get(_UNCHECKED, "0").strip().lower() in ("1", "true"):
        raise InvalidServingSetting(
            f"{_UNCHECKED} makes vLLM answer from the base for every name that it does not know, adapters that were "
            f"refused among them. Unset it, or unset {VARIABLE}."
        )
    # Loaded only here: it needs vLLM.
    importlib.import_module("lora_plugins.serving.vllm_resolver").add_resolver(settings)

"""Former place of the bitsandbytes backends, now in `quantizers`."""

from __future__ import annotations

import importlib
import warnings
from typing import Any


def __getattr__(name: str) -> Any:
    if name.startswith("__"):
        raise AttributeError(name)
    place = "lora_plugins.builtin.quantizers.bitsandbytes"
    warnings.warn(f"Import {name} from {place}; {__name__} is deprecated", DeprecationWarning, stacklevel=2)
    return getattr(importlib.import_module(place), name)

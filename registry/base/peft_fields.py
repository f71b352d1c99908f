"""Turn an adapter's configuration into the installed PEFT's."""

from __future__ import annotations

import inspect
import warnings
from typing import Any

from registry.base.stored import StoredAdapter
from registry.checks.configuration import LOST_INITIALIZATION, UNKNOWN_FIELDS, list_unknown
from registry.checks.table import enforce
from registry.errors import BaseMismatch
from registry.formats.strict_json import shown

__all__ = ["read_peft_config"]


def read_peft_config(adapter: StoredAdapter) -> tuple[Any, tuple[str, ...]]:
    """Return an adapter's ``peft.LoraConfig``, and the fields that PEFT ignores because another trainer wrote them.

    Raises:
        BaseMismatch: It has non-default fields that a newer PEFT knows and this one would drop; or PEFT rejects its
            fields; or its initialization changed the base.
    """
    import peft

    fields = adapter.config.fields
    known = inspect.signature(peft.LoraConfig).parameters
    enforce(adapter.files, "load", ("configuration", "manifest"), checks=(UNKNOWN_FIELDS, LOST_INITIALIZATION))
    _, ignored = list_unknown(adapter.config, adapter.manifest)
    # The adapter's values come from the file; some initializations would read the base's weights.
    values = {key: value for key, value in fields.items() if key in known}
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            made = peft.LoraConfig(**{**values, "auto_mapping": None, "init_lora_weights": True, "loftq_config": {}})
    except Exception as error:
        # PEFT may raise anything for inconsistent fields.
        text = " ".join(str(error).split())[:300] or type(error).__name__
    else:
        return made, tuple(shown(key) for key in ignored)
    raise BaseMismatch(f"PEFT cannot use the configuration of {adapter.title}: {text}")

"""Turn an adapter's configuration into the installed PEFT's."""

from __future__ import annotations

import inspect
import warnings
from typing import Any

from packaging.version import InvalidVersion, Version

from registry.base.stored import StoredAdapter
from registry.errors import BaseMismatch
from registry.formats.strict_json import shown

__all__ = ["describe_lost", "read_peft_config"]

#: Fields of early PEFT releases that changed the computation; no later release knows them.
_REMOVED = ("enable_lora",)
#: Values of ``init_lora_weights`` that do not change the base.
_PLAIN = (True, False, None, "gaussian", "eva", "orthogonal", "mica", "true", "false")
#: Values that change the base, and that PEFT repeats with the same result when it loads the adapter.
_REPEATED = ("pissa", "olora")


def read_peft_config(adapter: StoredAdapter) -> tuple[Any, tuple[str, ...]]:
    """Return an adapter's ``peft.LoraConfig``, and the fields that PEFT ignores because another trainer wrote them.

    Raises:
        BaseMismatch: It has non-default fields that a newer PEFT knows and this one would drop; or PEFT rejects its
            fields; or its initialization changed the base.
    """
    import peft

    fields = adapter.config.fields
    known = inspect.signature(peft.LoraConfig).parameters
    unknown = [key for key in sorted(fields) if key not in known and fields[key] not in (None, {}, [], False)]
    needed = [key for key in unknown if _is_needed(key, adapter, Version(peft.__version__))]
    if needed:
        raise BaseMismatch(_describe_unknown(adapter, needed))
    lost = describe_lost(fields.get("init_lora_weights", True))
    if lost:
        raise BaseMismatch(f"{adapter.title}: {lost}")
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
        return made, tuple(shown(key) for key in unknown)
    raise BaseMismatch(f"PEFT cannot use the configuration of {adapter.title}: {text}")


def _is_needed(key: str, adapter: StoredAdapter, installed: Version) -> bool:
    """Whether dropping an unknown field may change the computation."""
    if key in _REMOVED:
        return True
    writer = _parse_version(adapter.config.peft_version)
    if writer is None or writer <= installed:
        # The PEFT release that wrote the file did not know the field either: another trainer added it.
        return False
    manifest = adapter.manifest
    # A manifest lists only fields with non-default values in the PEFT release that wrote them.
    return manifest is None or manifest.peft_version != adapter.config.peft_version or key in manifest.config


def _parse_version(text: str | None) -> Version | None:
    try:
        return Version(text.partition("@")[0]) if text else None
    except InvalidVersion:
        return None


def _describe_unknown(adapter: StoredAdapter, unknown: list[str]) -> str:
    import peft

    fields = adapter.config.fields
    told = ", ".join(f"{key}={fields[key]!r}" for key in unknown)
    cure = "Update PEFT: pip install -U peft"
    if any(key in _REMOVED for key in unknown):
        cure = "No release of PEFT since 0.3 knows them: convert the adapter first"
    return (
        f"{adapter.title} was saved by PEFT {adapter.config.peft_version or 'of another release'} with {told}, which "
        f"PEFT {peft.__version__} does not know and would ignore. {cure}"
    )


def describe_lost(init: object) -> str | None:
    """Return why an adapter with this ``init_lora_weights`` cannot be loaded; ``None`` if it can."""
    name = init.lower() if isinstance(init, str) else init
    if name in _PLAIN or name in _REPEATED:
        return None
    return (
        f"it was initialised with {init!r}, which changes the base's weights in a way that cannot be repeated when the "
        "adapter is loaded. Publish it again from the model that was trained: push_adapter makes a plain LoRA of it"
    )

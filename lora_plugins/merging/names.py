"""Find the module that a tensor of an adapter's file belongs to."""

from __future__ import annotations

import re

__all__ = ["base_name", "is_replaced", "place_of"]


#: What PEFT inserts between the name of a module and the name of an adapter's tensor.
_ADAPTER_PART = re.compile(r"\.(lora_|token_adapter\b|trainable_tokens_|modules_to_save\b|original_module\b)")


def base_name(name: str) -> str:
    """Return the name in the base model of a tensor that is saved in full.

    ``base_model.model.score.modules_to_save.weight`` is ``score.weight``, and so is
    ``base_model.model.score.token_adapter.base_layer.weight``.
    """
    return _strip_wrappers(name).replace(".modules_to_save.", ".").replace(".token_adapter.", ".")


def is_replaced(name: str) -> bool:
    """Whether a tensor is the unused original of a module that is saved in full."""
    return ".original_module." in name


def place_of(name: str) -> str:
    """Return the path in the base model of the module that a tensor of an adapter's file belongs to.

    ``base_model.model.h.0.q_proj.lora_A.weight`` belongs to ``h.0.q_proj``, ``base_model.model.score.weight`` to
    ``score``.
    """
    plain = _strip_wrappers(name)
    part = _ADAPTER_PART.search(plain)
    return plain[: part.start()] if part else plain.rpartition(".")[0]


def _strip_wrappers(name: str) -> str:
    return name.removeprefix("base_model.model.").replace(".base_layer", "")

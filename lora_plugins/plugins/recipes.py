"""Recipes: LoRA fields that are known together by one word."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from lora_plugins.errors import UnknownArgument
from lora_plugins.text import did_you_mean

__all__ = ["RECIPES", "read_recipe"]


#: Name -> fields of ``peft.LoraConfig``. They stay what they are when defaults change.
RECIPES: Mapping[str, Mapping[str, Any]] = MappingProxyType(
    {
        # BLOOMZ-7B1 in int8 on one A10G: 3,932,160 of 7,072,948,224 weights.
        "bloomz-2023": MappingProxyType(
            {"r": 8, "lora_alpha": 32, "lora_dropout": 0.05, "target_modules": ("query_key_value",)}
        ),
    }
)


def read_recipe(name: str) -> dict[str, Any]:
    """Return the fields of a recipe.

    Raises:
        UnknownArgument: There is no such recipe.
    """
    if not isinstance(name, str) or name not in RECIPES:
        hint = did_you_mean(str(name), RECIPES)
        raise UnknownArgument(f"recipe={name!r} is not known.{hint} Known: {', '.join(RECIPES)}.")
    return {field: list(value) if isinstance(value, tuple) else value for field, value in RECIPES[name].items()}

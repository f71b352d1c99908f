"""Check the arguments of LoraCallback, attach and prepare_model."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

import peft
import torch
from peft import LoraConfig

from lora_plugins.errors import PreparationError, UnknownArgument
from lora_plugins.plugins.recipes import read_recipe
from lora_plugins.quantization.request import Quantization, parse_quantization
from lora_plugins.text import suggest_arguments

__all__ = ["DEFAULTS", "LoraSettings"]


#: The recipe's values, used unless an argument or ``peft_config=`` sets them.
DEFAULTS: Mapping[str, Any] = {"r": 8, "lora_alpha": 32, "lora_dropout": 0.05}


@dataclass(frozen=True)
class LoraSettings:
    """The requested settings, checked without a model.

    Attributes:
        lora: The fields of ``peft.LoraConfig`` that were passed explicitly or that the recipe gave.
        peft_config: A complete configuration, instead of ``lora``.
        adapter: An adapter folder or registry reference to continue from, instead of both.
        quantization: Backend and options, ``None`` for none.
        compute_dtype: Dtype of the frozen float weights, ``"auto"`` to decide by hardware.
        upcast: ``"none"``, ``"norms"`` or ``"all"``.
        adapter_name: Name of the adapter in the model.
        experts: Policy for routed experts, ``"default"`` for the architecture's own.
        strict: Whether problems with targets are errors (else warnings).
        trainable_dtype: Dtype of all trained tensors, ``None`` to keep the dtype in which each is created.
        fused: Whether LoRA layers compute their branch as one function during training.
        frozen: Names of newly initialized parts that are deliberately not trained.
        allow_format: Storage format of the base to train on although it is refused.
        recipe: Name of the recipe that gave fields of ``lora``, ``None`` for none.
        from_recipe: The fields of ``lora`` that it gave: those of the recipe that were not passed.
    """

    lora: Mapping[str, Any] = field(default_factory=dict)
    peft_config: peft.LoraConfig | None = None
    adapter: str | os.PathLike[str] | None = None
    quantization: Quantization | None = None
    compute_dtype: str | torch.dtype = "auto"
    upcast: str = "none"
    adapter_name: str = "default"
    experts: str = "default"
    strict: bool = True
    trainable_dtype: str | torch.dtype | None = "float32"
    fused: bool = True
    frozen: Sequence[str] = ()
    allow_format: str | None = None
    recipe: str | None = None
    from_recipe: tuple[str, ...] = field(default_factory=tuple)

    @classmethod
    def from_arguments(cls, **arguments: Any) -> LoraSettings:
        """Separate our keyword arguments from the fields of ``peft.LoraConfig``, and check them.

        Args:
            **arguments: Of both kinds, and ``recipe``, whose fields are taken where none is passed.

        Raises:
            UnknownArgument: A keyword is neither; the message suggests similar names. Or the recipe is not known.
            PreparationError: Two sources for the adapter's configuration were given.
        """
        recipe = arguments.pop("recipe", None)
        found: dict[str, Any] = {}
        if recipe is not None:
            _check_recipe(recipe, arguments)
            found = {name: value for name, value in read_recipe(recipe).items() if name not in arguments}
            arguments = {**found, **arguments, "recipe": recipe}
        ours = {item.name for item in fields(cls)} - {"lora", "from_recipe"}
        own = {key: value for key, value in arguments.items() if key in ours}
        lora = {key: value for key, value in arguments.items() if key not in ours}
        _check_fields(lora, ours)
        own["quantization"] = parse_quantization(own.get("quantization"))
        settings = cls(lora=lora, from_recipe=tuple(found), **own)
        settings._check_sources()
        return settings

    def asked(self, stored: LoraConfig | None = None) -> dict[str, Any]:
        """Return the fields of ``peft.LoraConfig`` that were passed, one by one or in a configuration.

        Args:
            stored: Configuration of the adapter to continue from.
        """
        source = stored or self.peft_config
        if source is None:
            return dict(self.lora)
        asked = {item.name: getattr(source, item.name) for item in fields(LoraConfig) if item.init}
        # The user's own LoRA layers, by the class they adapt: PEFT 0.21.2 keeps them beside its fields.
        own = getattr(source, "_custom_modules", None)
        return {**asked, "_custom_modules": own} if own else asked

    def _check_sources(self) -> None:
        given = [
            name
            for name, value in (
                ("peft_config", self.peft_config),
                ("adapter", self.adapter),
                (_join_names(self.lora), self.lora),
            )
            if value
        ]
        if len(given) > 1:
            raise PreparationError(
                f"{' and '.join(given)} were given together and each configures the adapter; leave all but one out."
            )
        if self.peft_config is not None:
            _check_lora_config(self.peft_config)
        if isinstance(self.frozen, str):
            raise UnknownArgument(f"frozen must be a list of names; write frozen=[{self.frozen!r}]")
        if self.allow_format is not None and not isinstance(self.allow_format, str):
            raise UnknownArgument(f"allow_format must be the name of one storage format, not {self.allow_format!r}")
        name = self.adapter_name
        if not isinstance(name, str) or not name or "." in name or "/" in name:
            raise PreparationError(f"adapter_name must be a non-empty string without '.' and '/', not {name!r}")
        if name in "lora_":
            raise PreparationError(f"adapter_name {name!r} is part of PEFT's weight prefix 'lora_'; choose another")


def _check_recipe(recipe: str, arguments: Mapping[str, Any]) -> None:
    other = next((name for name in ("peft_config", "adapter") if arguments.get(name) is not None), None)
    if other is not None:
        raise PreparationError(
            f"recipe={recipe!r} and {other} were given together and each configures the adapter; leave one out."
        )


def _join_names(lora: Mapping[str, Any]) -> str:
    return ", ".join(lora)


def _check_fields(lora: Mapping[str, Any], ours: set[str]) -> None:
    known = {item.name for item in fields(LoraConfig)}
    for name in lora:
        if name in known:
            continue
        near = suggest_arguments(name, sorted(known | ours))
        meant = [f"{argument}={value!r}" if value else repr(argument) for argument, value in near]
        hint = f" Did you mean {' or '.join(meant)}?" if meant else ""
        raise UnknownArgument(f"{name!r} is neither an argument of lora_plugins nor a field of peft.LoraConfig.{hint}")


def _check_lora_config(config: Any) -> None:
    if type(config) is not LoraConfig:
        raise PreparationError(
            f"peft_config must be a peft.LoraConfig, not a {type(config).__name__}. "
            "For other PEFT methods wrap the model with get_peft_model() and add Int8PreparationCallback."
        )

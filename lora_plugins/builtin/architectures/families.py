"""One record for each model type of a family that shares its names."""

from __future__ import annotations

from typing import Any

from lora_plugins import Architecture

__all__ = ["EXPERTS", "FC", "GATED", "MAMBA_RAW", "QKVO", "QKV_OUT", "QV", "family", "single"]


QV = ("q_proj", "v_proj")
QKVO = ("q_proj", "k_proj", "v_proj", "o_proj")
QKV_OUT = ("q_proj", "k_proj", "v_proj", "out_proj")
GATED = ("gate_proj", "up_proj", "down_proj")
FC = ("fc1", "fc2")

#: Stacked weights of routed experts, as most mixture-of-experts models store them.
EXPERTS = ("experts.gate_up_proj", "experts.down_proj")

#: Layers of a Mamba mixer whose weight is read without a call: by its code (``dt_proj``) or by the fused kernel.
MAMBA_RAW = ("out_proj", "x_proj", "dt_proj")


def family(
    model_types: str, targets: tuple[str, ...], attention: tuple[str, ...], mlp: tuple[str, ...] = (), **fields: Any
) -> list[Architecture]:
    """Return the records of model types that share their module names.

    Args:
        model_types: The types, separated by white space.
        targets: Names that get adapters by default.
        attention: Names of the scope ``"attention"``.
        mlp: Names of the scope ``"mlp"``; the scope is left out when empty.
        **fields: Further fields of the record.
    """
    scopes = {"attention": attention, **({"mlp": mlp} if mlp else {}), **fields.pop("scopes", {})}
    return [Architecture(model_type, targets, scopes, **fields) for model_type in model_types.split()]


def single(model_types: str, targets: tuple[str, ...], **fields: Any) -> list[Architecture]:
    """Return records without scopes of their own: the model's structure tells attention from the rest."""
    return [Architecture(model_type, targets, **fields) for model_type in model_types.split()]

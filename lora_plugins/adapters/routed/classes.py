"""Compute the experts of one module, by the interface or by its class."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from lora_plugins.adapters.routed.function import ExpertAdapter, Experts, Projection, compute_experts
from lora_plugins.models.experts import is_transposed, list_stacks

__all__ = ["forward", "run_experts"]


Adapters = Mapping[str, tuple[ExpertAdapter, ...]]


@torch.compiler.disable  # type: ignore[untyped-decorator]
def run_experts(
    module: Any,
    hidden_states: torch.Tensor,
    top_k_index: torch.Tensor,
    top_k_weights: torch.Tensor,
    adapters: Adapters | None = None,
) -> torch.Tensor:
    """Compute routed experts: an experts function of transformers.

    Args:
        module: The experts of one block.
        hidden_states: Shape ``[tokens, hidden]``.
        top_k_index: Experts of each token, shape ``[tokens, k]``.
        top_k_weights: Their weights, shape ``[tokens, k]``.
        adapters: Adapters by name of the stack.

    Returns:
        Shape ``[tokens, hidden]``.
    """
    experts = _read_experts(module, hidden_states.device.type, adapters or {})
    return compute_experts(experts, hidden_states, top_k_index, top_k_weights)


def _read_experts(module: Any, device: str, adapters: Adapters) -> Experts:
    up, down = (_read_projection(module, name, adapters) for name in list_stacks(module))
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else up.stack.dtype
    norm = module.post_expert_norm if getattr(module, "has_post_expert_norm", False) else None
    return Experts(up, down, _find_gate(module), norm, dtype)


def _find_gate(module: Any) -> Any:
    if not getattr(module, "has_gate", True):
        return module.act_fn
    own = getattr(module, "_apply_gate", None)
    if own is not None:
        return own

    def gate(values: torch.Tensor) -> torch.Tensor:
        first, second = values.chunk(2, dim=-1)
        gated: torch.Tensor = module.act_fn(first) * second
        return gated

    return gate


def _read_projection(module: Any, name: str, adapters: Adapters) -> Projection:
    bias = getattr(module, name + "_bias") if getattr(module, "has_bias", False) else None
    return Projection(getattr(module, name), bias, is_transposed(module), adapters.get(name, ()))


# A bound method is pickled as its object and its name, so this function needs the name of the method it replaces.
def forward(module: Any, hidden_states: torch.Tensor, *args: Any, adapters: Adapters | None = None) -> torch.Tensor:
    """Compute the experts of a class that does not use transformers' interface.

    Args:
        module: The experts, of a class that `has_known_forward`.
        hidden_states: Shape ``[tokens, hidden]``; for Llama 4 ``[experts * tokens, hidden]``, already weighted.
        *args: Index and weights of the routing, each of shape ``[tokens, k]``; none for Llama 4.
        adapters: Adapters by name of the stack.

    Returns:
        In the shape of ``hidden_states``.
    """
    if not args:
        return _run_by_position(module, hidden_states, adapters)
    index, weights = args
    output: torch.Tensor = run_experts(module, hidden_states, index, weights, adapters)
    zeros = getattr(module, "zero_expert_num", 0)
    if zeros:
        # LongCat's last experts give back their input.
        passed = (weights * (index >= module.num_routed_experts)).sum(-1, keepdim=True)
        output = output + (hidden_states * passed).to(output.dtype)
    return output


def _run_by_position(module: Any, x: torch.Tensor, adapters: Adapters | None) -> torch.Tensor:
    """Compute Llama 4's experts: each gets all tokens, times zero where a token was not routed to it.

    Its experts have no bias, so a row of zeros gives zeros and no gradient: it is routed nowhere.
    """
    count = module.gate_up_proj.shape[0]
    rows = x.view(-1, x.shape[-1])
    index = torch.arange(count, device=x.device).repeat_interleave(rows.shape[0] // count)
    index = torch.where(rows.detach().any(-1), index, count)[:, None]
    output: torch.Tensor = run_experts(module, rows, index, torch.ones_like(index, dtype=rows.dtype), adapters)
    return output

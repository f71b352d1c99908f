"""Compute routed experts one at a time, adapters included.

Only experts that were hit are computed. A quantized expert is dequantized when its turn comes, in the forward pass and
again in the backward pass; between the two only the first projection's output is kept. Adapters work on the activations
of the tokens that were routed to an expert, ``x A^T B^T``, and never as a change of the stacked weight.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.autograd.function import once_differentiable

from lora_plugins.adapters.fused import draw_mask
from lora_plugins.quantization.stacks import QuantizedStack

__all__ = ["ExpertAdapter", "Experts", "Projection", "Routing", "compute_experts", "route"]


@dataclass(frozen=True)
class ExpertAdapter:
    """One adapter on one stack, in the layout of PEFT's ``ParamWrapper``.

    Attributes:
        a: Shape ``[experts * rank, in]``; the rows of an expert follow each other.
        b: Shape ``[out, rank * experts]``; column ``j * experts + e`` belongs to expert ``e``.
        scaling: Factor of the branch.
        rate: Probability that a value of the input is dropped, 0 outside of training.
        swapped: Whether the roles of A and B are exchanged: PEFT takes the axes of a stack ``[experts, in, out]`` for
            out and in where the module does not say that it is transposed. Then ``a`` is ``[experts * rank, out]`` and
            ``b`` is ``[in, rank * experts]``.
    """

    a: torch.Tensor
    b: torch.Tensor
    scaling: float
    rate: float = 0.0
    swapped: bool = False


@dataclass(frozen=True)
class Projection:
    """One stacked projection.

    Attributes:
        stack: Float or quantized weights, ``[experts, out, in]``, or ``[experts, in, out]`` if ``transposed``.
        bias: Shape ``[experts, out]``, or ``None``.
        transposed: Whether the last two axes of the stack are in and out.
        adapters: Adapters whose branches are added.
    """

    stack: torch.Tensor
    bias: torch.Tensor | None = None
    transposed: bool = False
    adapters: tuple[ExpertAdapter, ...] = ()

    def weight(self, expert: int, dtype: torch.dtype) -> torch.Tensor:
        """Return the weight of one expert, shape ``[out, in]``; a view if the stack is in float."""
        if isinstance(self.stack, QuantizedStack):
            return self.stack.read_expert(expert, dtype)
        one = self.stack[expert].to(dtype)
        return one.T if self.transposed else one


@dataclass(frozen=True)
class Experts:
    """What the experts of one block compute: ``norm(down(gate(up(x))))``.

    Attributes:
        up: First projection; its output holds gate and up values where the experts are gated.
        down: Second projection.
        gate: From the first projection's output to the second one's input; without trained weights.
        norm: Normalization of each expert's output, or ``None``.
        dtype: Dtype in which the base weights are multiplied.
    """

    up: Projection
    down: Projection
    gate: Callable[[torch.Tensor], torch.Tensor]
    norm: Callable[[torch.Tensor], torch.Tensor] | None
    dtype: torch.dtype


@dataclass(frozen=True)
class Routing:
    """Which tokens go to which expert.

    Attributes:
        order: Indices into the flattened routing table, sorted by expert, shape ``[pairs]``.
        tokens: Row of the token of each pair, in that order.
        slices: ``(expert, start, end)`` of each expert that was hit.
        pairs: Number of pairs that go to an expert.
    """

    order: torch.Tensor
    tokens: torch.Tensor
    slices: list[tuple[int, int, int]]
    pairs: int


def route(index: torch.Tensor, experts: int) -> Routing:
    """Sort the pairs of token and expert by expert.

    Args:
        index: Experts of each token, shape ``[tokens, k]``; a number from ``experts`` on is routed nowhere.
        experts: Number of experts.
    """
    flat = index.reshape(-1)
    order = torch.argsort(flat, stable=True)
    if flat.is_meta:
        # As `plan` states it: every expert is hit, by equally many tokens. Each holds the same bytes, so two will do.
        counts = [-(-flat.numel() // min(experts, flat.numel()))] * 2
    else:
        counts = torch.bincount(flat, minlength=experts)[:experts].tolist()
    slices, start = [], 0
    for expert, count in enumerate(counts):
        if count:
            slices.append((expert, start, start + count))
        start += count
    return Routing(order, order // index.shape[-1], slices, flat.numel() if flat.is_meta else start)


def compute_experts(experts: Experts, x: torch.Tensor, index: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """Return the weighted sum of the experts' outputs for each token.

    Args:
        experts: The experts, all of their weights frozen.
        x: Shape ``[tokens, hidden]``.
        index: Experts of each token, shape ``[tokens, k]``.
        weights: Their weights, shape ``[tokens, k]``.

    Returns:
        Shape ``[tokens, hidden]``, in the dtype of ``x``.
    """
    routing = route(index, min(_count(experts.up), _count(experts.down)))
    tensors = [tensor for one in _list_adapters(experts) for tensor in (one.a, one.b)]
    function: Any = _ExpertsFunction.apply
    with _disable_autocast(x.device.type):
        return function(experts, routing, x, weights, *tensors)


def _list_adapters(experts: Experts) -> tuple[ExpertAdapter, ...]:
    return (*experts.up.adapters, *experts.down.adapters)


@dataclass
class _Branch:
    """One adapter during a pass, with its tensors by expert.

    Attributes:
        a: Shape ``[experts, rank, in]``.
        b: Shape ``[experts, out, rank]``.
        factor: Scaling, divided by the probability that an input value is kept.
        mask: Which input values are kept, by row of the input, or ``None`` for all.
        inner: Output of A for each pair, shape ``[pairs, rank]``.
        by_token: Whether a row of the mask belongs to a token (else to a pair).
    """

    a: torch.Tensor
    b: torch.Tensor
    factor: float
    mask: torch.Tensor | None
    inner: torch.Tensor
    by_token: bool
    of_a: torch.Tensor | None = field(default=None)
    of_b: torch.Tensor | None = field(default=None)

    def drop(self, values: torch.Tensor, rows: Any) -> torch.Tensor:
        """Return values in the branch's dtype, with dropped ones set to zero."""
        values = values.to(self.a.dtype)
        return values if self.mask is None else self.mask.view(torch.uint8)[rows].to(self.a.dtype).mul_(values)

    def add_output(
        self, output: torch.Tensor, values: torch.Tensor, expert: int, pairs: slice, rows: Any, keep: bool
    ) -> None:
        """Add the branch to an expert's output, and keep the output of A, in the forward pass."""
        inner = self.drop(values, rows) @ self.a[expert].T
        if keep:
            self.inner[pairs] = inner
        output += (inner @ self.b[expert].T).mul_(self.factor)

    def run_backward(
        self,
        gradient: torch.Tensor,
        scale: torch.Tensor | None,
        values: torch.Tensor,
        expert: int,
        pairs: slice,
        rows: Any,
    ) -> torch.Tensor:
        """Add to the gradients of A and B; return what the branch adds to the gradient of its input, unscaled.

        Args:
            gradient: Of the branch's output, shape ``[pairs of the expert, out]``.
            scale: What ``gradient`` lacks for each pair, shape ``[pairs of the expert, 1]``.
            values: Input of the branch.
            expert: Number of the expert.
            pairs: Its pairs.
            rows: Rows of the mask.
        """
        gradient = gradient.to(self.a.dtype)
        of_inner = (gradient @ self.b[expert]).mul_(self.factor)
        scaled = of_inner if scale is None else of_inner * scale.to(of_inner.dtype)
        if self.of_a is not None:
            self.of_a[expert] = scaled.T @ self.drop(values, rows)
        if self.of_b is not None:
            inner = self.inner[pairs] if scale is None else self.inner[pairs] * scale.to(of_inner.dtype)
            self.of_b[expert] = (gradient.T @ inner).mul_(self.factor)
        return self.drop(of_inner @ self.a[expert], rows)


class _ExpertsFunction(torch.autograd.Function):
    """``compute_experts`` with a backward pass that keeps no weight."""

    @staticmethod
    def forward(
        ctx: Any, experts: Experts, routing: Routing, x: torch.Tensor, weights: torch.Tensor, *tensors: torch.Tensor
    ) -> torch.Tensor:
        pairs = routing.pairs
        masks, kept = _draw_masks(experts, x, pairs)
        inners = [_make_inner(x, pairs, one, experts) for one in _list_adapters(experts)]
        up, down = _make_branches(experts, tensors, masks, kept, inners)
        middle = x.new_empty(pairs, _out_features(experts.up), dtype=experts.dtype)
        total = torch.zeros(x.shape, dtype=torch.promote_types(experts.dtype, torch.float32), device=x.device)
        flat = weights.reshape(-1)[routing.order].to(total.dtype)
        for expert, start, end in routing.slices:
            span = slice(start, end)
            rows = routing.tokens[span]
            first = _project(experts, experts.up, up, x[rows], expert, span, rows)
            middle[span] = first
            output = _project(experts, experts.down, down, experts.gate(first), expert, span, rows)
            if experts.norm is not None:
                output = experts.norm(output)
            total.index_add_(0, rows, output.to(total.dtype).mul_(flat[span, None]))
        ctx.save_for_backward(x, weights, middle, routing.order, routing.tokens, *tensors, *inners, *_present(masks))
        ctx.experts, ctx.slices, ctx.has_mask = experts, routing.slices, [mask is not None for mask in masks]
        ctx.kept = kept
        return total.to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        experts: Experts = ctx.experts
        # Once only: gradient checkpointing gives its tensors out a single time.
        saved = ctx.saved_tensors
        x, rest = saved[0], saved[5:]
        count = len(ctx.kept)
        left = iter(rest[3 * count :])
        masks = [next(left) if has else None for has in ctx.has_mask]
        up, down = _make_branches(experts, rest[: 2 * count], masks, ctx.kept, rest[2 * count : 3 * count])
        _make_gradients(experts, [*up, *down], ctx.needs_input_grad[4:])
        with _disable_autocast(x.device.type):
            of_x, of_weights = _run_backward(ctx, saved, (up, down), gradient)
        return (
            None,
            None,
            of_x,
            of_weights if ctx.needs_input_grad[3] else None,
            *_collect_gradients(experts, [*up, *down], rest[: 2 * count]),
        )


def _run_backward(
    ctx: Any, saved: Any, branches: tuple[list[_Branch], list[_Branch]], gradient: torch.Tensor
) -> tuple[torch.Tensor | None, torch.Tensor]:
    """Return the gradients of the tokens and of the routing weights; add to those of the adapters."""
    x, weights, middle, order, tokens = saved[:5]
    experts: Experts = ctx.experts
    exact = torch.promote_types(experts.dtype, torch.float32)
    flat = weights.reshape(-1)[order].to(exact)
    of_flat = torch.zeros_like(flat)
    of_x = torch.zeros(x.shape, dtype=exact, device=x.device) if ctx.needs_input_grad[2] else None
    for expert, start, end in ctx.slices:
        span = slice(start, end)
        rows = tokens[span]
        scale = flat[span, None]
        with torch.enable_grad():
            first = middle[span].detach().requires_grad_()
            second = experts.gate(first)
        inside = second.detach()
        upstream = gradient[rows].to(exact)
        if experts.norm is None:
            of_inside, of_flat[span] = _step_back(experts, branches[1], upstream, scale, inside, expert, span, rows)
        else:
            of_output, of_flat[span] = _step_back_norm(
                experts, branches[1], upstream, scale, inside, expert, span, rows
            )
            of_inside, _ = _step_back(experts, branches[1], of_output, None, inside, expert, span, rows)
        (of_first,) = torch.autograd.grad(second, first, of_inside.to(second.dtype))
        of_tokens = _step_back_input(experts, branches[0], of_first, x[rows], expert, span, rows, of_x is not None)
        if of_x is not None:
            of_x.index_add_(0, rows, of_tokens.to(exact))
    of_weights = torch.zeros_like(weights.reshape(-1), dtype=exact)
    of_weights[order] = of_flat
    return None if of_x is None else of_x.to(x.dtype), of_weights.view(weights.shape).to(weights.dtype)


def _step_back(
    experts: Experts,
    branches: list[_Branch],
    upstream: torch.Tensor,
    scale: torch.Tensor | None,
    inside: torch.Tensor,
    expert: int,
    span: slice,
    rows: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Go back through the second projection; return the gradients of its input and of the routing weights.

    The output is linear in its input, so ``<gradient, output> = <gradient of the input, input>``: the output is not
    needed for the gradient of the routing weights.
    """
    low = upstream.to(experts.dtype)
    of_inside = (low @ experts.down.weight(expert, experts.dtype)).to(upstream.dtype)
    for branch in branches:
        of_inside += branch.run_backward(upstream, scale, inside, expert, span, span)
    of_weights = (of_inside * inside).sum(-1)
    if experts.down.bias is not None:
        of_weights += upstream @ experts.down.bias[expert].to(upstream.dtype)
    return of_inside if scale is None else of_inside * scale, of_weights


def _step_back_norm(
    experts: Experts,
    branches: list[_Branch],
    upstream: torch.Tensor,
    scale: torch.Tensor,
    inside: torch.Tensor,
    expert: int,
    span: slice,
    rows: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Go back through the norm after an expert; return the gradients of its input and of the routing weights."""
    output = _project(experts, experts.down, branches, inside, expert, span, rows, keep=False)
    with torch.enable_grad():
        norm: Any = experts.norm
        normed = norm(output.requires_grad_())
    (of_output,) = torch.autograd.grad(normed, output, (upstream * scale).to(normed.dtype))
    return of_output.to(upstream.dtype), (normed.detach() * upstream).sum(-1)


def _step_back_input(
    experts: Experts,
    branches: list[_Branch],
    of_first: torch.Tensor,
    values: torch.Tensor,
    expert: int,
    span: slice,
    rows: torch.Tensor,
    wanted: bool,
) -> torch.Tensor:
    """Go back through the first projection; return the gradient of its input if wanted."""
    parts = [branch.run_backward(of_first, None, values, expert, span, rows) for branch in branches]
    if not wanted:
        return of_first
    of_values = of_first @ experts.up.weight(expert, experts.dtype)
    for part in parts:
        of_values += part
    return of_values


def _project(
    experts: Experts,
    projection: Projection,
    branches: list[_Branch],
    values: torch.Tensor,
    expert: int,
    span: slice,
    rows: torch.Tensor,
    keep: bool = True,
) -> torch.Tensor:
    """Return the output of one projection of one expert."""
    output = values.to(experts.dtype) @ projection.weight(expert, experts.dtype).T
    if projection.bias is not None:
        output += projection.bias[expert].to(output.dtype)
    for branch in branches:
        branch.add_output(output, values, expert, span, rows if branch.by_token else span, keep)
    return output


def _count(projection: Projection) -> int:
    return int(projection.stack.shape[0])


def _out_features(projection: Projection) -> int:
    return int(projection.stack.shape[2 if projection.transposed else 1])


def _in_features(projection: Projection) -> int:
    return int(projection.stack.shape[1 if projection.transposed else 2])


def _draw_masks(experts: Experts, x: torch.Tensor, pairs: int) -> tuple[list[torch.Tensor | None], list[float]]:
    """Draw the dropout masks: by token for the first projection, by pair for the second.

    Returns:
        The mask of each adapter, ``None`` without dropout, and the exact probability that a value stays.
    """
    # Only the shape of what is masked counts, so no memory is taken for it.
    inside = x.new_ones(()).expand(pairs, _in_features(experts.down))
    asked = [(x, one) for one in experts.up.adapters] + [(inside, one) for one in experts.down.adapters]
    drawn = [draw_mask(like, one.rate, one.a.dtype) if one.rate and pairs else (None, 1.0) for like, one in asked]
    return [mask for mask, _ in drawn], [kept for _, kept in drawn]


def _make_inner(x: torch.Tensor, pairs: int, adapter: ExpertAdapter, experts: Experts) -> torch.Tensor:
    count = _count(experts.up if any(adapter is one for one in experts.up.adapters) else experts.down)
    return x.new_empty(pairs, adapter.a.shape[0] // count, dtype=adapter.a.dtype)


def _present(masks: list[torch.Tensor | None]) -> Iterator[torch.Tensor]:
    return (mask for mask in masks if mask is not None)


def _make_branches(
    experts: Experts, tensors: Any, masks: list[torch.Tensor | None], kept: list[float], inners: Any
) -> tuple[list[_Branch], list[_Branch]]:
    """Return the branches of the first and of the second projection."""
    found = []
    middle = len(experts.up.adapters)
    for number, one in enumerate(_list_adapters(experts)):
        count = _count(experts.up if number < middle else experts.down)
        a, b = _split(tensors[2 * number], tensors[2 * number + 1], count, one.swapped)
        factor = one.scaling / kept[number]
        found.append(_Branch(a, b, factor, masks[number], inners[number], number < middle))
    return found[:middle], found[middle:]


def _split(a: torch.Tensor, b: torch.Tensor, count: int, swapped: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Return A as ``[experts, rank, in]`` and B as ``[experts, out, rank]``."""
    first = a.reshape(count, -1, a.shape[-1])
    second = b.reshape(b.shape[0], -1, count)
    if swapped:
        return second.permute(2, 1, 0).contiguous(), first.transpose(1, 2).contiguous()
    return first, second.permute(2, 0, 1).contiguous()


def _join(of_a: torch.Tensor | None, of_b: torch.Tensor | None, like: tuple[Any, Any], swapped: bool) -> Any:
    """Undo `_split` for the gradients of A and B."""
    if swapped:
        of_a, of_b = (None if one is None else one.transpose(1, 2) for one in (of_b, of_a))
    first = None if of_a is None else of_a.reshape(like[0].shape)
    second = None if of_b is None else of_b.permute(1, 2, 0).reshape(like[1].shape)
    return first, second


def _make_gradients(experts: Experts, branches: list[_Branch], wanted: Any) -> None:
    for number, (branch, one) in enumerate(zip(branches, _list_adapters(experts), strict=True)):
        for_a, for_b = wanted[2 * number : 2 * number + 2]
        if one.swapped:
            for_a, for_b = for_b, for_a
        branch.of_a = torch.zeros_like(branch.a) if for_a else None
        branch.of_b = torch.zeros_like(branch.b) if for_b else None


def _collect_gradients(experts: Experts, branches: list[_Branch], tensors: Any) -> list[torch.Tensor | None]:
    """Return the gradients of A and B of each branch, in the layout of the tensors."""
    found: list[torch.Tensor | None] = []
    for number, (branch, one) in enumerate(zip(branches, _list_adapters(experts), strict=True)):
        found += _join(branch.of_a, branch.of_b, (tensors[2 * number], tensors[2 * number + 1]), one.swapped)
    return found


def _disable_autocast(device: str) -> contextlib.AbstractContextManager[Any]:
    return torch.autocast(device, enabled=False) if torch.is_autocast_enabled(device) else contextlib.nullcontext()

"""Count the bytes alive during a training step on the meta device."""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from lora_plugins.models.structure import Structure
from lora_plugins.models.wrapping import base_of
from lora_plugins.quantization.stacks import list_parts

__all__ = ["Block", "LiveBytes", "activation_bytes", "as_on_a_device", "removable_blocks", "shorten"]


#: Fewest blocks that a shortened stack keeps.
_FEWEST = 4


@dataclass(frozen=True)
class Block:
    """A block removed from a stack: the stack's path, and the index of a remaining block of the same kind."""

    stack: str
    twin: int


class _Autocast(torch.autocast):
    """``torch.autocast`` that treats the meta device, which torch 2.13 has no autocast for, as the CPU."""

    def __init__(self, device_type: str, *args: Any, **kwargs: Any) -> None:
        super().__init__("cpu" if device_type == "meta" else device_type, *args, **kwargs)


@contextlib.contextmanager
def as_on_a_device() -> Iterator[None]:
    """Make the meta device behave like a real one, by patching three functions of torch for the whole process.

    Tensors on other devices go to the original functions, in other threads too. Attention keeps its inputs and one
    number per query, as fused kernels do; torch 2.13 would otherwise choose the implementation that keeps the whole
    attention matrix. A dispatch mode cannot do this: none is active where checkpointing recomputes blocks.
    ``tests/test_canaries.py`` shows when torch no longer needs the patch.
    """
    original, autocast = nn.functional.scaled_dot_product_attention, torch.autocast
    enabled: Any = torch.is_autocast_enabled

    def attention(*args: Any, **kwargs: Any) -> torch.Tensor:
        output = _run_fused_kernel(*args, **kwargs)
        return original(*args, **kwargs) if output is None else output

    nn.functional.scaled_dot_product_attention = attention
    torch.autocast = _Autocast  # type: ignore[misc]
    torch.is_autocast_enabled = lambda *kind: kind != ("meta",) and enabled(*kind)
    try:
        yield
    finally:
        nn.functional.scaled_dot_product_attention = original
        torch.autocast = autocast  # type: ignore[misc]
        torch.is_autocast_enabled = enabled


def _run_fused_kernel(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> torch.Tensor | None:
    """Return the output of the fused attention kernel, ``None`` if it does not support the inputs."""
    if not query.is_meta or query.dim() != 4 or query.shape[-1] != value.shape[-1] or dropout_p:
        return None
    if attn_mask is not None:
        if attn_mask.requires_grad:
            return None
        attn_mask = attn_mask.to(query.dtype)
    kernel = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    output: torch.Tensor = kernel(query, key, value, 0.0, is_causal, attn_mask=attn_mask, scale=scale)[0]
    return output


def activation_bytes(model: Any, batch: dict[str, torch.Tensor], removed: list[Block]) -> int:
    """Return the peak bytes alive in a training step, besides weights, gradients and optimizer state.

    Args:
        model: A prepared model on the meta device, in training mode.
        batch: Its inputs, with labels.
        removed: Blocks removed from its stacks; each adds the bytes that its twin keeps until the backward pass.
    """
    live = LiveBytes(*batch.values())
    marks: dict[str, dict[int, int]] = {}
    hooks: list[Any] = [
        parameter.register_post_accumulate_grad_hook(lambda p: live.forget(p.grad))
        for parameter in model.parameters()
        if parameter.requires_grad
    ]
    for stack in {block.stack for block in removed}:
        hooks += _mark(base_of(model).get_submodule(stack), marks.setdefault(stack, {}), live)
    for tensor in [*model.parameters(), *model.buffers()]:
        live.forget(tensor)
    with as_on_a_device(), live, contextlib.ExitStack() as cleanup:
        for hook in hooks:
            cleanup.callback(hook.remove)
        loss = _compute_loss(model(**batch))
        recorded = {name: dict(found) for name, found in marks.items()}
        loss.backward()  # type: ignore[no-untyped-call]
        del loss
    model.zero_grad()
    return live.peak + sum(_count_kept(recorded, block) for block in removed)


def _mark(blocks: Any, marks: dict[int, int], live: LiveBytes) -> list[Any]:
    """Record the live bytes at the first entry into each block; return the hooks."""

    def note(number: int) -> Any:
        return lambda module, args: marks.setdefault(number, live.live) and None

    return [block.register_forward_pre_hook(note(number)) for number, block in enumerate(blocks)]


def _count_kept(marks: dict[str, dict[int, int]], block: Block) -> int:
    found = marks[block.stack]
    return found[block.twin + 1] - found[block.twin]


def _compute_loss(output: Any) -> torch.Tensor:
    loss = getattr(output, "loss", None)
    if isinstance(loss, torch.Tensor):
        return loss
    first = output.logits if getattr(output, "logits", None) is not None else output[0]
    total: torch.Tensor = (first[0] if isinstance(first, tuple) else first).float().mean()
    return total


def removable_blocks(structure: Structure) -> dict[str, tuple[int, list[int]]]:
    """Return, by stack, the number of blocks to keep and the index of the twin of each block to remove.

    A twin is a kept block of the same kind, neither the first nor the last one. A stack stays whole if that would
    remove less than half of it, or if its blocks are not the elements of one list.
    """
    found: dict[str, tuple[int, list[int]]] = {}
    stacks: dict[str, list[Any]] = {}
    for block in structure.blocks:
        stacks.setdefault(block.path.rpartition(".")[0], []).append(block)
    for stack, blocks in stacks.items():
        container = structure.modules.get(stack)
        if not isinstance(container, nn.ModuleList) or len(container) != len(blocks) or "*" in stack:
            continue
        kinds = [block.kind for block in blocks]
        kept = _find_prefix(kinds)
        if kept * 2 <= len(kinds):
            twins = {kind: number for number, kind in enumerate(kinds[: kept - 1])}
            found[stack] = (kept, [twins[kind] for kind in kinds[kept:]])
    return found


def _find_prefix(kinds: list[Any]) -> int:
    """Return the length of the shortest prefix of a stack with two blocks of each kind before its last block."""
    for kept in range(_FEWEST, len(kinds)):
        seen = kinds[: kept - 1]
        if all(seen.count(kind) >= min(2, kinds.count(kind)) for kind in set(kinds)):
            return kept
    return len(kinds)


def shorten(model: nn.Module, stacks: dict[str, tuple[int, list[int]]]) -> list[Block]:
    """Remove blocks from a model's stacks and return them."""
    removed = []
    for stack, (kept, twins) in stacks.items():
        container: Any = model.get_submodule(stack)
        for number in range(kept, kept + len(twins)):
            del container._modules[str(number)]
        removed += [Block(stack, twin) for twin in twins]
    return removed


class LiveBytes(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the tensor storages that are alive while the mode is active, each storage once.

    Meta tensors have no values: Python code that reads one gets ``True`` or 1, as from a batch without padding.

    Args:
        *existing: Tensors that exist from the start.

    Attributes:
        live: Bytes now.
        peak: Most bytes so far.
    """

    def __init__(self, *existing: torch.Tensor) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.live = 0
        self.peak = 0
        self._sizes: dict[int, int] = {}
        for tensor in existing:
            self.add(tensor)

    def add(self, tensor: torch.Tensor) -> None:
        """Count a tensor's storage until it is freed, unless it is counted already."""
        # The storage of a wrapper is as large as the shape that it shows and takes no memory: what it holds is counted.
        for part in list_parts(tensor):
            storage = part.untyped_storage()
            key = storage._cdata
            if key in self._sizes:
                continue
            size = self._sizes[key] = storage.nbytes()
            self.live += size
            self.peak = max(self.peak, self.live)
            weakref.finalize(storage, self._drop, key)

    def forget(self, tensor: torch.Tensor) -> None:
        """Stop counting a tensor's storage, or never start."""
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._sizes:
            self.live -= self._sizes[key]
        else:
            weakref.finalize(storage, self._drop, key)
        self._sizes[key] = 0

    def _drop(self, key: int) -> None:
        self.live -= self._sizes.pop(key, 0)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default and args[0].is_meta:
            return True if args[0].dtype == torch.bool else 1
        if func is torch.ops.aten.nonzero.default and args[0].is_meta:
            # As if every label counted and every flag were set.
            full = torch.empty(args[0].numel(), args[0].dim(), dtype=torch.long, device="meta")
            self.add(full)
            return full
        grouped = func is torch.ops.aten._grouped_mm.default and args[0].is_meta
        output: Any = (_grouped_mm if grouped else func)(*args, **(kwargs or {}))
        if isinstance(output, torch.Tensor):
            self.add(output)
        elif isinstance(output, (tuple, list)):
            for item in output:
                if isinstance(item, torch.Tensor):
                    self.add(item)
        return output


def _grouped_mm(first: torch.Tensor, second: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
    """Multiply the experts' matrices in bfloat16: torch 2.13 supports only that on the meta device."""
    half = torch.ops.aten._grouped_mm.default(first.to(torch.bfloat16), second.to(torch.bfloat16), *args, **kwargs)
    output: torch.Tensor = half.to(first.dtype)
    return output

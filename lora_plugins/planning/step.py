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

__all__ = ["Block", "LiveBytes", "activation_bytes", "as_on_a_device", "removable_blocks", "shorten"]


#: Blocks that a shortened stack keeps at least.
_FEWEST = 4


@dataclass(frozen=True)
class Block:
    """A block that was taken out of a stack: which stack, and the number of a block like it that stayed."""

    stack: str
    twin: int


class _Autocast(torch.autocast):
    """``torch.autocast`` that takes the meta device, for which it has no dtype, as the CPU."""

    def __init__(self, device_type: str, *args: Any, **kwargs: Any) -> None:
        super().__init__("cpu" if device_type == "meta" else device_type, *args, **kwargs)


@contextlib.contextmanager
def as_on_a_device() -> Iterator[None]:
    """Let the meta device do what devices do, by exchanging three functions of torch for the whole process.

    Tensors on other devices go to the functions that were there, in other threads too. Attention keeps its inputs and
    one number for each query, as fused kernels do; torch 2.13 would otherwise choose the way that keeps the whole
    matrix of weights. A dispatch mode cannot do this: none is active where checkpointing computes blocks again.
    ``tests/test_canaries.py`` says when torch can do it by itself.
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
    """The output of the fused kernel, ``None`` where there is none for such inputs."""
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
    """Return the most bytes alive at one time in a step, above weights, gradients and optimizer state.

    Args:
        model: A prepared model on the meta device, in training mode.
        batch: Its inputs, with labels.
        removed: Blocks that were taken out of its stacks; each adds what its twin keeps until the backward pass.
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
    """Note the live bytes at the first entry into each block."""

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
    """Return for each long stack how many blocks stay, and for each that goes the number of its twin.

    Stacks stay whole where a block's twin would be the first or last of those that stay, and where the blocks
    are not the elements of one list.
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
    """Length of the shortest start of a stack that shows each kind twice before its last block."""
    for kept in range(_FEWEST, len(kinds)):
        seen = kinds[: kept - 1]
        if all(seen.count(kind) >= min(2, kinds.count(kind)) for kind in set(kinds)):
            return kept
    return len(kinds)


def shorten(model: nn.Module, stacks: dict[str, tuple[int, list[int]]]) -> list[Block]:
    """Take blocks out of a model's stacks; returns them."""
    removed = []
    for stack, (kept, twins) in stacks.items():
        container: Any = model.get_submodule(stack)
        for number in range(kept, kept + len(twins)):
            del container._modules[str(number)]
        removed += [Block(stack, twin) for twin in twins]
    return removed


class LiveBytes(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts tensor storages as they come and go while the mode is active, each storage once.

    On the meta device a value that Python code asks for is answered with "true" or one: that is how a
    batch without padding answers, and a tensor without data has no other answer.

    Args:
        *existing: Tensors that are there from the start.

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
        """Count a tensor's storage from now until it is freed, unless it is counted already."""
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._sizes:
            return
        size = self._sizes[key] = storage.nbytes()
        self.live += size
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self._drop, key)

    def forget(self, tensor: torch.Tensor) -> None:
        """Take a tensor's storage out of the count, or leave it out from the start."""
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
            # Every label counts and every flag is set.
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
    """Products of experts, which torch 2.13 knows on the meta device for bfloat16 only."""
    half = torch.ops.aten._grouped_mm.default(first.to(torch.bfloat16), second.to(torch.bfloat16), *args, **kwargs)
    output: torch.Tensor = half.to(first.dtype)
    return output

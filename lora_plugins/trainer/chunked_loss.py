"""Compute the loss of a causal language model in pieces of its logits.

The logits of a whole batch are the largest tensors of a training step: rows times vocabulary, several times over in
float32. Only the loss needs them, and the loss is a sum over rows, so they can be made, used and dropped in pieces.
The loss and its gradient are those of transformers' ``ForCausalLMLoss`` up to rounding.
"""

from __future__ import annotations

import contextlib
import types
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_map
from transformers import PreTrainedModel, Trainer
from transformers.loss.loss_utils import ForCausalLMLoss

from lora_plugins.errors import UnsupportedTraining
from lora_plugins.models.wrapping import base_of

__all__ = [
    "FEWEST_ROWS",
    "PIECE",
    "TILE",
    "LazyLogits",
    "around_prediction_step",
    "around_training_step",
    "chunked_loss",
]


#: Logits that are held at once, in values: 32 MiB in float32. Larger pieces leave the CPU's cache.
PIECE = 1 << 23
#: Rows that are computed at a time however large the vocabulary is: fewer would read the head's weight too often.
FEWEST_ROWS = 64
#: Vocabulary entries in one float32 product on a CPU: PyTorch's BLAS is a third slower with all of them at once.
TILE = 2048


@contextlib.contextmanager
def chunked_loss(model: nn.Module) -> Iterator[bool]:
    """Let a causal language model compute its loss in pieces inside this context.

    Its output then has logits that are computed at the first touch. Models whose loss or head is not the
    plain one (trained, adapted, sharded, hooked, another loss function) are left as they are, and so is every
    model outside the context.

    Args:
        model: The model, wrapped by PEFT or not.

    Yields:
        Whether the loss will be computed in pieces.
    """
    base: Any = base_of(model)
    head: Any = _find_plain_head(base)
    if head is None:
        yield False
        return
    state = _Loss(head, base.loss_function)
    # PEFT 0.19 calls the base's forward() past its hooks.
    armed = [one.register_forward_pre_hook(state.arm, with_kwargs=True) for one in dict.fromkeys((model, base))]
    before = vars(base).get("_loss_function")
    base.loss_function = state
    head.forward = types.MethodType(state.logits, head)
    try:
        yield True
    finally:
        for hook in armed:
            hook.remove()
        del head.forward
        if before is None:
            del base._loss_function
        else:
            base._loss_function = before


def around_training_step(
    trainer: Trainer, callback: Any, step: Callable[..., Any], model: nn.Module, *args: Any, **kwargs: Any
) -> Any:
    """Train a step with the loss in pieces, unless the Trainer makes its own loss or needs the logits.

    A Trainer that makes its own loss (label smoothing, ``compute_loss_func``, an overridden ``compute_loss``), whose
    model is compiled, or whose weights are sharded over processes, is left as it is.
    """
    with _choose_loss(trainer, callback, True):
        return step(model, *args, **kwargs)


def around_prediction_step(
    trainer: Trainer,
    callback: Any,
    step: Callable[..., Any],
    model: nn.Module,
    inputs: Any,
    prediction_loss_only: bool,
    *args: Any,
    **kwargs: Any,
) -> Any:
    """Evaluate a batch with the loss in pieces if only the loss is kept."""
    with _choose_loss(trainer, callback, prediction_loss_only):
        return step(model, inputs, prediction_loss_only, *args, **kwargs)


def _choose_loss(trainer: Trainer, callback: Any, only_loss: bool) -> contextlib.AbstractContextManager[Any]:
    if callback.chunked_loss and only_loss and _uses_models_loss(trainer):
        return chunked_loss(trainer.model)
    return contextlib.nullcontext()


def _uses_models_loss(trainer: Trainer) -> bool:
    """Whether a Trainer takes nothing but the loss from the output of a whole, uncompiled model."""
    own = type(trainer).compute_loss is not Trainer.compute_loss or "compute_loss" in vars(trainer)
    if own or trainer.compute_loss_func is not None or trainer.label_smoother is not None:
        return False
    return not (trainer.args.torch_compile or trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled)


def _find_plain_head(base: Any) -> nn.Linear | None:
    """Return the output embedding of a model whose loss can be computed in pieces, else ``None``."""
    if not isinstance(base, PreTrainedModel) or base.loss_function is not ForCausalLMLoss:
        return None
    head = base.get_output_embeddings()
    if type(head) is not nn.Linear or "forward" in vars(head) or type(head.weight) is not nn.Parameter:
        return None
    if head._forward_hooks or head._forward_pre_hooks or head._backward_hooks or head._backward_pre_hooks:
        return None
    if any(p.requires_grad or hasattr(p, "ds_id") or not p.is_floating_point() for p in head.parameters()):
        return None
    return head


class _Loss:
    """Stands in for a model's head and loss function during one step."""

    def __init__(self, head: nn.Linear, plain: Any) -> None:
        self.head = head
        self.plain = plain
        self.armed = False

    def arm(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Note whether a forward pass will compute the loss itself."""
        self.armed = kwargs.get("labels") is not None and not torch.compiler.is_compiling()

    def logits(self, head: nn.Linear, hidden: torch.Tensor) -> Any:
        """Return the head's output: lazy logits where the loss will be computed from them."""
        return LazyLogits(head, hidden) if self.armed else type(head).forward(head, hidden)

    def __call__(
        self,
        logits: Any,
        labels: Any,
        vocab_size: int,
        num_items_in_batch: torch.Tensor | int | None = None,
        ignore_index: int = -100,
        shift_labels: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> torch.Tensor:
        """Compute the loss as ``ForCausalLMLoss`` does; the arguments are its own."""
        if not isinstance(logits, LazyLogits) or logits.made is not None or vocab_size != self.head.out_features:
            return self.plain(logits, labels, vocab_size, num_items_in_batch, ignore_index, shift_labels, **kwargs)
        if shift_labels is None:
            shift_labels = nn.functional.pad(labels, (0, 1), value=ignore_index)[..., 1:]
        rows = logits.hidden.reshape(-1, logits.hidden.shape[-1])
        targets = shift_labels.reshape(-1).to(rows.device)
        kept = (targets != ignore_index).nonzero().squeeze(1)
        if len(kept) < len(targets):
            rows, targets = rows[kept], targets[kept]
        items = torch.as_tensor(len(kept) if num_items_in_batch is None else num_items_in_batch, device=rows.device)
        loss: Any = _PiecewiseLoss.apply
        with torch.autocast(rows.device.type, enabled=False):
            return loss(rows, self.head.weight, self.head.bias, targets, items.reciprocal(), logits.compute_dtype)


class LazyLogits(torch.Tensor):
    """Logits that are computed at the first touch, with the gradient that they would have had.

    For all code but the loss they are an ordinary tensor: autograd knows them as the output of the head, and any
    operation that reads or writes their values computes them first.

    Attributes:
        hidden: Input of the head, shape ``[…, hidden]``.
        compute_dtype: Dtype of the product with the head's weight.
        made: The values, ``None`` before the first touch.
    """

    hidden: torch.Tensor
    compute_dtype: torch.dtype
    made: torch.Tensor | None
    _head: nn.Linear

    __torch_function__: Any = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, head: nn.Linear, hidden: torch.Tensor) -> LazyLogits:
        apply: Any = _Head.apply
        lazy: LazyLogits = apply(hidden, head)
        # Set inside the autograd function, it would be detached from its graph.
        lazy.hidden = hidden
        return lazy

    def __init__(self, head: nn.Linear, hidden: torch.Tensor) -> None:
        """Do nothing: ``__new__`` sets every attribute."""

    @classmethod
    def wrap(cls, head: nn.Linear, hidden: torch.Tensor) -> LazyLogits:
        """Make the tensor, unknown to autograd. Under autocast it is float32, as accelerate makes a model's output."""
        device = hidden.device.type
        autocast = torch.is_autocast_enabled(device)
        compute = torch.get_autocast_dtype(device) if autocast else hidden.dtype
        return cls._wrap(head, hidden, compute, torch.float32 if autocast else compute)

    @classmethod
    def _wrap(cls, head: nn.Linear, hidden: torch.Tensor, compute: torch.dtype, dtype: torch.dtype) -> LazyLogits:
        shape = (*hidden.shape[:-1], head.out_features)
        lazy: Any = torch.Tensor._make_wrapper_subclass(cls, shape, dtype=dtype, device=hidden.device)
        lazy._head, lazy.hidden, lazy.compute_dtype, lazy.made = head, hidden, compute, None
        return lazy

    def materialize(self) -> torch.Tensor:
        """Compute the values, once."""
        if self.made is None:
            dtype, bias = self.compute_dtype, self._head.bias
            # Autocast is not at work where autograd has done its part already.
            with torch.no_grad(), torch.autocast(self.hidden.device.type, enabled=False):
                hidden, weight = self.hidden.to(dtype), self._head.weight.to(dtype)
                made = nn.functional.linear(hidden, weight, None if bias is None else bias.to(dtype))
                self.made = made.to(self.dtype).contiguous()
        return self.made

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        if func is torch.ops.aten.clone.default and args[0].made is None:
            # DDP returns clones of a model's output.
            first = args[0]
            return cls._wrap(first._head, first.hidden, first.compute_dtype, first.dtype)
        origins: dict[int, LazyLogits] = {}

        def find_values(value: Any) -> Any:
            if not isinstance(value, LazyLogits):
                return value
            made = value.materialize()
            origins[id(made)] = value
            return made

        result = func(*tree_map(find_values, args), **tree_map(find_values, kwargs or {}))
        # In-place operations return their argument.
        return tree_map(lambda value: origins.get(id(value), value), result)

    def retain_grad(self) -> None:
        """Refuse: the loss gives these logits no gradient."""
        raise UnsupportedTraining(_NO_GRADIENT)

    def register_hook(self, hook: Any) -> Any:
        """Refuse: the loss gives these logits no gradient."""
        raise UnsupportedTraining(_NO_GRADIENT)


_NO_GRADIENT = (
    "The loss is computed some rows of the logits at a time, so the logits as a whole get no gradient that could be "
    "kept or watched. Pass chunked_loss=False to the callback."
)


def _forward_to_values(name: str) -> Any:
    def call(self: LazyLogits, *args: Any, **kwargs: Any) -> Any:
        return getattr(torch.ops.aten.alias(self), name)(*args, **kwargs)

    return call


# These read a tensor's memory without an operation that ``__torch_dispatch__`` sees.
for _name in (
    "__array__",
    "__deepcopy__",
    "__dlpack__",
    "__reduce_ex__",
    "__repr__",
    "data_ptr",
    "numpy",
    "share_memory_",
    "storage",
    "tolist",
    "untyped_storage",
):
    setattr(LazyLogits, _name, _forward_to_values(_name))


class _Head(torch.autograd.Function):
    """The head of a model; its values are computed later."""

    @staticmethod
    def forward(ctx: Any, hidden: torch.Tensor, head: nn.Linear) -> LazyLogits:
        lazy = LazyLogits.wrap(head, hidden)
        ctx.weight, ctx.compute_dtype, ctx.hidden_dtype = head.weight, lazy.compute_dtype, hidden.dtype
        return lazy

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        with torch.autocast(gradient.device.type, enabled=False):
            return (gradient.to(ctx.compute_dtype) @ ctx.weight.to(ctx.compute_dtype)).to(ctx.hidden_dtype), None


class _PiecewiseLoss(torch.autograd.Function):
    """Cross-entropy of ``rows @ weight.T + bias``, summed and multiplied by ``factor``.

    The gradient is computed in the forward pass and rounded where transformers' loss rounds it.
    """

    @staticmethod
    def forward(
        ctx: Any,
        rows: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        targets: torch.Tensor,
        factor: torch.Tensor,
        dtype: torch.dtype,
    ) -> torch.Tensor:
        weight, bias = weight.to(dtype), None if bias is None else bias.to(dtype)
        # In float16 most shares times the factor underflow: it is applied later, with the scaled upstream gradient.
        ctx.later = dtype == torch.float16
        gradient = torch.empty_like(rows) if ctx.needs_input_grad[0] else None
        total = torch.zeros((), dtype=torch.float32, device=rows.device)
        for piece in _cut_rows(len(rows), weight.shape[0]):
            logits = _compute_logits(rows[piece].to(dtype), weight, bias).float()
            target = targets[piece].unsqueeze(1)
            largest, place = logits.max(dim=1, keepdim=True)
            shares = torch.softmax(logits, dim=1)
            # The largest share is never small, so its logarithm gives the normalization without another pass.
            total += (largest - shares.gather(1, place).log() - logits.gather(1, target)).sum()
            if gradient is not None:
                del logits
                shares.scatter_add_(1, target, torch.full_like(target, -1, dtype=shares.dtype))
                gradient[piece] = (shares if ctx.later else shares.mul_(factor)).to(dtype) @ weight
        ctx.save_for_backward(gradient, factor)
        return total * factor

    @staticmethod
    def backward(ctx: Any, upstream: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        if torch.is_grad_enabled():
            raise UnsupportedTraining(
                "create_graph=True differentiates the loss twice, and its gradient was made without a graph, some rows "
                "of the logits at a time. Pass chunked_loss=False to the callback."
            )
        gradient, factor = ctx.saved_tensors
        upstream = upstream * factor if ctx.later else upstream
        return (gradient * upstream).to(gradient.dtype), None, None, None, None, None


def _compute_logits(rows: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """Return ``rows @ weight.T + bias``."""
    if rows.device.type != "cpu" or rows.dtype != torch.float32:
        return nn.functional.linear(rows, weight, bias)
    logits = rows.new_empty(len(rows), len(weight))
    for start in range(0, len(weight), TILE):
        torch.mm(rows, weight[start : start + TILE].t(), out=logits[:, start : start + TILE])
    return logits if bias is None else logits.add_(bias)


def _cut_rows(rows: int, vocabulary: int) -> Iterator[slice]:
    """Yield slices of rows to compute at a time: few and of even size, because products of few rows are slow."""
    number = -(-rows // max(FEWEST_ROWS, PIECE // vocabulary))
    return (slice(rows * index // number, rows * (index + 1) // number) for index in range(number))

"""The loss of a causal language model, some rows of the logits at a time.

The logits of a whole batch are the largest tensors of a training step: rows times vocabulary, several times over in
float32. Only the loss needs them, and the loss is a sum over rows, so they can be made, used and dropped in pieces.
The loss and its gradient are those of transformers' ``ForCausalLMLoss`` up to rounding.
"""

from __future__ import annotations

import contextlib
import functools
import types
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn
from torch.autograd.function import once_differentiable
from transformers import PreTrainedModel, Trainer
from transformers.loss.loss_utils import ForCausalLMLoss

from lora_plugins.models.wrapping import base_of
from lora_plugins.trainer.seam import shadow_method

__all__ = ["FEWEST_ROWS", "PIECE", "TILE", "LazyLogits", "chunked_loss", "install"]


#: Logits that are held at once, in values: 32 MiB in float32. Larger pieces leave the CPU's cache.
PIECE = 1 << 23
#: Rows that are computed at a time however large the vocabulary is: fewer would read the head's weight too often.
FEWEST_ROWS = 64
#: Words of the vocabulary in one float32 product on a CPU: PyTorch's library for it is a third slower with all of them.
TILE = 2048


@contextlib.contextmanager
def chunked_loss(model: nn.Module) -> Iterator[bool]:
    """Let a causal language model compute its loss in pieces inside this context.

    Its output then has logits that are computed when somebody looks at them. Models whose loss or head is not the
    plain one (trained, adapted, sharded, hooked, another loss function) are left as they are, and so is every
    model outside the context.

    Args:
        model: The model, wrapped by PEFT or not.

    Yields:
        Whether the loss will be computed in pieces.
    """
    base: Any = base_of(model)
    head: Any = _plain_head(base)
    if head is None:
        yield False
        return
    state = _Loss(head, base.loss_function)
    armed = base.register_forward_pre_hook(state.arm, with_kwargs=True)
    before = vars(base).get("_loss_function")
    base.loss_function = state
    head.forward = types.MethodType(state.logits, head)
    try:
        yield True
    finally:
        armed.remove()
        del head.forward
        if before is None:
            del base._loss_function
        else:
            base._loss_function = before


def install(trainer: Trainer) -> list[Callable[[], None]]:
    """Let a Trainer compute the loss in pieces, in training and in evaluations that keep only the loss.

    A Trainer that makes its own loss (label smoothing, ``compute_loss_func``, an overridden ``compute_loss``), whose
    model is compiled, or whose weights are sharded over processes, is left as it is.

    Returns:
        Functions that undo it.
    """
    step, predict = trainer.training_step, trainer.prediction_step

    @functools.wraps(step)
    def training_step(model: nn.Module, *args: Any, **kwargs: Any) -> Any:
        with chunked_loss(trainer.model) if _uses_models_loss(trainer) else contextlib.nullcontext():
            return step(model, *args, **kwargs)

    @functools.wraps(predict)
    def prediction_step(model: nn.Module, inputs: Any, prediction_loss_only: bool, *args: Any, **kwargs: Any) -> Any:
        only = prediction_loss_only and _uses_models_loss(trainer)
        with chunked_loss(trainer.model) if only else contextlib.nullcontext():
            return predict(model, inputs, prediction_loss_only, *args, **kwargs)

    return [
        shadow_method(trainer, "training_step", training_step),
        shadow_method(trainer, "prediction_step", prediction_step),
    ]


def _uses_models_loss(trainer: Trainer) -> bool:
    """Whether a Trainer takes nothing but the loss from the output of a whole, uncompiled model."""
    own = type(trainer).compute_loss is not Trainer.compute_loss or "compute_loss" in vars(trainer)
    if own or trainer.compute_loss_func is not None or trainer.label_smoother is not None:
        return False
    return not (trainer.args.torch_compile or trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled)


def _plain_head(base: Any) -> nn.Linear | None:
    """The output embedding of a model whose loss can be computed in pieces, else ``None``."""
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
        """Look whether a forward pass will compute the loss itself."""
        self.armed = kwargs.get("labels") is not None and not torch.compiler.is_compiling()

    def logits(self, head: nn.Linear, hidden: torch.Tensor) -> Any:
        """What the head returns."""
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
            arguments = (vocab_size, num_items_in_batch, ignore_index, shift_labels)
            return self.plain(_materialized(logits), labels, *arguments, **kwargs)
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


class LazyLogits:
    """Logits that are computed when somebody looks at them, with the gradient that they would have had.

    Attributes:
        hidden: What the head got, shape ``[…, hidden]``.
        compute_dtype: Dtype of the product with the head's weight.
        made: The logits, ``None`` as long as nobody has looked.
    """

    def __init__(self, head: nn.Linear, hidden: torch.Tensor) -> None:
        device = hidden.device.type
        self._head = head
        self._autocast = torch.is_autocast_enabled(device)
        self.hidden = hidden
        self.compute_dtype = torch.get_autocast_dtype(device) if self._autocast else hidden.dtype
        self.made: torch.Tensor | None = None

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the logits; float32 under autocast, where accelerate casts a model's output."""
        return torch.float32 if self._autocast else self.compute_dtype

    @property
    def shape(self) -> torch.Size:
        """Shape of the logits."""
        return torch.Size((*self.hidden.shape[:-1], self._head.out_features))

    def materialize(self) -> torch.Tensor:
        """Compute the logits."""
        if self.made is None:
            with torch.autocast(self.hidden.device.type, dtype=self.compute_dtype, enabled=self._autocast):
                self.made = type(self._head).forward(self._head, self.hidden).to(self.dtype)
        return self.made

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return getattr(self.materialize(), name)

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        from torch.utils._pytree import tree_map

        return function(*tree_map(_materialized, args), **tree_map(_materialized, kwargs or {}))


def _materialized(value: Any) -> Any:
    return value.materialize() if isinstance(value, LazyLogits) else value


def _operator(name: str) -> Any:
    def operate(self: LazyLogits, *others: Any) -> Any:
        return getattr(self.materialize(), name)(*map(_materialized, others))

    return operate


# Python looks operators up on the class, past __getattr__.
for _name in ("add", "sub", "mul", "truediv", "matmul", "pow"):
    setattr(LazyLogits, f"__{_name}__", _operator(f"__{_name}__"))
    setattr(LazyLogits, f"__r{_name}__", _operator(f"__r{_name}__"))
for _name in ("getitem", "neg", "len", "iter", "lt", "le", "gt", "ge", "float", "bool"):
    setattr(LazyLogits, f"__{_name}__", _operator(f"__{_name}__"))


class _PiecewiseLoss(torch.autograd.Function):
    """Cross-entropy of ``rows @ weight.T + bias``, summed and multiplied by ``factor``.

    The gradient is made in the forward pass, rounded where transformers' loss rounds it.
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
        # Below float16's smallest number lie most shares divided by the items; a gradient scaler comes later.
        ctx.later = dtype == torch.float16
        gradient = torch.empty_like(rows) if ctx.needs_input_grad[0] else None
        total = torch.zeros((), dtype=torch.float32, device=rows.device)
        for piece in _pieces(len(rows), weight.shape[0]):
            logits = _logits(rows[piece].to(dtype), weight, bias).float()
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
    @once_differentiable
    def backward(ctx: Any, upstream: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        gradient, factor = ctx.saved_tensors
        upstream = upstream * factor if ctx.later else upstream
        return (gradient * upstream).to(gradient.dtype), None, None, None, None, None


def _logits(rows: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """``rows @ weight.T + bias``."""
    if rows.device.type != "cpu" or rows.dtype != torch.float32:
        return nn.functional.linear(rows, weight, bias)
    logits = rows.new_empty(len(rows), len(weight))
    for start in range(0, len(weight), TILE):
        torch.mm(rows, weight[start : start + TILE].t(), out=logits[:, start : start + TILE])
    return logits if bias is None else logits.add_(bias)


def _pieces(rows: int, vocabulary: int) -> Iterator[slice]:
    """Rows that are computed at a time: as many at once as may be, and as evenly, for a product of few is slow."""
    number = -(-rows // max(FEWEST_ROWS, PIECE // vocabulary))
    return (slice(rows * index // number, rows * (index + 1) // number) for index in range(number))

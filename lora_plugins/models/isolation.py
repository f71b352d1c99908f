"""Find a way to keep the examples of one row apart, by measuring.

A model that takes position ids may read from them where an example begins, and mask the others itself; another one
takes a mask; a third, such as a recurrent one, can do neither. Which of them a model is depends on its class, on its
attention implementation and on the release of transformers, and a model that ignores what it was given says nothing. So
the model is run on a few tokens: a change in one example must not reach the next, and an example must come out as it
does alone.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn

from lora_plugins.errors import UnsupportedPacking
from lora_plugins.models.wrapping import base_of

__all__ = ["Isolation", "find_isolation"]

#: Tokens of the probe's three examples.
_LENGTHS = (5, 4, 3)

Way = Literal["positions", "masks"]


@dataclass(frozen=True)
class Isolation:
    """How a model keeps the examples of one row apart.

    Attributes:
        way: ``"positions"``: position ids that begin anew with each example are enough. ``"masks"``: it needs a
            mask as well.
        takes_positions: Whether ``forward`` takes position ids.
        takes_cache: Whether ``forward`` takes ``use_cache``; with a cache, transformers 5.23 doesn't look for examples.
        bool_mask: Whether a mask is true where attention is allowed; else it is added to the scores.
        one_row: Whether all examples of a batch must stand in one row, as attention functions for sequences of
            different lengths (flash attention) want them; other attention is quadratic in the length of a row.
    """

    way: Way
    takes_positions: bool
    takes_cache: bool
    bool_mask: bool = False
    one_row: bool = False

    def make_inputs(self, positions: torch.Tensor) -> dict[str, Any]:
        """Return the arguments of ``forward`` besides tokens and labels.

        Args:
            positions: Place of each token in its example, from 0: shape (rows, tokens).

        Raises:
            ValueError: A row does not begin with an example.
        """
        if (positions[:, 0] != 0).any():
            raise ValueError("Each row must begin with the first token of an example")
        inputs: dict[str, Any] = {"position_ids": positions} if self.takes_positions else {}
        if self.way == "masks":
            inputs["attention_mask"] = _make_mask(positions, bool_mask=self.bool_mask)
        return inputs | ({"use_cache": False} if self.takes_cache else {})


def _make_mask(positions: torch.Tensor, *, bool_mask: bool) -> torch.Tensor:
    """Return a mask of shape (rows, 1, tokens, tokens): attention goes to earlier tokens of the same example."""
    examples = (positions == 0).cumsum(-1)
    length = positions.shape[-1]
    causal = torch.ones(length, length, dtype=torch.bool, device=positions.device).tril()
    allowed = ((examples[:, :, None] == examples[:, None, :]) & causal)[:, None]
    if bool_mask:
        return allowed
    return torch.zeros(allowed.shape, device=positions.device).masked_fill_(~allowed, torch.finfo(torch.float32).min)


def find_isolation(model: nn.Module) -> Isolation:
    """Find out how a causal language model keeps the examples of one row apart.

    Runs the model on 12 tokens a few times, without gradients and in evaluation mode, and leaves it as it was, but for
    one thing: a BLOOM then takes a mask of four dimensions.

    Args:
        model: The model, on the device and with the attention implementation that it is trained with; adapters and
            quantized layers may be in it.

    Raises:
        UnsupportedPacking: Its examples cannot be kept apart.
    """
    base = base_of(model)
    with _in_evaluation(base), torch.no_grad():
        probe = _Probe(base)
        reasons = []
        for isolation in _list_candidates(base):
            reason = probe.find_fault(isolation)
            if reason is None:
                return isolation
            reasons.append(reason)
    why = "; ".join(reasons) or "its forward takes neither position ids nor a mask"
    raise UnsupportedPacking(
        f"{type(base).__name__} cannot keep packed examples apart: {why}. Use padded batches, or "
        "chunks in which examples follow each other as one text (--packing none or wrapped)."
    )


def _list_candidates(base: nn.Module) -> Iterator[Isolation]:
    config: Any = getattr(base, "config", None)
    config = config.get_text_config() if hasattr(config, "get_text_config") else config
    attention = str(getattr(config, "_attn_implementation", ""))
    arguments = inspect.signature(base.forward).parameters
    make = functools.partial(
        Isolation,
        takes_positions="position_ids" in arguments,
        takes_cache="use_cache" in arguments,
        one_row="flash" in attention,
    )
    if "position_ids" in arguments:
        yield make("positions")
    kinds = set(getattr(config, "layer_types", None) or ())
    # One mask for all layers would let those with a window see everything; flash attention takes none.
    windows = getattr(config, "sliding_window", None) is not None or kinds - {"full_attention"}
    if "attention_mask" in arguments and not windows and "flash" not in attention:
        _let_alibi_take_masks(base)
        yield make("masks", bool_mask=attention == "sdpa")


def _let_alibi_take_masks(base: nn.Module) -> None:
    """Let BLOOM take a mask of four dimensions.

    Its alibi is computed from a mask of padding alone (transformers 5.23). The bias of a key grows with the key's place
    in the row; for an example that begins later all keys have the same constant more, which softmax takes away.
    """
    for module in base.modules():
        build = getattr(type(module), "build_alibi_tensor", None)
        if build is not None and "build_alibi_tensor" not in vars(module):
            module.build_alibi_tensor = functools.partial(_build_alibi, build)  # type: ignore[assignment]


def _build_alibi(build: Any, attention_mask: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
    if attention_mask.ndim == 4:
        attention_mask = attention_mask.new_ones(attention_mask.shape[0], attention_mask.shape[-1], dtype=torch.long)
    # BLOOM's method doesn't use the module that it belongs to.
    return build(None, attention_mask, *args, **kwargs)


@contextlib.contextmanager
def _in_evaluation(base: nn.Module) -> Iterator[None]:
    modes = {module: module.training for module in base.modules()}
    base.eval()
    try:
        yield
    finally:
        for module, training in modes.items():
            module.training = training


class _Probe:
    """Three examples in a row; in the second version every token of the first one differs."""

    def __init__(self, base: nn.Module) -> None:
        self.base = base
        weight: Any = base.get_input_embeddings().weight  # type: ignore[operator]
        self.device = weight.device
        words = int(base.get_input_embeddings().num_embeddings)  # type: ignore[operator]
        if self.device.type == "meta" or words < 4:
            raise UnsupportedPacking(
                f"{type(base).__name__} cannot be tried: it has no weights in memory, or fewer than four words."
            )
        # Neighbours differ, and so do both versions of a token.
        tokens = torch.arange(sum(_LENGTHS), device=self.device) * 3 % (words - 1)
        self.tokens = tokens[None]
        self.changed = self.tokens.clone()
        self.changed[:, : _LENGTHS[0]] += 1
        self.positions = torch.cat([torch.arange(length, device=self.device) for length in _LENGTHS])[None]

    def find_fault(self, isolation: Isolation) -> str | None:
        """Return what is wrong with a way of keeping examples apart, ``None`` if nothing is."""
        name = "with position ids" if isolation.way == "positions" else "with a mask"
        try:
            inputs = isolation.make_inputs(self.positions)
            packed, changed = self._run(self.tokens, inputs), self._run(self.changed, inputs)
            alone = torch.cat([self._run_alone(isolation, begin, end) for begin, end in _find_bounds()[1:]])
        except Exception as error:
            # What a model raises for arguments that it cannot use is not known beforehand.
            return f"{name} it fails ({type(error).__name__}: {' '.join(str(error).split())[:120]})"
        if not (packed.isfinite().all() and alone.isfinite().all() and changed.isfinite().all()):
            return f"{name}, its logits are not finite"
        behind = slice(_LENGTHS[0], None)
        scale = float(alone.abs().max())
        rounding = torch.finfo(packed.dtype).eps
        moved = float((packed[behind] - changed[behind]).abs().max())
        if moved > 0 and (moved > 4 * rounding * scale or self._influence <= 64 * rounding * scale):
            return f"{name}, a change in one example moves the logits of the next by {moved:.2g}"
        if not self._influence:
            return "whether one example reaches another does not show in its outputs"
        away = float((packed[behind] - alone).abs().max())
        if away > rounding**0.5 / 2 * scale:
            return f"{name}, the logits of an example differ by {away:.2g} from those that it has alone"
        return None

    @functools.cached_property
    def _influence(self) -> float:
        """How far a change in the first example moves the others' logits if nothing keeps them apart."""
        behind = slice(_LENGTHS[0], None)
        plain = self._run(self.tokens, {})[behind] - self._run(self.changed, {})[behind]
        return float(plain.abs().max())

    def _run_alone(self, isolation: Isolation, begin: int, end: int) -> torch.Tensor:
        return self._run(self.tokens[:, begin:end], isolation.make_inputs(self.positions[:, begin:end]))

    def _run(self, tokens: torch.Tensor, inputs: dict[str, Any]) -> torch.Tensor:
        """Return the logits of one row: shape (tokens, words)."""
        logits: torch.Tensor = self.base(input_ids=tokens, **inputs).logits
        return logits[0]


def _find_bounds() -> list[tuple[int, int]]:
    ends = [sum(_LENGTHS[: index + 1]) for index in range(len(_LENGTHS))]
    return [(end - length, end) for end, length in zip(ends, _LENGTHS, strict=True)]

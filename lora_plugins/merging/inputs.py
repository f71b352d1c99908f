"""Make inputs to measure a merge: text, trained tokens, images, audio."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from lora_plugins.models.images import read_image_shape

__all__ = ["PROBE_TEXT", "Batch", "make_batches"]


#: Everyday English with names, numbers and punctuation.
PROBE_TEXT = (
    "Summarize the chat dialogue:\nMia: Are we still meeting at 6:30?\nNoah: Sorry, the train is 20 minutes late. "
    "Can we say seven?\nMia: Fine, I'll order for both of us. The usual?\nNoah: Yes please!\n---\nSummary:\n"
    "Noah's train is late, so he and Mia meet at seven instead of half past six. Mia orders for both."
)

#: Number of tokens of the text, and of an encoder-decoder's answer.
_LENGTH = 128
_ANSWER = 16

#: Samples and frames of audio if the configuration gives no length.
_SAMPLES = 8000
_FRAMES = 128


@dataclass(frozen=True)
class Batch:
    """One example.

    Attributes:
        name: What it contains, for messages.
        inputs: Arguments of the model's ``forward``, each with batch size 1.
    """

    name: str
    inputs: Mapping[str, torch.Tensor]


def make_batches(
    model: nn.Module, tokenizer: PreTrainedTokenizerBase | None, text: str, trained: Sequence[int]
) -> list[Batch]:
    """Return examples that reveal a difference between two models of this class; the model may not accept all of them.

    Args:
        model: The base model.
        tokenizer: Its tokenizer; ``None`` for random token ids.
        text: The text of the example.
        trained: Ids of tokens whose embeddings were trained; a second example repeats them.
    """
    accepted = inspect.signature(model.forward).parameters
    ids = _make_text_ids(model, tokenizer, text)
    rows = {"text": ids, **({"trained tokens": _mix_in(ids, trained)} if trained else {})}
    other = _make_other_input(model, accepted)
    batches = []
    for name, row in rows.items():
        answer = {"decoder_input_ids": row[:, :_ANSWER]} if _decodes(model, accepted) else {}
        words = {"input_ids": row, **answer} if "input_ids" in accepted else {}
        for kind, inputs in ((name, words), (f"{other[0]} and {name}", {**other[1], **words, **answer})):
            if inputs and (kind == name or other[1]):
                batches.append(Batch(kind, inputs))
    if other[1] and "input_ids" in accepted:
        batches.append(Batch(other[0], other[1]))
    return batches


def _decodes(model: Any, accepted: Mapping[str, Any]) -> bool:
    return "decoder_input_ids" in accepted and (
        bool(getattr(model.config, "is_encoder_decoder", False)) or "input_ids" not in accepted
    )


def _make_text_ids(model: Any, tokenizer: PreTrainedTokenizerBase | None, text: str) -> torch.Tensor:
    """Return token ids of shape ``[1, tokens]``, all within the model's embeddings."""
    rows = _count_rows(model)
    length = min(_LENGTH, _count_positions(model.config))
    found: list[int] = []
    if tokenizer is not None:
        found = [index for index in tokenizer(text)["input_ids"] if index < rows][:length]
    if not found:
        generator = torch.Generator().manual_seed(0)
        # The first ids are special tokens in most vocabularies.
        first = min(10, rows // 2)
        return torch.randint(first, rows, (1, length), generator=generator)
    return torch.tensor([found])


def _count_rows(model: Any) -> int:
    try:
        return int(model.get_input_embeddings().weight.shape[0])
    except (AttributeError, NotImplementedError):
        text = model.config.get_text_config()
        return int(getattr(text, "vocab_size", None) or 100)


def _count_positions(config: Any) -> int:
    """Return how many tokens surely fit; some models reserve positions before the first token."""
    text = config.get_text_config()
    names = ("max_position_embeddings", "n_positions", "n_ctx", "max_target_positions", "seq_length")
    found = [getattr(part, name, None) for part in (config, text) for name in names]
    return max(2, min((size for size in found if isinstance(size, int) and size > 4), default=_LENGTH + 4) - 4)


def _mix_in(ids: torch.Tensor, trained: Sequence[int]) -> torch.Tensor:
    """Return the text's ids with every other token replaced by a trained one."""
    row = ids.clone()
    places = row[0, ::2]
    row[0, ::2] = torch.tensor([trained[index % len(trained)] for index in range(len(places))])
    return row


def _make_other_input(model: Any, accepted: Mapping[str, Any]) -> tuple[str, dict[str, torch.Tensor]]:
    """Return the kind and tensor of an image or audio input, empty if the model takes neither."""
    generator = torch.Generator().manual_seed(0)
    makers: dict[str, tuple[str, Callable[[], torch.Tensor]]] = {
        "pixel_values": ("image", lambda: torch.randn(1, *read_image_shape(model.config), generator=generator)),
        "input_values": ("sound", lambda: torch.randn(1, _SAMPLES, generator=generator)),
        "input_features": ("sound", lambda: torch.randn(1, *_read_sound_shape(model.config), generator=generator)),
    }
    main = getattr(model, "main_input_name", "input_ids")
    name = next((one for one in (main, *makers) if one in makers and one in accepted), None)
    return (makers[name][0], {name: makers[name][1]()}) if name else ("", {})


def _read_sound_shape(config: Any) -> tuple[int, int]:
    bins = getattr(config, "num_mel_bins", None) or 80
    frames = getattr(config, "max_source_positions", None)
    # Whisper needs exactly twice `max_source_positions` frames, after the bins; other models take frames first.
    return (bins, 2 * frames) if frames and config.model_type == "whisper" else (_FRAMES, bins)

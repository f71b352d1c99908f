"""Let a base write with and without an adapter, on this machine."""

from __future__ import annotations

import contextlib
import os
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, TextStreamer

from lora_plugins.adapters.prepare import prepare_model
from lora_plugins.errors import PreparationWarning, TrialError
from lora_plugins.merging.base import fit_vocabulary
from lora_plugins.models.randomness import seeded
from lora_plugins.quantization.precision import loading_dtype
from lora_plugins.serving.source import Source, read_source
from lora_plugins.text import one_line
from registry import TOKENIZER_FILES

__all__ = ["Message", "Trial", "Writing", "open_trial"]

#: A message of a conversation: ``role`` and ``content``, as chat templates take it.
Message = dict[str, str]


@dataclass(frozen=True)
class Writing:
    """How a text is written.

    Attributes:
        tokens: New tokens at most.
        temperature: 0 takes the likeliest token each time.
        seed: Seed of the sampling, the same for base and adapter.
        raw: Whether a prompt is continued as it is, although the tokenizer has a chat template.
    """

    tokens: int = 256
    temperature: float = 0.0
    seed: int = 0
    raw: bool = False


class Trial:
    """A base with an adapter, and the tokenizer of both.

    Attributes:
        adapter: ``org/name@version`` of a release, else the name of the adapter's folder.
        base: Base model.
    """

    def __init__(self, model: Any, tokenizer: Any, adapter: str, base: str) -> None:
        self.model = model
        self.tokenizer = tokenizer
        self.adapter = adapter
        self.base = base

    def answer(
        self,
        messages: Sequence[Message],
        writing: Writing = Writing(),
        *,
        with_adapter: bool = True,
        say: Callable[[str], None] = lambda text: None,
    ) -> str:
        """Return what follows a conversation.

        Args:
            messages: The conversation; without a chat template, only the last message counts.
            writing: How to write.
            with_adapter: Whether the adapter is on.
            say: Is given each piece of the text as soon as it is there.
        """
        given = self._encode(messages, writing).to(self.model.device)
        sampled = {"do_sample": True, "temperature": writing.temperature} if writing.temperature > 0 else {}
        settings = GenerationConfig(
            **{"do_sample": False, "max_new_tokens": writing.tokens, **sampled},
            pad_token_id=self._find_padding(),
            eos_token_id=self._list_ends(),
        )
        off = contextlib.nullcontext() if with_adapter else self.model.disable_adapter()
        streamer = _Streamer(self.tokenizer, say)
        with off, torch.inference_mode(), seeded(self.model, writing.seed):
            self.model.generate(**given, generation_config=settings, streamer=streamer)
        return "".join(streamer.pieces)

    def _encode(self, messages: Sequence[Message], writing: Writing) -> Any:
        if writing.raw or not self.tokenizer.chat_template:
            return self.tokenizer(messages[-1]["content"], return_tensors="pt")
        text = self.tokenizer.apply_chat_template(list(messages), add_generation_prompt=True, tokenize=False)
        return self.tokenizer(text, return_tensors="pt", add_special_tokens=False)

    def _find_padding(self) -> int | None:
        ends = self._list_ends()
        found: int | None = self.tokenizer.pad_token_id
        return ends[0] if found is None and ends else found

    def _list_ends(self) -> list[int]:
        """Return the tokens that end an answer: the model's own, and the tokenizer's."""
        own = getattr(self.model.generation_config, "eos_token_id", None)
        listed = own if isinstance(own, list) else [own]
        return [token for token in dict.fromkeys([*listed, self.tokenizer.eos_token_id]) if token is not None]


class _Streamer(TextStreamer):  # type: ignore[misc]
    """Hands on each piece of a text, and keeps it."""

    def __init__(self, tokenizer: Any, say: Callable[[str], None]) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self.say = say
        self.pieces: list[str] = []

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        self.pieces.append(text)
        self.say(text)


def open_trial(
    adapter: str | os.PathLike[str],
    *,
    base: str | os.PathLike[str] | None = None,
    revision: str | None = None,
    quantization: str | None = None,
) -> Trial:
    """Load an adapter on its base, after the check that it belongs to it.

    A base without the tokens that the adapter was trained with gets their rows; the adapter's file has the values.

    Args:
        adapter: Adapter folder (a path, or a string that begins with ``/``, ``.`` or ``~``), or a registry reference.
        base: Base model; default is the one that the adapter names.
        revision: Revision of the base model.
        quantization: Backend to quantize the base with; none by default.

    Raises:
        TrialError: The base cannot be loaded, does not write text, or has no tokenizer.
        MergeError: The base is unknown or cannot be read.
        MismatchedBase: The adapter was trained on another base, or does not fit this one.
    """
    source = read_source(adapter, base, revision)
    job = source.job
    try:
        loaded, report = AutoModelForCausalLM.from_pretrained(
            job.base, revision=job.revision, dtype=loading_dtype(), output_loading_info=True
        )
    except (ValueError, OSError, ImportError) as error:
        # An ImportError: the base's own format needs a package that is missing.
        raise TrialError(f"{job.base} cannot be loaded as a model that writes text: {one_line(error)}") from error
    if report["missing_keys"]:
        # transformers gives an encoder a head of random values.
        first = min(report["missing_keys"])
        raise TrialError(f"{job.base} does not write text: it has no weights for {first}, which that needs")
    for note in fit_vocabulary(job, loaded):
        warnings.warn(f"{source.title}: {note}", PreparationWarning, stacklevel=2)
    if torch.accelerator.is_available():
        loaded = loaded.to(torch.accelerator.current_accelerator())
    model = prepare_model(loaded, adapter=job.folder, quantization=quantization)
    return Trial(model.eval(), _load_tokenizer(source), source.title, job.base)


def _load_tokenizer(source: Source) -> Any:
    """Return the tokenizer of the adapter if it brings one, else the base's."""
    folder = source.job.folder
    own = any(Path(folder, name).is_file() for name in TOKENIZER_FILES)
    place = str(folder) if own else source.job.base
    try:
        return AutoTokenizer.from_pretrained(place, revision=None if own else source.job.revision)
    except (ValueError, OSError) as error:
        raise TrialError(f"{place} has no tokenizer that can be loaded: {one_line(error)}") from error

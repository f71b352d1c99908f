"""Turn rows into token ids and labels, by prompt or chat templates."""

from __future__ import annotations

import string
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from datasets import ClassLabel, Dataset, Features, List, Value
from datasets.fingerprint import Hasher
from transformers import PreTrainedTokenizerBase

from lora_plugins.errors import TemplateError
from lora_plugins.recipe.arguments import CHAT
from lora_plugins.recipe.packing import IGNORED
from lora_plugins.text import did_you_mean

__all__ = ["Span", "Template", "encode", "encode_rows", "make_template"]


#: Names in a template that stand for special tokens of the tokenizer.
_TOKENS = ("eos_token", "bos_token")

_MESSAGES = "messages"

Span = tuple[int, int]


class Template(Protocol):
    """Renders a row as text, and finds the answers in it."""

    #: Whether the tokenizer adds its special tokens; a chat template writes them itself.
    add_special_tokens: bool

    #: Runs share cached tokens only if this is equal.
    identity: tuple[str, ...]

    def text(self, row: Mapping[str, Any]) -> str:
        """Return the text of an example."""

    def spans(self, row: Mapping[str, Any]) -> list[Span]:
        """Return the begin and end of each answer in the text, in characters."""

    def usable(self, row: Mapping[str, Any]) -> bool:
        """Whether the row has everything that the template needs."""


def make_template(text: str, columns: Features | list[str], tokenizer: PreTrainedTokenizerBase) -> Template:
    """Return the template for a data set.

    Args:
        text: ``"chat"``, or a text with columns in braces, in which ``\\n`` also stands for a new line.
        columns: Columns of the data set; ``Features`` also say which of them hold lists.
        tokenizer: Fills ``{eos_token}`` and ``{bos_token}``, or has the chat template.

    Raises:
        TemplateError: The template names no column, a missing one, or one that holds lists; or the tokenizer has
            no chat template.
    """
    return _ChatTemplate(columns, tokenizer) if text == CHAT else _TextTemplate(text, columns, tokenizer)


class _TextTemplate:
    """A text with columns in braces; the last column, and what follows it, is the completion."""

    add_special_tokens = True

    def __init__(self, text: str, columns: Features | list[str], tokenizer: PreTrainedTokenizerBase) -> None:
        # A shell passes \n on as two characters.
        text = text.replace("\\n", "\n")
        self.parts = _parse(text)
        self.fields = [name for _, name in self.parts if name is not None and name not in _TOKENS]
        _check_fields(self.fields, columns, text)
        self.tokens = {name: _find_special_token(tokenizer, name) for _, name in self.parts if name in _TOKENS}
        self.identity: tuple[str, ...] = (text,)

    def text(self, row: Mapping[str, Any]) -> str:
        return "".join(self._make_pieces(row))

    def spans(self, row: Mapping[str, Any]) -> list[Span]:
        pieces = self._make_pieces(row)
        # Each part is a literal and what follows it; the completion begins with the last column's value.
        last = max(index for index, (_, name) in enumerate(self.parts) if name in self.fields)
        return [(len("".join(pieces[: 2 * last + 1])), len("".join(pieces)))]

    def _make_pieces(self, row: Mapping[str, Any]) -> list[str]:
        pieces = []
        for literal, name in self.parts:
            value = "" if name is None else self.tokens[name] if name in self.tokens else str(row[name])
            pieces += [literal, value]
        return pieces

    def usable(self, row: Mapping[str, Any]) -> bool:
        return all(row[name] is not None and str(row[name]).strip() for name in self.fields)


def _parse(text: str) -> list[tuple[str, str | None]]:
    """Split a template into pairs of literal text and the name that follows it."""
    try:
        parsed = list(string.Formatter().parse(text))
    except ValueError as error:
        raise TemplateError(
            f"The template {text!r} cannot be read: {error}. A brace itself is written twice."
        ) from error
    for _, name, spec, conversion in parsed:
        if name is not None and (spec or conversion or not name.isidentifier()):
            raise TemplateError(f"The template {text!r} has {{{name}}}, which is not the plain name of a column.")
    return [(literal, name) for literal, name, _, _ in parsed]


def _check_fields(names: list[str], columns: Features | list[str], text: str) -> None:
    if not names:
        raise TemplateError(f"The template {text!r} names no column. The data set has: {', '.join(columns)}.")
    for name in names:
        if name not in columns:
            hint = did_you_mean(name, columns, show="{{{}}}".format)
            chat = f" For the conversations in {_MESSAGES!r}, use --template {CHAT}." if _MESSAGES in columns else ""
            raise TemplateError(
                f"The template names the column {name!r} and the data set has: {', '.join(columns)}.{hint} "
                f"Choose with --template.{chat}"
            )
        if isinstance(columns, Mapping) and not _is_plain(columns[name]):
            raise TemplateError(
                f"The template names the column {name!r}, which holds no text but {columns[name]}. For conversations "
                f"in a column {_MESSAGES!r}, use --template {CHAT}; else write the text into a column of its own."
            )


def _is_plain(kind: object) -> bool:
    """Whether a column's values are texts, numbers or the like, not lists or records."""
    return isinstance(kind, (Value, ClassLabel))


def _find_special_token(tokenizer: PreTrainedTokenizerBase, name: str | None) -> str:
    token = getattr(tokenizer, name or "", None)
    if not token:
        raise TemplateError(f"The template has {{{name}}} and the tokenizer has none. Leave it out, or set it.")
    return str(token)


class _ChatTemplate:
    """Conversations in a column of messages, rendered by the tokenizer; the assistant's turns are the answers."""

    add_special_tokens = False

    def __init__(self, columns: Features | list[str], tokenizer: PreTrainedTokenizerBase) -> None:
        if _MESSAGES not in columns:
            raise TemplateError(
                f"--template chat reads the column {_MESSAGES!r}, a list of role and content; the data set has: "
                f"{', '.join(columns)}."
            )
        if not tokenizer.chat_template:
            raise TemplateError("--template chat was asked for and the tokenizer has no chat template.")
        self.tokenizer = tokenizer
        self.identity: tuple[str, ...] = (CHAT, str(tokenizer.chat_template))

    def text(self, row: Mapping[str, Any]) -> str:
        return self._render(row[_MESSAGES])

    def spans(self, row: Mapping[str, Any]) -> list[Span]:
        messages = row[_MESSAGES]
        text = self._render(messages)
        spans = []
        for index, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            before = self._render(messages[:index], add_generation_prompt=True)
            through = self._render(messages[: index + 1])
            if not (text.startswith(before) and text.startswith(through) and through.startswith(before)):
                raise TemplateError(
                    f"The chat template writes the conversation differently when turn {index} is the last one, so the "
                    "assistant's part of the text cannot be told. Use --loss_on all, or another chat template."
                )
            spans.append((len(before), len(through)))
        return spans

    def usable(self, row: Mapping[str, Any]) -> bool:
        return any(message["role"] == "assistant" and message["content"] for message in row[_MESSAGES] or ())

    def _render(self, messages: list[Any], **options: Any) -> str:
        return str(self.tokenizer.apply_chat_template(messages, tokenize=False, **options)) if messages else ""


@dataclass(frozen=True)
class _Encoder:
    """Turns batches of rows into token ids and labels."""

    tokenizer: PreTrainedTokenizerBase
    template: Template
    completion_only: bool

    def __call__(self, batch: Mapping[str, list[Any]]) -> dict[str, list[list[int]]]:
        names = list(batch)
        rows = [dict(zip(names, values, strict=True)) for values in zip(*batch.values(), strict=True)]
        rows = [row for row in rows if self.template.usable(row)]
        if not rows:
            return {"input_ids": [], "labels": []}
        encoded = self.tokenizer(
            [self.template.text(row) for row in rows],
            add_special_tokens=self.template.add_special_tokens,
            return_offsets_mapping=self.completion_only,
        )
        ids: list[list[int]] = encoded["input_ids"]
        if not self.completion_only:
            return {"input_ids": ids, "labels": ids}
        labels = []
        for tokens, places, row in zip(ids, encoded["offset_mapping"], rows, strict=True):
            spans = self.template.spans(row)
            labels.append(
                [t if _touches_answer(place, spans) else IGNORED for t, place in zip(tokens, places, strict=True)]
            )
        return {"input_ids": ids, "labels": labels}


def _touches_answer(place: Span, spans: list[Span]) -> bool:
    """Whether any of a token's characters is in an answer; tokens without characters are the tokenizer's own.

    The first token of an answer often includes the space before it.
    """
    start, end = place
    return start < end and any(begin < end and start < stop for begin, stop in spans)


def encode(
    rows: Dataset,
    template: Template,
    tokenizer: PreTrainedTokenizerBase,
    *,
    completion_only: bool,
    num_proc: int | None = None,
) -> tuple[Dataset, int]:
    """Tokenise a data set: rows of ``input_ids`` and ``labels``.

    Rows in which a column of the template is empty or missing are left out.

    Returns:
        The tokenised rows, cached beside the data set's own files, and how many rows were left out.

    Raises:
        TemplateError: Only answers count in the loss, and the tokenizer cannot map tokens to characters.
    """
    if completion_only and not tokenizer.is_fast:
        raise TemplateError(
            f"--loss_on completion needs a tokenizer that knows which characters a token is made of; "
            f"{type(tokenizer).__name__} does not. Use --loss_on all."
        )
    encoder: Callable[..., Any] = _Encoder(tokenizer, template, completion_only)
    encoded = rows.map(
        encoder,
        batched=True,
        num_proc=num_proc,
        remove_columns=rows.column_names,
        features=Features({name: List(Value("int64")) for name in ("input_ids", "labels")}),
        # A tokenizer keeps state from its last call, so its hash would differ each time.
        new_fingerprint=_make_fingerprint(rows, template, tokenizer, completion_only),
        desc="Tokenising",
    )
    return encoded, len(rows) - len(encoded)


def encode_rows(
    batch: Mapping[str, Any], template: Template, tokenizer: PreTrainedTokenizerBase, *, completion_only: bool
) -> dict[str, list[list[int]]]:
    """Tokenise some rows, columns with their values, without a cache; see `encode`."""
    return _Encoder(tokenizer, template, completion_only)(batch)


def _make_fingerprint(rows: Dataset, template: Template, tokenizer: Any, completion_only: bool) -> str:
    backend = getattr(tokenizer, "backend_tokenizer", None)
    words = backend.to_str() if backend is not None else repr(sorted(tokenizer.get_vocab().items()))
    # The first number changes whenever tokens or labels come out differently.
    parts = (2, rows._fingerprint, template.identity, completion_only, tokenizer.eos_token, tokenizer.bos_token, words)
    return str(Hasher.hash(("lora_plugins.templates", *parts)))

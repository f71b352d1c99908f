"""Make small data sets under the ids that TRL's tests load from the Hub."""

# ruff: noqa: TID253 - a program for developers, which always needs them

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from datasets import Dataset, DatasetDict, IterableDatasetDict

__all__ = ["KINDS", "load_local"]

LINES = (
    ("Beautiful is better", "than ugly."),
    ("Explicit is", "better than implicit."),
    ("Simple is better", "than complex."),
    ("Readability", "counts."),
    ("Errors should never", "pass silently."),
    ("Now is better", "than never."),
    ("Flat is", "better than nested."),
    ("In the face of ambiguity,", "refuse the temptation to guess."),
    ("Although practicality", "beats purity."),
)
WORSE = "of all the other things."


def _say(role: str, text: str) -> list[dict[str, str]]:
    return [{"role": role, "content": text}]


def _keep(_: str, text: str) -> str:
    return text


def _make_row(kind: str, say: Callable[[str, str], Any], index: int) -> dict[str, Any]:
    prompt, completion = LINES[index % len(LINES)]
    asked, good, bad = say("user", prompt), say("assistant", " " + completion), say("assistant", " " + WORSE)
    fields: Mapping[str, dict[str, Any]] = {
        "prompt_only": {"prompt": asked},
        "prompt_completion": {"prompt": asked, "completion": good},
        "preference": {"prompt": asked, "chosen": good, "rejected": bad},
        "implicit_prompt_preference": {"chosen": asked + good, "rejected": asked + bad},
        "unpaired_preference": {"prompt": asked, "completion": bad if index % 2 else good, "label": not index % 2},
    }
    if kind == "language_modeling":
        return {"text": asked + good} if say is _keep else {"messages": asked + good}
    return fields[kind]


KINDS = (
    "language_modeling",
    "prompt_only",
    "prompt_completion",
    "preference",
    "implicit_prompt_preference",
    "unpaired_preference",
)


def load_local(
    path: str, name: str, split: str | None = None, *, streaming: bool = False
) -> Dataset | DatasetDict | IterableDatasetDict:
    """Stand in for `datasets.load_dataset` with ``"trl-internal-testing/zen"``.

    Args:
        path: The id.
        name: ``"standard_"`` or ``"conversational_"``, and one of `KINDS`.
        split: ``"train"`` or ``"test"``; both if `None`.
        streaming: Whether to return iterable data sets.

    Raises:
        LookupError: There are no local data under this id or name.
    """
    style, _, kind = name.partition("_")
    if path != "trl-internal-testing/zen" or kind not in KINDS or style not in ("standard", "conversational"):
        raise LookupError(f"There are no local data for {path!r}, {name!r}.")
    say = _keep if style == "standard" else _say
    sizes = {"train": range(17), "test": range(17, 19)}
    made = {key: Dataset.from_list([_make_row(kind, say, index) for index in rows]) for key, rows in sizes.items()}
    data = {key: rows.to_iterable_dataset() for key, rows in made.items()} if streaming else made
    if split is not None:
        return data[split]
    return IterableDatasetDict(data) if streaming else DatasetDict(data)

"""The demo's data: functions of the standard library and their docstrings.

Every machine that runs this has it: some thousand examples of real code, each with a summary by its author.
"""

from __future__ import annotations

import ast
import contextlib
import dataclasses
import hashlib
import json
import platform
import random
import re
import sysconfig
import textwrap
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lora_plugins.text import write_json

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase

__all__ = [
    "QUESTION",
    "Example",
    "collator",
    "collect_examples",
    "encode",
    "make_dataset",
    "prompt_text",
    "read_examples",
    "split_examples",
]


#: Folders beside the standard library's modules that hold third-party code, tests, data or programs.
_LEFT_OUT = frozenset({"site-packages", "dist-packages", "test", "tests", "idlelib", "turtledemo", "pydoc_data"})

#: Bounds on the characters of a function's source and of its summary.
_SOURCE_LENGTH = (60, 900)
_SUMMARY_LENGTH = (20, 140)

#: Raise it when other examples are collected, so that what is kept is left alone.
_LAYOUT = 1

QUESTION = "Summarize what this Python function does, in one sentence.\n\n{source}"


@dataclass(frozen=True, order=True)
class Example:
    """One function and what it does.

    Attributes:
        module: Dotted name of the module it is from.
        source: Its source code, without the docstring.
        summary: The docstring's first sentence.
    """

    module: str
    source: str
    summary: str

    @property
    def package(self) -> str:
        """The top-level module or package it belongs to, by which examples are split."""
        return self.module.partition(".")[0]


def collect_examples(root: Path | None = None) -> list[Example]:
    """Read all examples from the files of a library, without importing any.

    Args:
        root: Its folder; default is this interpreter's standard library.

    Returns:
        Examples in a fixed order; no source and no summary occurs twice.
    """
    root = root or Path(sysconfig.get_paths()["stdlib"])
    found: dict[str, Example] = {}
    summaries: set[str] = set()
    for path in _list_files(root):
        for example in _read_examples(path, ".".join(path.relative_to(root).with_suffix("").parts)):
            summary = example.summary.casefold()
            if summary not in summaries and example.source not in found:
                summaries.add(summary)
                found[example.source] = example
    return list(found.values())


def read_examples(cache: Path) -> list[Example]:
    """Return the examples of this interpreter's standard library, read from the library once and kept in a file.

    Args:
        cache: Folder for the file.
    """
    root = Path(sysconfig.get_paths()["stdlib"])
    # Distributions patch the library within one version.
    state = f"{root} {platform.python_version()} {platform.python_build()} {root.stat().st_mtime_ns}"
    kept = cache / f"examples-{hashlib.sha256(state.encode()).hexdigest()[:16]}-{_LAYOUT}.json"
    try:
        return [Example(**row) for row in json.loads(kept.read_text(encoding="utf-8"))]
    except (OSError, ValueError, TypeError):
        examples = collect_examples(root)
    # What cannot be kept is read again next time.
    with contextlib.suppress(OSError):
        write_json(kept, [dataclasses.asdict(example) for example in examples])
    return examples


def split_examples(
    examples: Iterable[Example], *, held_out: float = 0.15, seed: int = 0
) -> tuple[list[Example], list[Example]]:
    """Split by top-level module, so that nothing of a held-out module is seen in training.

    Args:
        examples: What `collect_examples` returns.
        held_out: Share of the modules to hold out.
        seed: Decides which modules, and the order of the examples.

    Returns:
        Examples for training and for evaluation, each in a shuffled order.
    """
    examples = list(examples)
    packages = sorted({example.package for example in examples})
    generator = random.Random(seed)  # noqa: S311 - shuffles an example, protects nothing
    generator.shuffle(packages)
    unseen = set(packages[: round(len(packages) * held_out)])
    train = [example for example in examples if example.package not in unseen]
    test = [example for example in examples if example.package in unseen]
    generator.shuffle(train)
    generator.shuffle(test)
    return train, test


def prompt_text(example: Example, tokenizer: PreTrainedTokenizerBase) -> str:
    """Return the prompt of an example: by the tokenizer's chat template, else as plain text."""
    question = QUESTION.format(source=example.source)
    if not tokenizer.chat_template:
        return f"{question}\n\nSummary: "
    messages = [{"role": "user", "content": question}]
    text: str = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    return text


def encode(example: Example, tokenizer: PreTrainedTokenizerBase) -> dict[str, list[int]]:
    """Turn an example into token ids and labels, with labels on the answer and its end only."""
    # A chat template has written the special tokens already.
    special = not tokenizer.chat_template
    prompt: list[int] = tokenizer(prompt_text(example, tokenizer), add_special_tokens=special)["input_ids"]
    answer: list[int] = tokenizer(example.summary, add_special_tokens=False)["input_ids"]
    answer = [*answer, tokenizer.eos_token_id]
    return {"input_ids": [*prompt, *answer], "labels": [-100] * len(prompt) + answer}


def make_dataset(
    examples: Iterable[Example], tokenizer: PreTrainedTokenizerBase, *, count: int, max_tokens: int
) -> Dataset:
    """Encode the first ``count`` examples of at most ``max_tokens`` tokens.

    Longer ones are passed over rather than cut, because the end that would be lost is the answer.
    """
    from datasets import Dataset

    rows: list[dict[str, list[int]]] = []
    for example in examples:
        if len(rows) == count:
            break
        row = encode(example, tokenizer)
        if len(row["input_ids"]) <= max_tokens:
            rows.append(row)
    return Dataset.from_list(rows)


def collator(tokenizer: PreTrainedTokenizerBase) -> Any:
    """Return a collator that pads a batch to its longest row, with label -100 on the padding."""
    from transformers import DataCollatorForSeq2Seq

    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return DataCollatorForSeq2Seq(tokenizer, padding=True, label_pad_token_id=-100)


def _list_files(root: Path) -> list[Path]:
    paths = (path for path in root.rglob("*.py") if not _LEFT_OUT & set(path.relative_to(root).parts))
    return sorted(paths, key=lambda path: path.relative_to(root).as_posix())


def _read_examples(path: Path, module: str) -> Iterator[Example]:
    try:
        text = path.read_text(encoding="utf-8")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            tree = ast.parse(text)
    except (UnicodeDecodeError, SyntaxError, ValueError):
        # The library keeps a few files that are broken on purpose.
        return
    lines = text.splitlines()
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            summary = _find_first_sentence(ast.get_docstring(node) or "")
            source = _remove_docstring(node, lines)
            if _fits(len(summary), _SUMMARY_LENGTH) and _fits(len(source), _SOURCE_LENGTH):
                yield Example(module, source, summary)


def _fits(length: int, bounds: tuple[int, int]) -> bool:
    return bounds[0] <= length <= bounds[1]


def _find_first_sentence(docstring: str) -> str:
    """Return the text up to the first full stop, on one line; empty if there is none."""
    paragraph = " ".join(docstring.strip().partition("\n\n")[0].split())
    sentence = re.match(r"[A-Z][^.:`<>|]*[a-z)'\"]\.(?=\s|$)", paragraph)
    return sentence.group() if sentence else ""


def _remove_docstring(node: ast.FunctionDef | ast.AsyncFunctionDef, lines: list[str]) -> str:
    """Return a function's source without its docstring; empty if no body is left."""
    docstring = node.body[0]
    if len(node.body) == 1 or docstring.lineno == node.lineno or docstring.end_lineno is None:
        return ""
    head = lines[node.lineno - 1 : docstring.lineno - 1]
    body = "\n".join(lines[docstring.end_lineno : node.end_lineno]).lstrip("\n")
    return textwrap.dedent("\n".join([*head, body])).strip()

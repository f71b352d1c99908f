"""Find the class of a base that an adapter's tensors fit."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from registry.base.classes import rows_of_embedding
from registry.base.fingerprint import ROWS
from registry.base.peft_fields import read_peft_config
from registry.base.places import place_tensors
from registry.base.stored import StoredAdapter
from registry.base.target import Base, Candidate
from registry.errors import BaseMismatch, UnsafeFile
from registry.formats.paths import ADAPTER_CONFIG
from registry.formats.patterns import find_slow
from registry.formats.strict_json import shown

if TYPE_CHECKING:
    import torch
    from torch import nn

__all__ = ["Findings", "choose_candidate", "fit_base"]

#: Rows that are compared at a time.
_CHUNK = 4096
#: Relative and absolute tolerance for one value rounded to two different 16-bit formats.
_TOLERANCE = (2.0**-6, 2.0**-12)


@dataclass
class Findings:
    """Problems of an adapter on one base, and what could not be compared.

    Attributes:
        problems: Clauses that say why it does not fit.
        not_compared: What could not be compared, with the reason.
        rename: See `Placement`.
        copies: Stored embeddings and heads that repeat all values of the base's own.
    """

    problems: list[str] = field(default_factory=list)
    not_compared: list[str] = field(default_factory=list)
    rename: tuple[str, str] | None = None
    copies: list[str] = field(default_factory=list)


def choose_candidate(adapter: StoredAdapter, candidates: Iterator[Candidate]) -> Candidate:
    """Return the first candidate class that the adapter's tensors fit; the first candidate if none fits.

    Raises:
        BaseMismatch: transformers cannot build any of them.
    """
    return fit_base(adapter, candidates, None)[0]


def fit_base(adapter: StoredAdapter, candidates: Iterator[Candidate], base: Base | None) -> tuple[Candidate, Findings]:
    """Return the first candidate class that the adapter's tensors fit, or the first candidate with its problems.

    Args:
        adapter: The adapter.
        candidates: Candidate classes of the base.
        base: The base whose tensors are compared; ``None`` compares names and shapes only.

    Raises:
        BaseMismatch: transformers cannot build any of them.
    """
    first: tuple[Candidate, Findings] | None = None
    failure: BaseMismatch | None = None
    for candidate in candidates:
        try:
            found = candidate, _find_problems(adapter, candidate, base)
        except BaseMismatch as error:
            failure = failure or error
            continue
        if not found[1].problems:
            return found
        first = first or found
    if first is None:
        raise failure or BaseMismatch(f"{adapter.title}: transformers has no class for this base. Give it as a model.")
    return first


def _find_problems(adapter: StoredAdapter, candidate: Candidate, base: Base | None) -> Findings:
    empty = candidate.make_empty()
    found = Findings(_check_vocabulary(adapter, rows_of_embedding(empty)))
    config, _ = read_peft_config(adapter)
    _check_expressions(adapter, [name for name, _ in empty.named_modules()])
    placed = place_tensors(adapter.tensors, config, empty)
    found.problems += placed.problems
    found.rename = placed.rename
    if base is not None and not found.problems:
        found.problems += _check_added_rows(adapter, placed.left_out, base, _count_special_rows(empty))
        for name, names in placed.copies.items():
            _check_copy(found, adapter, name, names, base)
    return found


def _check_expressions(adapter: StoredAdapter, modules: list[str]) -> None:
    """Check that PEFT will soon be done with the expressions of the configuration.

    Raises:
        UnsafeFile: One takes too long.
    """
    slow = find_slow(adapter.config.expressions(), modules)
    if slow is not None:
        raise UnsafeFile(
            f"{adapter.title}: {slow[0]} of {ADAPTER_CONFIG} has the expression {shown(slow[1])}, which takes too long "
            f"to match with the {len(modules):,} modules of this base; name the modules instead"
        )


def _check_vocabulary(adapter: StoredAdapter, here: int | None) -> list[str]:
    trained = adapter.vocabulary
    if here is None:
        return []
    if adapter.config.trained_tokens > here:
        return [
            f"it trains the token {adapter.config.trained_tokens - 1}, and the vocabulary has {here:,} entries here. "
            f"Add the tokens here, too: base.resize_token_embeddings({adapter.config.trained_tokens})"
        ]
    if trained is None or trained == here:
        return []
    return [
        f"the vocabulary has {here:,} entries here and had {trained:,} in training. If tokens were added, add them "
        f"here, too: base.resize_token_embeddings({trained})"
    ]


def _count_special_rows(empty: nn.Module) -> int:
    """Return how many rows of its embedding a class makes beside those of the vocabulary (CPM-Ant: for prompts)."""
    rows = rows_of_embedding(empty)
    config: Any = getattr(empty, "config", None)
    size = getattr(config.get_text_config(), "vocab_size", None) if hasattr(config, "get_text_config") else None
    return max(0, rows - size) if rows is not None and isinstance(size, int) else 0


def _check_added_rows(adapter: StoredAdapter, left_out: list[str], base: Base, special: int) -> list[str]:
    """Check that the adapter carries the rows of added tokens: their values exist nowhere else."""
    if base.vocabulary is None or not left_out:
        return []
    own = base.vocabulary + special
    # A folder does not say how large the vocabulary was; a row that it trains was there.
    trained = max(adapter.vocabulary or 0, adapter.config.trained_tokens)
    if set(range(own, trained)) <= adapter.config.token_indices:
        return []
    return [
        f"{trained - own:,} entries were added to the vocabulary of {own:,} in training, and its file does not hold "
        f"their rows of {left_out[0]}. Save it again with save_embedding_layers=True, or push the model itself"
    ]


def _check_copy(found: Findings, adapter: StoredAdapter, name: str, names: tuple[str, ...], base: Base) -> None:
    """Check that a whole embedding stored under a base name holds the base's own rows, plus rows for added tokens.

    When the vocabulary has grown, PEFT 0.21.2 saves the whole embedding and head, and replaces the base's with them on
    loading. Training an adapter leaves the old rows unchanged.
    """
    inner, stored = names[0], adapter.tensors[name].shape[0]
    count = min(stored, base.vocabulary or stored)
    rows = _read_rows(base, names, count if base.local else ROWS)
    if rows is None or not rows.is_floating_point() or rows.device.type == "meta":
        if base.vocabulary is not None and base.vocabulary != stored:
            found.not_compared.append(f"the rows of {inner} that the base has, too (none can be read here)")
        else:
            found.problems.append(f"its file would replace {inner} of the base, which its configuration does not train")
        return
    same = _count_equal(adapter.rows(name, len(rows)), rows)
    if same == len(rows):
        found.copies += [name] if same == stored == base.vocabulary else []
        return
    if base.vocabulary is None and same >= max(1, len(rows) // 2):
        found.not_compared.append(
            f"rows {same:,} to {stored - 1:,} of {inner} (the base's own vocabulary is not known)"
        )
        return
    found.problems.append(
        f"its file would replace {inner} of the base, from row {same:,} on with other values, and its configuration "
        "does not train them"
    )


def _read_rows(base: Base, names: tuple[str, ...], count: int) -> torch.Tensor | None:
    """Read the first rows of a weight of the base under the first of its names that is there."""
    found = (base.tensors.rows(name, count) for name in names if base.tensors is not None)
    return next((rows for rows in found if rows is not None), None)


def _count_equal(one: torch.Tensor, other: torch.Tensor) -> int:
    """Return how many leading rows of two tensors agree within the tolerance of 16-bit formats."""
    relative, absolute = _TOLERANCE
    for start in range(0, len(other), _CHUNK):
        a, b = (part[start : start + _CHUNK].detach().to("cpu").float() for part in (one, other))
        if a.shape != b.shape:
            return 0
        near = (a - b).abs() <= absolute + relative * b.abs()
        same = near.flatten(1).all(1) if near.ndim > 1 else near
        if not bool(same.all()):
            return start + int(same.logical_not().nonzero()[0])
    return len(other)

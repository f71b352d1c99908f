"""Find the backend or the nearest change that makes a run fit in memory."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch

from lora_plugins.planning.amounts import USABLE, show_bytes
from lora_plugins.planning.records import Row
from lora_plugins.quantization.request import Quantization
from lora_plugins.quantization.selftest import weight_error

__all__ = ["AUTO", "Change", "Choice", "Scenario", "choose_backend", "nearest_change"]


#: Most changes that are tried together.
_MOST_CHANGES = 4


@dataclass(frozen=True)
class Scenario:
    """The settings of a run that decide its memory.

    Attributes:
        quantization: Backend of the base, empty for float.
        batch_size: Examples per device.
        length: Tokens per example.
        checkpointing: Whether blocks are recomputed in the backward pass.
        optim: Name of the optimizer.
        strategy: How devices share the work.
        devices: Number of devices.
    """

    quantization: str
    batch_size: int
    length: int
    checkpointing: bool
    optim: str
    strategy: str
    devices: int


@dataclass(frozen=True)
class Change:
    """A change in words, and the function that applies it to a scenario."""

    words: str
    apply: Callable[[Scenario], Scenario]


def nearest_change(
    scenario: Scenario, backends: Sequence[str], measure: Callable[[Scenario], int | None], limit: float
) -> str:
    """Describe the nearest change that makes a run fit, or say that none of those tried does.

    Args:
        scenario: The requested run, which does not fit.
        backends: Names of backends that can run, those with more bits first.
        measure: Returns the bytes per device of a scenario, ``None`` where it is impossible.
        limit: Usable bytes per device.
    """
    best: tuple[int, str] | None = None
    groups = [list(group) for group in _list_groups(scenario, backends)]
    for count in range(1, min(_MOST_CHANGES, len(groups)) + 1):
        for chosen in itertools.combinations(groups, count):
            for changes in itertools.product(*chosen):
                size = measure(_apply_changes(scenario, changes))
                if size is None:
                    continue
                words = " and ".join(change.words for change in changes)
                if size <= limit:
                    return f"With {words} it takes {show_bytes(size)} on each device and fits."
                if best is None or size < best[0]:
                    best = (size, words)
    if best is None:
        return "No change that was tried makes it smaller."
    return f"Nothing that was tried makes it fit; the smallest is {show_bytes(best[0])} on each device, with {best[1]}."


def _apply_changes(scenario: Scenario, changes: Sequence[Change]) -> Scenario:
    for change in changes:
        scenario = change.apply(scenario)
    return scenario


def _list_groups(now: Scenario, backends: Sequence[str]) -> Iterator[list[Change]]:
    """Yield groups of mutually exclusive changes, in the order of what they cost: time, precision, money."""
    if not now.checkpointing:
        yield [Change("gradient checkpointing", lambda s: replace(s, checkpointing=True))]
    smaller = [now.batch_size // 2**n for n in range(1, now.batch_size.bit_length())]
    if smaller:
        yield [_change_batch(now.batch_size, size) for size in smaller]
    if not now.quantization and backends:
        yield [_change_quantization(name) for name in backends]
    elif now.quantization and backends and backends[-1] != now.quantization:
        yield [_change_quantization(backends[-1])]
    if now.optim.startswith("adamw_torch"):
        yield [Change("optim='adamw_8bit'", lambda s: replace(s, optim="adamw_8bit"))]
    if now.strategy in ("single", "ddp"):
        counts = [n for n in (2, 4, 8) if n > now.devices] or [now.devices]
        yield [_shard(n) for n in counts]
    elif now.strategy == "fsdp" and now.devices < 8:
        yield [_shard(n) for n in (2, 4, 8) if n > now.devices]
    if now.length >= 512:
        yield [_change_length(now.length // 2**n) for n in (1, 2, 3) if now.length // 2**n >= 256]


def _change_batch(before: int, size: int) -> Change:
    steps = -(-before // size)
    return Change(
        f"batch size {size} and {steps} times the gradient accumulation", lambda s: replace(s, batch_size=size)
    )


def _change_quantization(name: str) -> Change:
    return Change(f"quantization={name!r}", lambda s: replace(s, quantization=name))


def _shard(devices: int) -> Change:
    return Change(f"FSDP over {devices} devices", lambda s: replace(s, strategy="fsdp", devices=devices))


def _change_length(tokens: int) -> Change:
    return Change(f"sequences of {tokens} tokens", lambda s: replace(s, length=tokens))


#: What users write in ``quantization=``.
AUTO = "auto"


@dataclass(frozen=True)
class Choice:
    """A chosen backend.

    Attributes:
        quantization: Its name, empty for a float base.
        reason: Why, one sentence without a full stop.
    """

    quantization: str
    reason: str


def choose_backend(rows: Iterable[Row], backends: Mapping[str, Quantization | None], limit: int) -> Choice:
    """Return the least lossy backend whose run fits, or the smallest run if none does.

    Lossy is what the backend does to a small layer of normally distributed weights: the distance of its dequantized
    weight from the original one. Backends that differ by less than a hundredth are alike, and their priority decides.

    Args:
        rows: The planned runs, one for each backend.
        backends: Backend by the name in a row.
        limit: Memory of one device in bytes.
    """
    usable = [row for row in rows if not row.unavailable]
    errors = {row.quantization: _measure(backends[row.quantization]) for row in usable}
    order = sorted(usable, key=lambda row: _rank(row, errors, backends))
    fitting = next((row for row in order if row.fits), None)
    if fitting is None:
        smallest = min(order, key=lambda row: row.memory.total)
        return Choice(
            smallest.quantization,
            f"quantization='auto' took {_name(smallest)}, the smallest: it needs {show_bytes(smallest.memory.total)} "
            f"and no backend fits into {show_bytes(USABLE * limit)}, the usable part of {show_bytes(limit)}",
        )
    passed = order[: order.index(fitting)]
    better = "; " + ", ".join(f"{_name(row)} needs {show_bytes(row.memory.total)}" for row in passed) if passed else ""
    error = errors[fitting.quantization]
    return Choice(
        fitting.quantization,
        f"quantization='auto' took {_name(fitting)}, the least lossy that fits: its weights are {error:.1%} from the "
        f"float ones and it needs {show_bytes(fitting.memory.total)} of {show_bytes(USABLE * limit)}, the usable part "
        f"of {show_bytes(limit)}{better}",
    )


def _measure(quantization: Quantization | None) -> float:
    return 0.0 if quantization is None else weight_error(quantization, torch.device("cpu"), torch.float32)


def _rank(row: Row, errors: Mapping[str, float], backends: Mapping[str, Quantization | None]) -> tuple[float, int]:
    backend = backends[row.quantization]
    return round(errors[row.quantization], 2), 0 if backend is None else -backend.quantizer.priority


def _name(row: Row) -> str:
    return repr(row.quantization) if row.quantization else "a float base"

"""Mutated input: every parser, and a whole pull, ends with a typed error or a result, and in two seconds.

The mutator knows the formats: it changes values of JSON documents by kind, moves bytes of headers, cuts and joins. A
few hundred inputs are part of every run; the slow test takes a hundred thousand.
"""

from __future__ import annotations

import json
import random
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from hubs import FolderPlace
from places import fetch, use_own_folders
from releases import NAME, contents, draft, release

from registry.catalog.memory import parse_record
from registry.catalog.state import Move, State, Yank
from registry.checks.table import check_weights
from registry.errors import RegistryError
from registry.formats.adapter_config import AdapterConfig
from registry.formats.manifest import Manifest
from registry.formats.references import Reference
from registry.formats.strict_json import JsonRefused
from registry.formats.weights import read_header
from registry.pulling.cache import Cache
from registry.pulling.lockfile import Lock

#: Values that have broken parsers before.
NASTY: list[Any] = [
    None,
    True,
    False,
    0,
    -1,
    1,
    2**31,
    2**53,
    2**63,
    10**18,
    1e308,
    -0.0,
    "",
    "\ud800",
    "\x00",
    "\x1b[2J\u202e",
    "../x",
    "/etc",
    "a" * 10_000,
    "9" * 62,
    "1.0.0",
    "v1",
    "0" * 40,
    "f" * 64,
    [],
    {},
    [[]],
    [None],
    {"": {}},
    ["x"] * 1000,
    ".?" * 60,
    "(.*)*#",
    {"__class__": 1},
    {"a": {"b": {"c": {}}}},
    "NaN",
    "https://x@y",
    "org/name@1.0.0",
]


BYTES = [b"[" * 5000, b"\x00" * 9, b"\xff", b'"', b"\\ud800", b"NaN", b"1" * 5000]


def mutate_json(source: random.Random, document: bytes) -> bytes:
    """Change some values or keys of a document, and sometimes its bytes."""
    try:
        value = json.loads(document)
    except (ValueError, RecursionError):
        return mutate_bytes(source, document)
    for _ in range(source.randint(1, 3)):
        value = _mutate(source, value, 6)
    data = json.dumps(value).encode()
    return mutate_bytes(source, data) if source.random() < 0.2 else data


def _mutate(source: random.Random, value: Any, depth: int) -> Any:
    if not isinstance(value, (dict, list)) or not value or depth == 0 or source.random() < 0.1:
        return source.choice(NASTY)
    if isinstance(value, list):
        index = source.randrange(len(value))
        return [*value[:index], _mutate(source, value[index], depth - 1), *value[index + source.randint(0, 1) :]]
    key = source.choice(list(value))
    action = source.random()
    if action < 0.15:
        return {name: item for name, item in value.items() if name != key}
    if action < 0.3:
        return {**value, str(source.choice(NASTY)): value[key]}
    return {**value, key: _mutate(source, value[key], depth - 1)}


def mutate_bytes(source: random.Random, data: bytes) -> bytes:
    """Flip, cut, double or insert bytes."""
    at = source.randrange(len(data) + 1)
    action = source.randrange(5)
    if action == 0 and at < len(data):
        return data[:at] + bytes([data[at] ^ (1 << source.randrange(8))]) + data[at + 1 :]
    if action == 1:
        return data[:at]
    if action == 2:
        return data[:at] + data[at // 2 :]
    if action == 3:
        return (
            data[:at]
            + source.choice([b"[" * 5000, b"\x00" * 9, b"\xff", b'"', b"\\ud800", b"NaN", b"1" * 5000])
            + data[at:]
        )
    return data[:at] + source.randbytes(8) + data[at + 8 :]


def mutate_weights(source: random.Random, data: bytes) -> bytes:
    """Change the header's JSON, its length, or the bytes of the file."""
    length = int.from_bytes(data[:8], "little")
    header, rest = data[8 : 8 + length], data[8 + length :]
    action = source.random()
    if action < 0.6:
        header = mutate_json(source, header)
        length = len(header)
    elif action < 0.8:
        length = source.choice([0, 1, length - 1, length + 1, 2**31, 2**63, 2**64 - 1, len(data)])
    else:
        return mutate_bytes(source, data)
    return length.to_bytes(8, "little") + header + (mutate_bytes(source, rest) if source.random() < 0.3 else rest)


def read_weights(data: bytes) -> object:
    return read_header(lambda start, size: data[start : start + size], len(data), "fuzzed")


def read_values(data: bytes) -> object:
    path = Path("fuzzed.safetensors")
    path.write_bytes(data)
    return check_weights(path, AdapterConfig.parse(contents()["adapter_config.json"]))


def read_lock(data: bytes) -> object:
    path = Path("fuzzed.lock")
    path.write_bytes(data)
    return Lock(path).entries()


def make_targets(folder: Path) -> dict[str, tuple[bytes, Callable[..., bytes], Callable[[bytes], object]]]:
    """Each parser with a sound document and the mutator for it."""
    place = FolderPlace(folder / "registry")
    release(place.hub, "1.0.0")
    fetch(place, lock=True)
    files = contents()
    config = json.loads(files["adapter_config.json"]) | {
        "rank_pattern": {"q_proj": 2},
        "alpha_pattern": {"q": 1},
        "layers_pattern": ["layers"],
        "modules_to_save": ["score"],
        "layer_replication": [[0, 2]],
        "layers_to_transform": [0],
        "exclude_modules": ".*x",
        "auto_mapping": {"base_model_class": "X"},
        "trainable_token_indices": [1],
        "task_type": "CAUSAL_LM",
        "lora_dropout": 0.1,
        "peft_version": "0.1",
    }
    state = State({"1.0.0": Yank("why", "2026-01-31T12:00:00Z")}, {"best": (Move("1.0.0", "2026-01-31T12:00:00Z"),)}, 3)
    record = Cache().record_path(place.hub.location, NAME).read_bytes()
    return {
        "configuration": (json.dumps(config).encode(), mutate_json, AdapterConfig.parse),
        "manifest": (draft("1.0.0").manifest.to_bytes(), mutate_json, Manifest.parse),
        "state": (state.to_bytes(), mutate_json, State.parse),
        "record": (record, mutate_json, parse_record),
        "lock file": (Path("adapters.lock").read_bytes(), mutate_json, read_lock),
        "header": (files["adapter_model.safetensors"], mutate_weights, read_weights),
        "values": (files["adapter_model.safetensors"], mutate_weights, read_values),
        "reference": (
            b"org/name>=1.0,<2",
            mutate_bytes,
            lambda data: Reference.parse(data.decode("utf-8", "replace")),
        ),
    }


@pytest.fixture(autouse=True)
def _own_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    use_own_folders(tmp_path, monkeypatch)


@dataclass
class Tally:
    """What came of inputs: each is taken, or refused by an error of ours, within two seconds of processor time."""

    taken: int = 0
    refused: int = 0
    slowest: float = 0.0

    def attempt(self, call: Callable[[], object], seed: object) -> None:
        """Try one input."""
        started = time.thread_time()
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                call()
            self.taken += 1
        except (RegistryError, JsonRefused):
            self.refused += 1
        except BaseException as error:
            raise AssertionError(f"input {seed}") from error
        seconds = time.thread_time() - started
        assert seconds < 2, f"input {seed}"
        self.slowest = max(self.slowest, seconds)

    def __str__(self) -> str:
        return (
            f"{self.taken + self.refused:,} inputs: {self.refused:,} refused by an error of ours, {self.taken:,} taken"
            f", 0 unclean, the slowest in {self.slowest:.2f} s"
        )


@pytest.mark.parametrize("count", [60, pytest.param(12_500, marks=pytest.mark.slow)])
def test_mutated_files_are_taken_or_refused_by_an_error_of_ours(
    tmp_path: Path, count: int, capsys: pytest.CaptureFixture[str]
) -> None:
    tally = Tally()
    for name, (document, mutate, parse) in make_targets(tmp_path).items():
        parse(document)
        before = tally.refused
        for number in range(count):
            data = mutate(random.Random(f"{name} {number}"), document)
            tally.attempt(lambda data=data, parse=parse: parse(data), (name, number))  # type: ignore[misc]
        assert tally.refused - before > count // 10, name
    with capsys.disabled():
        print(f"\n{tally}")


@pytest.mark.parametrize("count", [40, pytest.param(3000, marks=pytest.mark.slow)])
def test_a_pull_from_a_mutated_registry_ends_well(
    tmp_path: Path, count: int, capsys: pytest.CaptureFixture[str]
) -> None:
    """Any file of a folder registry, of its release, or of the machine's memory."""
    place, tally = FolderPlace(tmp_path / "registry"), Tally()
    release(place.hub, "1.0.0")
    release(place.hub, "1.1.0", 1)
    fetch(place, f"{NAME}@1.0.0", lock=True)
    files = sorted(path for root in (place.root, Cache().folder, Path()) for path in root.rglob("*") if path.is_file())
    for number in range(count):
        source = random.Random(number)
        path = source.choice(files)
        before, mode = path.read_bytes(), path.stat().st_mode
        path.chmod(0o644)
        mutate = mutate_weights if path.suffix == ".safetensors" else mutate_json if before else mutate_bytes
        path.write_bytes(mutate(source, before or b"{}"))
        folders = {each: each.stat().st_mode for each in (path.parent,)}
        tally.attempt(lambda: fetch(place, lock=False), (path.name, number))
        for folder, bits in folders.items():
            if folder.exists():
                folder.chmod(bits | 0o700)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.unlink(missing_ok=True)
        path.write_bytes(before)
        path.chmod(mode)
    fetch(place, f"{NAME}@1.0.0", lock=False)
    with capsys.disabled():
        print(f"\npulls from a registry: {tally}")

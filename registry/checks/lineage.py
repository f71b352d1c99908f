"""What an adapter was trained from: read, cleaned of private names, shown.

A lineage is plain data. Each of its fields (`FIELDS`) is recorded, or stands in ``not_recorded`` with the reason.
"""

from __future__ import annotations

import getpass
import hashlib
import ipaddress
import os
import re
import socket
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit, urlunsplit

from registry.disk.files import open_regular, read_small
from registry.formats.fields import is_finite
from registry.formats.paths import ADAPTER_WEIGHTS
from registry.formats.references import is_path
from registry.formats.strict_json import JsonRefused, canonical, parse

__all__ = [
    "FIELDS",
    "LINEAGE_FILE",
    "LINEAGE_WEIGHTS",
    "clean_lineage",
    "compare_lineage",
    "list_lineage",
    "read_lineage",
]

#: File beside an adapter's weights that holds its lineage.
LINEAGE_FILE = "lineage.json"
#: Key in that file of the sha256 of the adapter's weights that it belongs to; older files have none.
LINEAGE_WEIGHTS = "weights"
#: The fields in the order in which they are shown, each with its title.
FIELDS: Mapping[str, str] = {
    "dataset": "data set",
    "recipe": "recipe",
    "code": "code",
    "seed": "seed",
    "tracker": "tracker",
    "hardware": "hardware",
    "libraries": "libraries",
    "parent": "parent adapter",
    "losses": "losses",
}
#: Fields that are shown only where they are recorded.
_EXTRA = ("inputs", "checks", "resumed")
_MAX_BYTES = 512 * 1024
_MAX_TEXT = 20_000
_MAX_REASONS = 64
_DEPTH = 8
#: Values that are ids on a hub. What is not one is a local name.
_IDS = frozenset({"id", "dataset", "eval_dataset", "model", "push_base_model"})
_ID = re.compile(r"[A-Za-z0-9][\w.\-]{0,95}(?:/[A-Za-z0-9][\w.\-]{0,95})?(?:@[\w.\-/]{1,100})?", re.ASCII)
_DATA_FILE = re.compile(r"\.(?:jsonl?|csv|parquet|arrow|txt|gz|zip)$", re.IGNORECASE)
#: A path of two parts or more after a space, a quote or the like; a drive; a share; a file's address.
_PATH = re.compile(
    r"""(?:^|[\s"'`=(\[{,;:<>|])(?:~[\w-]*|/[\w.+@-]+)/[\w.+@-]|(?:^|\W)[A-Za-z]:[\\/]\w|\\\\\w+\\|\bfile:/""", re.ASCII
)
_PAGE = re.compile(r"/[\w/-]*", re.ASCII)
_WITHHELD = "it names a place on the machine where it was trained"


def read_lineage(folder: Path) -> dict[str, Any]:
    """Return the lineage that an adapter's folder holds, cleaned; every field not recorded if there is none.

    A file that names other weights than those beside it belongs to another adapter, and counts as none.
    """
    try:
        value = parse(read_small(folder / LINEAGE_FILE, _MAX_BYTES + 1), _MAX_BYTES)
    except FileNotFoundError:
        return clean_lineage(None, f"the folder holds no {LINEAGE_FILE}, which LoraCallback writes")
    except (OSError, JsonRefused):
        return clean_lineage(None, f"{LINEAGE_FILE} cannot be read")
    digest = value.get(LINEAGE_WEIGHTS) if isinstance(value, dict) else None
    if digest is not None and digest != _hash_weights(folder):
        return clean_lineage(None, "it belongs to other weights")
    return clean_lineage(value)


def _hash_weights(folder: Path) -> str | None:
    try:
        # The weights may be reached through a link, as in a cache.
        with os.fdopen(open_regular((folder / ADAPTER_WEIGHTS).resolve()), "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError:
        return None


def clean_lineage(value: Any, reason: str = "nothing recorded it") -> dict[str, Any]:
    """Return a lineage whose fields are known and plain, without names of this machine, its folders or its users.

    Args:
        value: The lineage, JSON values; or anything else.
        reason: Why a field is missing that neither stands in it nor in its ``not_recorded``.
    """
    given: Mapping[str, Any] = value if isinstance(value, Mapping) else {}
    told = given.get("not_recorded")
    reasons = {str(k): str(v) for k, v in told.items()} if isinstance(told, Mapping) else {}
    found: dict[str, Any] = {}
    for name in (*FIELDS, *_EXTRA):
        if name not in given:
            continue
        kept = _clean(given[name], name, reasons, 0)
        if kept is not None and kept not in ({}, []):
            found[name] = kept
        elif name not in reasons:
            reasons[name] = _WITHHELD if any(key.startswith(f"{name}.") for key in reasons) else "it is empty"
    missing = {name: reason for name in FIELDS if name not in found and name not in reasons}
    machine = _find_machine()
    told = {key: why for key, why in {**reasons, **missing}.items() if key not in found}
    private = {key: _WITHHELD if machine.names(text) else text for key, text in told.items()}
    found["not_recorded"] = {
        key: private[key][:300] for key in sorted(private)[:_MAX_REASONS] if not machine.names(key)
    }
    if len(canonical(found)) > _MAX_BYTES:
        return clean_lineage(None, "it is larger than a manifest may hold")
    return found


def _clean(value: Any, path: str, reasons: dict[str, str], depth: int) -> Any:
    """Return a value without what may not be told, and note the reason for each part that is left out."""
    if depth > _DEPTH:
        reasons[path] = "it is not plain data"
        return None
    if isinstance(value, float) and not is_finite(value):
        reasons[path] = "a value is not finite"
        return None
    if isinstance(value, (bool, int, float)):
        return value
    if isinstance(value, str):
        return _clean_text(value, path, reasons)
    if isinstance(value, Mapping):
        items = {str(k): _clean(v, f"{path}.{k}", reasons, depth + 1) for k, v in value.items() if v is not None}
        private = {key for key in items if _find_machine().names(key)}
        reasons.update({f"{path}.a name": _WITHHELD for _ in private})
        return {key: item for key, item in items.items() if item is not None and key not in private}
    if isinstance(value, (list, tuple)):
        cleaned = [_clean(item, path, reasons, depth + 1) for item in value]
        # A number that is missing keeps its place, because lists of a lineage are read side by side.
        return [new for new, old in zip(cleaned, value, strict=True) if new is not None or not isinstance(old, str)]
    return None


def _clean_text(text: str, path: str, reasons: dict[str, str]) -> str | None:
    key = path.rpartition(".")[2]
    if key == "url":
        shortened = _shorten_url(text)
        if shortened is None:
            reasons[path] = "the tracker runs on this machine, or in its network"
        return shortened
    local = key in _IDS and (is_path(text) or _ID.fullmatch(text) is None or _DATA_FILE.search(text) is not None)
    if local or _find_machine().names(text):
        reasons[path] = _WITHHELD
        return None
    if len(text) > _MAX_TEXT:
        reasons[path] = f"it has {len(text):,} characters"
        return None
    return text


@dataclass(frozen=True)
class _Machine:
    """Names that must not leave this machine."""

    host: re.Pattern[str] | None
    home: re.Pattern[str] | None
    user: str

    def names(self, text: str) -> bool:
        """Whether a text holds a path, the name of this machine, or one of its folders."""
        return any(pattern is not None and pattern.search(text) for pattern in (_PATH, self.home, self.host))


@lru_cache(maxsize=1)
def _find_machine() -> _Machine:
    host = socket.gethostname()
    # A usual name would hide ordinary words.
    telling = len(host) > 1 and host.partition(".")[0].lower() not in ("localhost", "host", "linux", "server")
    pattern = re.compile(rf"(?<![\w-]){re.escape(host)}(?![\w-])", re.IGNORECASE) if telling else None
    home = os.path.expanduser("~")
    at_home = re.compile(rf"{re.escape(home)}(?!\w)") if len(home) > 2 else None
    try:
        user = getpass.getuser()
    except (KeyError, OSError, ImportError):
        user = ""
    return _Machine(pattern, at_home, user)


def _shorten_url(text: str) -> str | None:
    """Return the public part of an address; ``None`` for one of this machine or of a private network."""
    try:
        parts = urlsplit(text)
        host, port = parts.hostname, parts.port
    except ValueError:
        return None
    machine = _find_machine()
    if parts.scheme not in ("http", "https") or host is None or machine.names(host) or _is_private(host):
        return None
    # The pages of some trackers are behind the "#".
    fragment = parts.fragment if _PAGE.fullmatch(parts.fragment) else ""
    if machine.user and machine.user in (*parts.path.split("/"), *fragment.split("/")):
        return None
    return urlunsplit((parts.scheme, host if port is None else f"{host}:{port}", parts.path, "", fragment))


def _is_private(host: str) -> bool:
    try:
        return not ipaddress.ip_address(host).is_global
    except ValueError:
        return "." not in host or host.endswith((".local", ".internal", ".lan", ".localhost", ".home.arpa"))


def compare_lineage(one: Mapping[str, Any], two: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Return what differs between two lineages: dotted field to the values of both, ``not recorded: why`` for none.

    Args:
        one: A manifest's ``lineage``; empty for a release from before it was recorded.
        two: Another one.
    """
    flat = [_flatten_lineage(each) for each in (one, two)]
    names = list(dict.fromkeys([*flat[0], *flat[1]]))
    pairs = {name: (_find(one, flat[0], name), _find(two, flat[1], name)) for name in names}
    return {name: pair for name, pair in pairs.items() if pair[0] != pair[1]}


def _flatten_lineage(lineage: Mapping[str, Any]) -> dict[str, Any]:
    """Return the plain values by dotted name; of the losses only their number, the first and the last."""
    found: dict[str, Any] = {}
    for name in (*FIELDS, *_EXTRA):
        if name == "losses" and name in lineage:
            found[name] = _describe_losses(lineage[name])
        elif name in lineage:
            _flatten_value(name, lineage[name], found)
    return found


def _flatten_value(name: str, value: Any, found: dict[str, Any]) -> None:
    if isinstance(value, Mapping):
        for key, item in value.items():
            _flatten_value(f"{name}.{key}", item, found)
    elif isinstance(value, list) and any(isinstance(item, Mapping) for item in value):
        for index, item in enumerate(value):
            _flatten_value(f"{name}.{index}", item, found)
    else:
        found[name] = value


def _find(lineage: Mapping[str, Any], flat: Mapping[str, Any], name: str) -> Any:
    """Return a value, or the reason why it, or a field that it is in, is missing."""
    if name in flat:
        return flat[name]
    reasons = lineage.get("not_recorded")
    if not lineage or not isinstance(reasons, Mapping):
        return "not recorded: the release is older than this record" if not lineage else None
    parts = name.split(".")
    above = (".".join(parts[:length]) for length in range(len(parts), 0, -1))
    return next((f"not recorded: {reasons[field]}" for field in above if field in reasons), None)


def list_lineage(lineage: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Return the lineage for a table: title and text; ``not recorded: why`` for what is missing.

    Args:
        lineage: A manifest's ``lineage``; empty for a release from before it was recorded.
    """
    known = lineage or clean_lineage(None, "the release is older than this record")
    reasons = known.get("not_recorded")
    reasons = reasons if isinstance(reasons, Mapping) else {}
    if not any(name in known for name in FIELDS) and len({*reasons.values()}) == 1:
        return [("lineage", f"not recorded: {next(iter(reasons.values()))}")]
    rows: list[tuple[str, str]] = []
    for name, title in {**FIELDS, "inputs": "tokenized", "checks": "checks"}.items():
        if name in known:
            rows += [(title if not part else f"{title}: {part}", text) for part, text in _describe(name, known[name])]
        elif name in FIELDS:
            rows.append((title, f"not recorded: {reasons.get(name, 'nothing recorded it')}"))
        inner = sorted(key for key in reasons if key.startswith(f"{name}."))
        rows += [(f"{title}: {key.partition('.')[2]}", f"not recorded: {reasons[key]}") for key in inner]
    return rows + [(f"resumed at step {step}", text) for step, text in _describe_resumed(known.get("resumed"))]


def _describe(name: str, value: Any) -> Iterator[tuple[str, str]]:
    if name == "losses":
        yield "", _describe_losses(value)
    elif name in ("dataset", "inputs") and isinstance(value, Mapping):
        for part, entry in value.items():
            yield part, _describe_rows(entry) if isinstance(entry, Mapping) else str(entry)
    elif name == "code" and isinstance(value, Mapping):
        changed = ", with changes that are not committed" if value.get("dirty") else ""
        yield "", f"commit {value.get('commit')} of {value.get('of', 'the script')}{changed}"
    elif name in ("recipe", "checks") and isinstance(value, Mapping):
        for key, item in value.items():
            yield str(key), _show(item)
    else:
        yield "", _show(value)


def _describe_rows(entry: Mapping[str, Any]) -> str:
    at = f" at {entry['revision']}" if entry.get("revision") else ""
    parts = [f"{entry['id']}{at}"] if entry.get("id") else []
    parts += [f"{entry['rows']:,} rows"] if isinstance(entry.get("rows"), int) else []
    columns = entry.get("columns")
    parts += [f"columns {', '.join(map(str, columns))}"] if isinstance(columns, list) else []
    parts += [f"sha256 {entry['sha256']}"] if entry.get("sha256") else []
    return "; ".join(parts)


def _describe_losses(value: Any) -> str:
    steps = value.get("step") if isinstance(value, Mapping) else None
    losses = value.get("loss") if isinstance(value, Mapping) else None
    if not isinstance(steps, list) or not isinstance(losses, list) or not steps or len(steps) != len(losses):
        return "none"
    return f"{len(steps):,} of steps {steps[0]} to {steps[-1]}, first {_show(losses[0])}, last {_show(losses[-1])}"


def _describe_resumed(value: Any) -> Iterator[tuple[str, str]]:
    for entry in value if isinstance(value, list) else ():
        changed = entry.get("changed") if isinstance(entry, Mapping) else None
        if isinstance(changed, Mapping):
            texts = [f"{key} {_show(pair)}" for key, pair in changed.items()]
            yield str(entry.get("step")), "; ".join(texts) or "in the same environment"


def _show(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.6g}"
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {_show(item)}" for key, item in value.items())
    if isinstance(value, list):
        return ", ".join(map(_show, value)) or "none"
    return "none" if value is None else str(value)

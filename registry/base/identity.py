"""Check whether a base model is the one an adapter was trained on."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from registry.base.files import BaseFiles
from registry.base.fingerprint import Comparison, compare, config_values
from registry.base.target import Base, open_base_hub
from registry.errors import RegistryError
from registry.formats.records import BaseRecord

if TYPE_CHECKING:
    from registry.hubs.protocol import Hub

__all__ = ["Identity", "compare_identity"]

_EXAMPLES = 3
#: The best-known configuration keys; messages list them first.
_KNOWN_BY = ("model_type", "hidden_size", "n_embd", "num_hidden_layers", "n_layer", "intermediate_size")
_BLOBS = "blobs"


@dataclass
class Identity:
    """Result of comparing a base with its record.

    Attributes:
        configuration: A clause about configuration keys that differ; empty if none differs.
        weights: A clause about weights that differ, or may differ; empty if none does.
        compared: What was compared.
        not_compared: What could not be compared, with the reason.
        verified: Whether the base's commit or some of its tensors were compared.
    """

    configuration: str = ""
    weights: str = ""
    compared: list[str] = field(default_factory=list)
    not_compared: list[str] = field(default_factory=list)
    verified: bool = False


def compare_identity(
    recorded: BaseRecord, base: Base, hub: Hub | str | None = None, token: str | bool | None = None
) -> Identity:
    """Compare a base with its record: configuration, commit, and the tensors of its fingerprint.

    Two different commits of one base count as the same only if the hashes of their weight files and the configuration
    values that define the computation are equal.

    Args:
        recorded: Record of the base in training.
        base: The base to check.
        hub: The hub of the base models; used only if two commits differ.
        token: Token for that hub.
    """
    found = Identity()
    _compare_fingerprint(found, recorded, base)
    if recorded.commit is None or base.commit is None:
        found.not_compared.append(f"commit ({'not recorded' if recorded.commit is None else 'not known here'})")
    elif recorded.id is not None and base.id is not None and recorded.id != base.id:
        found.not_compared.append(f"commit (of {base.id}, trained on {recorded.id})")
    elif recorded.commit == base.commit:
        found.compared.append("commit")
        found.verified = True
    else:
        _compare_commits(found, recorded, base, hub, token)
    return found


def _compare_fingerprint(found: Identity, recorded: BaseRecord, base: Base) -> None:
    known = recorded.fingerprint
    if known is None:
        found.not_compared.append("configuration and weights of the base (no fingerprint recorded)")
        return
    compared = compare(known, base.values, base.tensors)
    found.compared.append("configuration")
    if compared.configuration:
        found.configuration = _describe_configuration(compared)
    if compared.tensors:
        found.weights = (
            f"it has the same shapes and other weights: {', '.join(compared.tensors)} of the base differ from those "
            "that the adapter was trained on"
        )
    found.verified = compared.verified
    names = ", ".join(compared.read)
    (found.compared if names else found.not_compared).append(names or "weights of the base (none can be read here)")


def _describe_configuration(found: Comparison) -> str:
    def order(difference: tuple[str, object, object]) -> tuple[bool, str]:
        return difference[0] not in _KNOWN_BY, difference[0]

    told = [f"{key} is {here!r}, was {there!r}" for key, there, here in sorted(found.configuration, key=order)]
    more = f" and {len(told) - _EXAMPLES} more" if len(told) > _EXAMPLES else ""
    return f"the configuration differs: {', '.join(told[:_EXAMPLES])}{more}"


def _compare_commits(
    found: Identity, recorded: BaseRecord, base: Base, hub: Hub | str | None, token: str | bool | None
) -> None:
    assert recorded.commit is not None  # noqa: S101 - narrows a type
    assert base.commit is not None  # noqa: S101 - narrows a type
    name, commits = base.id or recorded.id, (recorded.commit, base.commit)
    if name is None:
        found.not_compared.append("commit (the base has no id)")
        return
    here, there = base.commit[:12], recorded.commit[:12]
    try:
        same = _compare_in_cache(name, commits)
        if same is None:
            same = _compare_on_hub(open_base_hub(hub, token), name, commits)
    except RegistryError as error:
        found.weights = found.weights or (
            f"it is at commit {here}, the adapter was trained at {there}, and whether their weights are the same "
            f"cannot be found out ({error}). Give the base at commit {recorded.commit}"
        )
        return
    if same:
        found.compared.append(f"commit (weight files and configuration of {here} are those of {there})")
        found.verified = True
    elif not found.weights:
        found.weights = (
            f"it is at commit {here}, the adapter was trained at {there}, and their weight files or configurations "
            f"differ. Give the base at commit {recorded.commit}"
        )


def _compare_in_cache(name: str, commits: tuple[str, str]) -> bool | None:
    """Whether two commits have equal weights in huggingface_hub's cache; ``None`` unless both are there as links."""
    from registry.hubs.client import cached_folder

    folders = [cached_folder(name, commit) for commit in commits]
    if folders[0] is None or folders[1] is None:
        return None
    one, other = (_read_links(folder) for folder in folders if folder is not None)
    if not _select_weights(one) or not _select_weights(other):
        return None
    configurations = [_read_values(BaseFiles.in_folder(folder)) for folder in folders if folder is not None]
    return _select_weights(one) == _select_weights(other) and configurations[0] == configurations[1]


def _read_links(folder: Path) -> dict[str, str]:
    """Return the files of a snapshot that link to blobs, with the hashes by which blobs are named."""
    found = {path.name: path.resolve() for path in folder.iterdir() if path.is_symlink()}
    return {name: path.name for name, path in found.items() if path.parent.name == _BLOBS}


def _compare_on_hub(hub: Hub, name: str, commits: tuple[str, str]) -> bool:
    one, other = (hub.hashes(name, commit) for commit in commits)
    if not _select_weights(one) or _select_weights(one) != _select_weights(other):
        return False
    if one.get("config.json") == other.get("config.json"):
        return True
    return _read_values(BaseFiles.on_hub(hub, name, commits[0])) == _read_values(
        BaseFiles.on_hub(hub, name, commits[1])
    )


def _read_values(files: BaseFiles) -> Mapping[str, object]:
    return config_values(files.config().to_dict())


def _select_weights(hashes: Mapping[str, str]) -> dict[str, str]:
    """Return the hashes of a model's weight files: safetensors, or else pickles."""
    for suffix in (".safetensors", ".bin"):
        found = {name: value for name, value in hashes.items() if name.endswith(suffix) and "/" not in name}
        if found:
            return found
    return {}

"""A base model to check against: a model, folder, configuration or id."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from registry.base.classes import config_of, empty_model, find_classes, with_labels
from registry.base.files import BaseFiles, LiveTensors, original_vocabulary
from registry.base.fingerprint import config_values, original_name
from registry.base.places import ends_of
from registry.base.skeleton import skeleton
from registry.base.stored import StoredAdapter
from registry.base.target import Base, Candidate, open_base_hub
from registry.errors import CommitNotFound, UnknownBase
from registry.formats.fields import COMMIT
from registry.formats.manifest import BASE_ID
from registry.formats.references import expand_path, is_path
from registry.formats.tensors import other_tensors

if TYPE_CHECKING:
    from torch import nn
    from transformers import PretrainedConfig

    from registry.hubs.protocol import Hub

__all__ = ["describe_base", "find_candidates"]

_SNAPSHOTS = "snapshots"


def describe_base(base: Any, adapter: StoredAdapter, hub: Hub | str | None, token: str | bool | None) -> Base:
    """Describe a base given as a model, folder, configuration or id.

    Raises:
        UnknownBase: It is none of these.
        HubError: The hub does not provide it.
    """
    from torch import nn

    if isinstance(base, nn.Module):
        return _describe_live(base)
    if is_path(base):
        folder = expand_path(base)
        if not folder.is_dir():
            raise UnknownBase(f"The folder {folder} does not exist")
        name, commit = _find_snapshot(folder)
        return _describe_files(BaseFiles.in_folder(folder), f"the model in {folder}", adapter, name, commit)
    if isinstance(base, str):
        return _describe_on_hub(base, adapter, hub, token)
    if hasattr(base, "to_dict"):
        title = f"a {base.model_type} of this configuration"
        return Base(
            title, lambda: find_candidates(base, adapter), _read_values(base), None, vocabulary=_count_entries(base)
        )
    raise UnknownBase(f"{base!r} is not a base model: give a model, a folder, a configuration or an id")


def _describe_live(model: nn.Module) -> Base:
    config: Any = getattr(model, "config", None)
    name = getattr(config, "_name_or_path", None)
    title = f"this {type(model).__name__}" + (f" ({name})" if name else "")
    hub_id, commit = name if name and BASE_ID.fullmatch(name) else None, getattr(config, "_commit_hash", None)
    if hub_id is None and name:
        # transformers 5.23 leaves _commit_hash unset for a model loaded from a folder.
        hub_id, commit = _find_snapshot(Path(name))
    return Base(
        title,
        lambda: iter([Candidate(None, None, lambda: skeleton(model))]),
        _read_values(config),
        LiveTensors(model),
        vocabulary=original_vocabulary(model),
        id=hub_id,
        commit=commit if isinstance(commit, str) and COMMIT.fullmatch(commit) else None,
    )


def _find_snapshot(folder: Path) -> tuple[str | None, str | None]:
    """Return the id and commit of a folder in huggingface_hub's cache: models--org--name/snapshots/<commit>."""
    found = folder.resolve()
    if found.parent.name != _SNAPSHOTS or not COMMIT.fullmatch(found.name):
        return None, None
    kind, _, name = found.parent.parent.name.partition("--")
    return (name.replace("--", "/"), found.name) if kind == "models" else (None, None)


def _describe_on_hub(text: str, adapter: StoredAdapter, hub: Hub | str | None, token: str | bool | None) -> Base:
    name, _, revision = text.partition("@")
    if BASE_ID.fullmatch(name) is None:
        raise UnknownBase(f"{text!r} is not a base model: give an id such as org/base, or a folder as path object")
    where = open_base_hub(hub, token)
    recorded = adapter.base.commit if name == adapter.base.id else None
    commit = _find_commit(where, name, revision or recorded or "main")
    files = BaseFiles.on_hub(where, name, commit)
    return _describe_files(files, f"{name} at commit {commit[:12]}", adapter, name, commit, local=where.local)


def _find_commit(hub: Hub, name: str, revision: str) -> str:
    if COMMIT.fullmatch(revision):
        return revision
    refs = hub.refs(name)
    commit = refs.branches.get(revision) or refs.tags.get(revision)
    if commit is None:
        raise CommitNotFound(f"{name} has no branch or tag {revision!r}")
    return commit


def _describe_files(
    files: BaseFiles, title: str, adapter: StoredAdapter, name: str | None, commit: str | None, *, local: bool = True
) -> Base:
    config = files.config()
    return Base(
        title,
        lambda: find_candidates(config, adapter),
        _read_values(config),
        files,
        local=local,
        vocabulary=_count_entries(config),
        id=name,
        commit=commit,
    )


def find_candidates(config: PretrainedConfig, adapter: StoredAdapter) -> Iterator[Candidate]:
    """Yield the classes that a base of this configuration may have, each with the adapter's labels and vocabulary."""
    trained = {original_name(name): adapter.tensors[name].shape for name in other_tensors(adapter.tensors)}
    for model_class in find_classes(adapter.class_name, adapter.config.task_type, config):
        fitting = config_of(model_class, config)
        if trained:
            fitting = with_labels(fitting, model_class, trained)
        yield Candidate(model_class, fitting, _defer_empty_model(fitting, model_class, adapter))


def _defer_empty_model(config: PretrainedConfig, model_class: Any, adapter: StoredAdapter) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        model = empty_model(config, model_class)
        entries = _count_entries_needed(config, model, adapter)
        return model if entries is None else empty_model(_resize_vocabulary(config, entries), model_class)

    return make


def _count_entries_needed(config: PretrainedConfig, model: nn.Module, adapter: StoredAdapter) -> int | None:
    """Return the vocabulary that a class must have for an adapter's rows; ``None`` if it is the configuration's."""
    own = _count_entries(config)
    weights = [getattr(end, "weight", None) for end in ends_of(model).values()]
    rows = {int(weight.shape[0]) for weight in weights if weight is not None}
    if own is None or not rows:
        return None
    carried = adapter.vocabulary if adapter.carries_vocabulary else None
    entries = own if carried is None or carried in rows else carried
    # Some classes make more rows than their vocabulary has entries: for prompts, images, codebooks.
    special = max(*rows, own) - own
    entries = max(entries, adapter.config.trained_tokens - special)
    return None if entries == own else entries


def _resize_vocabulary(config: PretrainedConfig, entries: int) -> PretrainedConfig:
    changed = copy.deepcopy(config)
    for part in {id(part): part for part in (changed, changed.get_text_config())}.values():
        if hasattr(part, "vocab_size"):
            part.vocab_size = entries
    return changed


def _count_entries(config: Any) -> int | None:
    size = getattr(config.get_text_config(), "vocab_size", None) if hasattr(config, "get_text_config") else None
    return size if isinstance(size, int) else None


def _read_values(config: Any) -> Mapping[str, object]:
    return config_values(config.to_dict()) if hasattr(config, "to_dict") else {}

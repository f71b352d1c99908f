"""Record the base model that an adapter was trained on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from registry.base.choice import find_candidates
from registry.base.classes import rows_of_embedding
from registry.base.files import BaseFiles, find_cached_folder, find_cached_snapshots, is_hub_id
from registry.base.fingerprint import ROWS, compare, config_values, fingerprint, prints, telling
from registry.base.fitting import choose_candidate
from registry.base.stored import StoredAdapter
from registry.errors import BaseMismatch, HubError, RegistryError, RepositoryNotFound, UnknownBase
from registry.formats.fields import COMMIT
from registry.formats.manifest import BASE_ID, MAX_ALIASES
from registry.formats.records import BaseKind, BaseRecord, Fingerprint

if TYPE_CHECKING:
    from torch import nn

    from registry.formats.adapter_config import AdapterConfig
    from registry.hubs.protocol import Hub

__all__ = ["base_at_hand", "base_of_folder", "base_of_model", "require_known", "with_aliases", "with_given"]

_LAYERS = "num_hidden_layers"


def base_of_model(model: nn.Module, config: AdapterConfig) -> tuple[BaseRecord, BaseKind]:
    """Return record and kind of a base model in memory. The id may be a folder; see `require_known`."""
    settings: Any = getattr(model, "config", None)
    named = [config.base_id, getattr(settings, "_name_or_path", None), getattr(model, "name_or_path", None)]
    name = next((text for text in named if text), None)
    commit = getattr(settings, "_commit_hash", None) or config.fields.get("revision")
    known = fingerprint(model)
    if config.fields.get("layer_replication"):
        # PEFT 0.21.2 writes the number of replicated layers into the base's configuration; its own is not known here.
        known = Fingerprint({key: v for key, v in known.config.items() if key.split(".")[-1] != _LAYERS}, known.tensors)
    if is_hub_id(name) and not _is_commit(commit):
        commit = _find_commit(str(name), commit, known)
    kind = BaseKind(getattr(settings, "model_type", None), type(model).__name__, rows_of_embedding(model))
    return BaseRecord(name, commit if _is_commit(commit) else None, known), kind


def base_of_folder(adapter: StoredAdapter) -> tuple[BaseRecord, BaseKind]:
    """Return record and kind of the base that an adapter folder names, as far as it is found on this machine."""
    config = adapter.config
    name, revision = config.base_id, config.fields.get("revision")
    if name is None:
        return BaseRecord(), BaseKind()
    pinned = _is_commit(revision)
    folder = _find_folder(name, revision)
    record = BaseRecord(name, revision if pinned else None)
    if folder is None:
        return record, BaseKind()
    try:
        kind, found = _read(BaseFiles.in_folder(folder), adapter)
    except RegistryError:
        return record, BaseKind()
    # The cached commit of a branch may differ from the one that the adapter was trained on.
    return (record if is_hub_id(name) and not pinned else BaseRecord(name, record.commit, found)), kind


def base_at_hand(config: AdapterConfig) -> Path | None:
    """Return the folder of the base that a configuration names, if it is certain and on this machine."""
    name, revision = config.base_id, config.fields.get("revision")
    # The cached commit of a branch may differ from the one that the adapter was trained on.
    if name is None or (is_hub_id(name) and not _is_commit(revision)):
        return None
    return _find_folder(name, revision)


def _find_folder(name: str, revision: Any) -> Path | None:
    folder = find_cached_folder(name, revision) if is_hub_id(name) else Path(name)
    return folder if folder is not None and (folder / "config.json").is_file() else None


def _read(files: BaseFiles, adapter: StoredAdapter) -> tuple[BaseKind, Fingerprint]:
    """Return kind and fingerprint of a base model from its files and the adapter's tensors."""
    settings = files.config()
    candidate = choose_candidate(adapter, find_candidates(settings, adapter))
    model = candidate.make_empty()
    found = {}
    for name, _ in telling(model):
        rows = files.rows(name, ROWS)
        shown = None if rows is None else prints(rows)
        if shown is not None:
            found[name] = shown
    kind = BaseKind(settings.model_type, candidate.model_class.__name__, rows_of_embedding(model))
    return kind, Fingerprint(config_values(settings.to_dict()), found)


def with_given(record: BaseRecord, given: str, hub: Hub | None) -> BaseRecord:
    """Return a record for the base that the caller names, as ``org/base`` or ``org/base@revision``, after comparing it.

    If the hub cannot be reached, a given commit is accepted unchecked; without a revision, no commit is recorded.

    Raises:
        UnknownBase: It is not an id, the hub has no such model or revision, or a branch cannot be resolved.
        BaseMismatch: The model under that id is not the one trained on.
    """
    name, _, revision = given.partition("@")
    if BASE_ID.fullmatch(name) is None:
        raise UnknownBase(f"base_model={given!r} is not the id of a model on a hub: give org/name or org/name@revision")
    commit = revision if _is_commit(revision) else None
    if hub is None:
        if commit is None and record.fingerprint is not None:
            commit = _find_commit(name, revision, record.fingerprint)
        if revision and commit is None:
            raise _explain_unresolved(name, revision, "no hub is asked for bases, and the local cache does not tell")
        return BaseRecord(name, commit, record.fingerprint)
    try:
        if commit is None:
            commit = _resolve(hub, name, revision or "main")
        if record.fingerprint is not None:
            _compare(record.fingerprint, BaseFiles.on_hub(hub, name, commit))
    except RepositoryNotFound:
        raise UnknownBase(f"base_model={given!r}: {hub.location} shows no such model to this token") from None
    except HubError as error:
        if revision and commit is None:
            raise _explain_unresolved(name, revision, str(error)) from None
        # The hub cannot be reached.
    return BaseRecord(name, commit, record.fingerprint)


def _explain_unresolved(name: str, revision: str, reason: str) -> UnknownBase:
    return UnknownBase(
        f"{revision!r} of {name} is a branch or a tag, and which commit it stands for cannot be found out ({reason}). "
        f'Say the commit: base_model="{name}@<40 hex digits>"'
    )


def _resolve(hub: Hub, name: str, revision: str) -> str:
    refs = hub.refs(name)
    commit = refs.branches.get(revision) or refs.tags.get(revision)
    if commit is None:
        raise UnknownBase(f"base_model: {name} has no branch or tag {revision!r}")
    return commit


def _compare(recorded: Fingerprint, files: BaseFiles) -> None:
    found = compare(recorded, config_values(files.config().to_dict()), files)
    if found.configuration or found.tensors:
        keys = ", ".join(f"{key} {there!r} there, {here!r} in training" for key, here, there in found.configuration[:3])
        raise BaseMismatch(
            f"base_model={files.name} is not the model that the adapter was trained on: "
            f"{keys or 'its weights differ in ' + ', '.join(found.tensors)}"
        )


def require_known(record: BaseRecord, *, on_hub: bool) -> BaseRecord:
    """Return the base as published: by an id that others can load, or by its fingerprint.

    Raises:
        UnknownBase: It has neither; or it has no id and is published on a hub.
    """
    if is_hub_id(record.id):
        return record
    what = f"the folder {record.id!r}" if record.id else "a model without a name"
    if on_hub:
        raise UnknownBase(
            f"The base model is {what}, which nobody else can load. Say where it is on the Hub: "
            'push_adapter(…, base_model="org/base@revision")'
        )
    if record.fingerprint is None or not record.fingerprint.tensors:
        raise UnknownBase(
            f"The base model is {what}, and cannot be identified from here. Push the model itself, or say where its "
            'base is on the Hub: push_adapter(…, base_model="org/base@revision")'
        )
    return BaseRecord(None, None, record.fingerprint)


def with_aliases(record: BaseRecord, aliases: str | Sequence[str]) -> BaseRecord:
    """Return the base with further ids that `Adapter.load` tries if its own id is gone.

    Raises:
        UnknownBase: An alias is not a model id, there are too many, or the base has no id, or no fingerprint to verify
            the model under an alias.
    """
    given = dict.fromkeys((aliases,) if isinstance(aliases, str) else aliases)
    if not given:
        return record
    wrong = next((name for name in given if not isinstance(name, str) or BASE_ID.fullmatch(name) is None), None)
    if wrong is not None:
        raise UnknownBase(f"base_aliases: {wrong!r} is not the id of a model on a hub: give org/name, without revision")
    if len(given) > MAX_ALIASES:
        raise UnknownBase(f"base_aliases has {len(given)} ids, and may have {MAX_ALIASES}")
    if not is_hub_id(record.id):
        raise UnknownBase('base_aliases are further ids of a base that has one: say base_model="org/base@revision" too')
    if record.fingerprint is None or not record.fingerprint.tensors:
        raise UnknownBase(
            f"base_aliases count only where the base's fingerprint matches, and {record.id} has none here. Push the "
            "model itself, or load the base once so that it is in the local cache, then push"
        )
    return replace(record, aliases=tuple(name for name in given if name != record.id) or None)


def _is_commit(text: object) -> bool:
    return isinstance(text, str) and COMMIT.fullmatch(text) is not None


def _find_commit(name: str, revision: str | None, known: Fingerprint) -> str | None:
    """Find the commit that a model was loaded from by comparing tensors, where transformers does not record it.

    The tensors are compared with the cached commit of the revision if one is named, else with all cached commits, since
    the revision need not have been ``main``. ``None`` if no commit matches, or several with different weight files do.
    """
    named = find_cached_folder(name, revision) if revision else None
    folders = [named] if named is not None else [] if revision else find_cached_snapshots(name)
    matches = [folder for folder in folders if _is_loaded_from(folder, known)]
    if len({_list_weights(folder) for folder in matches}) != 1:
        return None
    main = find_cached_folder(name, None)
    return (main if main in matches else matches[-1]).name if matches else None


def _is_loaded_from(folder: Path, known: Fingerprint) -> bool:
    files = BaseFiles.in_folder(folder)
    try:
        found = compare(known, config_values(files.config().to_dict()), files)
    except RegistryError:
        return False
    return found.verified and not found.configuration


def _list_weights(folder: Path) -> tuple[tuple[str, str], ...]:
    """Return the weight files of a cached commit, each with the blob that it links to."""
    return tuple(sorted((path.name, str(path.resolve())) for path in folder.glob("*.safetensors")))

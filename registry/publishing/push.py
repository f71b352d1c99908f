"""Push a trained adapter as a release."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from packaging.version import Version

from registry.base.record import base_of_model, require_known, with_aliases, with_given
from registry.checks.adapter_files import AdapterFiles
from registry.checks.configuration import changes_base
from registry.checks.serving import check_serving, describe_base, require_servers
from registry.checks.table import enforce
from registry.formats.adapter_config import AdapterConfig
from registry.formats.references import BUMPS, check_name, parse_version, version_text
from registry.formats.tensors import other_tensors
from registry.hubs import open_hub
from registry.hubs.protocol import Hub
from registry.publishing.card import CardFields
from registry.publishing.checks import check_size
from registry.publishing.draft import make_release
from registry.publishing.publish import Draft, Published, publish
from registry.publishing.signer import Signer
from registry.publishing.snapshot import read_config, read_state
from registry.publishing.source import collect, find_adapter_name
from registry.signing.keys import SigningKey

__all__ = ["check_push", "push_adapter"]


def push_adapter(
    source: Any,
    name: str,
    *,
    version: str,
    hub: Hub | str | os.PathLike[str] | None = None,
    token: str | bool | None = None,
    private: bool | None = None,
    base_model: str | None = None,
    base_hub: Hub | str | os.PathLike[str] | None = None,
    base_token: str | bool | None = None,
    base_aliases: str | Sequence[str] = (),
    adapter_name: str | None = None,
    metrics: Mapping[str, float] | None = None,
    training: Mapping[str, Any] | None = None,
    allow: Sequence[str] = (),
    commit_message: str | None = None,
    create_pr: bool = False,
    force: bool = False,
    dry_run: bool = False,
    sign: SigningKey | str | os.PathLike[str] | None = None,
    license: str | None = None,
    datasets: Sequence[str] = (),
    language: str | Sequence[str] | None = None,
    pipeline_tag: str | None = None,
    serve: str | Iterable[str] = (),
) -> Published:
    """Publish an adapter as an immutable version.

    Everything is checked before anything is uploaded. Publishing the same content under the same version again
    succeeds. Foreign files in the repository are neither changed nor part of the release.

    Args:
        source: A `PeftModel`, a Trainer that holds one, an adapter folder, or a Trainer's checkpoint.
        name: ``org/name``; the repository is created if it does not exist.
        version: A version such as ``"1.2.0"``; ``"patch"``, ``"minor"`` or ``"major"`` increments the newest one.
        hub: The registry: ``https://…``, ``file:///…`` or a path; by default ``LORA_REGISTRY``, else the Hugging
            Face Hub.
        token: Token for the registry; by default the one that the user logged in with.
        private: Whether a new repository is private.
        base_model: ``org/base`` or ``org/base@revision``, if the base model has no id or should be recorded under
            another one.
        base_hub: The hub of ``base_model``, to find its commit and compare it; by default the registry, if that is on
            the network.
        base_token: Token for that hub; by default ``token``.
        base_aliases: Further ids of the base, such as a mirror's. If its own id is gone, loading uses the first one
            that exists, and refuses it unless its fingerprint matches.
        adapter_name: Name of the adapter in the model; the active one by default.
        metrics: Results for manifest and card; those of the last evaluation by default.
        training: Further facts about the training for manifest and card, JSON values by name.
        allow: Names of modules, such as ``"lm_head"``, whose tensors may be large although they are not LoRA's.
        commit_message: Commit message.
        create_pr: Open a change request instead of publishing. After it is accepted, the same push publishes.
        force: Publish into a repository that holds a base model, and replace foreign files that have the names of a
            release's files.
        dry_run: Check everything and change nothing: the result's ``changes`` list what would be written, replaced,
            deleted and left.
        sign: Sign the release with this private key: the path of its PEM file, or a `SigningKey` with a certificate or
            a password. Needs ``pip install 'lora-plugins[signing]'``.
        license: For the model card: id of a license, such as ``"apache-2.0"``.
        datasets: For the model card: ids of the training datasets.
        language: For the model card: code of the language, such as ``"en"``, or several.
        pipeline_tag: For the model card: the Hub's task; by default derived from the base's class.
        serve: Servers that the adapter is for, such as ``"vllm"``: refuses an adapter that one of them does not take.

    Raises:
        InvalidReference: The name or the version is malformed.
        UnservedAdapter: A server of ``serve`` does not take it.
        lora_plugins.errors.UnknownServer: ``serve`` has a name that is not that of a server.
        RepositoryConflict: The repository holds a base model, or foreign files with the names of a release's files.
        UnknownBase: The base model is not identified well enough to be found again, or an alias is not an id.
        VersionExists: Other content has been published under this version.
        PublishError: The adapter is unusable, or others published concurrently during every attempt.
        UnsafeFile: A file is malformed or not allowed.
        InvalidKey: The key cannot sign.
        HubError: The registry failed.
    """
    check_name(name)
    fields = CardFields(license, datasets, language, pipeline_tag)
    wanted = version if version in BUMPS else parse_version(version)
    servers = require_servers(serve)
    place, signer = open_hub(hub, token), Signer.of(name, sign)
    bases = _open_bases(place, base_hub, token if base_token is None else base_token)
    token = base_token = None
    with collect(
        source,
        on_hub=not place.local,
        base_model=base_model,
        base_hub=bases,
        base_aliases=base_aliases,
        adapter_name=adapter_name,
        metrics=metrics,
        training=training,
        allow=allow,
    ) as collected:
        described = describe_base(collected.architecture, collected.base)
        check_serving("The adapter", collected.config.fields, collected.tensors, described, servers)

        def draft(chosen: Version, before: Version | None) -> Draft:
            parent = None if before is None else version_text(before)
            manifest, files = make_release(collected, name, version_text(chosen), parent, fields=fields)
            return Draft(manifest, files, signer=signer)

        done = publish(
            place,
            name,
            wanted,
            draft,
            message=commit_message,
            private=private,
            propose=create_pr,
            force=force,
            dry_run=dry_run,
        )
    return done if signer is None or dry_run or create_pr else signer.check(place, done)


def check_push(
    model: Any,
    name: str,
    *,
    version: str,
    hub: Hub | str | os.PathLike[str] | None = None,
    token: str | bool | None = None,
    base_model: str | None = None,
    base_aliases: str | Sequence[str] = (),
    adapter_name: str | None = None,
    allow: Sequence[str] = (),
    serve: str | Iterable[str] = (),
) -> None:
    """Check before training what `push_adapter` checks after it, without asking a hub.

    Not checked is what depends on the training (whether values are finite) and on what others publish meanwhile.

    Args:
        model: The `PeftModel` that will be trained.
        name: ``org/name``.
        version: See `push_adapter`.
        hub: The registry.
        token: Token for the registry.
        base_model: See `push_adapter`.
        base_aliases: See `push_adapter`.
        adapter_name: See `push_adapter`.
        allow: See `push_adapter`.
        serve: See `push_adapter`.

    Raises:
        InvalidReference: The name, the version or the registry is malformed.
        UnservedAdapter: A server of ``serve`` will not take it.
        lora_plugins.errors.UnknownServer: ``serve`` has a name that is not that of a server.
        UnknownBase: The base model is not identified well enough to be found again.
        UnsafeFile: The configuration cannot be published, for example because of an expression that may take forever.
        InvalidAdapter: With this configuration the adapter would have no effect.
        TooLarge: It would hold large tensors other than LoRA's.
    """
    check_name(name)
    if version not in BUMPS:
        parse_version(version)
    servers, place = require_servers(serve), open_hub(hub, token)
    adapter = adapter_name or find_adapter_name(model)
    state = read_state(model, adapter)
    config = read_config(model, adapter)
    enforce(AdapterFiles(Path(), given={"config": config}), "push", ("configuration",))
    sizes = {key: tensor.numel() * tensor.element_size() for key, tensor in state.items()}
    check_size({key: sizes[key] for key in other_tensors(sizes)}, allow, sum(sizes.values()))
    base, kind = base_of_model(model.get_base_model(), config)
    check_serving("The adapter", _describe_saved(config), sizes, describe_base(kind, base), servers)
    if base_model is not None:
        base = with_given(base, base_model.partition("@")[0], None)
    with_aliases(require_known(base, on_hub=not place.local), base_aliases)


def _describe_saved(config: AdapterConfig) -> Mapping[str, Any]:
    """Return the fields that a push will publish: it makes a plain LoRA of an initialization that changed the base."""
    fields = config.fields
    if not changes_base(fields.get("init_lora_weights")):
        return fields
    ranks = {name: 2 * rank for name, rank in (fields.get("rank_pattern") or {}).items()}
    return {**fields, "init_lora_weights": True, "r": 2 * config.rank, "rank_pattern": ranks}


def _open_bases(place: Hub, given: Hub | str | os.PathLike[str] | None, token: str | bool | None) -> Hub | None:
    """Open the hub of the base models; ``None`` when pushing to a folder or an object store, unless one is given."""
    if given is not None:
        return open_hub(given, token)
    return open_hub(place.location, token) if place.location.startswith(("http://", "https://")) else None

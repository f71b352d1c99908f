"""Pushing: from a trained adapter to a release."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

from packaging.version import Version

from registry.base.record import base_of_model, require_known, with_aliases, with_given
from registry.formats.references import BUMPS, check_name, parse_version, version_text
from registry.formats.tensors import other_tensors
from registry.hubs import open_hub
from registry.hubs.protocol import Hub
from registry.publishing.card import CardFields
from registry.publishing.checks import check_size, check_use
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
) -> Published:
    """Publish an adapter as a version that never changes again.

    Everything is checked before anything is uploaded. The same content under the same version again is success. Files
    that no release put into the repository are neither changed nor part of the release.

    Args:
        source: A `PeftModel`, a Trainer that holds one, an adapter folder, or a Trainer's checkpoint.
        name: ``org/name``; the repository is made if there is none.
        version: A version such as ``"1.2.0"``; ``"patch"``, ``"minor"`` or ``"major"`` counts from the newest.
        hub: Which registry: ``https://…``, ``file:///…`` or a path; by default ``LORA_REGISTRY``, else the Hugging
            Face Hub.
        token: For the registry; by default the one that the user logged in with.
        private: Whether a new repository is private.
        base_model: ``org/base`` or ``org/base@revision``, where the base model has no id or another one.
        base_hub: Where ``base_model`` is, to find its commit and compare it; by default the registry, if that is a hub.
        base_token: For that hub; by default ``token``.
        base_aliases: Other ids of the base, such as a mirror's. If its own id is gone, loading takes the first of these
            that is there, and refuses it unless its fingerprint is the recorded one.
        adapter_name: Which adapter of a model; the active one by default.
        metrics: Results for manifest and card; those of the last evaluation by default.
        training: More facts about the training for manifest and card, JSON values by name.
        allow: Names of modules whose tensors may be large although they are not LoRA's, such as ``"lm_head"``.
        commit_message: For the history of the repository.
        create_pr: Open a change request instead of publishing. Pushing the same again once it is accepted publishes.
        force: Publish into a repository that holds a base model, and replace files of others that have the names of a
            release's files.
        dry_run: Check everything and change nothing: the result's ``changes`` say what would be written, replaced,
            deleted and left.
        sign: Sign the release with this private key: the path of its PEM file, or a `SigningKey` that has a
            certificate or a password. Needs ``pip install 'lora-plugins[signing]'``.
        license: For the model card: id of a license, such as ``"apache-2.0"``.
        datasets: For the model card: ids of the training datasets.
        language: For the model card: code of the language, such as ``"en"``, or several.
        pipeline_tag: For the model card: the Hub's task; by default the one that follows from the base's class.

    Raises:
        InvalidReference: The name or the version is malformed.
        RepositoryConflict: The repository holds a base model, or files of others where those of a release have to go.
        UnknownBase: Nobody could find the base model, or an alias is not an id.
        VersionExists: Other content has been published under this version.
        PublishError: The adapter would be of no use, or others publish at the same time, again and again.
        UnsafeFile: A file is not what it should be.
        InvalidKey: The key cannot sign.
        HubError: The registry didn't do what it was asked for.
    """
    check_name(name)
    fields = CardFields(license, datasets, language, pipeline_tag)
    wanted = version if version in BUMPS else parse_version(version)
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
) -> None:
    """Refuse before a training what `push_adapter` would refuse after it; no hub is asked.

    What only the training decides is not checked: whether values are finite, and what others publish meanwhile.

    Args:
        model: The `PeftModel` that will be trained.
        name: ``org/name``.
        version: See `push_adapter`.
        hub: Which registry.
        token: For the registry.
        base_model: See `push_adapter`.
        base_aliases: See `push_adapter`.
        adapter_name: See `push_adapter`.
        allow: See `push_adapter`.

    Raises:
        InvalidReference: The name, the version or the registry is malformed.
        UnknownBase: Nobody could find the base model.
        UnsafeFile: The configuration can't be published, for example because it has an expression that takes forever.
        InvalidAdapter: With this configuration the adapter would change nothing.
        TooLarge: It would hold large tensors that are not LoRA's.
    """
    check_name(name)
    if version not in BUMPS:
        parse_version(version)
    place = open_hub(hub, token)
    adapter = adapter_name or find_adapter_name(model)
    state = read_state(model, adapter)
    config = read_config(model, adapter)
    check_use(config)
    sizes = {key: tensor.numel() * tensor.element_size() for key, tensor in state.items()}
    check_size({key: sizes[key] for key in other_tensors(sizes)}, allow, sum(sizes.values()))
    base, _ = base_of_model(model.get_base_model(), config)
    if base_model is not None:
        base = with_given(base, base_model.partition("@")[0], None)
    with_aliases(require_known(base, on_hub=not place.local), base_aliases)


def _open_bases(place: Hub, given: Hub | str | os.PathLike[str] | None, token: str | bool | None) -> Hub | None:
    """Where base models are; pushing to a folder asks nobody, unless it is said whom."""
    if given is not None:
        return open_hub(given, token)
    return None if place.local else open_hub(place.location, token)

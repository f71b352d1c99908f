"""Adopt adapters: publish them as versions, with where they are from."""

from __future__ import annotations

import os
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass

from packaging.version import Version

from registry.adopting.prepare import Prepared, prepare
from registry.adopting.sources import Source, find_sources, is_local
from registry.disk.machine import temporary_folder
from registry.errors import (
    AdapterWarning,
    HubUnavailable,
    InvalidAdapter,
    InvalidReference,
    MachineError,
    RegistryError,
    RepositoryNotFound,
    UnknownBase,
)
from registry.formats.references import BUMPS, check_name, parse_version, version_text
from registry.hubs import open_hub
from registry.hubs.huggingface import HuggingFaceHub
from registry.hubs.protocol import MAIN, Hub
from registry.publishing.collected import Collected
from registry.publishing.draft import make_release
from registry.publishing.publish import Draft, Published, publish
from registry.publishing.signer import Signer
from registry.publishing.source import collect
from registry.signing.keys import SigningKey

__all__ = ["Adopted", "adopt"]


@dataclass(frozen=True)
class Adopted:
    """An adapter that was adopted.

    Attributes:
        source: What it was called.
        published: The release.
        renamed: New names of tensors by the old ones.
        dropped: Tensors that were left out.
        changes: What was changed, one clause each.
        license: The licence of the release; ``None`` if the original states none and none was given.
    """

    source: str
    published: Published
    renamed: Mapping[str, str]
    dropped: tuple[str, ...]
    changes: tuple[str, ...]
    license: str | None


@dataclass(frozen=True)
class _Ready:
    """An adapter that has passed every check."""

    name: str
    prepared: Prepared
    collected: Collected


def adopt(
    source: str | os.PathLike[str],
    name: str,
    *,
    version: str,
    hub: Hub | str | os.PathLike[str] | None = None,
    token: str | bool | None = None,
    source_hub: Hub | str | os.PathLike[str] | None = None,
    source_token: str | bool | None = None,
    every: bool = False,
    skip: Sequence[str] = (),
    from_pickle: bool = False,
    base_model: str | None = None,
    base_hub: Hub | str | os.PathLike[str] | None = None,
    license: str | None = None,
    metrics: Mapping[str, float] | None = None,
    allow: Sequence[str] = (),
    private: bool | None = None,
    force: bool = False,
    dry_run: bool = False,
    sign: SigningKey | str | os.PathLike[str] | None = None,
) -> list[Adopted]:
    """Publish an adapter that was saved by any tool as a version.

    The adapter is brought into the form that PEFT writes today: names of older layouts and of wrappers are rewritten, a
    pickle is converted if ``from_pickle`` is set. Manifest and card say where it is from; licence and card text of the
    original are carried over, as text. Everything is checked before anything is uploaded; of several adapters, all or
    none are published.

    Args:
        source: A reference as for `pull_adapter` (``org/name`` is what main holds), a folder, a Trainer's checkpoint,
            or a folder of huggingface_hub's cache.
        name: ``org/name`` of the release.
        version: See `push_adapter`.
        hub: The registry to publish in.
        token: Token for it.
        source_hub: The registry of a reference; by default ``hub`` if that is on the network, else the Hugging Face
            Hub.
        source_token: Token for that registry; by default ``token`` if it is the same one.
        every: Adopt all adapters in and below the source. Each gets a name of its own: ``org/name-<folder>``.
        skip: Folders that are left out then.
        from_pickle: Convert weights in a pickle, in a process of its own with limits.
        base_model: See `push_adapter`.
        base_hub: See `push_adapter`.
        license: Id of the licence, if the card of the original states none or another one.
        metrics: Results for manifest and card.
        allow: See `push_adapter`.
        private: Whether a new repository is private.
        force: See `push_adapter`. Publishing into the adapter's own repository needs no force.
        dry_run: Check everything and change nothing.
        sign: See `push_adapter`.

    Raises:
        NotAdapter: The source holds no adapter, or a published release.
        InvalidAdapter: An adapter is unusable; nothing was uploaded.
        UnsafeFile: A file is malformed or malicious, or the weights are a pickle.
        UnknownBase: The base model is not identified well enough to be found again.
        RepositoryConflict: The repository holds a base model, or others' files with the names of a release's files.
        VersionExists: Other content has been published under this version.
        HubError: A registry failed.
    """
    check_name(name)
    wanted = version if version in BUMPS else parse_version(version)
    place = open_hub(hub, token)
    origin = None if is_local(source) else _open_source(place, source_hub, token, source_token)
    bases = open_hub(base_hub, token) if base_hub is not None else None if place.local else place
    token = source_token = None
    try:
        sources = find_sources(source, origin, every=every)
    except (HubUnavailable, RepositoryNotFound) as error:
        if source_hub is None and place.local:
            hint = f"{source} was looked up on the Hugging Face Hub: --from-hub (source_hub=) names another registry"
            raise type(error)(f"{error}. {hint}") from error
        raise
    found = [each for each in sources if each.folder not in skip]
    if not found:
        raise InvalidAdapter(f"{source}: skip leaves out every adapter")
    names = _name_all(name, found) if every else {found[0].folder: name}
    options = {
        "on_hub": not place.local,
        "base_model": base_model,
        "base_hub": bases,
        "metrics": metrics,
        "allow": allow,
    }
    with ExitStack() as stack:
        ready = _prepare_all(found, names, stack, from_pickle=from_pickle, options=options)
        return list(
            _publish_all(
                ready,
                place,
                wanted,
                license_=license,
                private=private,
                force=force,
                dry_run=dry_run,
                origin=origin,
                key=sign,
            )
        )


def _open_source(
    place: Hub, source_hub: Hub | str | os.PathLike[str] | None, token: str | bool | None, given: str | bool | None
) -> Hub:
    if source_hub is not None:
        return open_hub(source_hub, given)
    if not place.local:
        return place if given is None else open_hub(place.location, given)
    return HuggingFaceHub(None, token if given is None else given)


def _name_all(name: str, found: Sequence[Source]) -> dict[str, str]:
    """Return the name of each adapter: the given one at the top, else with the folder at its end.

    Raises:
        InvalidReference: Two adapters would get the same name, or one is not valid.
    """
    names = {each.folder: _derive_name(name, each.folder) for each in found}
    twice = sorted(folder for folder, one in names.items() if list(names.values()).count(one) > 1)
    if twice:
        raise InvalidReference(
            f"The adapters in {', '.join(twice)} would have the same name, {names[twice[0]]}: adopt them one by one"
        )
    return names


def _derive_name(name: str, folder: str) -> str:
    if not folder:
        return name
    plain = re.sub(r"[-.]*[^A-Za-z0-9_.-]+[-.]*|--+|\.\.+", "-", folder, flags=re.ASCII).strip("-.")
    return check_name(f"{name}-{plain}")


def _prepare_all(
    found: Sequence[Source],
    names: Mapping[str, str],
    stack: ExitStack,
    *,
    from_pickle: bool,
    options: Mapping[str, object],
) -> list[_Ready]:
    """Check all adapters.

    Raises:
        InvalidAdapter: Of several, some cannot be adopted; the message says why, for each.
    """
    ready, reasons = [], {}
    for source in found:
        try:
            ready.append(_prepare_one(source, names[source.folder], stack, from_pickle=from_pickle, options=options))
        except MachineError:
            raise
        except RegistryError as error:
            if len(found) == 1:
                raise
            reasons[source.folder] = error
    if reasons:
        told = "; ".join(f"{folder or 'at the top'}: {error}" for folder, error in reasons.items())
        raise InvalidAdapter(
            f"{len(reasons)} of {len(found)} adapters cannot be adopted, and nothing was uploaded: {told}. To adopt "
            f"the others, leave these out: skip={sorted(reasons)!r} (--skip)"
        )
    return ready


def _prepare_one(
    source: Source, name: str, stack: ExitStack, *, from_pickle: bool, options: Mapping[str, object]
) -> _Ready:
    folder = stack.enter_context(temporary_folder())
    prepared = prepare(source, folder, from_pickle=from_pickle)
    if prepared.rest:
        warnings.warn(
            f"{source.title} holds {', '.join(prepared.rest)}, which a release does not: only what PEFT loads is "
            "published. If these were trained, the published adapter is not what was trained",
            AdapterWarning,
            stacklevel=6,
        )
    try:
        collected = stack.enter_context(collect(folder, training=prepared.facts(), **options))  # type: ignore[arg-type]
    except RegistryError as error:
        raise _explain(error, source, folder) from None
    return _Ready(name, prepared, collected)


def _explain(error: RegistryError, source: Source, folder: os.PathLike[str]) -> RegistryError:
    """Return an error that names the source instead of the folder of its copy, and what can be passed here."""
    text = Exception.__str__(error).replace(str(folder), source.title).replace("push_adapter(", "adopt(")
    if isinstance(error, UnknownBase) and "base_model=" not in text:
        text = f"{text}. Say which it is: base_model= (--base-model)"
    return type(error)(text if source.title in text else f"{source.title}: {text}")


def _publish_all(
    ready: Sequence[_Ready],
    place: Hub,
    version: Version | str,
    *,
    license_: str | None,
    private: bool | None,
    force: bool,
    dry_run: bool,
    origin: Hub | None,
    key: SigningKey | str | os.PathLike[str] | None,
) -> Iterator[Adopted]:
    signers = {each.name: Signer.of(each.name, key) for each in ready}

    def release(each: _Ready, *, dry: bool) -> Published:
        own = force or _is_own(each, place, origin)
        message = f"Adopted from {each.prepared.source.origin.get('repository', 'a folder')}"

        def draft(chosen: Version, before: Version | None) -> Draft:
            fields = each.prepared.original.fields(license_, each.prepared.source.origin, each.prepared.changes)
            parent = None if before is None else version_text(before)
            manifest, files = make_release(each.collected, each.name, version_text(chosen), parent, fields=fields)
            return Draft(manifest, files, signer=signers[each.name])

        return publish(place, each.name, version, draft, message=message, private=private, force=own, dry_run=dry)

    if len(ready) > 1 and not dry_run:
        for each in ready:
            release(each, dry=True)  # one that would be refused stops all of them
    for each in ready:
        done, signer = release(each, dry=dry_run), signers[each.name]
        if signer is not None and not dry_run:
            done = signer.check(place, done)
        renames, original = each.prepared.renames, each.prepared.original
        yield Adopted(
            each.prepared.source.title,
            done,
            dict(renames.renamed),
            renames.dropped,
            each.prepared.changes,
            license_ or original.license,
        )


def _is_own(each: _Ready, place: Hub, origin: Hub | None) -> bool:
    """Whether the adapter at the head of a repository is published in that repository, in place of its files."""
    source = each.prepared.source
    if origin is None or origin.location != place.location or source.folder:
        return False
    return (
        source.origin.get("repository") == each.name
        and place.refs(each.name).branches.get(MAIN) == source.origin["commit"]
    )

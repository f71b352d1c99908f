"""Copy releases from one registry to another, byte by byte."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

from packaging.version import Version

from registry.catalog.index import read_index
from registry.catalog.state import Move, State, change_state
from registry.errors import UnknownBase, VersionExists
from registry.formats.references import Reference, versions_in
from registry.hubs import open_hub
from registry.hubs.protocol import Hub, Refs
from registry.publishing.publish import Draft, Published, publish
from registry.pulling.cache import Cache
from registry.pulling.fetch import Fetched, Fetcher
from registry.pulling.lockfile import Lock
from registry.pulling.signatures import SignatureRule
from registry.signing.keys import PathOrPaths
from registry.signing.signatures import read_signature
from registry.upkeep.plain_copy import copy_plain

__all__ = ["mirror"]


def mirror(
    reference: str,
    target: Hub | str | os.PathLike[str],
    *,
    hub: Hub | str | os.PathLike[str] | None = None,
    token: str | bool | None = None,
    target_token: str | bool | None = None,
    private: bool | None = None,
    force: bool = False,
    cache_dir: str | os.PathLike[str] | None = None,
    require_signature: PathOrPaths | None = None,
) -> list[Published]:
    """Copy releases to another registry, with signatures, withdrawals, aliases, notes and tags.

    Args:
        reference: ``org/name`` for all its releases; with a version, a range, an alias, a commit or a branch, for one.
            An unversioned adapter is copied to the branch ``copy-<commit>`` of the target.
        target: Registry to copy to.
        hub: Registry to copy from.
        token: Token for ``hub``.
        target_token: Token for ``target``.
        private: Whether a new repository is private.
        force: See `push_adapter`.
        cache_dir: The cache that releases pass through.
        require_signature: See `pull_adapter`; a release without it is not copied.

    Returns:
        The releases, oldest version first; ``created`` says which were not there before.

    Raises:
        VersionExists: The target has another release under one of the versions.
        RepositoryConflict: The target has others' files under the names of a release's files.
        SignatureError: A release lacks the required signature.
        UnknownBase: The target is a hub, and an adapter's base model has no id there.
    """
    parsed = Reference.parse(reference)
    source, token = open_hub(hub, token), None
    destination, target_token = open_hub(target, target_token), None
    index = read_index(source, parsed.name)
    wanted = index.releases() if parsed == Reference(parsed.name) else [index.resolve(parsed, unversioned=True)]
    cache = Cache(cache_dir)
    rule = SignatureRule.choose(require_signature, cache)
    fetcher = Fetcher(source, cache, Lock(None), quiet=True, signature=rule)
    copied = []
    for release in wanted:
        if release.unversioned:
            found = fetcher.fetch(Reference(parsed.name, commit=release.commit, folder=release.folder))
            return [copy_plain(found, destination, private)]
        fetched = fetcher.fetch(Reference(parsed.name, version=Version(release.version)))
        copied.append(
            _copy(fetched, read_signature(source, parsed.name, release.commit), destination, private, force=force)
        )
    _copy_state(destination, parsed.name, index.state)
    return copied


def _copy(fetched: Fetched, signature: bytes | None, target: Hub, private: bool | None, *, force: bool) -> Published:
    release, manifest = fetched.release, fetched.manifest
    if not target.local and manifest.base.id is None:
        raise UnknownBase(
            f"{release}: its base model is known by its fingerprint only, and nobody could find it from "
            f"{target.location}. Push the adapter there with base_model="
        )
    files: dict[str, Path | bytes] = {name: fetched.path / name for name in manifest.files}
    version = Version(release.version)
    draft = Draft(manifest, files, fixed=True, signer=None if signature is None else lambda _: signature)
    done = publish(target, release.name, version, lambda *_: draft, private=private, force=force)
    if done.manifest.digest != manifest.digest:
        raise VersionExists(
            f"{release} stands on {target.location} with the same weights and another manifest: it was pushed there, "
            "not copied"
        )
    return done


def _copy_state(target: Hub, name: str, source: State) -> None:
    """Copy withdrawals and aliases of the versions that the target has."""

    def change(state: State, refs: Refs) -> State:
        there = {str(tag.removeprefix("v")) for tag in versions_in(refs.tags).values()}
        yanked = {version: yank for version, yank in source.yanked.items() if version in there}
        aliases: dict[str, tuple[Move, ...]] = dict(state.aliases)
        for alias in source.aliases:
            version = source.version_of(alias)
            if version in there and state.version_of(alias) != version:
                aliases[alias] = (*aliases.get(alias, ()), source.aliases[alias][-1])
        notes = {**state.notes, **{version: note for version, note in source.notes.items() if version in there}}
        tags = {**state.tags, **{version: found for version, found in source.tags.items() if version in there}}
        return replace(state, yanked={**state.yanked, **yanked}, aliases=aliases, notes=notes, tags=tags)

    change_state(target, name, change, "Copied")

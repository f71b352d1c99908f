"""Aliases such as ``champion``: one version at a time, with history."""

from __future__ import annotations

import os
from collections.abc import Mapping

from packaging.version import Version

from registry.catalog.index import Index, Manifests, Release, index_of, read_index
from registry.catalog.state import Move, State, change_state, now, read_state
from registry.errors import AliasMoved, AliasNotFound, InvalidReference
from registry.formats.references import Reference, check_alias, check_name, parse_version, version_text
from registry.hubs import open_hub
from registry.hubs.protocol import Hub, Refs

__all__ = ["ANY", "aliases", "remove_alias", "set_alias"]

#: For ``expect=``: the version that the alias points to when the call begins.
ANY = "any"


def set_alias(
    reference: str,
    alias: str,
    *,
    expect: str | None = ANY,
    hub: Hub | str | os.PathLike[str] | None = None,
    token: str | bool | None = None,
) -> Release:
    """Point an alias at the release that a reference resolves to now.

    The alias moves only if it points to the expected version, so of two concurrent callers one gets an error.

    Args:
        reference: The release, for example ``org/name@1.2.0``.
        alias: The name.
        expect: The version that the alias must point to; ``None`` if it must be new. By default, the version that it
            points to when the call begins.
        hub: The registry.
        token: For the registry.

    Raises:
        AliasMoved: It points to another version than expected.
        InvalidReference: The alias is invalid.
        VersionNotFound: No release matches the reference.
    """
    parsed = Reference.parse(reference)
    place, token = open_hub(hub, token), None
    release = read_index(place, parsed.name).resolve(parsed)
    _move(place, parsed.name, check_alias(alias), release.version, expect)
    return read_index(place, parsed.name).release(parse_version(release.version))


def remove_alias(
    name: str,
    alias: str,
    *,
    expect: str | None = ANY,
    hub: Hub | str | os.PathLike[str] | None = None,
    token: str | bool | None = None,
) -> None:
    """Remove an alias; its history stays.

    Raises:
        AliasNotFound: The alias does not exist.
        AliasMoved: It points to another version than expected.
    """
    place, token = open_hub(hub, token), None
    _move(place, check_name(name), check_alias(alias), None, expect)


def aliases(
    name: str, *, hub: Hub | str | os.PathLike[str] | None = None, token: str | bool | None = None
) -> Mapping[str, tuple[Move, ...]]:
    """Return all aliases of an adapter, each with the versions it pointed to, oldest first."""
    place, token = open_hub(hub, token), None
    return read_state(place, check_name(name), place.refs(name)).aliases


def _move(hub: Hub, name: str, alias: str, version: str | None, expect: str | None) -> None:
    # Without ``expect``, the version found on the first read is the expected one.
    expected: list[str | None] = [] if expect == ANY else [_normalize(expect)]
    manifests = Manifests(hub, name)

    def change(state: State, refs: Refs) -> State:
        standing = state.version_of(alias)
        if not expected:
            expected.append(standing)
        if standing == version and (standing is not None or expected[0] is not None):
            return state
        if standing is None and version is None:
            raise AliasNotFound(f"{name} has no alias {alias}")
        if standing != expected[0]:
            raise AliasMoved(
                f"{name}@{alias} stands for {standing or 'nothing'}, not for {expected[0] or 'nothing'} as expected: "
                "somebody else has moved it"
            )
        if version is not None and not _is_there(index_of(name, refs, state, manifests), parse_version(version)):
            raise InvalidReference(f"{name} has no version {version} any more")
        moves = (*state.aliases.get(alias, ()), Move(version, now()))
        return State(state.yanked, {**state.aliases, alias: moves})

    change_state(hub, name, change, f"{alias} is {version}" if version else f"Remove {alias}")


def _is_there(index: Index, version: Version) -> bool:
    return version in index.versions and index.is_release(version)


def _normalize(expect: str | None) -> str | None:
    return None if expect is None else version_text(parse_version(expect))

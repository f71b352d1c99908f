"""List adapters and versions, and show their manifests."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass

from registry.catalog.index import Release, read_index, read_manifest
from registry.errors import HubUnavailable, MachineError, RegistryError
from registry.formats.manifest import Manifest
from registry.formats.references import Reference, check_name
from registry.hubs import open_hub
from registry.hubs.http.deadline import OPERATION, Deadline, limit_operation
from registry.hubs.protocol import Hub

__all__ = ["Described", "foreign_tags", "list_adapters", "show", "versions"]


@dataclass(frozen=True)
class Described:
    """A release with its manifest; its files are not downloaded."""

    release: Release
    manifest: Manifest

    @property
    def name(self) -> str:
        """``org/name``."""
        return self.release.name

    @property
    def version(self) -> str:
        """The version."""
        return self.release.version


def versions(
    name: str, *, hub: Hub | str | os.PathLike[str] | None = None, token: str | bool | None = None
) -> list[Release]:
    """Return all releases of an adapter, oldest version first; withdrawn ones are included, foreign tags are not.

    Raises:
        RepositoryNotFound: There is no such adapter.
    """
    place, token = open_hub(hub, token), None
    with limit_operation():
        return read_index(place, check_name(name)).releases()


def foreign_tags(
    name: str, *, hub: Hub | str | os.PathLike[str] | None = None, token: str | bool | None = None
) -> dict[str, str]:
    """Return the version tags of a repository whose commits hold no release, with these commits.

    Raises:
        RepositoryNotFound: There is no such adapter.
    """
    place, token = open_hub(hub, token), None
    with limit_operation():
        return read_index(place, check_name(name)).foreign_tags()


def show(
    reference: str, *, hub: Hub | str | os.PathLike[str] | None = None, token: str | bool | None = None
) -> Described:
    """Return a release and its manifest.

    Raises:
        VersionNotFound: No release matches the reference.
    """
    place, parsed, token = open_hub(hub, token), Reference.parse(reference), None
    with limit_operation():
        index = read_index(place, parsed.name)
        release = index.resolve(parsed)
        return Described(release, read_manifest(place, release, index.manifests))


def list_adapters(
    base: str | None = None,
    *,
    hub: Hub | str | os.PathLike[str] | None = None,
    token: str | bool | None = None,
) -> Iterator[Described]:
    """Yield the newest stable release of each adapter in a registry.

    Args:
        base: Id of a base model; only its adapters are listed.
        hub: The registry.
        token: For the registry.
    """
    place, token = open_hub(hub, token), None
    with limit_operation():
        names = list(place.names(base))
    patience = Deadline(OPERATION)
    for name in names:
        found = _find_newest(place, name)
        if found is not None and (base is None or found.manifest.base.id == base):
            yield found
            patience = Deadline(OPERATION)
        elif patience.passed:
            raise HubUnavailable(f"The list of {place.location} has brought no adapter for {OPERATION:.0f} seconds")


def _find_newest(place: Hub, name: str) -> Described | None:
    try:
        with limit_operation():
            index = read_index(place, check_name(name))
            release = index.newest()
            return None if release is None else Described(release, read_manifest(place, release, index.manifests))
    except (HubUnavailable, MachineError):
        raise
    except RegistryError:
        return None  # a foreign repository, or one deleted meanwhile
